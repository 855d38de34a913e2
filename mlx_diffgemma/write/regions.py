"""The slots of a template over tokens. A slot and the tokens beside it are a region where they may
be spelled together: `{"vip": ` and `true` have a token ` true` on their border."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config.generation import ResolvedSettings
from ..constraint import parts
from ..constraint.build import concatenate, intersection
from ..constraint.constraint import slot_dfa
from ..constraint.dfa import DFA
from ..constraint.line import Line, Part
from ..denoise.constrained import TokenConstraint
from ..errors import TemplateError
from ..language.prompt import encode_text, token_bytes
from ..language.template import Slot, Template
from ..model import DiffusionGemma
from .constrained import over_part

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A slot, with the given text at its borders that is spelled together with it."""

    name: str
    lengths: list[int]  # tokens that it may have, ascending
    asked: int | None  # the most that the template or the user asks for
    part: Part  # its strings
    constraint: TokenConstraint | None  # on these; None where any text of a length fits
    left: bytes = b""  # the given text that it begins with
    right: bytes = b""
    borders: int = 0  # tokens that this text has by itself

    def own(self, length: int) -> int:
        """Return the tokens of the slot in a region of some length; one that holds text beside the
        slot too counts as the slot's where nothing else is left."""
        return max(1, length - self.borders)

    def around(self, text: str) -> str:
        """Return a text of the slot with the given text that the region holds beside it."""
        return f"{self.left.decode(errors='ignore')}{text}{self.right.decode(errors='ignore')}"

    def inside(self, spellings: Sequence[bytes]) -> tuple[bytes, slice]:
        """Return the text of the slot, and which of the region's tokens it has a part in.

        Args:
          spellings: of the region's tokens.
        """
        text = b"".join(spellings)
        start, stop = len(self.left), len(text) - len(self.right)
        ends = np.cumsum([len(one) for one in spellings])
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        return text[start:stop], slice(first, last + 1)


Piece = list[int] | Region


class Regions:
    """Makes the pieces of templates for one checkpoint."""

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: AnyTokenizer,
        settings: ResolvedSettings,
        ends: tuple[int, int],
    ) -> None:
        """Prepare for templates.

        Args:
          model: whose vocabulary counts.
          tokenizer: of the model.
          settings: whose canvas counts.
          ends: the end of the turn, and the token that fills a canvas after it.
        """
        self._model, self._tokenizer, self._ends = model, tokenizer, ends
        self._most = settings.canvas_length
        self._size = model.config.text.vocab_size
        self.spellings = {t: s for t, s in token_bytes(tokenizer).items() if t < self._size}
        self.text_tokens = np.array(sorted(self.spellings))
        self._longer: dict[tuple[bytes, bytes], np.ndarray] = {}

    def pieces(self, template: Template, gap_tokens: tuple[int, int] | None) -> list[Piece]:
        """Return given tokens and regions in order.

        Args:
          template: any.
          gap_tokens: least and most tokens of gaps without their own.

        Raises:
          TemplateError: if a slot cannot be written in a canvas.
        """
        given = [
            encode_text(self._tokenizer, part) if isinstance(part, str) else None
            for part in template.parts
        ]
        pieces: list[Piece] = []
        for i, part in enumerate(template.parts):
            tokens = given[i]
            if tokens is not None:
                pieces.append(tokens)
                continue
            assert isinstance(part, Slot)
            left = given[i - 1] if i else None
            right = given[i + 1] if i + 1 < len(given) else None
            # A single token between two slots belongs to the second: words begin with a space.
            if right is not None and len(right) == 1 and i + 2 < len(given):
                right = None
            pieces.append(self._region(part, left, right, gap_tokens))
        return [piece for piece in pieces if piece]

    def _region(
        self,
        slot: Slot,
        left: list[int] | None,
        right: list[int] | None,
        gap_tokens: tuple[int, int] | None,
    ) -> Region:
        """Return the region of a slot. Border tokens that it takes leave the given tokens."""
        if slot.kind == "gap":
            return self._gap(slot, left, right, gap_tokens)
        if slot.kind == "one of":
            self._check_options(slot)
            if len(set(slot.options)) == 1 and slot.options[0]:
                return self._only(slot)
        before, behind = (self._border(left, -1), self._border(right, 0))
        part, constraint = over_part(
            (slot.kind, slot.options, slot.pattern, slot.schema, before, behind),
            lambda: concatenate([before, _not_empty(slot), behind]),
            self._model,
            self._tokenizer,
            self._ends,
        )
        lengths = part.lengths(self._most)
        if not lengths and (before or behind):  # it may fit without the tokens beside it
            return self._region(slot, None, None, gap_tokens)
        if not lengths:
            raise TemplateError(
                f"{slot.label}: no text that fits it has at most {self._most} tokens, "
                "which is what a canvas holds"
            )
        if before and left:
            left.pop()
        if behind and right:
            right.pop(0)
        return Region(
            slot.name,
            lengths,
            None,
            part,
            constraint,
            before.encode(),
            behind.encode(),
            bool(before) + bool(behind),
        )

    def _only(self, slot: Slot) -> Region:
        """Return the region of a slot with one option: its tokens, as given text has them."""
        line = Line(self._size)
        for at, token in enumerate(tokens := encode_text(self._tokenizer, slot.options[0])):
            line.token(at, token, line.state())
        part = line.part(len(tokens))
        return Region(slot.name, [len(tokens)], None, part, TokenConstraint.of(part.automaton))

    def _border(self, tokens: list[int] | None, at: int) -> str:
        """Return the text of a given token beside a slot; nothing if it is no whole text."""
        if not tokens:
            return ""
        try:
            return self.spellings.get(tokens[at], b"").decode()
        except UnicodeDecodeError:
            return ""

    def _check_options(self, slot: Slot) -> None:
        for option in slot.options:
            ids = encode_text(self._tokenizer, option)
            if b"".join(self.spellings.get(t, b"") for t in ids) != option.encode():
                raise TemplateError(
                    f"{slot.label}: this checkpoint's tokens cannot spell {option!r}"
                )
            if len(ids) > self._most:
                raise TemplateError(
                    f"{slot.label}: {option!r} has {len(ids)} tokens, "
                    f"more than a canvas of {self._most} holds"
                )

    def _gap(
        self,
        slot: Slot,
        left: list[int] | None,
        right: list[int] | None,
        gap_tokens: tuple[int, int] | None,
    ) -> Region:
        L = self._most
        low, high = gap_tokens or (1, L)
        low, high = slot.low or low, min(slot.high or high, L)
        asked = slot.high or (gap_tokens[1] if gap_tokens else None)
        if low < 1 or (asked is not None and asked < low):
            raise TemplateError(f"{slot.label}: a gap cannot have {low} to {asked} tokens")
        if low > L:
            raise TemplateError(
                f"{slot.label} is to have at least {low} tokens, and a canvas holds {L}; "
                "use several slots, one after the other"
            )
        before = self._joining(left, -1) if low < high else None
        behind = self._joining(right, 0) if low < high else None
        part = self._gap_part(low, high, before, behind)
        borders = 0
        if before is not None and left:
            left.pop()
            borders += 1
        if behind is not None and right:
            right.pop(0)
            borders += 1
        constraint = TokenConstraint.of(part.automaton) if borders else None
        lengths = list(range(low, high + 1)) if not borders else part.lengths(L)
        return Region(
            slot.name,
            lengths,
            asked,
            part,
            constraint,
            b"" if before is None else self.spellings[before],
            b"" if behind is None else self.spellings[behind],
            borders,
        )

    def _joining(self, tokens: list[int] | None, at: int) -> int | None:
        """Return the given token beside a gap if some tokens hold it and text of the gap."""
        if not tokens or tokens[at] not in self.spellings:
            return None
        border = self.spellings[tokens[at]]
        found = self._longest(b"", border) if at == 0 else self._longest(border, b"")
        return tokens[at] if len(found) else None

    def _longest(self, begin: bytes, end: bytes) -> np.ndarray:
        """Return the tokens that begin and end with some text and hold more: int64 [n]."""
        if (begin, end) not in self._longer:
            least = len(begin) + len(end)
            self._longer[begin, end] = np.array(
                [
                    token
                    for token, text in self.spellings.items()
                    if len(text) > least and text.startswith(begin) and text.endswith(end)
                ],
                np.int64,
            )
        return self._longer[begin, end]

    def _gap_part(self, low: int, high: int, before: int | None, behind: int | None) -> Part:
        """Return the strings of `low` to `high` text tokens between two given ones. A token that
        holds a given one and more counts as one of the gap's."""
        line, texts = Line(self._size), self.text_tokens
        end, at = line.state(), 0
        start, stop = (b"" if one is None else self.spellings[one] for one in (before, behind))
        if before is not None:
            line.token(0, before, at := line.state())
        is_open = high >= self._most
        last = low if is_open else high
        for count in range(1, last + 1):
            onward = line.state()
            line.among(at, texts, onward)
            if count == 1 and before is not None:
                line.among(0, self._longest(start, b""), onward)
            if count >= low:
                if behind is not None:
                    line.among(at, self._longest(b"", stop), end)
                    if count == 1 and before is not None:
                        line.among(0, self._longest(start, stop), end)
                    line.token(onward, behind, end)
                else:
                    line.among(at, texts, end)
                    if count == 1 and before is not None:
                        line.among(0, self._longest(start, b""), end)
            at = onward
        if is_open:
            line.among(at, texts, at)
            if behind is not None:
                line.among(at, self._longest(b"", stop), end)
            else:
                line.among(at, texts, end)
        return line.part(end)


def _not_empty(slot: Slot) -> DFA:
    """Return the automaton of a slot's texts that have a character."""
    dfa = slot_dfa(slot)
    if not dfa.accepting[0]:
        return dfa
    found = intersection(dfa, parts.free_text(1))
    if not found.accepting.any():
        raise TemplateError(f"{slot.label}: only the empty text fits it")
    return found
