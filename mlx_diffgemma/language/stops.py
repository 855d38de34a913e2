"""Stop strings: the text ends before the first of them, also where it is split between pieces."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PromptError


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return stop strings as a tuple; a single string counts as one.

    Raises:
      PromptError: if one is empty or not a string.
    """
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) for text in stop):
        raise PromptError(f"stop must be a string or a list of strings, got {stop!r}")
    if "" in stop:
        raise PromptError("a stop string is empty; every answer would end before its first letter")
    return tuple(stop)


class Stops:
    """Finds the stop string that is complete first, or the longer of two that end together. Text
    that may still become a stop string is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Return the text that is certainly before any stop string; nothing once one was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # (end, start) of each string's first occurrence.
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
        """Return the text that was held back, since no more follows."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Return how many characters at the end of a text may begin a stop string."""
        longest = min(len(text), max(map(len, self._strings), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(string.startswith(text[-count:]) for string in self._strings):
                return count
        return 0
