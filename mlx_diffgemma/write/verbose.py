"""The output of `verbose=True` on stdout, in mlx-lm's format. Nothing else in the library
prints."""

from __future__ import annotations

import time

import mlx.core as mx

from ..events import Event, Finished, PrefillDone, Text, ToolCall

_RULE = "=" * 10


class Printed:
    """Prints the answer to one prompt while it is written, then the run's numbers."""

    def __init__(self) -> None:
        self._numbers = _Numbers()
        self._has_text = False

    def observe(self, event: Event) -> None:
        """Print the text that an event adds."""
        self._numbers.observe(event)
        if isinstance(event, PrefillDone):
            print(_RULE)
        elif isinstance(event, Text) and event.channel == "answer":
            self._has_text = True
            print(event.piece, end="", flush=True)
        elif isinstance(event, ToolCall):
            self._has_text = True
            print(f"[tool call] {event.line()}", flush=True)
        elif isinstance(event, Finished):
            print(f"\n{_RULE}")
            if not self._has_text:
                print("No text generated for this prompt")
                return
            for line in self._numbers.lines():
                print(line)


class PrintedBatch:
    """Prints how many prompts of a batch are done, then the run's numbers."""

    def __init__(self, prompts: int) -> None:
        self._numbers = _Numbers()
        self._prompts = prompts
        self._say(f"Finished processing 0/{prompts} ...", end="\r")

    def observe(self, event: Event, done: int) -> None:
        """Print an event's progress; `done` prompts have their answers."""
        self._numbers.observe(event)
        if not isinstance(event, PrefillDone) and done < self._prompts:
            self._say(f"Finished processing {done}/{self._prompts} ...", end="\r")

    def conclude(self) -> None:
        """Print the run's numbers."""
        self._say(f"Finished processing {self._prompts}/{self._prompts}")
        for line in self._numbers.lines():
            self._say(line)

    @staticmethod
    def _say(line: str, end: str = "\n") -> None:
        print(f"[batch_generate] {line}", end=end, flush=True)


class _Numbers:
    """Tokens and seconds of a run; the listener's time counts too. Rows read their prompts
    together, so the longest time is that of all."""

    def __init__(self) -> None:
        self._prompt_tokens = self._new_tokens = 0
        self._prefill_seconds = self._seconds = self._started = 0.0

    def observe(self, event: Event) -> None:
        if isinstance(event, PrefillDone):
            self._prompt_tokens += event.prompt_tokens
            self._prefill_seconds = max(self._prefill_seconds, event.seconds)
            self._started = self._started or time.perf_counter()
        elif isinstance(event, Finished):
            self._new_tokens += event.new_tokens
            self._seconds = time.perf_counter() - self._started

    def lines(self) -> list[str]:
        prompt_speed = self._prompt_tokens / max(self._prefill_seconds, 1e-9)
        speed = self._new_tokens / max(self._seconds, 1e-9)
        return [
            f"Prompt: {self._prompt_tokens} tokens, {prompt_speed:.3f} tokens-per-sec",
            f"Generation: {self._new_tokens} tokens, {speed:.3f} tokens-per-sec",
            f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB",
        ]
