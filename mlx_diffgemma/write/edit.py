"""Editing: the model rewrites a selection of a document, and the text around it stays byte for
byte."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config.generation import GenerationSettings
from ..errors import TemplateError
from ..events import Event
from ..language.prompt import PromptOptions, encode_prompt, encode_text, token_bytes
from ..language.template import Slot, Template, split_mark
from ..model import DiffusionGemma
from .fill import Filled, FillTask
from .job import Job, run_jobs

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

_NAME = "selection"
_PLACES = re.compile(r"\s*(\d{1,9}):(\d{1,9})\s*-\s*(\d{1,9}):(\d{1,9})\s*")
_LINES = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")
_OPEN, _CLOSE = "[[[", "]]]"
_SLACK = 8  # tokens by which texts that are joined may be longer than apart


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of a text, as offsets in characters."""

    start: int
    stop: int

    @classmethod
    def of_places(cls, text: str, places: str) -> Selection:
        """Return the part from "line:column-line:column" or the whole lines of "line-line".

        Lines and columns count from 1; a byte order mark has no column. The second place of a pair
        with columns is the first one after the part. Whole lines come without the line break at
        their end; "12" is short for "12-12".

        Raises:
          TemplateError: if it cannot be read, or lies outside of the text.
        """
        found = _PLACES.fullmatch(places) or _LINES.fullmatch(places)
        if found is None:
            raise TemplateError(
                f"the selection {places!r} is not line:column-line:column, such as 12:3-14:20, "
                "and not whole lines, such as 12-14"
            )
        if found.re is _PLACES:
            line, column, last_line, last_column = map(int, found.groups())
            start = _offset(text, line, column, places)
            stop = _offset(text, last_line, last_column, places)
        else:
            line, last_line = int(found[1]), int(found[2] or found[1])
            if max(line, last_line) > _count_lines(text):
                raise TemplateError(_outside(text, places))
            start = _offset(text, line, 1, places)
            stop = _offset(text, last_line, None, places)
        if stop < start:
            raise TemplateError(f"the selection {places} ends before it begins")
        return cls(start, stop)

    @classmethod
    def of_match(cls, text: str, part: str) -> Selection:
        """Return the only place where a text occurs.

        Raises:
          TemplateError: if there is none, or more than one.
        """
        _, part = split_mark(part)
        if not part:
            raise TemplateError("the text to match is empty")
        starts = [found.start() for found in re.finditer(f"(?={re.escape(part)})", text)]
        if (count := len(starts)) != 1:
            found = "is not" if not count else f"occurs {count} times"
            raise TemplateError(
                f"{part!r} {found} in the document; the selection must be one place"
            )
        return cls(starts[0], starts[0] + len(part))


@dataclass(frozen=True, slots=True)
class Edited:
    """A document with its selection rewritten."""

    text: str
    before: str  # the document as it was
    selection: Selection  # of the document as it was
    filled: Filled

    @property
    def replacement(self) -> str:
        return self.filled.slots[_NAME].text

    def diff(self, name: str) -> str:
        """Return the change as a unified diff, for `git apply` and `patch -p1`; empty if there is
        none.

        Args:
          name: the path of the file, with `/` between folders, from the folder in which the diff
            is to be applied.
        """
        lines = list(difflib.unified_diff(_lines(self.before), _lines(self.text)))
        if lines:
            lines[:2] = f"--- {_header(f'a/{name}')}\n", f"+++ {_header(f'b/{name}')}\n"
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
            for line in lines
        )


def edit(
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    document: str,
    selection: Selection | str,
    instruction: str,
    *,
    gap_tokens: tuple[int, int] | None = None,
    window_tokens: int | None = None,
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    listener: Callable[[Event], None] | None = None,
) -> Edited:
    """Rewrite the selected part of a document; every other byte of it stays.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      document: all of it. The model does not see a byte order mark at its beginning.
      selection: the part to rewrite, or its places as `Selection.of_places` reads them, such as
        "12-14" or "12:3-14:20"; an empty one inserts.
      instruction: what to do with it.
      gap_tokens: least and most tokens of the new part; by default from half of the old one to
        twice as much and 8 more.
      window_tokens: most tokens of the document that the model sees, around the selection; by
        default, and at most, what its positions hold twice: in the prompt and in the answer.
      settings: how to denoise.
      prompt_options: how the instruction becomes tokens.
      listener: called with the loop's events, see `stream_fill`.

    Raises:
      DiffGemmaError: if the instruction, the selection or the settings cannot be used.
    """
    task = EditTask(
        document=document,
        selection=selection,
        instruction=instruction,
        gap_tokens=gap_tokens,
        window_tokens=window_tokens,
        settings=settings,
        prompt_options=prompt_options,
    )
    edited = None
    for _, event in run_jobs(model, [task.job(model, tokenizer)]):
        if isinstance(event, Edited):
            edited = event
        elif listener is not None:
            listener(event)
    assert edited is not None
    return edited


@dataclass(frozen=True, slots=True, kw_only=True)
class EditTask:
    """A selection to rewrite, as a task for an engine; the fields are `edit`'s arguments."""

    document: str
    selection: Selection | str
    instruction: str
    gap_tokens: tuple[int, int] | None = None
    window_tokens: int | None = None
    settings: GenerationSettings = GenerationSettings()
    prompt_options: PromptOptions = PromptOptions()

    def job(self, model: DiffusionGemma, tokenizer: AnyTokenizer) -> Job[Event | Edited]:
        """Return the job that rewrites it; it yields the events of `stream_fill`, and Edited last.

        Raises:
          DiffGemmaError: if the instruction, the selection or the settings cannot be used.
        """
        selection = _checked(self.document, self.selection, self.instruction)
        mark, text = split_mark(self.document)
        start, stop = (max(0, at - len(mark)) for at in (selection.start, selection.stop))
        before, old, behind = text[:start], text[start:stop], text[stop:]
        selection = Selection(start + len(mark), stop + len(mark))
        canvas_length = self.settings.resolve(model.config).canvas_length
        tokens = len(encode_text(tokenizer, old))
        if tokens > canvas_length:
            raise TemplateError(
                f"the selection has {tokens} tokens, more than a canvas of {canvas_length} holds; "
                "select less, and edit part by part"
            )
        window = self.window_tokens
        if window is not None and window < 1:
            raise TemplateError(f"window_tokens must be at least 1, got {window}")
        low, high = self.gap_tokens or (max(1, tokens // 2), min(2 * tokens + 8, canvas_length))
        empty = encode_prompt(
            tokenizer, _request(self.instruction, "", old, ""), self.prompt_options
        )
        room = model.config.text.max_position_embeddings - canvas_length - len(empty) - high
        most = room // 2 - _SLACK if window is None else min(room // 2 - _SLACK, window)
        near = _near(tokenizer, before, behind, max(0, most - tokens))
        slot = Slot(_NAME, "gap", low, high)
        job = FillTask(
            template=Template(tuple(part for part in (near[0], slot, near[1]) if part != "")),
            prompt=_request(self.instruction, near[0], old, near[1]),
            settings=self.settings,
            prompt_options=self.prompt_options,
            is_shown=True,
            standing={_NAME: old},
        ).job(model, tokenizer)
        return _edited(job, self.document, selection, sum(map(len, near)) + len(old))


def _edited(job: Job[Event | Filled], document: str, selection: Selection, seen: int) -> Job[Any]:
    """Pass a fill's words on, with the edited document in place of its result.

    Args:
      job: fills the selection's place.
      document: all of it.
      selection: of the document.
      seen: characters of it that the model sees.
    """
    mark, _ = split_mark(document)
    with closing(job):
        said = next(job)
        while True:
            event = None
            if isinstance(said, Filled):
                if seen < (count := len(document) - len(mark)):
                    note = (
                        f"the model saw {seen:,} of the document's {count:,} characters, around "
                        "the selection"
                    )
                    said = replace(said, notes=(note, *said.notes))
                new = said.slots[_NAME].text
                text = f"{document[: selection.start]}{new}{document[selection.stop :]}"
                yield Edited(text, document, selection, said)
            else:
                event = yield said
            try:
                said = job.send(event)
            except StopIteration:
                return


def _checked(document: str, selection: Selection | str, instruction: str) -> Selection:
    """Return the selection, after checks of what a user gives."""
    if isinstance(selection, str):
        selection = Selection.of_places(document, selection)
    if not isinstance(selection, Selection):
        raise TemplateError(
            'a selection is a Selection or a string such as "12-14" or "12:3-14:20", '
            f"got {selection!r}"
        )
    if not 0 <= selection.start <= selection.stop <= len(document):
        raise TemplateError(
            f"the selection {selection.start} to {selection.stop} lies outside of the document's "
            f"{len(document)} characters"
        )
    if not instruction.strip():
        raise TemplateError("the instruction is empty: say what to do with the selection")
    return selection


def _near(tokenizer: AnyTokenizer, before: str, behind: str, most: int) -> tuple[str, str]:
    """Return the text on both sides of a selection that is nearest to it, in at most so many
    tokens: all of it, or as much on both sides where there is enough."""
    sides = [encode_text(tokenizer, side) for side in (before, behind)]
    if sum(map(len, sides)) <= most:
        return before, behind
    spelled = token_bytes(tokenizer)
    lead = min(len(sides[0]), max(most // 2, most - len(sides[1])))
    tail, head = (
        b"".join(spelled.get(token, b"") for token in ids).decode("utf-8", "ignore")
        for ids in (sides[0][len(sides[0]) - lead :], sides[1][: most - lead])
    )
    if not (before.endswith(tail) and behind.startswith(head)):
        # The tokenizer spells a character that it does not know as another.
        tail, head = before[max(0, len(before) - lead) :], behind[: most - lead]
    return _whole_lines(before, tail), _whole_lines_of_head(behind, head)


def _whole_lines(text: str, tail: str) -> str:
    """Return the end of a text from a line's beginning on, if that leaves half of it."""
    start = len(text) - len(tail)
    cut = 0 if start == 0 or text[start - 1] == "\n" else tail.find("\n") + 1
    return tail[cut:] if 2 * cut <= len(tail) else tail


def _whole_lines_of_head(text: str, head: str) -> str:
    """Return the beginning of a text up to a line's end, if that leaves half of it."""
    cut = len(head) if head == text else head.rfind("\n") + 1
    return head[:cut] if 2 * cut >= len(head) else head


def _request(instruction: str, before: str, old: str, behind: str) -> str:
    marked = f"{before}{_OPEN}{old}{_CLOSE}{behind}"
    return (
        f"{instruction}\n\nThis is about the part between {_OPEN} and {_CLOSE} of the text below. "
        f"Write the whole text again without the brackets, with only that part changed.\n\n{marked}"
    )


def _count_lines(text: str) -> int:
    """Return the number of lines; a line break at the end begins no further one."""
    return max(1, len(text.removesuffix("\n").split("\n")))


def _outside(text: str, places: str) -> str:
    count = _count_lines(text)
    return (
        f"the selection {places} lies outside of the file: it has {count} line{'s' * (count != 1)}"
    )


def _offset(text: str, line: int, column: int | None, places: str) -> int:
    """Return the offset of a place, or of its line's end if there is no column."""
    mark, text = split_mark(text)
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise TemplateError(_outside(text, places))
    length = len(lines[line - 1].removesuffix("\r"))
    column = length + 1 if column is None else column
    if not 1 <= column <= length + 1:
        raise TemplateError(
            f"the selection {places} lies outside of the file: line {line} has {length} characters"
        )
    return len(mark) + sum(len(earlier) + 1 for earlier in lines[: line - 1]) + column - 1


def _header(name: str) -> str:
    """Return a file's name for git and patch: in quotes if it has special characters, with a tab
    after it if it has a space."""
    raw = os.fsencode(name)
    if all(byte >= 0x20 and byte not in b'"\\\x7f' for byte in raw) and name.isprintable():
        return f"{name}\t" if " " in name else name
    quoted = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b'"\\' else f"\\{byte:03o}" for byte in raw
    )
    return f'"{quoted}"'


def _lines(text: str) -> list[str]:
    """Return lines as editors and diff count them: only line feeds end a line."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)
