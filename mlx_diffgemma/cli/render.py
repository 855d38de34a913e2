"""Events -> terminal. The only file that styles text; the answer goes to stdout, everything else
to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text as Styled

from ..info import Info


class View:
    """Shows a run: on a terminal the settling canvas in place, and the answer as it becomes final.

    Where both streams are one terminal, the last unfinished line of the answer stays in the live
    region until it is complete: a region that is redrawn must not begin in the middle of a line.
    """

    def __init__(self, *, verbose: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=False)
        self.is_live = verbose and self._console.is_terminal and not self._console.is_dumb_terminal
        self._verbose = verbose
        self._shares_terminal = self.is_live and sys.stdout.isatty()
        self._live: Live | None = None
        self._open_line = ""  # of the answer
        self._ends_with_break = True

    def reading(self, done: int, total: int) -> None:
        """Progress of a long prompt."""
        if done < total:
            self._draw(Styled(f"reading the prompt: {done:,} of {total:,} tokens", style="dim"))

    def draft(self, pieces: Sequence[tuple[str, bool]], caption: str) -> None:
        """A canvas that is not final: accepted tokens plain, the others dim."""
        if not self.is_live:
            return
        canvas = Styled(self._open_line)
        for piece, accepted in pieces:
            canvas.append(_printable(piece), style="" if accepted else "dim cyan")
        canvas.append(f"\n{caption}", style="dim italic")
        self._draw(canvas)

    def answer(self, piece: str) -> None:
        """Final text, to stdout at once; on a shared terminal line by line."""
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
        """The model's reasoning, to stderr."""
        self._erase()
        self._console.print(_printable(piece), style="dim", end="", markup=False)

    def note(self, line: str) -> None:
        """One line about the run, to stderr."""
        if self._verbose:
            self._erase()
            self._console.print(line, style="dim", markup=False, soft_wrap=True)

    def summary(self, line: str) -> None:
        """The numbers at the end, for a terminal only."""
        if self.is_live:
            self.note(line)

    def close(self) -> None:
        """Takes the canvas away and completes the last line of the answer."""
        self._erase()
        self._write(self._open_line)
        if not self._ends_with_break:
            self._write("\n")
        self._open_line, self._ends_with_break = "", True

    def _write(self, text: str) -> None:
        # A lone surrogate cannot be written; nothing else is ever replaced.
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()

    def _draw(self, content: Styled) -> None:
        if not self.is_live:
            return
        if self._live is None:
            self._live = Live(
                console=self._console, transient=True, auto_refresh=False, vertical_overflow="crop"
            )
            self._live.start()
        self._live.update(content, refresh=True)

    def _erase(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _printable(text: str) -> str:
    """Control characters of a half-made canvas must not reach the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "·" for c in text)


def show_info(info: Info) -> None:
    """A checkpoint's facts on stdout; plain text, the same for a terminal and a file."""
    text, config = info.config.text, info.config
    lines = [
        f"{info.folder}",
        f"{info.parameters:,} parameters, {info.active_parameters:,} active per token",
        f"{text.num_hidden_layers} layers, {text.top_k_experts} of {text.num_experts} experts, "
        f"vocabulary {text.vocab_size:,}, canvas {config.canvas_length}, "
        f"{text.max_position_embeddings:,} positions",
        f"{info.disk_bytes:,} bytes on disk in {info.files} weight file{'s' * (info.files > 1)}, "
        f"{info.tensors:,} tensors",
        f"vision: {info.vision}",
        "",
        f"{'part':<20}{'parameters':>16}{'bytes':>18}{'bits/weight':>13}",
    ]
    lines += [
        f"{part.name:<20}{part.parameters:>16,}{part.nbytes:>18,}{part.bits_per_weight:>13.2f}"
        for part in info.parts
    ]
    lines.append("")
    for tokens, nbytes in info.needed_bytes.items():
        lines.append(f"memory at {tokens // 1024}K context: about {nbytes / 1e9:.2f} GB (estimate)")
    print("\n".join(lines))
