"""The display of a chat in a terminal: answers as Markdown, above the canvas that settles."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text as Styled

from .render import View, cut, printable, wrapped

_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_LIST = re.compile(r"\s*([-*+]|\d+[.)])\s")
_FRAME = re.compile(r"\A\n+|\n+\Z")  # blank lines around a block
_HARD_SPACE = "\xa0"


class ChatView(View):
    """Shows the answers of a chat. Where the answer goes to a terminal, its text is Markdown: whole
    blocks are printed for good, and the open one is drawn above the canvas."""

    def __init__(self, *, markdown: bool) -> None:
        super().__init__(verbose=True)
        self._is_markdown = markdown and self._shares_terminal
        self._has_printed = False  # a block of this answer

    def answer(self, piece: str) -> None:
        if not self._is_markdown:
            super().answer(piece)
            return
        self._end_thought()
        whole, self._open_line = split_blocks(self._open_line + piece)
        self._print_blocks(whole)

    def draft(self, pieces: Sequence[tuple[str, bool]], caption: str) -> None:
        if not self._is_markdown or not self._open_line.strip():
            super().draft(pieces, caption)
            return
        canvas = Styled()
        for piece, accepted in pieces:
            canvas.append(printable(piece), style="" if accepted else "dim cyan")
        above = markdown(self._open_line)
        self._show(Settling(above, canvas, Styled(caption, style="dim italic")))

    def remark(self, line: str) -> None:
        self._end_thought()
        self._print_rest()
        super().remark(line)

    def close(self) -> None:
        self._end_thought()
        self._print_rest()
        self._has_printed = False
        super().close()

    def listing(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and what they do, in two columns."""
        indent = max(len(name) for name, _ in rows) + 2
        for name, does in rows:
            lines = textwrap.wrap(does, max(20, self._console.width - indent - 1))
            self.note(f"{name:<{indent}}" + f"\n{'':<{indent}}".join(lines))

    def error(self, line: str) -> None:
        """Print what could not be done, in one line on stderr; on a terminal broken between
        words."""
        self.close()
        self._console.print(
            f"error: {printable(line)}", style="red", markup=False, soft_wrap=not self.is_live
        )

    def _print_rest(self) -> None:
        if self._is_markdown:
            rest, self._open_line = self._open_line, ""
            self._print_blocks(rest)

    def _print_blocks(self, text: str) -> None:
        if not text.strip():
            return
        self._erase()
        with self._console.capture() as captured:
            self._console.print(markdown(text))
        if self._has_printed:
            self._write("\n")
        self._has_printed = True
        lines = captured.get().replace(_HARD_SPACE, " ").split("\n")
        self._write(_FRAME.sub("", "\n".join(line.rstrip(" ") for line in lines)) + "\n")


@dataclass(frozen=True, slots=True)
class Settling:
    """The open block of an answer, the canvas behind it and a caption, cut to the terminal's size
    as in `Fitted`: of the block, the end is shown."""

    above: Markdown
    canvas: Styled
    caption: Styled

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(0, options.max_height - 1)
        foot = wrapped(console, self.caption, options.max_width)[:room]
        room -= len(foot)
        canvas = wrapped(console, self.canvas, options.max_width) if self.canvas else []
        canvas = cut(canvas, room)
        above = console.render_lines(self.above, options.update(height=None), pad=False)
        for line in above[max(0, len(above) - (room - len(canvas))) :]:
            yield from line
            yield Segment.line()
        yield from canvas
        yield from foot


def markdown(text: str) -> Markdown:
    """Return Markdown that loses nothing of the text: line breaks and indents stay, and HTML is
    text."""
    shown = Markdown("", hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    shown.parsed = parser.parse(_with_indents(printable(text)))
    for token in shown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


def split_blocks(text: str) -> tuple[str, str]:
    """Return the whole blocks of an unfinished text, and the rest. A block ends at a blank line
    outside of fenced code, unless the next line is indented and may belong to it."""
    lines = text.splitlines(keepends=True)
    border, fence = 0, ""
    for number, line in enumerate(lines):
        fence = _fence_behind(line, fence)
        behind = lines[number + 1] if number + 1 < len(lines) else ""
        is_blank = not fence and line.endswith("\n") and not line.strip()
        if is_blank and behind.strip() and not behind[0].isspace():
            border = number + 1
    return "".join(lines[:border]), "".join(lines[border:])


def _fence_behind(line: str, fence: str) -> str:
    """Return the fence of the code that is open behind a line; "" if none is."""
    found = _FENCE.match(line)
    if not found:
        return fence
    if not fence:
        return found[1]
    is_end = found[1].startswith(fence) and not line[found.end() :].strip()
    return "" if is_end else fence


def _with_indents(text: str) -> str:
    """Return a text in which Markdown keeps the indents of a paragraph's later lines."""
    lines, fence, first = [], "", ""
    for line in text.split("\n"):
        was_code, fence = bool(fence), _fence_behind(line, fence)
        if was_code or fence or not line.strip():
            first = ""
        elif not first:
            first = line
        elif not _LIST.match(first) and not _LIST.match(line):
            bare = line.lstrip(" ")
            line = _HARD_SPACE * (len(line) - len(bare)) + bare
        lines.append(line)
    return "\n".join(lines)
