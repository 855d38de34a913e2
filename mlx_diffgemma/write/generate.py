"""Prompts in, text out: the functions most programs need."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..checkpoint.memory import generation_limits
from ..config.generation import GenerationSettings
from ..denoise.loop import denoise_tokens
from ..denoise.noise import Noise
from ..errors import PromptError
from ..events import CanvasCommitted, Event, Finished, PrefillDone, Text
from ..language.prompt import Prompt, PromptOptions, encode_prompt
from ..language.text import TextStream
from ..model import DiffusionGemma

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class BatchResponse:
    """Texts of a batch, in the order of its prompts."""

    texts: list[str]
    thoughts: list[str]
    prompt_tokens: int
    finished: Finished


def generate(
    model: DiffusionGemma,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    noise: Noise | None = None,
) -> str:
    """The answer to one prompt, without the model's thoughts.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompt: a string is one user turn, a list of messages a chat, a list of ints token ids.
      settings: how to denoise; what is left open, the checkpoint decides.
      prompt_options: system prompt, thinking, and how contents are read.
      noise: where draws come from; by default the settings' seed.

    Raises:
      DiffGemmaError: if the prompt or the settings cannot be used.
    """
    events = stream_generate(
        model, tokenizer, prompt, settings=settings, prompt_options=prompt_options, noise=noise
    )
    return "".join(
        event.piece for event in events if isinstance(event, Text) and event.channel == "answer"
    )


def stream_generate(
    model: DiffusionGemma,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    noise: Noise | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[Event, None, None]:
    """The loop's events, and `Text` behind each `CanvasCommitted`. Closing the generator stops the
    run.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompt: a string is one user turn, a list of messages a chat, a list of ints token ids.
      settings: how to denoise; what is left open, the checkpoint decides.
      prompt_options: system prompt, thinking, and how contents are read.
      noise: where draws come from; by default the settings' seed.
      prompt_progress_callback: called with (places read, places in all) during prefill.

    Raises:
      DiffGemmaError: if the prompt or the settings cannot be used.
    """
    ids = encode_prompt(tokenizer, prompt, prompt_options)
    _check_ids(ids, model)
    resolved = settings.resolve(model.config)
    text = TextStream(tokenizer, resolved.eos_token_ids, ids)
    with generation_limits():
        for event in denoise_tokens(
            model,
            mx.array([ids], dtype=mx.int32),
            resolved,
            noise=noise,
            prompt_progress_callback=prompt_progress_callback,
        ):
            if isinstance(event, Finished):
                yield from text.finish()
            yield event
            if isinstance(event, CanvasCommitted):
                yield from text.push(np.array(event.tokens[0]).tolist())


def batch_generate(
    model: DiffusionGemma,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
) -> BatchResponse:
    """Answers several prompts at once. Rows do not influence each other: row i under seed s is a
    single run under s + i.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompts: each as in `generate`; lengths may differ.
      settings: how to denoise, the same for all.
      prompt_options: how prompts become tokens, the same for all.

    Raises:
      DiffGemmaError: if a prompt or the settings cannot be used.
    """
    if not prompts:
        raise PromptError("the batch is empty")
    rows = [encode_prompt(tokenizer, prompt, prompt_options) for prompt in prompts]
    for ids in rows:
        _check_ids(ids, model)
    resolved = settings.resolve(model.config)
    lengths = [len(ids) for ids in rows]
    padded = np.full((len(rows), max(lengths)), resolved.pad_token_id, np.int32)
    for i, ids in enumerate(rows):
        padded[i, -len(ids) :] = ids
    streams = [TextStream(tokenizer, resolved.eos_token_ids, ids) for ids in rows]
    channels: list[dict[str, str]] = [{"answer": "", "thought": ""} for _ in rows]
    prompt_tokens, finished = 0, None
    with generation_limits():
        for event in denoise_tokens(
            model, mx.array(padded), resolved, lengths=mx.array(lengths, dtype=mx.int32)
        ):
            if isinstance(event, PrefillDone):
                prompt_tokens = event.prompt_tokens
            elif isinstance(event, CanvasCommitted):
                for stream, channel, ids in zip(
                    streams, channels, np.array(event.tokens).tolist(), strict=True
                ):
                    for text in stream.push(ids):
                        channel[text.channel] += text.piece
            elif isinstance(event, Finished):
                finished = event
    for stream, channel in zip(streams, channels, strict=True):
        for text in stream.finish():
            channel[text.channel] += text.piece
    assert finished is not None
    return BatchResponse(
        [c["answer"] for c in channels], [c["thought"] for c in channels], prompt_tokens, finished
    )


def _check_ids(ids: Sequence[int], model: DiffusionGemma) -> None:
    """Before they are packed as int32, which would wrap a large one into the vocabulary."""
    vocab_size = model.config.text.vocab_size
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise PromptError(f"token {bad[0]} is outside the vocabulary of {vocab_size}")
