"""ids -> pieces of text that will not change any more, across canvas borders. Thoughts and answer
are told apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..events import StepDone, Text
from .prompt import THOUGHT_BEGIN, THOUGHT_END, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Control tokens that belong to the answer: whoever runs tools needs to see them.
_SHOWN = frozenset({"<|tool_call>", "<tool_call|>", '<|"|>'})


class TextStream:
    """Turns committed ids into text, piece by piece. Parsed from ids: the channel markers are
    control tokens, the
    channel's name behind the first of them is plain text up to a line break."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Iterable[int],
        prompt: Sequence[int] = (),
    ):
        """`prompt` tells whether the template has left a thought open."""
        self._tokenizer = tokenizer
        specials = special_tokens(tokenizer)
        self._open, self._close = specials.get(THOUGHT_BEGIN), specials.get(THOUGHT_END)
        self._hidden = {token_id for token, token_id in specials.items() if token not in _SHOWN}
        self._ends = frozenset(eos_token_ids)
        self._ended = False
        self._channel: Literal["answer", "thought"] = "answer"
        self._ids: list[int] = []  # of the channel's text so far
        self._shown = 0  # characters of it
        self._has_name = True  # False: inside a channel's name
        markers = [token for token in prompt if token in (self._open, self._close)]
        if markers and markers[-1] == self._open:
            last = len(prompt) - 1 - list(reversed(prompt)).index(markers[-1])
            self._enter("thought")
            self._ids = [token for token in prompt[last + 1 :] if token not in self._hidden]
            self._drop_prompt_text()

    def push(self, ids: Iterable[int]) -> list[Text]:
        """Text that is final once these ids are; nothing after an end token."""
        pieces: list[Text] = []
        for token in ids:
            if self._ended:
                break
            if token in self._ends:
                self._ended = True
            elif token == self._open:
                pieces += self._flush(final=True)
                self._enter("thought")
            elif token == self._close:
                pieces += self._flush(final=True)
                self._enter("answer")
            elif token not in self._hidden and self._spelling(token) is not None:
                self._ids.append(token)
        return pieces + self._flush(final=self._ended)

    def finish(self) -> list[Text]:
        """What was held back: the run is over."""
        return self._flush(final=True)

    def _enter(self, channel: Literal["answer", "thought"]) -> None:
        self._channel, self._ids, self._shown = channel, [], 0
        self._has_name = channel == "answer"

    def _drop_prompt_text(self) -> None:
        text = self._decode(final=True)
        self._has_name = "\n" in text
        self._shown = len(text) if self._has_name else 0

    def _flush(self, *, final: bool) -> list[Text]:
        text = self._decode(final=final)
        if not self._has_name:
            name_end = text.find("\n")
            if name_end < 0:
                return []  # a name that never ends is no text
            self._has_name, self._shown = True, name_end + 1
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return [Text(piece, self._channel)] if piece else []

    def _decode(self, *, final: bool) -> str:
        """The channel's text. Unless final, a run of byte tokens at its end waits: a character may
        be incomplete."""
        end = len(self._ids)
        while not final and end and self._is_byte(self._ids[end - 1]):
            end -= 1
        text = str(
            self._tokenizer.decode(
                self._ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        return text if final else text.rstrip("\ufffd")

    def _is_byte(self, token: int) -> bool:
        return re.fullmatch(r"<0x[0-9A-F]{2}>", self._spelling(token) or "") is not None

    def _spelling(self, token: int) -> str | None:
        """As in the vocabulary; None for an id of the model that the tokenizer does not have."""
        spelling = self._tokenizer.convert_ids_to_tokens(token)
        return None if spelling is None else str(spelling)


def draft_pieces(
    tokenizer: PreTrainedTokenizerBase, event: StepDone, eos_token_ids: Iterable[int]
) -> list[tuple[str, bool]]:
    """The first row's draft as (text, accepted) pieces up to its first end token; for eyes only."""
    hidden = set(special_tokens(tokenizer).values())
    ends = set(eos_token_ids)
    pieces: list[tuple[str, bool]] = []
    draft, accepted = np.array(event.draft[0]).tolist(), np.array(event.accepted[0]).tolist()
    for token, sure in zip(draft, accepted, strict=True):
        if token in ends:
            break
        if token not in hidden:
            pieces.append((str(tokenizer.decode([token])), sure))
    return pieces


# Where one colour of certainty ends and the next begins.
CERTAINTY_BANDS = (0.25, 0.5, 0.75, 0.95)


class Spellings:
    """How single tokens look, for eyes only: control tokens and bytes by their names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._controls = {token_id: name for name, token_id in special_tokens(tokenizer).items()}
        self._known: dict[int, str] = {}

    def is_control(self, token: int) -> bool:
        return token in self._controls

    def __getitem__(self, token: int) -> str:
        """Never empty, also for an id that the tokenizer does not have."""
        if token not in self._known:
            self._known[token] = self._controls.get(token) or self._spelled(token)
        return self._known[token]

    def _spelled(self, token: int) -> str:
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if text and "\ufffd" not in text:
            return text
        name = self._tokenizer.convert_ids_to_tokens(token)  # half a character has no text
        return str(name) if name else f"<{token}>"


@dataclass(frozen=True, slots=True)
class CanvasToken:
    """One position of a draft, for eyes only."""

    text: str
    kind: Literal["text", "control", "end", "pad"]
    accepted: bool
    band: int  # of certainty, from 0; see CERTAINTY_BANDS


def canvas_tokens(
    spellings: Spellings, event: StepDone, eos_token_ids: Iterable[int], pad_token_id: int
) -> list[CanvasToken]:
    """The first row's draft, all of it."""
    kinds: dict[int, Literal["end", "pad"]] = {pad_token_id: "pad"}
    kinds |= dict.fromkeys(eos_token_ids, "end")
    bands = np.digitize(
        np.array(event.certainty[0]), np.array(CERTAINTY_BANDS, np.float32)
    ).tolist()
    columns = np.array(event.draft[0]).tolist(), np.array(event.accepted[0]).tolist(), bands
    return [
        CanvasToken(
            spellings[token],
            kinds.get(token, "control" if spellings.is_control(token) else "text"),
            accepted,
            band,
        )
        for token, accepted, band in zip(*columns, strict=True)
    ]
