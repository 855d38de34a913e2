"""The denoising loop: prefill, then per canvas denoise, accept and renoise until settled, then
commit. Knows ids, not text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..config.generation import GenerationSettings, ResolvedSettings
from ..config.model import ModelConfig
from ..errors import ConfigError, PromptError, TemplateError
from ..events import CanvasCommitted, LoopEvent, PrefillDone, StepDone
from ..model import Context, DiffusionGemma, OpenContext
from ..model.backend import is_cpu
from .noise import Noise, SeededNoise
from .pinned import Pinned, begun_with
from .rows import Planner, Rows, check_room
from .step import Run, Step, take_step


def denoise_tokens(
    model: DiffusionGemma,
    tokens: mx.array,
    settings: GenerationSettings | ResolvedSettings,
    *,
    lengths: mx.array | None = None,
    noise: Noise | None = None,
    pinned: Pinned | None = None,
    stop: Callable[[np.ndarray], Sequence[bool]] | None = None,
    begin: Callable[[], Sequence[Sequence[int]]] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[LoopEvent, None, None]:
    """Run a batch of prompts to its end. Closing the generator stops the run; no further step is
    computed.

    Args:
      model: the model, whose checkpoint fills in open settings.
      tokens: int32 [B, S]; rows of different lengths are padded on the left, with any token.
      settings: how to denoise.
      lengths: int32 [B], tokens of each row without padding; None where all rows are full.
      noise: the source of draws; by default `SeededNoise` of the settings' seed.
      pinned: the given parts of the answers. Pinned tokens are the same in every canvas and every
        draft; they are never noised, accepted or counted in the stop rule.
      stop: called with each committed canvas, int32 [B, up to L], before it is yielded; a row for
        which it returns True ends with it, as with an end token.
      begin: called before each canvas; returns the tokens that each row's canvas begins with, if
        any. Without effect where `pinned` is given.
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
    noise = _checked(noise, settings)
    real = _check_prompt(tokens, lengths, model.config)
    check_room(model.config, settings, int(real.max()))  # before the prompt is read
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
    contexts = [context]
    del context  # so that its memory is freed once the first canvas has its copy
    yield from denoise_context(
        model,
        contexts,
        settings,
        longest=int(real.max()),
        noise=noise,
        pinned=pinned,
        stop=stop,
        begin=begin,
    )


def denoise_context(
    model: DiffusionGemma,
    contexts: list[Context],
    settings: ResolvedSettings,
    *,
    longest: int | None = None,
    noise: Noise | None = None,
    pinned: Pinned | None = None,
    stop: Callable[[np.ndarray], Sequence[bool]] | None = None,
    begin: Callable[[], Sequence[Sequence[int]]] | None = None,
) -> Generator[LoopEvent, None, None]:
    """Run `denoise_tokens` after a context that has been read already: everything after
    PrefillDone.

    Args:
      model: the model.
      contexts: a list of only the context, which is removed from it; to reuse the context, keep
        another reference.
      settings: how to denoise.
      longest: tokens of the longest row; by default all places of the context.
      noise: as for `denoise_tokens`.
      pinned: as for `denoise_tokens`.
      stop: as for `denoise_tokens`.
      begin: as for `denoise_tokens`.
    """
    noise = _checked(noise, settings)
    context = contexts.pop()
    if pinned is not None and len(pinned.tokens) != context.batch:
        raise TemplateError(
            f"{len(pinned.tokens)} rows are pinned, the context has {context.batch}"
        )
    rows = Rows(model.config, settings, longest or context.length, context.batch)
    is_sparse = settings.self_conditioning == "sparse"
    run = Run(model, settings, noise, model.mean_row() if is_sparse else None)
    position = 0  # of the canvas in the answer
    for canvas_index in itertools.count():
        # In a list: each step overwrites the last one's context, and any other reference to that
        # would make it a copy.
        opened = [model.open(context, settings.canvas_length)]
        del context  # the opened one holds a copy and returns it
        if pinned is not None:
            here = pinned.canvas(position, settings.canvas_length, run.vocab_size)
            run = replace(run, pinned=here)
        elif begin is not None:
            begun = begun_with(begin(), settings.canvas_length, run.vocab_size)
            run = replace(run, pinned=begun)
        last = yield from _denoise_canvas(run, opened, canvas_index, rows)
        committed, row_steps = rows.take(last.draft, last.row_steps)
        position += committed.shape[1]
        if stop is not None:
            rows.end(stop(committed))
        yield CanvasCommitted(canvas_index, mx.array(committed), rows.steps_run, row_steps)
        if rows.are_done:
            del last
            break
        context = model.commit(mx.array(committed), opened.pop().closed())
        del last
        mx.eval(context.arrays)
        mx.clear_cache()
    yield rows.finish()


def _denoise_canvas(
    run: Run, opened: list[OpenContext], canvas_index: int, rows: Rows
) -> Generator[StepDone, None, Step]:
    """Denoise one canvas and return its last step. Rows that have ended start settled."""
    rows.steps_run, settings = 0, run.settings
    B, L = len(rows.ended), settings.canvas_length
    draft, live = mx.full((B, L), settings.pad_token_id, dtype=mx.int32), ~rows.ended
    if run.pinned is not None:
        draft = run.pinned.over(draft)
        live = live & run.pinned.has_free
    last = Step(draft, draft, mx.array(~live), mx.zeros(B, dtype=mx.int32))
    if not live.any():  # all of it is given
        return last
    last = yield from _settle(run, opened, last, canvas_index, rows, live)
    for attempt in range(1, settings.empty_rerolls + 1 if canvas_index == 0 else 1):
        assert isinstance(run.noise, SeededNoise)
        is_end = np.isin(np.array(last.draft), settings.eos_token_ids)
        empty = is_end[:, 0] & ~rows.ended
        if not empty.any():
            break
        if is_end.shape[1] < L:  # a narrow row without an end token lacks the rest
            empty |= ~is_end.any(axis=1) & ~rows.ended
        last = replace(last, settled=mx.array(~empty))
        again = replace(run, noise=run.noise.reroll(attempt))
        last = yield from _settle(again, opened, last, canvas_index, rows, empty)
    return last


def _settle(
    run: Run,
    opened: list[OpenContext],
    now: Step,
    canvas_index: int,
    rows: Rows,
    live: np.ndarray,
) -> Generator[StepDone, None, Step]:
    """Step from random tokens until every row has settled or no step is left; return the last one.
    `live` marks the rows that have not settled, bool [B]."""
    settings, shape = run.settings, (len(live), run.settings.canvas_length)
    start = run.noise.start(canvas_index, shape, run.vocab_size)
    if run.pinned is not None:
        start = run.pinned.kept_to(start)
    now = replace(now, canvas=start, held=None)
    drafts: tuple[mx.array, ...] = ()
    planner = Planner(settings, rows)
    plan = planner.first()
    # The host chooses an automaton's strings, so it waits for every step anyway.
    is_lazy = not is_cpu() and not (run.pinned and run.pinned.spans)

    ahead: tuple[Step, OpenContext] | None = None
    for step in range(settings.max_denoising_steps):
        if ahead is None:
            now = take_step(run, opened, canvas_index, step, now, drafts, plan)
        else:
            now, opened[0] = ahead
            ahead = None
        assert now.event is not None and now.check is not None
        is_last = step + 1 == settings.max_denoising_steps
        listened = (now.event.entropy, *(now.event.candidates or ()))
        # The next canvas too, or the arrays that it is drawn from would stay in memory until then.
        mx.async_eval(now.draft, now.check, *(() if is_last else (now.canvas,)), *listened)
        drafts = (*drafts, now.draft)[-max(1, settings.stability_threshold) :]
        if is_lazy and not is_last:
            # Built before the host reads this step, so that the device need not wait for Python;
            # dropped if the step has settled or the plan changes.
            beyond = list(opened)
            ahead = take_step(run, beyond, canvas_index, step + 1, now, drafts, plan), beyond.pop()
        rows.count(live, plan.width)
        yield now.event
        check = np.array(now.check)  # the one host read of a step
        live = check[:, 0] == 0
        if not live.any():
            break
        if not is_last and (new_plan := planner.next(check)) != plan:
            plan, ahead = new_plan, None
    # Otherwise the belief and the drawn canvas would keep logits in memory through the commit.
    return replace(now, canvas=now.draft, belief=None, check=None, event=None)


def _checked(noise: Noise | None, settings: ResolvedSettings) -> Noise:
    noise = SeededNoise(settings.seed) if noise is None else noise
    if settings.empty_rerolls and not isinstance(noise, SeededNoise):
        raise ConfigError("empty_rerolls needs seeded noise: a replay has no other draws")
    if settings.canvas_width == "answer" and not isinstance(noise, SeededNoise):
        raise ConfigError("canvas_width 'answer' needs seeded noise: a replay's canvas is whole")
    return noise


def _check_prompt(tokens: mx.array, lengths: mx.array | None, config: ModelConfig) -> np.ndarray:
    """Return the number of tokens of each row, after a check of every token: one outside the table
    would be read as garbage."""
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
