"""Answering prompts: `generate`, `stream_generate` and `batch_generate`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..checkpoint.memory import generation_limits
from ..config.generation import GenerationSettings, ResolvedSettings
from ..denoise.loop import denoise_tokens
from ..denoise.noise import Noise
from ..errors import ConfigError, PromptError
from ..events import CanvasCommitted, Event, Finished, PrefillDone, StepDone, Text, ToolCall
from ..language.controls import THOUGHT_END, special_tokens
from ..language.prompt import Prompt, PromptOptions, encode_prompt
from ..language.stops import stop_strings
from ..language.text import TextStream
from ..language.tools import CallEvent
from ..model import DiffusionGemma
from .verbose import Printed, PrintedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class BatchResponse:
    """Texts and tool calls of a batch, in the order of its prompts."""

    texts: list[str]
    thoughts: list[str]
    prompt_tokens: int
    finished: Finished
    tool_calls: list[list[ToolCall]]


def generate(
    model: DiffusionGemma,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    verbose: bool = False,
    stop: str | Sequence[str] = (),
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    noise: Noise | None = None,
) -> str:
    """Return the answer to one prompt, without the model's thoughts and tool calls.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompt: a string is one user turn, a list of messages a chat. Token ids may be a list of ints,
        an array of one row, or the result of the tokenizer's `apply_chat_template`.
      max_tokens: most new tokens, as in mlx-lm; the same as the settings' `max_new_tokens`.
      verbose: print the answer while it is written, and then the speed, on stdout.
      stop: strings that end the answer; it ends before the one that is complete first.
      settings: how to denoise; the checkpoint fills in open settings.
      prompt_options: system prompt, thinking, tools, and how contents are read.
      noise: where draws come from; by default the settings' seed.

    Raises:
      DiffGemmaError: if the prompt, the stop strings or the settings cannot be used.
    """
    printed = Printed() if verbose else None
    answer = ""
    for event in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        stop=stop,
        settings=settings,
        prompt_options=prompt_options,
        noise=noise,
    ):
        if printed is not None:
            printed.observe(event)
        if isinstance(event, Text) and event.channel == "answer":
            answer += event.piece
    return answer


def stream_generate(
    model: DiffusionGemma,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    noise: Noise | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[Event, None, None]:
    """Yield the loop's events, and `Text` and `ToolCall` after each `CanvasCommitted`.

    Closing the generator stops the run. A piece of text never contains a part of a stop string;
    text that may still become one is held back. The run ends with the canvas that completes one,
    with the reason "stop"; all tokens of that canvas count.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompt: as in `generate`.
      max_tokens: as in `generate`.
      stop: as in `generate`.
      settings: how to denoise; the checkpoint fills in open settings.
      prompt_options: system prompt, thinking, tools, and how contents are read.
      noise: where draws come from; by default the settings' seed.
      prompt_progress_callback: called with (places read, places in all) during prefill.

    Raises:
      DiffGemmaError: if the prompt, the stop strings or the settings cannot be used.
    """
    resolved = _limited(settings, max_tokens).resolve(model.config)
    strings = stop_strings(stop)
    ids = encode_prompt(tokenizer, prompt, prompt_options)
    _check_ids(ids, model)
    answers = _Answers(tokenizer, resolved, [ids], strings)
    with generation_limits():
        for event in denoise_tokens(
            model,
            mx.array([ids], dtype=mx.int32),
            resolved,
            noise=noise,
            stop=answers.take,
            begin=answers.begin,
            prompt_progress_callback=prompt_progress_callback,
        ):
            if isinstance(event, Finished):
                yield from answers.finish()[0]
            yield event
            if isinstance(event, CanvasCommitted):
                yield from answers.pieces[0]


def batch_generate(
    model: DiffusionGemma,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = None,
    verbose: bool = False,
    stop: str | Sequence[str] = (),
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
) -> BatchResponse:
    """Answer several prompts at once.

    Rows do not influence each other: row i under seed s is a single run under s + i.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompts: a list of prompts, each as in `generate`; lengths may differ.
      max_tokens: most new tokens of each answer, as in `generate`.
      verbose: print how many prompts are done, and then the speed, on stdout.
      stop: as in `generate`, the same for all.
      settings: how to denoise, the same for all.
      prompt_options: how prompts become tokens, the same for all.

    Raises:
      DiffGemmaError: if a prompt, the stop strings or the settings cannot be used.
    """
    resolved = _limited(settings, max_tokens).resolve(model.config)
    strings = stop_strings(stop)
    rows = []
    for number, prompt in enumerate(_listed(prompts), 1):
        try:
            rows.append(encode_prompt(tokenizer, prompt, prompt_options))
            _check_ids(rows[-1], model)
        except PromptError as error:
            raise PromptError(f"prompt {number}: {error}") from error
    lengths = [len(ids) for ids in rows]
    padded = np.full((len(rows), max(lengths)), resolved.pad_token_id, np.int32)
    for i, ids in enumerate(rows):
        padded[i, -len(ids) :] = ids
    answers = _Answers(tokenizer, resolved, rows, strings)
    calls: list[list[ToolCall]] = [[] for _ in rows]
    channels: list[dict[str, str]] = [{"answer": "", "thought": ""} for _ in rows]
    printed = PrintedBatch(len(rows)) if verbose else None
    prompt_tokens, finished = 0, None
    with generation_limits():
        for event in denoise_tokens(
            model,
            mx.array(padded),
            resolved,
            lengths=mx.array(lengths, dtype=mx.int32),
            stop=answers.take,
            begin=answers.begin,
        ):
            pieces: list[list[CallEvent]] = []
            if isinstance(event, PrefillDone):
                prompt_tokens = event.prompt_tokens
            elif isinstance(event, CanvasCommitted):
                pieces = answers.pieces
            elif isinstance(event, Finished):
                finished, pieces = event, answers.finish()
            for i, piece in ((i, piece) for i, row in enumerate(pieces) for piece in row):
                if isinstance(piece, Text):
                    channels[i][piece.channel] += piece.piece
                elif isinstance(piece, ToolCall):
                    calls[i].append(piece)
            if printed is not None and not isinstance(event, StepDone):
                printed.observe(event, answers.done)
    assert finished is not None
    return BatchResponse(
        [c["answer"] for c in channels],
        [c["thought"] for c in channels],
        prompt_tokens,
        finished,
        calls,
    )


class _Answers:
    """The texts of a run's rows. They tell the loop when a row has ended, and when a canvas is to
    begin with the end of a thought."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: ResolvedSettings,
        prompts: Sequence[list[int]],
        stop: tuple[str, ...],
    ) -> None:
        ends = settings.eos_token_ids
        self._streams = [TextStream(tokenizer, ends, ids, stop) for ids in prompts]
        self._most_thinking = settings.max_thinking_tokens
        self._end_of_thought = special_tokens(tokenizer).get(THOUGHT_END)
        self.pieces: list[list[CallEvent]] = []  # of each row, from the last canvas

    def begin(self) -> list[list[int]]:
        """Return the tokens that each row's next canvas begins with: the end of a thought that has
        used up its tokens."""
        if self._most_thinking < 0 or self._end_of_thought is None:
            return [[] for _ in self._streams]
        return [
            [self._end_of_thought]
            if stream.is_thinking and stream.thought_tokens >= self._most_thinking
            else []
            for stream in self._streams
        ]

    def take(self, tokens: np.ndarray) -> list[bool]:
        """Read a canvas, int32 [B, up to L]; return which rows are stopped."""
        pairs = zip(self._streams, tokens.tolist(), strict=True)
        self.pieces = [stream.push(ids) for stream, ids in pairs]
        return [stream.is_stopped for stream in self._streams]

    def finish(self) -> list[list[CallEvent]]:
        """Return each row's text that was held back."""
        return [stream.finish() for stream in self._streams]

    @property
    def done(self) -> int:
        """The number of rows whose text is complete."""
        return sum(stream.has_ended for stream in self._streams)


def _limited(settings: GenerationSettings, max_tokens: int | None) -> GenerationSettings:
    if max_tokens is None:
        return settings
    if settings.max_new_tokens is not None:
        raise ConfigError(
            f"max_tokens={max_tokens} and the settings' max_new_tokens="
            f"{settings.max_new_tokens} are the same limit; give one of them"
        )
    return replace(settings, max_new_tokens=max_tokens)


def _listed(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of a batch; refuse all forms of a single prompt."""
    items: object = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(items, (str, bytes, bytearray, Mapping)) or not isinstance(items, Sequence):
        raise PromptError(
            f"a batch is a list of prompts, got {type(prompts).__name__}; "
            "put a single prompt into a list, or use generate"
        )
    if not items:
        raise PromptError("the batch is empty")
    for kind, name in ((Integral, "token ids"), (Mapping, "messages")):
        if all(isinstance(item, kind) and not _is_encoding(item) for item in items):
            raise PromptError(
                f"a batch is a list of prompts, got a list of {name}, which is one prompt; "
                "put it into a list, or use generate"
            )
    return list(items)


def _is_encoding(item: object) -> bool:
    return isinstance(item, Mapping) and "input_ids" in item


def _check_ids(ids: Sequence[int], model: DiffusionGemma) -> None:
    """Check ids before they become int32, which would wrap a large one into the vocabulary."""
    vocab_size = model.config.text.vocab_size
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise PromptError(f"token {bad[0]} is outside the vocabulary of {vocab_size}")
