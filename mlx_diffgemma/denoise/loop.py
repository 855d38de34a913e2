"""The only loop: prefill, then per canvas denoise, accept and renoise until settled, then commit.
Knows ids, not text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..config.generation import GenerationSettings, ResolvedSettings
from ..config.model import ModelConfig
from ..errors import ConfigError, PromptError, TemplateError
from ..events import CanvasCommitted, LoopEvent, PrefillDone, StepDone
from ..model import Context, DiffusionGemma, OpenContext
from ..model.backend import is_cpu
from .noise import Noise, SeededNoise
from .pinned import Pinned, PinnedCanvas
from .rows import Plan, Planner, Rows, check_room
from .sampler import (
    Statistics,
    decide,
    draw,
    hold,
    probability_of,
    scaled_logits,
    shortlist,
    statistics,
    top_candidates,
)
from .schedule import temperature
from .stopping import all_that_matter, answer_length, is_settled


def denoise_tokens(
    model: DiffusionGemma,
    tokens: mx.array,
    settings: GenerationSettings | ResolvedSettings,
    *,
    lengths: mx.array | None = None,
    noise: Noise | None = None,
    pinned: Pinned | None = None,
    stop: Callable[[np.ndarray], Sequence[bool]] | None = None,
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
      pinned: what is given of the answers. Pinned tokens stand unchanged in every canvas and in
        every draft; they are never noised, accepted or counted in the stop rule.
      stop: called with each committed canvas, int32 [B, up to L], before it is yielded; a row for
        which it returns True has ended with it, as if an end token stood there.
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
    del context  # so that its memory can go as soon as the first canvas has its copy
    yield from denoise_context(
        model, contexts, settings, longest=int(real.max()), noise=noise, pinned=pinned, stop=stop
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
) -> Generator[LoopEvent, None, None]:
    """`denoise_tokens` behind a context that has been read already: everything after PrefillDone.

    Args:
      model: the model.
      contexts: the context alone. It is taken out of the list; whoever wants it again keeps it.
      settings: how to denoise.
      longest: tokens of the longest row; by default all places of the context.
      noise: as for `denoise_tokens`.
      pinned: as for `denoise_tokens`.
      stop: as for `denoise_tokens`.
    """
    noise = _checked(noise, settings)
    context = contexts.pop()
    if pinned is not None and len(pinned.tokens) != context.batch:
        raise TemplateError(
            f"{len(pinned.tokens)} rows are pinned, the context has {context.batch}"
        )
    rows = Rows(model.config, settings, longest or context.length, context.batch)
    is_sparse = settings.self_conditioning == "sparse"
    run = _Run(model, settings, noise, model.mean_row() if is_sparse else None)
    position = 0  # of the canvas in the answer
    for canvas_index in itertools.count():
        # In a list: each step writes its context over the last one's, and whoever still held that
        # would turn the writing into copying.
        opened = [model.open(context, settings.canvas_length)]
        del context  # the opened one holds a copy, and gives it back
        if pinned is not None:
            here = pinned.canvas(position, settings.canvas_length, run.vocab_size)
            run = replace(run, pinned=here)
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


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What stays the same from step to step."""

    model: DiffusionGemma
    settings: ResolvedSettings
    noise: Noise
    mean_row: mx.array | None  # [M], for sparse self-conditioning
    pinned: PinnedCanvas | None = None  # of the canvas at hand

    @property
    def vocab_size(self) -> int:
        return self.model.config.text.vocab_size


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """Where a canvas stands after a step; lazy. W is how much of the canvas the step looked at."""

    canvas: mx.array  # [B, L] int32, the next step's input
    draft: mx.array  # [B, W] int32
    settled: mx.array  # [B] bool
    row_steps: mx.array  # [B] int32, steps until each row settled
    belief: _Belief | None = None  # what the next step is conditioned on
    held: mx.array | None = None  # [B, W] int32, see `sampler.hold`
    check: mx.array | None = None  # int32 [B, 1 to 3], what the host must know; see `Plan`
    event: StepDone | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Belief:
    """What a step thought, for the soft embedding of the next."""

    weights: mx.array  # [B, W, V], the model's type
    total: mx.array  # [B, W] float32
    entropy: mx.array  # [B, W] float32
    # Ids and probabilities of the likeliest tokens, for a sparse one.
    likeliest: tuple[mx.array, mx.array] | None = None


def _denoise_canvas(
    run: _Run, opened: list[OpenContext], canvas_index: int, rows: Rows
) -> Generator[StepDone, None, _Step]:
    """Denoises one canvas and returns its last step. Rows that have ended start settled."""
    rows.steps_run, settings = 0, run.settings
    B, L = len(rows.ended), settings.canvas_length
    draft, live = mx.full((B, L), settings.pad_token_id, dtype=mx.int32), ~rows.ended
    if run.pinned is not None:
        draft = run.pinned.over(draft)
        live = live & run.pinned.has_free
    last = _Step(draft, draft, mx.array(~live), mx.zeros(B, dtype=mx.int32))
    if not live.any():  # all of it is given
        return last
    last = yield from _settle(run, opened, last, canvas_index, rows, live)
    for attempt in range(1, settings.empty_rerolls + 1 if canvas_index == 0 else 1):
        assert isinstance(run.noise, SeededNoise)
        is_end = np.isin(np.array(last.draft), settings.eos_token_ids)
        empty = is_end[:, 0] & ~rows.ended
        if not empty.any():
            break
        if is_end.shape[1] < L:  # a row that lost its end while narrow has no text for the rest
            empty |= ~is_end.any(axis=1) & ~rows.ended
        last = replace(last, settled=mx.array(~empty))
        again = replace(run, noise=run.noise.reroll(attempt))
        last = yield from _settle(again, opened, last, canvas_index, rows, empty)
    return last


def _settle(
    run: _Run,
    opened: list[OpenContext],
    now: _Step,
    canvas_index: int,
    rows: Rows,
    live: np.ndarray,
) -> Generator[StepDone, None, _Step]:
    """Steps from random tokens until every row has settled, or no step is left; returns the last
    one. `live` are the rows that have not settled, bool [B]."""
    settings, shape = run.settings, (len(live), run.settings.canvas_length)
    start = run.noise.start(canvas_index, shape, run.vocab_size)
    if run.pinned is not None:
        start = run.pinned.kept_to(start)
    now = replace(now, canvas=start, held=None)
    drafts: tuple[mx.array, ...] = ()
    planner = Planner(settings, rows)
    plan = planner.first()
    # Strings of an automaton are chosen on the host, which so waits for every step anyway.
    is_lazy = not is_cpu() and not (run.pinned and run.pinned.spans)

    ahead: tuple[_Step, OpenContext] | None = None
    for step in range(settings.max_denoising_steps):
        if ahead is None:
            now = _step(run, opened, canvas_index, step, now, drafts, plan)
        else:
            now, opened[0] = ahead
            ahead = None
        assert now.event is not None and now.check is not None
        is_last = step + 1 == settings.max_denoising_steps
        listened = (now.event.entropy, *(now.event.candidates or ()))
        # The next canvas too, or what it is drawn from would stay in memory until then.
        mx.async_eval(now.draft, now.check, *(() if is_last else (now.canvas,)), *listened)
        drafts = (*drafts, now.draft)[-max(1, settings.stability_threshold) :]
        if is_lazy and not is_last:
            # Built before this step is looked at, so that the device need not wait for Python;
            # dropped if it settled or the plan changes.
            beyond = list(opened)
            ahead = _step(run, beyond, canvas_index, step + 1, now, drafts, plan), beyond.pop()
        rows.count(live, plan.width)
        yield now.event
        check = np.array(now.check)  # the one host read of a step
        live = check[:, 0] == 0
        if not live.any():
            break
        if not is_last and (new_plan := planner.next(check)) != plan:
            plan, ahead = new_plan, None
    # Logits would live on through the commit: in the belief, and in the canvas that was drawn.
    return replace(now, canvas=now.draft, belief=None, check=None, event=None)


def _step(
    run: _Run,
    opened: list[OpenContext],
    canvas_index: int,
    step: int,
    before: _Step,
    drafts: tuple[mx.array, ...],
    plan: Plan,
) -> _Step:
    """The graph of one step, which puts its context in the place of the last one's. What nobody
    reads, such as draws after the last one, is never computed."""
    settings, noise, pinned, W = run.settings, run.noise, run.pinned, plan.width
    heat = mx.array(temperature(step, settings))  # an array, so that no step costs a new trace
    canvas = before.canvas if W == before.canvas.shape[1] else before.canvas[:, :W]
    soft = None if before.belief is None else _soft_embedding(run, before.belief, plan)
    free = allowed = None
    if pinned is not None:
        free, allowed = pinned.free[:, :W], pinned.allowed(W)
        if soft is not None:
            soft = mx.where(free[..., None], soft, run.model.embed(pinned.tokens[:, :W]))
    outputs, context = run.model.look(canvas, opened.pop(), self_conditioning=soft)
    opened.append(context)
    cap = run.model.config.text.final_logit_softcapping
    thought = seen = statistics(outputs, heat, cap, allowed)
    shape = (before.canvas.shape[0], before.canvas.shape[1])
    if settings.temperature == 0:
        proposal = thought.draft
    elif type(noise) is SeededNoise:  # the same draws as `sample` makes, without making the logits
        chunks, inside = noise.gumbels(canvas_index, step, shape, run.vocab_size)
        proposal = draw(thought, (chunks[:, :W], inside[:, :W]))
    else:
        proposal = noise.sample(canvas_index, step, scaled_logits(outputs, heat, cap, allowed))
    # Always for the whole canvas: a position draws the same, however wide the canvas is.
    fresh = noise.renoise(canvas_index, step, shape, run.vocab_size)
    if pinned is not None:
        fresh = pinned.kept_to(fresh)
        seen, proposal = _with_given(thought, proposal, pinned)
    frozen = before.settled[:, None]
    draft = mx.where(frozen, _fitted(before.draft, W, settings.pad_token_id), seen.draft)
    length = answer_length(draft, settings.eos_token_ids) if settings.looks_for_end else None
    matters = None
    if settings.stop_on == "answer":
        assert length is not None
        matters = mx.arange(W) < length[:, None]
    if free is not None:
        matters = free if matters is None else matters & free
    held = None
    if settings.acceptance == "confidence":
        next_canvas, accepted, held = hold(
            proposal,
            thought.confidence if proposal is thought.draft else probability_of(proposal, thought),
            draft,
            mx.full((shape[0], W), -1) if before.held is None else _fitted(before.held, W, -1),
            mx.ones_like(draft, dtype=mx.bool_) if matters is None else matters,
            fresh[:, :W],
            confidence=settings.acceptance_confidence,
            share=settings.acceptance_share,
        )
        settled = all_that_matter(accepted, matters)
    else:
        next_canvas, accepted = decide(
            seen.entropy, proposal, fresh[:, :W], entropy_bound=settings.entropy_bound
        )
        settled = is_settled(
            draft,
            [_fitted(previous, W, -1) for previous in drafts],
            seen.entropy,
            stability_threshold=settings.stability_threshold,
            confidence_threshold=settings.confidence_threshold,
            matters=matters,
        )
    if pinned is not None and free is not None:
        accepted, next_canvas = accepted | ~free, pinned.over(next_canvas)
    check = []
    if settings.canvas_width == "answer":
        assert length is not None
        needed = _needed(length, accepted, plan.widest)
        check.append(needed)
        # A narrow look that has lost its end has not seen all of the answer.
        settled = settled & (needed <= W)
    settled = before.settled | settled
    check.insert(0, settled.astype(mx.int32))
    likeliest = None
    if settings.self_conditioning == "sparse":
        likeliest = shortlist(seen.weights, seen.total, settings.sparse_tokens)
        check.append((seen.entropy > settings.sparse_entropy).sum(axis=-1))
    count = settings.top_candidates
    candidates = None
    if count:
        candidates = top_candidates(outputs, count, thought.confidence, heat, cap, allowed)
    next_canvas = mx.where(frozen, canvas, next_canvas)
    if W < shape[1]:
        next_canvas = mx.concatenate([next_canvas, fresh[:, W:]], axis=1)
    return _Step(
        canvas=next_canvas,
        draft=draft,
        settled=settled,
        row_steps=before.row_steps + (~before.settled).astype(mx.int32),
        belief=_Belief(seen.weights, seen.total, seen.entropy, likeliest),
        held=held,
        check=mx.stack(check, axis=-1),
        event=StepDone(
            canvas_index, step, draft, accepted, seen.entropy, seen.confidence, candidates
        ),
    )


def _with_given(
    thought: Statistics, proposal: mx.array, pinned: PinnedCanvas
) -> tuple[Statistics, mx.array]:
    """Statistics and proposal with what is given in the place of what the model thinks there."""
    W = proposal.shape[1]
    free, draft, confidence = pinned.free[:, :W], thought.draft, thought.confidence
    if pinned.spans:
        draft = pinned.choose(thought)
        confidence = probability_of(draft, thought)
        proposal = mx.where(pinned.in_span[:, :W], draft, proposal)
    seen = thought._replace(
        draft=pinned.over(draft),
        entropy=mx.where(free, thought.entropy, 0.0),
        confidence=mx.where(free, confidence, 1.0),
    )
    return seen, pinned.over(proposal)


def _soft_embedding(run: _Run, belief: _Belief, plan: Plan) -> mx.array:
    """[B, W, M], for the columns of the plan; zeros for columns that the last step did not see."""
    model, seen = run.model, belief.weights.shape[1]
    W = min(plan.width, seen)
    if belief.likeliest is not None and plan.dense < W:
        assert run.mean_row is not None
        ids, probabilities = (x[:, :W] for x in belief.likeliest)
        soft = model.sparse_embedding(ids, probabilities, run.mean_row)
        if plan.dense:  # the most uncertain positions of each row, by their entropy
            unsure = mx.argpartition(-belief.entropy[:, :W], kth=plan.dense - 1, axis=-1)
            unsure = unsure[:, : plan.dense, None]
            weights = mx.take_along_axis(belief.weights[:, :W], unsure, axis=1)
            total = mx.take_along_axis(belief.total[:, :W], unsure[..., 0], axis=1)
            exact = model.mean_embedding(weights, total)
            soft = mx.put_along_axis(soft, mx.broadcast_to(unsure, exact.shape), exact, axis=1)
    elif W < seen:
        soft = model.mean_embedding(belief.weights[:, :W], belief.total[:, :W])
    else:
        soft = model.mean_embedding(belief.weights, belief.total)
    if W < plan.width:
        soft = mx.pad(soft, [(0, 0), (0, plan.width - W), (0, 0)])
    return soft


def _needed(length: mx.array, accepted: mx.array, widest: int) -> mx.array:
    """Columns that each row needs, int32 [B]: up to its first end token where that has been
    accepted, all of them otherwise."""
    W = accepted.shape[1]
    last = mx.minimum(length, W)[:, None] - 1
    has_end = (length <= W) & mx.take_along_axis(accepted, last, axis=-1)[:, 0]
    return mx.where(has_end, length, widest)


def _fitted(tokens: mx.array, width: int, fill: int) -> mx.array:
    """The first columns of [B, W], or all of them and more that hold `fill`."""
    seen = tokens.shape[1]
    if seen < width:
        return mx.pad(tokens, [(0, 0), (0, width - seen)], constant_values=fill)
    return tokens if seen == width else tokens[:, :width]


def _checked(noise: Noise | None, settings: ResolvedSettings) -> Noise:
    noise = SeededNoise(settings.seed) if noise is None else noise
    if settings.empty_rerolls and not isinstance(noise, SeededNoise):
        raise ConfigError("empty_rerolls needs seeded noise: a replay has no other draws to offer")
    if settings.canvas_width == "answer" and not isinstance(noise, SeededNoise):
        raise ConfigError("canvas_width 'answer' needs seeded noise: a replay's canvas is whole")
    return noise


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
