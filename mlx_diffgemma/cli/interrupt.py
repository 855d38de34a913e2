"""Ctrl-C before a command runs ends the program without a word."""

import os
import signal
import sys
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
