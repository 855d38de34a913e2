"""Ctrl-C before a command runs ends the program without a word."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def leave(*_: object) -> None:
    """The answer to Ctrl-C while imports run, of which a traceback would say nothing."""
    os._exit(130)


# As a program only: a library does not touch the signals of its host.
if (
    Path(sys.argv[0]).name.startswith("mlx_diffgemma.")
    or Path(sys.argv[0]).match("mlx_diffgemma/__main__.py")
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C asks to stop, which waits for a good moment; the second does not wait."""

    def ask(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
