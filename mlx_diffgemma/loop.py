"""The only loop: prefill, then per canvas denoise, accept and renoise until settled, then commit.
Knows ids, not text."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .config import ModelConfig
from .errors import ConfigError, PromptError
from .events import CanvasCommitted, Finished, LoopEvent, PrefillDone, StepDone
from .model import Context, DiffusionGemma
from .noise import Noise, SeededNoise
from .sampler import decide, statistics, top_candidates
from .schedule import temperature
from .settings import GenerationSettings, ResolvedSettings
from .stopping import is_settled


def denoise_tokens(
    model: DiffusionGemma,
    tokens: mx.array,
    settings: GenerationSettings | ResolvedSettings,
    *,
    lengths: mx.array | None = None,
    noise: Noise | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[LoopEvent, None, None]:
    """Runs a batch of prompts to its end. Closing the generator stops the run; no further step is
    computed.

    Args:
      model: the model, whose checkpoint fills in what the settings leave open.
      tokens: int32 [B, S]; rows of different lengths are padded on the left, with any token.
      settings: how to denoise.
      lengths: int32 [B], tokens of each row without padding; None where all rows are full.
      noise: where draws come from; by default `SeededNoise` of the settings' seed.
      prompt_progress_callback: called with (places read, places in all) during prefill.

    Yields:
      PrefillDone; per canvas StepDone for each step and CanvasCommitted; Finished.

    Raises:
      PromptError: if a token is outside the vocabulary or stands for an image, or the prompt is
      empty or too long.
      ConfigError: if the settings contradict the checkpoint.
    """
    if isinstance(settings, GenerationSettings):
        settings = settings.resolve(model.config)
    noise = SeededNoise(settings.seed) if noise is None else noise
    if settings.empty_rerolls and not isinstance(noise, SeededNoise):
        raise ConfigError("empty_rerolls needs seeded noise: a replay has no other draws to offer")
    real = _check_prompt(tokens, lengths, model.config)
    rows = _Rows(model.config, settings, longest=int(real.max()), batch=len(real))

    started = time.perf_counter()
    context = model.prefill(
        tokens,
        lengths=lengths,
        step_size=settings.prefill_step_size,
        progress=prompt_progress_callback,
    )
    mx.eval(context.arrays)
    mx.clear_cache()
    yield PrefillDone(int(real.sum()), time.perf_counter() - started)

    for canvas_index in range(rows.canvases):
        last = yield from _denoise_canvas(model, context, canvas_index, settings, noise, rows)
        committed, row_steps = rows.take(last)
        yield CanvasCommitted(canvas_index, mx.array(committed), rows.steps_run, row_steps)
        if rows.ended.all() or canvas_index + 1 == rows.canvases:
            break
        context = model.commit(mx.array(committed), context)
        mx.async_eval(context.arrays)
        mx.clear_cache()
    yield rows.finish()


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """Where a canvas stands after a step; lazy."""

    canvas: mx.array  # [B, L] int32, the next step's input
    draft: mx.array  # [B, L] int32
    settled: mx.array  # [B] bool
    row_steps: mx.array  # [B] int32, steps until each row settled
    logits: mx.array | None = None  # [B, L, V] float32, temperature-scaled
    event: StepDone | None = None


def _denoise_canvas(
    model: DiffusionGemma,
    context: Context,
    canvas_index: int,
    settings: ResolvedSettings,
    noise: Noise,
    rows: _Rows,
) -> Generator[StepDone, None, _Step]:
    """Denoises one canvas and returns its last step. Rows that have ended start settled."""
    rows.steps_run = 0
    settled = mx.array(rows.ended)
    draft = mx.full((context.batch, settings.canvas_length), settings.pad_token_id, dtype=mx.int32)
    before = yield from _settle(model, context, canvas_index, settings, noise, draft, settled, rows)
    for attempt in range(1, settings.empty_rerolls + 1 if canvas_index == 0 else 1):
        assert isinstance(noise, SeededNoise)
        empty = np.isin(np.array(before.draft[:, 0]), settings.eos_token_ids) & ~rows.ended
        if not empty.any():
            break
        spent = before.row_steps
        before = yield from _settle(
            model,
            context,
            canvas_index,
            settings,
            noise.reroll(attempt),
            before.draft,
            mx.array(~empty),
            rows,
        )
        before = replace(before, row_steps=before.row_steps + spent)
    return before


def _settle(
    model: DiffusionGemma,
    context: Context,
    canvas_index: int,
    settings: ResolvedSettings,
    noise: Noise,
    draft: mx.array,
    settled: mx.array,
    rows: _Rows,
) -> Generator[StepDone, None, _Step]:
    """Steps from random tokens until every row has settled, or no step is left; returns the last
    one."""
    shape = (context.batch, settings.canvas_length)
    start = noise.start(canvas_index, shape, model.config.text.vocab_size)
    now = _Step(start, draft, settled, mx.zeros(context.batch, dtype=mx.int32))
    drafts: tuple[mx.array, ...] = ()

    def build(step: int, before: _Step, drafts: tuple[mx.array, ...]) -> _Step:
        return _step(model, context, canvas_index, step, settings, noise, before, drafts)

    following = build(0, now, drafts)
    for step in range(settings.max_denoising_steps):
        now = following
        assert now.event is not None
        mx.async_eval(now.draft, now.event.entropy, now.settled, *(now.event.candidates or ()))
        drafts = (*drafts, now.draft)[-max(1, settings.stability_threshold) :]
        if step + 1 < settings.max_denoising_steps:
            # Built before this step is looked at, so that the device need not wait for Python;
            # dropped if it settled.
            following = build(step + 1, now, drafts)
        rows.steps_run += 1
        yield now.event
        if bool(now.settled.all().item()):  # the one host read of a step
            break
    return replace(now, logits=None, event=None)  # the logits would live on through the commit


def _step(
    model: DiffusionGemma,
    context: Context,
    canvas_index: int,
    step: int,
    settings: ResolvedSettings,
    noise: Noise,
    before: _Step,
    drafts: tuple[mx.array, ...],
) -> _Step:
    """The graph of one step. What nobody reads, such as draws after the last one, is never
    computed."""
    soft = None if before.logits is None else model.soft_embedding(before.logits)
    logits = model.denoise(before.canvas, context, self_conditioning=soft) / temperature(
        step, settings
    )
    draft, entropy = statistics(logits)
    proposal = draft if settings.temperature == 0 else noise.sample(canvas_index, step, logits)
    shape = (context.batch, settings.canvas_length)
    fresh = noise.renoise(canvas_index, step, shape, model.config.text.vocab_size)
    decision = decide(entropy, proposal, fresh, entropy_bound=settings.entropy_bound)
    frozen = before.settled[:, None]
    draft = mx.where(frozen, before.draft, draft)
    settled = before.settled | is_settled(
        draft,
        drafts,
        entropy,
        stability_threshold=settings.stability_threshold,
        confidence_threshold=settings.confidence_threshold,
    )
    count = settings.top_candidates
    candidates = top_candidates(logits, count) if count else None
    return _Step(
        canvas=mx.where(frozen, before.canvas, decision.canvas),
        draft=draft,
        settled=settled,
        row_steps=before.row_steps + (~before.settled).astype(mx.int32),
        logits=logits,
        event=StepDone(canvas_index, step, draft, decision.accepted, entropy, candidates),
    )


class _Rows:
    """What has become of each row: how much it has written, and whether it has ended."""

    def __init__(
        self, config: ModelConfig, settings: ResolvedSettings, *, longest: int, batch: int
    ):
        limit, canvas = config.text.max_position_embeddings, settings.canvas_length
        room = (limit - longest) // canvas
        if room < 1:
            raise PromptError(
                f"the prompt has {longest} tokens; with a canvas of {canvas}, "
                f"at most {limit - canvas} of the {limit} positions are free for it"
            )
        self.settings = settings
        self.canvases = min(-(-settings.max_new_tokens // canvas), room)
        self.left = min(settings.max_new_tokens, self.canvases * canvas)
        self.ended = np.zeros(batch, bool)
        self.steps_run = 0  # of the canvas at hand
        self.new_tokens, self.steps, self.row_canvases = (np.zeros(batch, int) for _ in range(3))

    def take(self, last: _Step) -> tuple[np.ndarray, tuple[int, ...]]:
        """Cuts a denoised canvas at `max_new_tokens`, pads behind end tokens, and counts.

        Returns:
          The tokens [B, up to L], and the steps of each row.
        """
        tokens = np.array(last.draft)[:, : self.left]  # one host read per canvas
        row_steps = np.where(self.ended, 0, np.array(last.row_steps))
        self.left -= tokens.shape[1]
        is_end = np.isin(tokens, self.settings.eos_token_ids)
        ends_before: np.ndarray = np.cumsum(is_end, axis=1) - is_end
        keep = (ends_before == 0) & ~self.ended[:, None]
        tokens = np.where(keep, tokens, self.settings.pad_token_id).astype(np.int32)
        self.new_tokens += keep.sum(axis=1)
        self.steps += row_steps
        self.row_canvases += ~self.ended
        self.ended |= is_end.any(axis=1)
        return tokens, tuple(row_steps.tolist())

    def finish(self) -> Finished:
        return Finished(
            tuple("stop" if ended else "length" for ended in self.ended),
            tuple(self.new_tokens.tolist()),
            tuple(self.steps.tolist()),
            tuple(self.row_canvases.tolist()),
        )


def _check_prompt(tokens: mx.array, lengths: mx.array | None, config: ModelConfig) -> np.ndarray:
    """Tokens of each row, after a look at every one of them: a token outside the table would be
    read as garbage."""
    host = np.array(tokens)
    if host.ndim != 2 or host.size == 0:
        raise PromptError(
            f"the prompt is empty: tokens must be [B, S] with at least one token, got {host.shape}"
        )
    real = np.full(host.shape[0], host.shape[1]) if lengths is None else np.array(lengths)
    if real.shape != host.shape[:1] or real.min() < 1 or real.max() > host.shape[1]:
        raise PromptError(
            f"lengths must be {host.shape[0]} numbers from 1 to {host.shape[1]}, "
            f"got {real.tolist()}"
        )
    is_real = np.arange(host.shape[1]) >= (host.shape[1] - real)[:, None]
    vocab_size = config.text.vocab_size
    if (bad := host[(host < 0) | (host >= vocab_size)]).size:
        raise PromptError(f"token {bad[0]} is outside the vocabulary of {vocab_size}")
    if (image := host[is_real & np.isin(host, config.image_token_ids)]).size:
        raise PromptError(f"the prompt holds image token {image[0]}; images are not supported yet")
    return real
