"""Stop strings: text ends before the first of them, however it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PromptError


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return stop strings as a tuple; a string alone is one of them.

    Raises:
      PromptError: if one is empty or no text.
    """
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) for text in stop):
        raise PromptError(f"stop must be a string or a list of strings, got {stop!r}")
    if "" in stop:
        raise PromptError("a stop string is empty; every answer would end before its first letter")
    return tuple(stop)


class Stops:
    """Finds the stop string that is complete first; of two that end together, the longer one. What
    may still become one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Return what is certain to stand before a stop string; nothing once one was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # (end, start) of each string's first place.
        places = [
            (start + len(string), start)
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        if places:
            stop, start = min(places)
            self.found, self._held = text[start:stop], ""
            return text[:start]
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """How many characters at the end of a text begin a stop string."""
        longest = min(len(text), max(map(len, self._strings), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(string.startswith(text[-count:]) for string in self._strings):
                return count
        return 0
