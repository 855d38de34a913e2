"""One denoise step: a forward pass over the canvas, the proposal and its acceptance. Builds the
graph; computes nothing and knows no loop."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..config.generation import ResolvedSettings
from ..events import StepDone
from ..model import DiffusionGemma, OpenContext
from .noise import Noise, SeededNoise
from .pinned import PinnedCanvas
from .rows import Plan
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


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The values that all steps share."""

    model: DiffusionGemma
    settings: ResolvedSettings
    noise: Noise
    mean_row: mx.array | None  # [M], for sparse self-conditioning
    pinned: PinnedCanvas | None = None  # of the current canvas

    @property
    def vocab_size(self) -> int:
        return self.model.config.text.vocab_size


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The state of a canvas after a step; lazy. W is the number of columns that the step
    computed."""

    canvas: mx.array  # [B, L] int32, the next step's input
    draft: mx.array  # [B, W] int32
    settled: mx.array  # [B] bool
    row_steps: mx.array  # [B] int32, steps until each row settled
    belief: Belief | None = None  # for the next step's self-conditioning
    held: mx.array | None = None  # [B, W] int32, see `sampler.hold`
    check: mx.array | None = None  # int32 [B, 1 to 3], the numbers that the host reads; see `Plan`
    event: StepDone | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Belief:
    """The prediction of a step, for the next one's self-conditioning."""

    weights: mx.array  # [B, W, V], the model's type
    total: mx.array  # [B, W] float32
    entropy: mx.array  # [B, W] float32
    # Ids and probabilities of the likeliest tokens, for a sparse one.
    likeliest: tuple[mx.array, mx.array] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """One forward pass over the canvas, W columns of it."""

    outputs: mx.array  # [B, W, V], the head's outputs before the softcap
    thought: Statistics  # of the outputs
    heat: mx.array  # float32, the step's temperature
    cap: float
    allowed: mx.array | None  # bool, broadcasts to [B, W, V]; where a pinned set of tokens is

    @property
    def scaled(self) -> tuple[mx.array, float, mx.array | None]:
        """The arguments that turn outputs into logits in the sampler's functions."""
        return self.heat, self.cap, self.allowed


@dataclass(frozen=True, slots=True, eq=False)
class _Judgement:
    """The accepted tokens of a step, and the rows that have settled."""

    canvas: mx.array  # [B, W] int32, accepted proposals and fresh noise
    accepted: mx.array  # [B, W] bool
    settled: mx.array  # [B] bool
    held: mx.array | None  # [B, W] int32, see `sampler.hold`


def take_step(
    run: Run,
    opened: list[OpenContext],
    canvas_index: int,
    step: int,
    before: Step,
    drafts: tuple[mx.array, ...],
    plan: Plan,
) -> Step:
    """Return the graph of one step, which replaces the last one's context by its own. Unread
    arrays, such as draws after the last step, are never computed.

    Args:
      run: the values that all steps share.
      opened: a list of only the context; the step replaces it by its own.
      canvas_index: of the canvas, from 0.
      step: from 0.
      before: the step before, or the start of the canvas.
      drafts: [B, W] each, of the last `stability_threshold` steps.
      plan: how many columns to compute.
    """
    settings, pinned, W = run.settings, run.pinned, plan.width
    shape = (before.canvas.shape[0], before.canvas.shape[1])
    canvas = before.canvas if W == shape[1] else before.canvas[:, :W]
    look = _look(run, opened, canvas, before, step, plan)
    seen = look.thought
    proposal = _propose(run, look, canvas_index, step, shape)
    # Always for the whole canvas, so that a position's draw does not depend on the width.
    fresh = run.noise.renoise(canvas_index, step, shape, run.vocab_size)
    if pinned is not None:
        fresh = pinned.kept_to(fresh)
        seen, proposal = _with_given(look.thought, proposal, pinned)
    frozen = before.settled[:, None]
    draft = mx.where(frozen, _fitted(before.draft, W, settings.pad_token_id), seen.draft)
    length = answer_length(draft, settings.eos_token_ids) if settings.looks_for_end else None
    judged = _judge(
        run, look, seen, proposal, fresh[:, :W], draft, drafts, before, _matters(run, length, W)
    )
    settled, check = judged.settled, []
    if settings.canvas_width == "answer":
        assert length is not None
        needed = _needed(length, judged.accepted, plan.widest)
        check.append(needed)
        # A narrow canvas without its end token does not show the whole answer.
        settled = settled & (needed <= W)
    settled = before.settled | settled
    check.insert(0, settled.astype(mx.int32))
    likeliest = None
    if settings.self_conditioning == "sparse":
        likeliest = shortlist(seen.weights, seen.total, settings.sparse_tokens)
        check.append((seen.entropy > settings.sparse_entropy).sum(axis=-1))
    candidates = None
    if count := settings.top_candidates:
        confidence = look.thought.confidence
        candidates = top_candidates(look.outputs, count, confidence, *look.scaled)
    next_canvas = mx.where(frozen, canvas, judged.canvas)
    if W < shape[1]:
        next_canvas = mx.concatenate([next_canvas, fresh[:, W:]], axis=1)
    return Step(
        canvas=next_canvas,
        draft=draft,
        settled=settled,
        row_steps=before.row_steps + (~before.settled).astype(mx.int32),
        belief=Belief(seen.weights, seen.total, seen.entropy, likeliest),
        held=judged.held,
        check=mx.stack(check, axis=-1),
        event=StepDone(
            canvas_index, step, draft, judged.accepted, seen.entropy, seen.confidence, candidates
        ),
    )


def _look(
    run: Run,
    opened: list[OpenContext],
    canvas: mx.array,
    before: Step,
    step: int,
    plan: Plan,
) -> _Look:
    """Run the model over the canvas, with self-conditioning on the step before."""
    pinned, W = run.pinned, plan.width
    heat = mx.array(temperature(step, run.settings))  # an array, so that no step costs a new trace
    soft = None if before.belief is None else _soft_embedding(run, before.belief, plan)
    if pinned is not None and soft is not None:
        given = run.model.embed(pinned.tokens[:, :W])
        soft = mx.where(pinned.free[:, :W, None], soft, given)
    outputs, context = run.model.look(canvas, opened.pop(), self_conditioning=soft)
    opened.append(context)
    cap = run.model.config.text.final_logit_softcapping
    allowed = None if pinned is None else pinned.allowed(W)
    return _Look(outputs, statistics(outputs, heat, cap, allowed), heat, cap, allowed)


def _propose(
    run: Run, look: _Look, canvas_index: int, step: int, shape: tuple[int, int]
) -> mx.array:
    """Return a token for each position, int32 [B, W]: drawn, or the likeliest. `shape` is that of
    the whole canvas."""
    noise, W = run.noise, look.outputs.shape[1]
    if run.settings.temperature == 0:
        return look.thought.draft
    if type(noise) is SeededNoise:  # the same draws as `sample`, without the logits
        chunks, inside = noise.gumbels(canvas_index, step, shape, run.vocab_size)
        return draw(look.thought, (chunks[:, :W], inside[:, :W]))
    return noise.sample(canvas_index, step, scaled_logits(look.outputs, *look.scaled))


def _matters(run: Run, length: mx.array | None, width: int) -> mx.array | None:
    """Return which positions a canvas waits for, bool [B, W]; None for all of them."""
    matters = None
    if run.settings.stop_on == "answer":
        assert length is not None
        matters = mx.arange(width) < length[:, None]
    if run.pinned is not None:
        free = run.pinned.free[:, :width]
        matters = free if matters is None else matters & free
    return matters


def _judge(
    run: Run,
    look: _Look,
    seen: Statistics,
    proposal: mx.array,
    fresh: mx.array,
    draft: mx.array,
    drafts: tuple[mx.array, ...],
    before: Step,
    matters: mx.array | None,
) -> _Judgement:
    """Accept certain proposals, renoise the rest from `fresh`, and find the rows that have
    settled."""
    settings, pinned, (B, W) = run.settings, run.pinned, draft.shape
    held = None
    if settings.acceptance == "confidence":
        thought = look.thought
        next_canvas, accepted, held = hold(
            proposal,
            thought.confidence if proposal is thought.draft else probability_of(proposal, thought),
            draft,
            mx.full((B, W), -1) if before.held is None else _fitted(before.held, W, -1),
            mx.ones_like(draft, dtype=mx.bool_) if matters is None else matters,
            fresh,
            confidence=settings.acceptance_confidence,
            share=settings.acceptance_share,
        )
        settled = all_that_matter(accepted, matters)
    else:
        next_canvas, accepted = decide(
            seen.entropy, proposal, fresh, entropy_bound=settings.entropy_bound
        )
        settled = is_settled(
            draft,
            [_fitted(previous, W, -1) for previous in drafts],
            seen.entropy,
            stability_threshold=settings.stability_threshold,
            confidence_threshold=settings.confidence_threshold,
            matters=matters,
        )
    if pinned is not None:
        accepted = accepted | ~pinned.free[:, :W]
        next_canvas = pinned.over(next_canvas)
    return _Judgement(next_canvas, accepted, settled, held)


def _with_given(
    thought: Statistics, proposal: mx.array, pinned: PinnedCanvas
) -> tuple[Statistics, mx.array]:
    """Return statistics and proposal with pinned tokens in place of the model's."""
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


def _soft_embedding(run: Run, belief: Belief, plan: Plan) -> mx.array:
    """Return the soft embedding [B, W, M] for the plan's columns; 0 where the last step did not
    compute one."""
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
    """Return the columns that each row needs, int32 [B]: up to its first end token if that has been
    accepted, else all."""
    W = accepted.shape[1]
    last = mx.minimum(length, W)[:, None] - 1
    has_end = (length <= W) & mx.take_along_axis(accepted, last, axis=-1)[:, 0]
    return mx.where(has_end, length, widest)


def _fitted(tokens: mx.array, width: int, fill: int) -> mx.array:
    """Return the first columns of [B, W], or all of them padded with `fill`."""
    seen = tokens.shape[1]
    if seen < width:
        return mx.pad(tokens, [(0, 0), (0, width - seen)], constant_values=fill)
    return tokens if seen == width else tokens[:, :width]
