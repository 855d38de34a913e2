"""Conversion of committed ids to final pieces of text, across canvas borders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..events import CanvasCommitted, StepDone, Text, ToolCall
from .controls import THOUGHT_BEGIN, THOUGHT_END, special_tokens
from .stops import Stops
from .tools import CALL_BEGIN, CALL_END, QUOTE, CallEvent, CallReader

if TYPE_CHECKING:
    from .tokenizer import AnyTokenizer

# Control tokens of tool calls: where they stand outside of a call, they are shown as text.
_SHOWN = frozenset({CALL_BEGIN, CALL_END, QUOTE})
# The text after THOUGHT_BEGIN where a thought begins; any other channel belongs to the answer.
# Source: transformers 5.23, cli/serving/utils.py, the response template of this family.
_THOUGHT = "thought\n"


class TextStream:
    """Converts committed ids to text, piece by piece.

    Ids separate thoughts from the answer: the markers of a channel are control tokens, and its name
    after the first of them is plain text up to a line break. The channel `thought` is the thought.
    Text of a channel of another name is part of the answer, name and all. A tool call in the answer
    becomes a `ToolCall`; one that a thought mentions is text of the thought.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        eos_token_ids: Iterable[int],
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
    ):
        """Begin after `prompt`, where the template may have left a thought or a call open. The
        answer ends before the first of the strings `stop`; thoughts and calls may contain them."""
        self._tokenizer = tokenizer
        specials = special_tokens(tokenizer)
        self._open, self._close = specials.get(THOUGHT_BEGIN), specials.get(THOUGHT_END)
        self._hidden = {token_id for token, token_id in specials.items() if token not in _SHOWN}
        self._ends = frozenset(eos_token_ids)
        self._ended = False
        self._stops = Stops(stop)
        self._ids: list[int] = []  # of the channel's text so far
        self._shown = 0  # characters of it
        # None inside of a channel whose name may become `thought`.
        self._channel: Literal["answer", "thought"] | None = "answer"
        self._written = 0  # tokens of the channel's text, without those in the prompt
        self._past_thoughts = 0  # tokens of the thoughts before it
        self._calls = CallReader(tokenizer, self._ends, prompt)
        markers = [token for token in prompt if token in (self._open, self._close)]
        if markers and markers[-1] == self._open:
            last = len(prompt) - 1 - list(reversed(prompt)).index(markers[-1])
            self._enter(None)
            self._ids = [token for token in prompt[last + 1 :] if token not in self._hidden]
            self._shown = len(self._decode(final=True))
            self._calls.forget()

    @property
    def stop_string(self) -> str | None:
        """The stop string before which the answer has ended."""
        return self._stops.found

    @property
    def is_stopped(self) -> bool:
        """Whether the answer has ended before a stop string."""
        return self.stop_string is not None

    @property
    def has_ended(self) -> bool:
        """Whether the text is complete: an end token or a stop string was found."""
        return self._ended or self.is_stopped

    @property
    def is_thinking(self) -> bool:
        """Whether a thought is open."""
        return self._channel == "thought" and not self.has_ended

    @property
    def thought_tokens(self) -> int:
        """The number of tokens in thoughts so far, their name included."""
        return self._past_thoughts + (self._written if self._channel == "thought" else 0)

    def push(self, ids: Iterable[int]) -> list[CallEvent]:
        """Return the text and the tool calls that these ids make final; nothing after an end token
        or a stop string."""
        events: list[CallEvent] = []
        for token in ids:
            if self._ended:
                break
            if (read := self._calls.push(token)) is not None:
                events += read
                continue
            events += self._calls.break_off()
            if token in self._ends:
                self._ended = True
            elif token == self._open:
                events += self._flush(final=True)
                self._enter(None)
            elif token == self._close:
                events += self._flush(final=True)
                self._enter("answer")
            elif token == self._calls.begin and self._begins_call(events):
                self._calls.open()
            elif token not in self._hidden and self._spelling(token) is not None:
                self._ids.append(token)
                self._written += 1
        return self._before_stop([*events, *self._flush(final=self._ended)], final=self._ended)

    def finish(self) -> list[CallEvent]:
        """Return the text that was held back, since the run is over; an open call is broken off."""
        return self._before_stop([*self._calls.break_off(), *self._flush(final=True)], final=True)

    def branch(self) -> TextStream:
        """Return a copy that goes on by itself, such as with a draft."""
        other = copy(self)
        other._ids, other._stops, other._calls = (
            [*self._ids],
            copy(self._stops),
            self._calls.branch(),
        )
        return other

    def _begins_call(self, events: list[CallEvent]) -> bool:
        """Return whether the marker of a call begins one here; then add the text before it."""
        events += self._flush(final=False)  # this decides whether an open channel is a thought
        if self._channel == "thought":
            return False
        self._channel = "answer"
        events += self._flush(final=True)
        self._enter("answer")
        return True

    def _before_stop(self, events: Iterable[CallEvent], *, final: bool) -> list[CallEvent]:
        before: list[CallEvent] = []
        for event in events:
            if self.is_stopped:
                break
            if isinstance(event, ToolCall):  # a stop string does not go around it
                before += [Text(held, "answer")] if (held := self._stops.finish()) else []
            if not isinstance(event, Text):
                before.append(event)
                continue
            piece = self._stops.push(event.piece) if event.channel == "answer" else event.piece
            before += [Text(piece, event.channel)] if piece else []
        if final and (held := self._stops.finish()):
            before.append(Text(held, "answer"))
        return before

    def _enter(self, channel: Literal["answer"] | None) -> None:
        self._past_thoughts = self.thought_tokens
        self._channel, self._ids, self._shown, self._written = channel, [], 0, 0

    def _flush(self, *, final: bool) -> list[Text]:
        text = self._decode(final=final)
        if self._channel is None:
            if text.startswith(_THOUGHT) or (final and text in ("", _THOUGHT.strip())):
                self._channel = "thought"
                self._shown = max(self._shown, len(_THOUGHT))
            elif final or not _THOUGHT.startswith(text):
                self._channel = "answer"
            else:
                return []
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return [Text(piece, self._channel)] if piece else []

    def _decode(self, *, final: bool) -> str:
        """Return the channel's text. Unless final, a run of byte tokens at its end waits: a
        character may be incomplete."""
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
        """Return a token's spelling in the vocabulary, or None for an id that only the model
        has."""
        spelling = self._tokenizer.convert_ids_to_tokens(token)
        return None if spelling is None else str(spelling)


class Drafts:
    """A row's whole text at each step, as if the step's draft were final."""

    def __init__(self, stream: TextStream) -> None:
        """Begin with a stream of the row's own."""
        self._stream = stream
        self._texts = {"answer": "", "thought": ""}

    def commit(self, event: CanvasCommitted) -> None:
        """Take the tokens of a canvas."""
        self._add(self._texts, self._stream.push(np.array(event.tokens[0]).tolist()))

    def of(self, event: StepDone) -> tuple[str, str]:
        """Return answer and thought with the step's draft."""
        texts, stream = dict(self._texts), self._stream.branch()
        self._add(texts, stream.push(np.array(event.draft[0]).tolist()))
        self._add(texts, stream.finish())
        return texts["answer"], texts["thought"]

    def _add(self, texts: dict[str, str], events: Iterable[CallEvent]) -> None:
        for event in events:
            if isinstance(event, Text):
                texts[event.channel] += event.piece


def draft_pieces(
    tokenizer: AnyTokenizer, event: StepDone, eos_token_ids: Iterable[int]
) -> list[tuple[str, bool]]:
    """Return the first row's draft as (text, accepted) pieces up to its first end token, for
    display."""
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


# Borders between the colours of certainty.
CERTAINTY_BANDS = (0.25, 0.5, 0.75, 0.95)


class Spellings:
    """Spellings of single tokens for display: control tokens and bytes by their names."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        self._controls = {token_id: name for name, token_id in special_tokens(tokenizer).items()}
        self._known: dict[int, str] = {}

    def is_control(self, token: int) -> bool:
        return token in self._controls

    def __getitem__(self, token: int) -> str:
        """Return a token's spelling, never empty, also for an id that the tokenizer does not
        have."""
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
    """One position of a draft, for display."""

    text: str
    kind: Literal["text", "control", "end", "pad"]
    accepted: bool
    band: int  # of certainty, from 0; see CERTAINTY_BANDS
    pinned: bool = False  # given, not written by the model


def canvas_tokens(
    spellings: Spellings,
    event: StepDone,
    eos_token_ids: Iterable[int],
    pad_token_id: int,
    pinned: Sequence[bool] | None = None,
) -> list[CanvasToken]:
    """Return all of the first row's draft, for display; `pinned` marks the given positions."""
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
            is_given,
        )
        for token, accepted, band, is_given in zip(*columns, pinned or repeat(False), strict=False)
    ]
