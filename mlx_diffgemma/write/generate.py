"""Answering prompts: `generate`, `stream_generate` and `batch_generate`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from ..config.generation import GenerationSettings
from ..constraint.constraint import Constraint
from ..denoise.ahead import ReadAhead
from ..denoise.checked import checked_tokens
from ..denoise.noise import Noise
from ..denoise.row import Row
from ..denoise.standing import StandingAnswer
from ..errors import ConfigError, PromptError
from ..events import CanvasCommitted, Event, Finished, PrefillDone, StepDone, Text, ToolCall
from ..language.controls import THOUGHT_END, special_tokens, turn_ends
from ..language.encoded import ImageForm
from ..language.prompt import Prompt, PromptOptions, encode, encode_text
from ..language.stops import stop_strings
from ..language.text import TextStream
from ..language.tools import CallEvent
from ..model import DiffusionGemma
from .constrained import check_answer, over_tokens
from .job import Ask, Job, refuse_other, run_jobs
from .verbose import Printed, PrintedBatch

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer


@dataclass(frozen=True, slots=True)
class BatchResponse:
    """Texts and tool calls of a batch, in the order of its prompts."""

    texts: list[str]
    thoughts: list[str]
    prompt_tokens: int
    finished: tuple[Finished, ...]
    tool_calls: list[list[ToolCall]]


@dataclass(frozen=True, slots=True)
class Request:
    """An answer to one prompt, as a task for an engine; the fields are `generate`'s arguments. A
    standing text without the setting `warm_start`, or the other way round, has no effect here."""

    prompt: Prompt
    settings: GenerationSettings = GenerationSettings()
    prompt_options: PromptOptions = PromptOptions()
    stop: str | Sequence[str] = ()
    constraint: Constraint | None = None
    standing: str | None = None

    def job(
        self,
        model: DiffusionGemma,
        tokenizer: AnyTokenizer,
        *,
        noise: Noise | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Job[Event]:
        """Return the job that answers.

        Raises:
          DiffGemmaError: if the prompt, the stop strings, the settings or the constraint cannot be
            used.
        """
        refuse_other("settings", self.settings, GenerationSettings, "GenerationSettings(seed=7)")
        made = "PromptOptions(thinking=True)"
        refuse_other("prompt_options", self.prompt_options, PromptOptions, made)
        if self.constraint is not None:
            made = 'Constraint.regex("[0-9]+")'
            refuse_other("a constraint", self.constraint, Constraint, made)
        resolved = self.settings.resolve(model.config)
        stands = None
        if self.standing and resolved.warm_start:
            old = np.array(encode_text(tokenizer, self.standing), np.int32)
            ends = turn_ends(tokenizer, resolved)
            reading = None
            if resolved.warm_read:
                reading = ReadAhead(np.append(old, np.int32(ends[0])), resolved.warm_read)
            stands = StandingAnswer(old, ends, reading=reading)
        strings = stop_strings(self.stop)
        bound = None
        if self.constraint is not None:
            self._check_constrained(strings)
            thinking = self.prompt_options.thinking
            bound = over_tokens(self.constraint, model, tokenizer, resolved, thinking=thinking)
        form = ImageForm.of(model.config)
        encoded = encode(tokenizer, self.prompt, self.prompt_options, form)
        tokens = checked_tokens(encoded.ids, model.config, encoded.images)
        stream = TextStream(tokenizer, resolved.eos_token_ids, encoded.ids, strings)
        end = special_tokens(tokenizer).get(THOUGHT_END)
        row = Row(
            model,
            resolved,
            tokens,
            images=encoded.images,
            noise=noise,
            constraint=bound,
            stands=stands,
            progress=progress,
        )
        return _answer(stream, row, end, self.constraint)

    def _check_constrained(self, strings: Sequence[str]) -> None:
        """Refuse what would cut the text that a constraint holds."""
        if strings:
            raise ConfigError("stop strings and a constraint exclude each other; leave one out")
        if self.prompt_options.response_prefix:
            raise ConfigError(
                "a constraint holds the whole answer, so that response_prefix is not possible"
            )


def _answer(
    stream: TextStream, row: Row, end_of_thought: int | None, constraint: Constraint | None
) -> Job[Event]:
    """Yield a row's events, `Text` and calls after each `CanvasCommitted`; a stop string ends the
    row. A canvas begins with the end of a thought that has used up its tokens. What a constraint
    promises is checked before `Finished`."""
    pieces: list[CallEvent] = []
    told: list[CallEvent] = []
    most_thinking = row.settings.max_thinking_tokens

    def stop(tokens: np.ndarray) -> bool:
        pieces[:] = stream.push(tokens.tolist())
        return stream.is_stopped

    def begin() -> list[int]:
        if end_of_thought is None or most_thinking < 0:
            return []
        is_over = stream.is_thinking and stream.thought_tokens >= most_thinking
        return [end_of_thought] if is_over else []

    row.stop, row.begin = stop, begin
    yield Ask([row])
    while True:
        event = yield None
        assert event is not None
        if isinstance(event, Finished):
            told += (rest := list(stream.finish()))
            yield from rest
            if constraint is not None:
                texts = (e.piece for e in told if isinstance(e, Text) and e.channel == "answer")
                calls = [(e.name, e.arguments) for e in told if isinstance(e, ToolCall)]
                check_answer(constraint, "".join(texts), calls)
                event = replace(event, constraint="kept")
            thought = stream.thought_tokens
            yield replace(event, stop_string=stream.stop_string, thought_tokens=thought)
            return
        yield event
        if isinstance(event, CanvasCommitted):
            told += pieces
            yield from pieces


def generate(
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    verbose: bool = False,
    stop: str | Sequence[str] = (),
    constraint: Constraint | None = None,
    standing: str | None = None,
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    noise: Noise | None = None,
) -> str:
    """Return the answer to one prompt, without the model's thoughts and tool calls.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompt: a string is one user turn, a list of messages a chat. A message's content is text, or
        a list of parts such as {"type": "text", "text": "What is this?"} and {"type": "image",
        "image": "photo.jpg"}; instead of a path, an image may be bytes, a Pillow image, an array or
        a data: URL. Token ids may be a list of ints, an array of one row, or the result of the
        tokenizer's `apply_chat_template`.
      max_tokens: most new tokens, as in mlx-lm; the same as the settings' `max_new_tokens`.
      verbose: print the answer while it is written, and then the speed, on stdout.
      stop: strings that end the answer; it ends before the one that is complete first.
      constraint: what the answer must be; `constraint.parse` makes the value of it.
      standing: what the answer is likely to be for the most part, such as the answer to an earlier
        form of the prompt; with the setting `warm_start` alone. The model need not know it.
      settings: how to denoise; the checkpoint fills in open settings.
      prompt_options: system prompt, thinking, tools, and how contents are read.
      noise: where draws come from; by default the settings' seed.

    Raises:
      DiffGemmaError: if the prompt, the stop strings, the settings or the constraint cannot be
        used.
    """
    printed = Printed() if verbose else None
    answer = ""
    for event in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        stop=stop,
        constraint=constraint,
        standing=standing,
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
    tokenizer: AnyTokenizer,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    constraint: Constraint | None = None,
    standing: str | None = None,
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
      constraint: as in `generate`.
      standing: as in `generate`.
      settings: how to denoise; the checkpoint fills in open settings.
      prompt_options: system prompt, thinking, tools, and how contents are read.
      noise: where draws come from; by default the settings' seed.
      prompt_progress_callback: called with (places read, places in all) during prefill.

    Raises:
      DiffGemmaError: if the prompt, the stop strings, the settings or the constraint cannot be
        used.
    """
    limited = _limited(settings, max_tokens)
    if standing is not None and not isinstance(standing, str):
        raise PromptError(f"a standing text is a string, got {type(standing).__name__}")
    if (standing is None) != (not settings.warm_start):
        which = "no standing text" if standing is None else "a standing text"
        raise ConfigError(
            "a standing text and the setting warm_start go together, such as "
            "generate(..., standing=..., settings=GenerationSettings(warm_start=0.1)); "
            f"got {which} with warm_start {settings.warm_start or 0}"
        )
    request = Request(prompt, limited, prompt_options, stop, constraint, standing)
    job = request.job(model, tokenizer, noise=noise, progress=prompt_progress_callback)
    for _, event in run_jobs(model, [job]):
        yield event


def batch_generate(
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = None,
    verbose: bool = False,
    stop: str | Sequence[str] = (),
    constraints: Sequence[Constraint | None] | None = None,
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
      constraints: what each answer must be, one for each prompt, None for any; None for no
        constraint at all.
      settings: how to denoise, the same for all.
      prompt_options: how prompts become tokens, the same for all.

    Raises:
      DiffGemmaError: if a prompt, the stop strings or the settings cannot be used.
    """
    settings = _limited(settings, max_tokens)
    if settings.warm_start:
        raise ConfigError("warm_start has no effect in a batch: there is no standing text")
    seed = settings.resolve(model.config).seed
    jobs, listed = [], _listed(prompts)
    if constraints is None:
        constraints = [None] * len(listed)
    if isinstance(constraints, str) or not isinstance(constraints, Sequence):
        raise ConfigError(
            f"constraints must be a list with one for each prompt, got {type(constraints).__name__}"
        )
    if len(constraints) != len(listed):
        raise ConfigError(
            f"{len(constraints)} constraints for {len(listed)} prompts; give each one"
        )
    for number, (prompt, constraint) in enumerate(zip(listed, constraints, strict=True)):
        own = replace(settings, seed=seed + number)
        request = Request(prompt, own, prompt_options, stop, constraint)
        try:
            jobs.append(request.job(model, tokenizer))
        except PromptError as error:
            raise PromptError(f"prompt {number + 1}: {error}") from error
    printed = PrintedBatch(len(jobs)) if verbose else None
    texts = [{"answer": "", "thought": ""} for _ in jobs]
    calls: list[list[ToolCall]] = [[] for _ in jobs]
    finished: dict[int, Finished] = {}
    prompt_tokens = 0
    for number, event in run_jobs(model, jobs):
        if isinstance(event, Text):
            texts[number][event.channel] += event.piece
        elif isinstance(event, ToolCall):
            calls[number].append(event)
        elif isinstance(event, PrefillDone):
            prompt_tokens += event.prompt_tokens
        elif isinstance(event, Finished):
            finished[number] = replace(event, row=number)
        if printed is not None and not isinstance(event, (StepDone, Text)):
            printed.observe(event, len(finished))
    if printed is not None:
        printed.conclude()
    return BatchResponse(
        [text["answer"] for text in texts],
        [text["thought"] for text in texts],
        prompt_tokens,
        tuple(finished[number] for number in range(len(jobs))),
        calls,
    )


def _limited(settings: GenerationSettings, max_tokens: int | None) -> GenerationSettings:
    refuse_other("settings", settings, GenerationSettings, "GenerationSettings(seed=7)")
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
