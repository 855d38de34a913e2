"""Answering prompts: `generate`, `stream_generate` and `batch_generate`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..checkpoint.memory import generation_limits
from ..config.generation import GenerationSettings
from ..denoise.loop import denoise_tokens
from ..denoise.noise import Noise
from ..errors import ConfigError, PromptError
from ..events import CanvasCommitted, Event, Finished, StepDone, Text
from ..language.prompt import Prompt, PromptOptions, encode_prompt
from ..language.stops import stop_strings
from ..language.text import TextStream
from ..model import DiffusionGemma
from .verbose import Printed, PrintedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class BatchResponse:
    """Texts of a batch, in the order of its prompts."""

    texts: list[str]
    thoughts: list[str]
    prompt_tokens: int
    finished: tuple[Finished, ...]


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
    """Return the answer to one prompt, without the model's thoughts.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompt: a string is one user turn, a list of messages a chat. Token ids may be a list of ints,
        an array of one row, or the result of the tokenizer's `apply_chat_template`.
      max_tokens: most new tokens, as in mlx-lm; the same as the settings' `max_new_tokens`.
      verbose: print the answer while it is written, and then the speed, on stdout.
      stop: strings that end the answer; it ends before the one that is complete first.
      settings: how to denoise; the checkpoint fills in open settings.
      prompt_options: system prompt, thinking, and how contents are read.
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
    """Yield the loop's events, and `Text` after each `CanvasCommitted`.

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
      prompt_options: system prompt, thinking, and how contents are read.
      noise: where draws come from; by default the settings' seed.
      prompt_progress_callback: called with (places read, places in all) during prefill.

    Raises:
      DiffGemmaError: if the prompt, the stop strings or the settings cannot be used.
    """
    resolved = _limited(settings, max_tokens).resolve(model.config)
    strings = stop_strings(stop)
    ids = encode_prompt(tokenizer, prompt, prompt_options)
    _check_ids(ids, model)
    answer = _Answer(TextStream(tokenizer, resolved.eos_token_ids, ids, strings))
    with generation_limits():
        for event in denoise_tokens(
            model,
            mx.array([ids], dtype=mx.int32),
            resolved,
            noise=noise,
            stop=lambda _, tokens: answer.take(tokens),
            prompt_progress_callback=prompt_progress_callback,
        ):
            if isinstance(event, Finished):
                yield from answer.stream.finish()
            yield event
            if isinstance(event, CanvasCommitted):
                yield from answer.pieces


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
    answers = [_Answer(TextStream(tokenizer, resolved.eos_token_ids, ids, strings)) for ids in rows]
    printed = PrintedBatch(len(rows)) if verbose else None
    finished: list[Finished | None] = [None] * len(rows)
    with generation_limits():
        for event in denoise_tokens(
            model,
            mx.array(padded),
            resolved,
            lengths=mx.array(lengths, dtype=mx.int32),
            stop=lambda row, tokens: answers[row].take(tokens),
        ):
            if isinstance(event, Finished):
                answers[event.row].keep(answers[event.row].stream.finish())
                finished[event.row] = event
            elif isinstance(event, CanvasCommitted):
                answers[event.row].keep(answers[event.row].pieces)
            if printed is not None and not isinstance(event, StepDone):
                printed.observe(event, sum(one is not None for one in finished))
    if printed is not None:
        printed.conclude()
    return BatchResponse(
        [answer.text["answer"] for answer in answers],
        [answer.text["thought"] for answer in answers],
        sum(lengths),
        tuple(one for one in finished if one is not None),
    )


class _Answer:
    """The text of a row, which tells the loop when the row has ended."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.pieces: list[Text] = []  # from the last canvas
        self.text = {"answer": "", "thought": ""}

    def take(self, tokens: np.ndarray) -> bool:
        """Read a canvas, int32 [up to L]; return whether a stop string ends the row."""
        self.pieces = self.stream.push(tokens.tolist())
        return self.stream.is_stopped

    def keep(self, pieces: list[Text]) -> None:
        """Add pieces to the whole text."""
        for piece in pieces:
            self.text[piece.channel] += piece.piece


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
