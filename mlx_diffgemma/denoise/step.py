"""One denoise step of any number of rows: a forward pass over their canvases, then each row's
proposal and its acceptance. Builds the graph; computes nothing and knows no loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..events import StepDone
from ..model import DiffusionGemma, OpenContext
from . import constrained
from .canvas import Belief, Canvas, Taken
from .classes import LARGEST_BLOCK
from .conditioning import columns, joined, pieces, self_conditioning
from .noise import SeededNoise
from .pinned import PinnedCanvas
from .prefix import settled_columns
from .sampler import (
    Statistics,
    decide,
    draw,
    hold,
    mass_of,
    probability_of,
    scaled_logits,
    shortlist,
    statistics,
    top_candidates,
)
from .schedule import temperature
from .stopping import (
    all_that_matter,
    answer_length,
    columns_to_end,
    columns_to_likely_end,
    is_settled,
    leading_columns,
)
from .warm import going_on, kept_by


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """One forward pass over a row's canvas, W columns of it."""

    outputs: mx.array  # [1, W, V], the head's outputs before the softcap
    thought: Statistics  # of the outputs
    heat: mx.array  # float32, the step's temperature
    cap: float
    allowed: mx.array | None  # bool [1, 1, V], where a set of tokens is given

    @property
    def scaled(self) -> tuple[mx.array, float, mx.array | None]:
        """The arguments that turn outputs into logits in the sampler's functions."""
        return self.heat, self.cap, self.allowed


@dataclass(frozen=True, slots=True, eq=False)
class _Judgement:
    """The accepted tokens of a step, and whether the row has settled."""

    canvas: mx.array  # [1, W] int32, accepted proposals and fresh noise
    accepted: mx.array  # [1, W] bool
    settled: mx.array  # [1] bool
    held: mx.array | None  # [1, W] int32, see `sampler.hold`


def take_step(
    model: DiffusionGemma,
    canvases: Sequence[Canvas],
    opened: list[OpenContext],
    mean_row: mx.array | None = None,
) -> tuple[list[Taken], list[OpenContext]]:
    """Return the graph of one step of several rows, each with its own context, width, step number
    and settings. Unread arrays, such as draws after the last step, are never computed.

    Args:
      model: the model.
      canvases: one per row.
      opened: the rows' open contexts; the list is emptied, see `DiffusionGemma.canvas_states`.
      mean_row: [M], for rows with sparse self-conditioning.

    Returns:
      What each row's step gave, and the contexts for the next one.
    """
    soft = self_conditioning(model, canvases, mean_row)
    states, written = model.canvas_states(
        [columns(c.tokens, 0, c.plan.width) for c in canvases], opened, self_conditioning=soft
    )
    vocab_size = model.config.text.vocab_size
    looks = list(_looks(model, canvases, states))
    choices = _choices(canvases, looks)
    taken = [
        _take(canvas, look, choice, vocab_size)
        for canvas, look, choice in zip(canvases, looks, choices, strict=True)
    ]
    return taken, written


def _choices(canvases: Sequence[Canvas], looks: Sequence[_Look]) -> list[constrained.Choice | None]:
    """Return what is chosen for the canvases under constraints; None for the others."""
    found: list[constrained.Choice | None] = [None] * len(canvases)
    bound = {}
    for row, (canvas, look) in enumerate(zip(canvases, looks, strict=True)):
        if not canvas.constraints:
            continue
        noise = None
        if canvas.settings.temperature != 0:
            assert isinstance(canvas.noise, SeededNoise)
            length = canvas.settings.canvas_length
            noise = canvas.noise.under_constraint(canvas.index, canvas.step, length, LARGEST_BLOCK)
        proposal = _propose(canvas, look)
        free = constrained.Choice(look.thought, proposal, _probability(proposal, look, None))
        bound[row] = constrained.Look(
            canvas.constraints, look.outputs, free, look.heat, look.cap, noise
        )
    if bound:
        for row, choice in zip(bound, constrained.choose(list(bound.values())), strict=True):
            found[row] = choice
    return found


def _take(canvas: Canvas, look: _Look, choice: constrained.Choice | None, vocab_size: int) -> Taken:
    """Return what the step gives for one row, after its forward pass."""
    settings, pinned, W = canvas.settings, canvas.pinned, canvas.plan.width
    shape = (1, settings.canvas_length)
    if choice is None:
        seen, proposal = look.thought, _propose(canvas, look)
    else:
        seen, proposal = choice.seen, choice.proposal
    # Always for the whole canvas, so that a position's draw does not depend on the width.
    fresh = canvas.noise.renoise(canvas.index, canvas.step, shape, vocab_size)
    if pinned is not None:
        fresh = pinned.kept_to(fresh)
        seen, proposal = _with_given(seen, proposal, pinned)
    draft = seen.draft
    length = answer_length(draft, settings.eos_token_ids) if settings.looks_for_end else None
    fresh_columns, matters = columns(fresh, 0, W), _matters(canvas, length)
    judged = _judge(canvas, look, choice, seen, proposal, fresh_columns, matters)
    settled, check = judged.settled, []
    kept = kept_by(canvas, look.thought)
    if choice is not None and choice.is_decided:
        settled = mx.ones_like(settled)
    seen_settled = settled
    if settings.canvas_width == "answer":
        assert length is not None
        needed = columns_to_end(length, judged.accepted, canvas.plan.widest)
        if settings.width_mass:
            ended = mass_of({*settings.eos_token_ids, settings.pad_token_id}, look.thought)
            likely = columns_to_likely_end(ended, length, settings.width_mass, canvas.plan.widest)
            needed = mx.minimum(needed, likely)
        if kept is not None and (end := kept.length(settings.eos_token_ids)) is not None:
            needed = mx.array([end])
        check.append(needed)
        # A narrow canvas without its end token does not show the whole answer.
        settled = settled & (needed <= W)
        if settings.lookahead < 1:
            check.append(mx.where(seen_settled, W, leading_columns(judged.accepted)))
    likeliest = None
    if settings.self_conditioning == "sparse":
        likeliest = shortlist(seen.weights, seen.total, settings.sparse_tokens)
        check.append((seen.entropy > settings.sparse_entropy).sum(axis=-1).astype(mx.int32))
    if settings.prefix_commit != "off":
        assert length is not None
        steps, most, drafts = settings.prefix_steps, settings.prefix_entropy, _fitted_drafts(canvas)
        part = settled_columns(draft, drafts, seen.entropy, steps=steps, most_entropy=most)
        check.append(part)
        # An end token in it ends the answer, whatever stands behind.
        settled = settled | (part >= mx.minimum(length, canvas.plan.widest))
    check.insert(0, settled.astype(mx.int32))
    candidates = None
    if count := settings.top_candidates:
        candidates = top_candidates(look.outputs, count, look.thought.confidence, *look.scaled)
    tokens = judged.canvas
    if shape[1] > W:
        tokens = mx.concatenate([tokens, fresh[:, W:]], axis=1)
    after = replace(
        canvas,
        tokens=tokens,
        step=canvas.step + 1,
        drafts=(*canvas.drafts, draft)[-settings.steps_looked_back :],
        belief=Belief(seen.weights, seen.total, seen.entropy, likeliest),
        held=judged.held,
    )
    return Taken(
        StepDone(
            canvas.index,
            canvas.step,
            draft,
            judged.accepted,
            seen.entropy,
            seen.confidence,
            candidates,
            canvas.row,
            _read_out(canvas, look),
        ),
        tuple(check),
        after if kept is None else going_on(after, kept.tokens),
        kept,
    )


def _read_out(canvas: Canvas, look: _Look) -> mx.array | None:
    """Return the log-probabilities that a canvas is asked for, float32 [P, N]."""
    if canvas.readout is None:
        return None
    outputs = look.outputs[0, : canvas.readout.positions]
    logits = scaled_logits(outputs, cap=look.cap)
    certain = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take(certain, mx.array(canvas.readout.tokens), axis=-1)


def _looks(model: DiffusionGemma, canvases: Sequence[Canvas], states: mx.array) -> Iterator[_Look]:
    """Yield each row's outputs and their statistics, from the states [1, T, M] of all rows."""
    cap = model.config.text.final_logit_softcapping
    alone = [c.pinned is not None and c.pinned.is_limited for c in canvases]
    widths = [c.plan.width for c in canvases]
    stop = 0
    for rows in pieces(widths, alone, model.config.text.vocab_size):
        start, stop = stop, stop + sum(widths[row] for row in rows)
        outputs = model.outputs(columns(states, start, stop))
        # Arrays, so that no step costs a new trace.
        some = [canvases[row] for row in rows]
        steps = [c.age + c.skipped + c.step for c in some]
        heats = [
            mx.array(temperature(step, c.settings)) for step, c in zip(steps, some, strict=True)
        ]
        if len(rows) == 1:
            pinned = canvases[rows[0]].pinned
            allowed = None if pinned is None else pinned.allowed
            thought = statistics(outputs, heats[0], cap, allowed)
            yield _Look(outputs, thought, heats[0], cap, allowed)
            continue
        heat = joined(
            [mx.broadcast_to(h, (1, widths[r], 1)) for h, r in zip(heats, rows, strict=True)]
        )
        thought, at = statistics(outputs, heat, cap), 0
        for row, own in zip(rows, heats, strict=True):
            end = at + widths[row]
            part = Statistics(*(x[:, at:end] for x in thought))
            yield _Look(outputs[:, at:end], part, own, cap, None)
            at = end


def _propose(canvas: Canvas, look: _Look) -> mx.array:
    """Return a token for each position, int32 [1, W]: drawn, or the likeliest."""
    noise, W, vocab_size = canvas.noise, canvas.plan.width, look.outputs.shape[-1]
    if canvas.settings.temperature == 0:
        return look.thought.draft
    if type(noise) is SeededNoise:  # the same draws as `sample`, without the logits
        shape = (1, canvas.settings.canvas_length)
        chunks, inside = noise.gumbels(canvas.index, canvas.step, shape, vocab_size)
        return draw(look.thought, (columns(chunks, 0, W), columns(inside, 0, W)))
    return noise.sample(canvas.index, canvas.step, scaled_logits(look.outputs, *look.scaled))


def _matters(canvas: Canvas, length: mx.array | None) -> mx.array | None:
    """Return which positions a canvas waits for, bool [1, W]; None for all of them."""
    matters, W = None, canvas.plan.width
    if canvas.settings.stop_on == "answer":
        assert length is not None
        matters = mx.arange(W) < length[:, None]
    if canvas.pinned is not None:
        free = canvas.pinned.free[:, :W]
        matters = free if matters is None else matters & free
    return matters


def _judge(
    canvas: Canvas,
    look: _Look,
    choice: constrained.Choice | None,
    seen: Statistics,
    proposal: mx.array,
    fresh: mx.array,
    matters: mx.array | None,
) -> _Judgement:
    """Accept certain proposals, renoise the rest from `fresh`, and find whether the row has
    settled."""
    settings, pinned, draft, (B, W) = canvas.settings, canvas.pinned, seen.draft, seen.draft.shape
    held = None
    if settings.acceptance == "confidence":
        tokens, accepted, held = hold(
            proposal,
            _probability(proposal, look, choice),
            draft,
            mx.full((B, W), -1) if canvas.held is None else _fitted(canvas.held, W, -1),
            mx.ones_like(draft, dtype=mx.bool_) if matters is None else matters,
            fresh,
            confidence=settings.acceptance_confidence,
            share=settings.acceptance_share,
        )
        settled = all_that_matter(accepted, matters)
    else:
        tokens, accepted = decide(
            seen.entropy, proposal, fresh, entropy_bound=settings.entropy_bound
        )
        settled = is_settled(
            draft,
            _fitted_drafts(canvas),
            seen.entropy,
            stability_threshold=settings.stability_threshold,
            confidence_threshold=settings.confidence_threshold,
            matters=matters,
            committed=canvas.committed,
        )
    if pinned is not None:
        accepted = accepted | ~pinned.free[:, :W]
        tokens = pinned.over(tokens)
    return _Judgement(tokens, accepted, settled, held)


def _probability(proposal: mx.array, look: _Look, choice: constrained.Choice | None) -> mx.array:
    """Return the probability of a proposal, float32 [1, W]."""
    if choice is not None:
        return choice.probability
    if proposal is look.thought.draft:
        return look.thought.confidence
    return probability_of(proposal, look.thought)


def _with_given(
    thought: Statistics, proposal: mx.array, pinned: PinnedCanvas
) -> tuple[Statistics, mx.array]:
    """Return statistics and proposal with pinned tokens in place of the model's."""
    free = pinned.free[:, : proposal.shape[1]]
    seen = thought._replace(
        draft=pinned.over(thought.draft),
        entropy=mx.where(free, thought.entropy, 0.0),
        confidence=mx.where(free, thought.confidence, 1.0),
    )
    return seen, pinned.over(proposal)


def _fitted_drafts(canvas: Canvas) -> list[mx.array]:
    return [_fitted(previous, canvas.plan.width, -1) for previous in canvas.drafts]


def _fitted(tokens: mx.array, width: int, fill: int) -> mx.array:
    """Return the first columns of [1, W], or all of them padded with `fill`."""
    seen = tokens.shape[1]
    if seen < width:
        return mx.pad(tokens, [(0, 0), (0, width - seen)], constant_values=fill)
    return columns(tokens, 0, width)
