"""The display of the settling canvas in colour: in place on a terminal, elsewhere one line per
step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text as Styled

from .render import View, cut, printable, wrapped

if TYPE_CHECKING:
    from ..language.text import CanvasToken

# By certainty, from unsure to sure. The terminal's own colours, so that they suit its background.
BAND_STYLES = ("red", "magenta", "yellow", "cyan", "green")
RENOISED = "underline"
PINNED = "dim"
END, PAD, LINE_BREAK = "∎", "·", "⏎"
_REDRAWS_PER_SECOND = 8  # so that a new size of the terminal takes effect between steps


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """The numbers in a step's line. `tokens` counts those that are not pinned."""

    canvas_index: int
    step: int
    accepted_tokens: int
    tokens: int
    mean_entropy: float
    trial: str = ""  # of fill and edit: what the batch is for

    def line(self) -> str:
        return (
            f"canvas {self.canvas_index + 1}{self.trial and f', {self.trial}'}, "
            f"step {self.step + 1}: {self.accepted_tokens} of "
            f"{self.tokens} accepted, mean entropy {self.mean_entropy:.3f} nats"
        )


class WatchView(View):
    """Takes the whole screen of a terminal during the run, so that a new size leaves no remains.
    Answer and thoughts for the same terminal wait until the screen is restored."""

    def __init__(self) -> None:
        super().__init__(verbose=True)
        self._screen: Live | None = None
        self._is_watching = False  # also while Ctrl-Z has restored the screen
        self._waiting: list[tuple[str, str]] = []  # (method of View, its argument)
        self._so_far = ""  # the text of canvases before this one

    def watch(self, tokens: Sequence[CanvasToken], numbers: StepNumbers) -> None:
        """Show a step."""
        if not self.is_live:
            self.note(f"{numbers.line()}, draft: {plain_draft(tokens)}")
            return
        frame = Frame(self._so_far, tokens, numbers)
        if self._screen is None:
            self._erase()  # the line about the prompt
        self._is_watching = True
        with self._drawing():
            if self._screen is None:
                self._screen = Live(
                    frame,
                    console=self._console,
                    screen=True,
                    refresh_per_second=_REDRAWS_PER_SECOND,
                    vertical_overflow="crop",
                )
                self._screen.start()
            self._screen.update(frame, refresh=True)

    def answer(self, piece: str) -> None:
        self._so_far += piece
        if self._is_watching and self._shares_terminal:
            self._waiting.append(("answer", piece))
        else:
            super().answer(piece)

    def thought(self, piece: str) -> None:
        self._so_far += piece
        if self._is_watching:
            self._waiting.append(("thought", piece))
        else:
            super().thought(piece)

    def remark(self, line: str) -> None:
        if self._is_watching:
            self._waiting.append(("remark", line))
        else:
            super().remark(line)

    def close(self) -> None:
        """Restore the screen and print the text that waited for it."""
        self._give_back()
        self._is_watching = False
        waiting, self._waiting = self._waiting, []
        show = {"answer": super().answer, "thought": super().thought, "remark": super().remark}
        for method, piece in waiting:
            show[method](piece)
        super().close()

    def _give_back(self) -> None:
        if self._screen is not None:
            screen, self._screen = self._screen, None
            self._stop(screen)
        super()._give_back()


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture. Its layout is made when it is drawn, for the terminal's size at that time."""

    so_far: str
    tokens: Sequence[CanvasToken]
    numbers: StepNumbers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or options.max_height
        foot = wrapped(console, Styled(self.numbers.line(), style="bold"), width)
        has_pinned = any(token.pinned for token in self.tokens)
        foot += wrapped(console, legend(has_pinned=has_pinned), width)
        foot = foot[: max(1, height - 2)]
        yield from self._head(console, width, max(1, height - len(foot) - 1))
        yield Styled("─" * width, style="dim")
        yield from foot

    def _head(self, console: Console, width: int, room: int) -> list[Styled]:
        """Return the lines that fit: the canvas from its start, and the end of the text before
        it."""
        before = Styled(printable(self.so_far), style="dim")
        lines = wrapped(console, Styled.assemble(before, canvas_text(self.tokens)), width)
        first = max(0, len(wrapped(console, before, width)) - 1)  # of the canvas
        first = max(0, min(first, len(lines) - room))
        return cut(lines[first:], room)


def canvas_text(tokens: Sequence[CanvasToken]) -> Styled:
    """Return the canvas in colour by certainty; renoised positions underlined, given text dim."""
    canvas = Styled()
    for token in tokens:
        style = BAND_STYLES[token.band] + ("" if token.accepted else f" {RENOISED}")
        style = PINNED if token.pinned else style
        canvas.append(_visible(token), style=style)
    return canvas


def legend(*, has_pinned: bool = False) -> Styled:
    """Return the meaning of the colours and signs."""
    from ..language.text import CERTAINTY_BANDS  # imports mlx

    line, low = Styled("certainty "), 0.0
    for style, high in zip(BAND_STYLES, (*CERTAINTY_BANDS, 1.0), strict=True):
        line.append(f"{low * 100:.0f}-{high * 100:.0f}%", style=style)
        line.append(" ")
        low = high
    line.append("| ")
    line.append("renoised", style=RENOISED)
    line.append(", else accepted")
    if has_pinned:
        line.append(" | ")
        line.append("given text", style=PINNED)
    line.append(f" | {END} end {PAD} padding {LINE_BREAK} line break")
    return line


def plain_draft(tokens: Sequence[CanvasToken]) -> str:
    """Return a draft in one line, up to its first end token."""
    return "".join(_visible(token, line_break=LINE_BREAK) for token in _until_end(tokens))


def _until_end(tokens: Sequence[CanvasToken]) -> Iterator[CanvasToken]:
    for token in tokens:
        if token.kind == "end":
            return
        yield token


def _visible(token: CanvasToken, *, line_break: str = LINE_BREAK + "\n") -> str:
    if token.kind == "end":
        return END
    if token.kind == "pad":
        return PAD
    return line_break.join(printable(line) for line in token.text.split("\n"))
