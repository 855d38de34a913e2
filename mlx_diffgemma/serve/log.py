"""One line for each request: method, route, status, tokens, steps, milliseconds. Never its text,
and never a key."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .runs import Usage


@dataclass(slots=True)
class Tally:
    """What is known of a request when it ends."""

    method: str
    path: str
    status: int = 0  # 0: the client went away before there was one
    usage: Usage | None = None
    note: str = ""  # such as that the client went away
    is_quiet: bool = False  # a file of the page, which needs no line
    started: float = field(default_factory=time.perf_counter)

    def line(self) -> str:
        """Return the line of the log."""
        status = str(self.status or "-")
        words = [self.method, self.path, status]
        if self.usage is not None:
            words.append(f"{self.usage.prompt_tokens}+{self.usage.completion_tokens} tokens")
            words.append(f"{self.usage.steps} steps")
        words.append(f"{1e3 * (time.perf_counter() - self.started):.0f} ms")
        if self.note:
            words.append(self.note)
        return " ".join(words)


def printable(path: str, most: int = 100) -> str:
    """Return a path as one line of plain characters."""
    shown = "".join(c if c.isprintable() and c.isascii() else "?" for c in path)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


Write = Callable[[str], None]
