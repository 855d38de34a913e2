"""The display of events in a terminal. The answer goes to stdout, everything else to stderr; only
the render files style text."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text as Styled

from ..checkpoint.cache import CachedModel
from ..checkpoint.choice import short_name
from ..checkpoint.info import Info
from ..errors import SourceError
from ..events import StepDone, TrialStarted
from .interrupt import on_suspend

if TYPE_CHECKING:
    from ..events import Event
    from ..write.fill import Filled


class View:
    """Shows a run: on a terminal the settling canvas in place, and the final parts of the answer.

    If both streams are one terminal, the last unfinished line of the answer stays in the live
    region until it is complete: a redrawn region must not begin in the middle of a line.
    """

    def __init__(self, *, verbose: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=False)
        self.is_live = verbose and self._console.is_terminal and not self._console.is_dumb_terminal
        self._verbose = verbose
        self._shares_terminal = self.is_live and sys.stdout is not None and sys.stdout.isatty()
        self._live: Live | None = None
        self._open_line = ""  # of the answer
        self._open_thought = ""
        self._ends_with_break = True
        self._is_final = True  # False while lengths of slots are looked for
        self._is_broken = False  # stdout accepts no more text
        self._is_drawing = self._is_suspended = False
        self._undo_suspend: Callable[[], None] | None = None

    def reading(self, done: int, total: int) -> None:
        """Show the progress of a long prompt."""
        if done < total:
            self._draw(f"reading the prompt: {done:,} of {total:,} tokens")

    def draft(self, pieces: Sequence[tuple[str, bool]], caption: str) -> None:
        """Show a canvas that is not final: accepted tokens plain, the others dim."""
        if not self.is_live:
            return
        canvas = Styled()
        canvas.append(printable(self._open_thought), style="dim")
        canvas.append(self._open_line)
        for piece, accepted in pieces:
            canvas.append(printable(piece), style="" if accepted else "dim cyan")
        self._draw(caption, canvas)

    def answer(self, piece: str) -> None:
        """Print final text on stdout at once; on a shared terminal line by line."""
        self._end_thought()
        self._ends_with_break = piece.endswith("\n")
        if not self._shares_terminal:
            self._write(piece)
            return
        self._open_line += piece
        complete, line_break, self._open_line = self._open_line.rpartition("\n")
        if line_break:
            self._erase()
            self._write(complete + line_break)

    def thought(self, piece: str) -> None:
        """Print the model's reasoning on stderr; on a terminal line by line, as the answer."""
        if not self._verbose:
            return
        self._open_thought += piece
        complete, line_break, self._open_thought = self._open_thought.rpartition("\n")
        if line_break:
            self._print_thought(complete)

    def remark(self, line: str) -> None:
        """Print one line on stderr between the answer so far and the rest of it."""
        self._end_thought()
        if self._open_line:
            self._erase()
            self._write(self._open_line + "\n")
            self._open_line, self._ends_with_break = "", True
        self.note(printable(line))

    def object(self, value: dict[str, Any]) -> None:
        """Print one line of JSON on stdout."""
        self._write(json.dumps(value) + "\n")

    def note(self, line: str) -> None:
        """Print one line about the run on stderr, on a terminal broken between words."""
        if self._verbose:
            self._erase()
            self._console.print(
                printable(line), style="dim", markup=False, soft_wrap=not self.is_live
            )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Say on a terminal that the model is being loaded, for as long as it is."""
        if not self.is_live:
            yield
            return
        self._console.print("loading the model ...", style="dim", end="\r")
        try:
            yield
        finally:
            self._console.control(Control((ControlType.ERASE_IN_LINE, 2)))

    def summary(self, line: str) -> None:
        """Print the numbers at the end, on a terminal only."""
        if self.is_live:
            self.note(line)

    def trial(self, event: Event) -> None:
        """Show the progress of a fill, in one line."""
        if isinstance(event, TrialStarted):
            self._is_final = event.is_final
        elif isinstance(event, StepDone) and self.is_live:
            what = "denoising the canvas" if self._is_final else "looking for lengths"
            self._draw(f"{what}, step {event.step + 1}")

    def about(self, filled: Filled, name: str | None = None) -> None:
        """Print notes and certainties of a filled template on stderr; `name` is that of its only
        slot."""
        from ..view.report import filled_lines  # imports mlx

        for line in filled_lines(filled, name):
            self.note(line)

    def result(self, text: str) -> None:
        """Print a text on stdout, byte for byte; a terminal gets a line break after it."""
        self._erase()
        self._write(text)
        if sys.stdout is not None and sys.stdout.isatty() and not text.endswith("\n"):
            self._write("\n")

    def close(self) -> None:
        """Remove the canvas and complete the last line of the answer."""
        self._end_thought()
        self._erase()
        if self._undo_suspend is not None:
            self._undo_suspend()
            self._undo_suspend = None
        self._write(self._open_line)
        if not self._ends_with_break:
            self._write("\n")
        self._open_line, self._ends_with_break = "", True

    def _write(self, text: str) -> None:
        if not text or self._is_broken:
            return
        if sys.stdout is None:
            self._is_broken = True
            raise SourceError("stdout is closed; the answer cannot be printed")
        try:
            # Only lone surrogates are replaced, which cannot be written.
            sys.stdout.buffer.write(text.encode("utf-8", "replace"))
            sys.stdout.buffer.flush()
        except OSError as error:
            self._is_broken = True
            if isinstance(error, BrokenPipeError):
                raise
            raise SourceError(f"stdout cannot be written: {error.strerror}") from error

    def _end_thought(self) -> None:
        if self._open_thought:
            self._print_thought(self._open_thought)
        self._open_thought = ""

    def _print_thought(self, lines: str) -> None:
        self._erase()
        if self.is_live:
            self._console.print(printable(lines), style="dim", markup=False, soft_wrap=True)
        else:  # a file or a pipe: no line break that the model did not write
            print(printable(lines), file=sys.stderr, flush=True)

    def _draw(self, caption: str, canvas: Styled | None = None) -> None:
        self._show(Fitted(canvas or Styled(), Styled(caption, style="dim italic")))

    def _show(self, picture: RenderableType) -> None:
        if not self.is_live:
            return
        with self._drawing():
            if self._live is None:
                self._live = Live(console=self._console, transient=True, auto_refresh=False)
                self._live.start()
            self._live.update(picture, refresh=True)

    def _erase(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            self._stop(live)

    def _stop(self, live: Live) -> None:
        """End a live region and restore the terminal, also if this is interrupted."""
        with suppress(OSError):  # the terminal may be gone
            try:
                with self._drawing():
                    live.stop()
            finally:
                if self._console.is_alt_screen:
                    self._console.set_alt_screen(False)
                self._console.show_cursor(True)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Let Ctrl-Z wait until the picture is complete."""
        if self._undo_suspend is None:
            self._undo_suspend = on_suspend(self._suspend)
        self._is_drawing = True
        try:
            yield
        finally:
            self._is_drawing = False
            if self._is_suspended:
                self._is_suspended = False
                signal.raise_signal(signal.SIGTSTP)

    def _suspend(self) -> bool:
        if self._is_drawing:
            self._is_suspended = True
            return False
        self._give_back()
        return True

    def _give_back(self) -> None:
        """Restore the terminal for the shell; the next picture takes it again."""
        self._erase()


@dataclass(frozen=True, slots=True)
class Fitted:
    """A canvas and a caption, cut to the terminal's size. One line stays free: a region that fills
    the terminal would scroll when it is removed, and leave lines."""

    canvas: Styled
    caption: Styled

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(0, options.max_height - 1)
        foot = wrapped(console, self.caption, options.max_width)[:room]
        lines = wrapped(console, self.canvas, options.max_width) if self.canvas else []
        yield from cut(lines, room - len(foot))
        yield from foot


def wrapped(console: Console, text: Styled, width: int) -> list[Styled]:
    return list(text.wrap(console, width, overflow="fold", no_wrap=False))


def cut(lines: list[Styled], room: int) -> list[Styled]:
    """Return the lines that fit; the last one tells how many more there are."""
    if len(lines) <= room:
        return lines
    kept = max(0, room - 1)
    return [*lines[:kept], Styled(f"({len(lines) - kept} more lines)", "dim")][:room]


def printable(text: str) -> str:
    """Remove control characters, which a canvas may hold, before they reach the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "·" for c in text)


def show_info(info: Info) -> None:
    """Print a checkpoint's facts on stdout; plain text, the same for a terminal and a file."""
    text, config = info.config.text, info.config
    lines = [
        info.name if info.folder is None else f"{info.folder}",
        f"{info.parameters:,} parameters, {info.active_parameters:,} active per token",
        f"{text.num_hidden_layers} layers, {text.top_k_experts} of {text.num_experts} experts, "
        f"vocabulary {text.vocab_size:,}, canvas {config.canvas_length}, "
        f"{text.max_position_embeddings:,} positions",
        f"{info.disk_bytes:,} bytes on disk in {info.files} weight file{'s' * (info.files > 1)}, "
        f"{info.tensors:,} tensors",
        f"vision: {info.vision.removeprefix('vision ')}",
        "",
        f"{'part':<20}{'parameters':>16}{'bytes':>18}{'bits/weight':>13}",
    ]
    lines += [
        f"{part.name:<20}{part.parameters:>16,}{part.nbytes:>18,}{part.bits_per_weight:>13.2f}"
        for part in info.parts
    ]
    lines.append("")
    for tokens, nbytes in info.needed_bytes.items():
        size = f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,} tokens of"
        lines.append(f"memory at {size} context: about {nbytes / 1e9:.2f} GB (estimate)")
    print("\n".join(lines))


def show_models(models: Sequence[CachedModel]) -> None:
    """Print the cached models on stdout; plain text, the same for a terminal and a file."""
    width = max(len(model.repo) for model in models)
    print(f"{'name':<8}{'repository':<{width}}{'GB':>8}  last used")
    for model in models:
        day = time.strftime("%Y-%m-%d", time.localtime(model.last_used))
        note = "" if model.is_whole else "  not whole: pull it to complete it"
        name = short_name(model.repo) or "-"
        print(f"{name:<8}{model.repo:<{width}}{model.nbytes / 1e9:>8.2f}  {day}{note}")
    print(f"{'':<{8 + width}}{sum(model.nbytes for model in models) / 1e9:>8.2f}  in all")
