"""The handling of signals. Ctrl-C before a command runs ends the program silently, SIGTERM and
SIGHUP end it after cleaning up, Ctrl-Z restores the terminal and stops it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def leave(*_: object) -> None:
    """End the program on Ctrl-C during imports, without a useless traceback."""
    os._exit(130)


# As a program only: a library does not touch the signals of its host.
_FILES = ("__main__.py", "*/__main__.py", "cli/as_module/*.py", "cli/*.py")  # of `python -m`
if (
    Path(sys.argv[0]).name.startswith("mlx_diffgemma.")
    or any(Path(sys.argv[0]).match(f"mlx_diffgemma/{file}") for file in _FILES)
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)


@contextmanager
def stopping(
    stop: Callable[[], None],
    said: bytes = b"stopping after this batch; press Ctrl-C again to stop at once\n",
) -> Iterator[None]:
    """Let the first Ctrl-C request a stop, which waits for a good moment; the second does not
    wait."""

    def ask(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, said)
        stop()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the code inside, which restores the terminal, and end the
    program with exit code 128 + n. A second one does not wait."""
    numbers = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    caught: list[int] = []

    def end(number: int, _: object) -> None:
        caught.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    # A handler of the host, or `nohup`, stays.
    taken = [n for n in numbers if is_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except BaseException:
        if caught:  # any error while unwinding, for example because the terminal is gone
            raise SystemExit(128 + caught[0]) from None
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def on_suspend(give_back: Callable[[], bool]) -> Callable[[], None]:
    """Call `give_back` before Ctrl-Z stops the program; if it returns False, the caller is busy and
    will raise the signal again. Return a function that undoes this."""
    number = getattr(signal, "SIGTSTP", None)
    if (
        number is None
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(number) is not signal.SIG_DFL
    ):
        return lambda: None

    def suspend(*_: object) -> None:
        if give_back():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # returns once the program is continued
            signal.signal(number, suspend)

    def undo() -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(number, suspend)
    return undo
