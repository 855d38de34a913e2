"""Draws mixtures of rows and compares each row with the row alone: `python -m
tests.denoise.mixtures`. Not a test.

A random network makes rounding larger from step to step, so that a few rows of many differ in
float32. In float64 (`--doubles`) the same code rounds a billion times less: there no row may differ
at all.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_diffgemma import GenerationSettings, bundled_model, load_model
from mlx_diffgemma.config.generation import ResolvedSettings
from mlx_diffgemma.denoise import loop, stopping
from mlx_diffgemma.denoise.canvas import Canvas
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.pinned import FREE, Pinned, TokenSet
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.denoise.step import take_step
from mlx_diffgemma.events import CanvasCommitted, Finished, LoopEvent, StepDone
from mlx_diffgemma.model import Context, DiffusionGemma, attention, layers
from mlx_diffgemma.model.backend import as_on_gpu
from mlx_diffgemma.model.experts import Router
from mlx_diffgemma.model.layers import softcap
from tests.checkpoints import load_drawn

UNDECIDED = 1e-5  # a decision that hangs on less may fall otherwise by rounding alone
# Through self-conditioning, a random network makes rounding some 5 times larger in each step.
MOST_GROWTH = 30  # from one pass to the next; more is a jump, which no rounding explains
MOST_DRIFT = 0.02  # of the routers' logits
SEEDS = (1, 2, 5, 9, 12, 14)
STYLES = (
    {},
    {"policy": "fast"},
    {"policy": "fast", "self_conditioning": "dense"},
    {"temperature": 0},
    {"self_conditioning": "sparse", "sparse_tokens": 4, "sparse_entropy": 1.0},
    {"canvas_width": "answer", "stop_on": "answer"},
    {"stop_on": "answer", "entropy_bound": 3.0},
    {"commit_pass": "joint"},
    {"acceptance": "confidence", "t_min": 0.2, "t_max": 1.2},
)


@functools.cache
def model_of(number: int, dtype: mx.Dtype = mx.float32) -> DiffusionGemma:
    """A drawn model, or the bundled one for -1."""
    if number < 0:
        model = load_model(bundled_model())
    else:
        model = load_drawn(number, vision=True, sliding_window=(4, 8, 16)[number % 3])
    model.set_dtype(dtype)
    return model


@contextmanager
def doubles() -> Iterator[None]:
    """Compute in float64 whatever is computed in float32, of which only the CPU is capable."""

    def gather_mm(x, weights, *, rhs_indices, **_):  # MLX's knows float32 alone
        return x @ weights[rhs_indices]

    with (
        patch.object(mx, "float32", mx.float64),
        patch.object(mx, "gather_mm", gather_mm),
        patch.object(attention, "exp_below_zero", mx.exp),  # an approximation in float32
        patch.object(layers, "tanh", mx.tanh),
    ):
        yield


@dataclass(frozen=True)
class Drawn:
    """A row of a mixture."""

    tokens: np.ndarray
    is_shared: bool  # it starts from the context of the mixture's shared text
    settings: ResolvedSettings
    pinned: Pinned | None
    joins: int  # before this step of the loop
    leaves: int  # before this one, unless it has ended


@dataclass
class Trace:
    """What a row did: the routers' logits of each pass, the steps, and what came out."""

    decisions: list[tuple[str, list[mx.array], StepDone | None, mx.array | None]] = field(
        default_factory=list
    )
    events: list[LoopEvent] = field(default_factory=list)

    @property
    def ids(self) -> list[list[int]]:
        return [e.tokens[0].tolist() for e in self.events if isinstance(e, CanvasCommitted)]

    @property
    def ends(self) -> list[tuple]:
        return [
            (e.reason, e.new_tokens, e.steps, e.canvases, e.positions)
            for e in self.events
            if isinstance(e, Finished)
        ]


def draw_mixture(rng: np.random.Generator, model: DiffusionGemma) -> tuple[np.ndarray, list[Drawn]]:
    """Return a text to share and the rows."""
    text, L = model.config.text, model.config.canvas_length
    V = text.vocab_size

    def tokens(most: int) -> np.ndarray:
        ids = rng.integers(2, V, int(rng.integers(1, most + 1)), dtype=np.int32)
        return np.where(np.isin(ids, model.config.image_token_ids), 3, ids).astype(np.int32)

    most = min(3 * text.sliding_window, 200)
    rows = []
    for _ in range(int(rng.integers(2, 9))):
        length = int(rng.integers(1, L + 1))
        style = dict(STYLES[rng.integers(len(STYLES))])
        if "policy" not in style and "acceptance" not in style:
            style["stability_threshold"] = int(rng.integers(0, 3))
        settings = GenerationSettings(
            **style,
            seed=int(rng.integers(1 << 30)),
            canvas_length=length,
            max_new_tokens=int(rng.integers(1, 3 * length + 1)),
            max_denoising_steps=int(rng.integers(1, 7)),
            prefill_step_size=int(rng.integers(3, 80)),
            empty_rerolls=int(rng.integers(0, 2)),
            top_candidates=2,
            extra_eos_token_ids=tuple(rng.integers(2, V, 4).tolist()),
        )
        pinned = None
        if rng.random() < 0.3:
            count = int(rng.integers(1, 2 * length + 1))
            given = np.where(rng.random(count) < 0.5, rng.integers(2, V, count), FREE)
            among = TokenSet(np.unique(rng.integers(2, V, 9))) if rng.random() < 0.5 else None
            pinned = Pinned(given.astype(np.int32), among)
        joins = int(rng.integers(0, 6))
        leaves = joins + int(rng.integers(1, 9)) if rng.random() < 0.3 else 1 << 30
        is_shared = rng.random() < 0.3
        resolved = settings.resolve(model.config, is_free=pinned is None)
        rows.append(Drawn(tokens(most), is_shared, resolved, pinned, joins, leaves))
    return tokens(most), rows


@contextmanager
def listening(traces: dict[int, Trace]) -> Iterator[type[Row]]:
    """Record the decisions of rows, which are of the class that this yields."""
    routed: list[mx.array] = []
    reading: list[int] = []
    steps: dict[int, tuple[StepDone, list[mx.array], mx.array]] = {}  # by event
    route, encode = Router.__call__, DiffusionGemma.encode

    def routing(router: Router, x: mx.array) -> tuple[mx.array, mx.array]:
        scaled = x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + router.eps)
        routed.append((scaled * router.scale * router.root) @ router.proj.weight.T)
        return route(router, x)

    def split(widths: list[int]) -> list[list[mx.array]]:
        parts, start = [], 0
        for width in widths:
            parts.append([logits[start : start + width] for logits in routed])
            start += width
        routed.clear()
        return parts

    def reads(model, pieces, contexts, images=None, **more):
        out = encode(model, pieces, contexts, images, **more)
        for number, part in zip(reading, split([p.shape[1] for p in pieces]), strict=bool(reading)):
            traces[number].decisions.append(("read", part, None, None))
        reading.clear()
        return out

    def steps_of(model, canvases: list[Canvas], opened, mean_row=None):
        joint = {
            canvas.row: each.unread.shape[1]
            for canvas, each in zip(canvases, opened, strict=True)
            if each.unread is not None
        }
        taken, later = take_step(model, canvases, opened, mean_row)
        read = sum(joint.values())  # columns before the canvases, but in the last layer
        of_text = [logits[:read] for logits in routed[:-1]]
        start = 0
        for number, count in joint.items():
            part = [logits[start : start + count] for logits in of_text]
            traces[number].decisions.append(("read", part, None, None))
            start += count
        routed[:-1] = [logits[read:] for logits in routed[:-1]]
        parts = split([canvas.plan.width for canvas in canvases])
        for canvas, each, part in zip(canvases, taken, parts, strict=True):
            steps[id(each.event)] = (each.event, part, canvas.tokens)
        return taken, later

    class Listened(Row):
        def take_context(self) -> Context:
            reading.append(self.number)
            return super().take_context()

        def take(self, taken, opened) -> None:
            event, part, tokens = steps[id(taken.event)]
            traces[self.number].decisions.append(("step", part, event, tokens))
            super().take(taken, opened)

    with (
        patch.object(Router, "__call__", routing),
        patch.object(DiffusionGemma, "encode", reads),
        patch.object(loop, "take_step", steps_of),
    ):
        yield Listened


def run(
    model: DiffusionGemma, context: Context, rows: dict[int, Drawn], *, shares: bool
) -> dict[int, Trace]:
    """Run rows together. Alone, nothing joins late, and nothing shares a context."""
    traces = {number: Trace() for number in rows}
    with listening(traces) as make:
        together, made = Rows(model), {}
        time = 0
        while time == 0 or together.rows or len(made) < len(rows):
            for number, drawn in rows.items():
                if number not in made and (drawn.joins <= time or len(rows) == 1):
                    made[number] = make(
                        model,
                        drawn.settings,
                        None if drawn.is_shared else drawn.tokens,
                        number=number,
                        context=context if drawn.is_shared else None,
                        is_shared=drawn.is_shared and shares,
                        pinned=drawn.pinned,
                    )
                    together.add(made[number])
                if drawn.leaves == time and made[number] in together.rows and len(rows) > 1:
                    together.remove(made[number])
            for _, event in together.advance():
                traces[event.row].events.append(event)
            time += 1
    return traces


def first_difference(
    alone: Trace, mixed: Trace, settings: ResolvedSettings, top_k: int
) -> tuple[str, float, bool]:
    """Return where a row first left the row alone, the margin of that decision, and whether
    rounding explains it: until then its numbers drifted, and never by a jump."""
    drift, is_smooth = 0.0, True
    for number, (a, b) in enumerate(zip(alone.decisions, mixed.decisions, strict=False)):
        where = f"{a[0]} {number}, drift {drift:.0e}"
        if a[0] != b[0] or [x.shape for x in a[1]] != [x.shape for x in b[1]]:
            return f"{where}: another pass", np.inf, False
        if a[3] is not None and a[3].tolist() != b[3].tolist():
            return f"{where}: tokens before it", np.inf, is_smooth and drift < MOST_DRIFT
        before = drift
        for depth, (some, other) in enumerate(
            zip(map(np.array, a[1]), map(np.array, b[1]), strict=True)
        ):
            if (gap := _flipped(some, other, top_k)) is not None:
                explained = is_smooth and gap < MOST_GROWTH * drift and drift < MOST_DRIFT
                return f"{where}: experts of layer {depth}", gap, explained
            drift = max(drift, float(np.abs(some - other).max()))
        is_smooth = is_smooth and drift < max(UNDECIDED, MOST_GROWTH * before)
        if a[2] is None:
            continue
        explained = is_smooth and drift < MOST_DRIFT
        first, second = np.array(a[2].draft)[0], np.array(b[2].draft)[0]
        if (differs := first != second).any():
            p = np.log(np.maximum(np.array(a[2].candidates[1])[0], 1e-30))
            gap = float((p[:, 0] - p[:, 1])[differs].max())
            return f"{where}: tokens", gap, explained and gap < MOST_GROWTH * drift
        if a[2].accepted.tolist() != b[2].accepted.tolist():
            entropy = np.sort(np.array(a[2].entropy)[0])
            spent = np.cumsum(entropy) - entropy
            gap = float(np.abs(spent - settings.entropy_bound).min())
            return f"{where}: acceptance", gap, explained
    return f"the end, drift {drift:.0e}", np.inf, is_smooth and drift < MOST_DRIFT


def _flipped(some: np.ndarray, other: np.ndarray, top_k: int) -> float | None:
    """Return on how little a choice of experts hung that fell otherwise; None if none did."""
    if top_k == some.shape[-1]:
        return None
    chosen = [np.sort(np.argsort(-x, axis=-1)[:, :top_k], axis=-1) for x in (some, other)]
    differs = (chosen[0] != chosen[1]).any(axis=-1)
    if not differs.any():
        return None
    ranked = -np.sort(-some[differs], axis=-1)
    return float((ranked[:, top_k - 1] - ranked[:, top_k]).max())


@dataclass
class Tally:
    mixtures: int = 0
    rows: int = 0
    canvases: int = 0
    steps: int = 0
    left: int = 0  # rows that were removed
    shared: int = 0
    pinned: int = 0
    ties: list[str] = field(default_factory=list)
    drifts: list[str] = field(default_factory=list)  # rounding that steps had made larger
    findings: list[str] = field(default_factory=list)


def compare(seed: int, tally: Tally, *, is_exact: bool = False) -> None:
    """Draw a mixture and compare its rows with each alone; where rounding plays no part, alone also
    with a pass of its own for what is committed."""
    rng = np.random.default_rng([18, seed])
    number = (*SEEDS, -1)[seed % (len(SEEDS) + 1)]
    model = model_of(number, mx.float32)
    text, drawn = draw_mixture(rng, model)
    rows, top_k = dict(enumerate(drawn)), model.config.text.top_k_experts
    with (
        as_on_gpu() if rng.random() < 0.5 else nullcontext(),
        patch.object(stopping, "_LEAST_AHEAD", 1),  # canvases are short
    ):
        context = model.prefill(mx.array(text[None]))
        mx.eval(context.arrays)
        together = run(model, context, rows, shares=True)
        for row, each in rows.items():
            mixed = together[row]
            if is_exact:
                each = replace(each, settings=replace(each.settings, commit_pass="own"))
            alone = run(model, context, {row: each}, shares=False)[row]
            tally.rows += 1
            tally.canvases += len(mixed.ids)
            tally.steps += sum(isinstance(event, StepDone) for event in mixed.events)
            tally.shared += each.is_shared
            tally.pinned += each.pinned is not None
            has_left = not mixed.ends
            tally.left += has_left
            expected = alone.ids[: len(mixed.ids)] if has_left else alone.ids
            if mixed.ids == expected and (has_left or mixed.ends == alone.ends):
                continue
            what, margin, is_drift = first_difference(alone, mixed, each.settings, top_k)
            line = f"mixture {seed} (model {number}), row {row}: {what}, margin {margin:.1e}"
            if margin < UNDECIDED:
                tally.ties.append(line)
            else:
                (tally.drifts if is_drift else tally.findings).append(line)
    tally.mixtures += 1


def logits_apart(seed: int) -> float:
    """Return how far a step's logits of rows together are from those of each alone."""
    rng = np.random.default_rng([19, seed])
    model = model_of((*SEEDS, -1)[seed % (len(SEEDS) + 1)], mx.float32)
    text, cap = model.config.text, model.config.text.final_logit_softcapping
    L, apart = model.config.canvas_length, 0.0
    count = int(rng.integers(2, 9))

    def tokens(number: int) -> mx.array:
        return mx.array(rng.integers(0, text.vocab_size, (1, number), dtype=np.int32))

    with as_on_gpu() if rng.random() < 0.5 else nullcontext():
        most = min(3 * text.sliding_window, 200)
        contexts = [model.prefill(tokens(int(rng.integers(1, most + 1)))) for _ in range(count)]
        canvases = [tokens(int(rng.integers(1, L + 1))) for _ in range(count)]
        soft = [
            model.soft_embedding(
                mx.array(4 * rng.standard_normal((1, c.shape[1], text.vocab_size), np.float32))
            )
            for c in canvases
        ]
        opened = [model.open(context, L) for context in contexts]
        states, _ = model.canvas_states(
            canvases, opened, self_conditioning=mx.concatenate(soft, axis=1)
        )
        together, start = np.array(softcap(model.outputs(states), cap)), 0
        for context, canvas, own in zip(contexts, canvases, soft, strict=True):
            stop = start + canvas.shape[1]
            alone = np.array(model.denoise(canvas, context, self_conditioning=own))
            # A column whose experts hang on nothing is another matter, and rare.
            columns = np.abs(together[:, start:stop] - alone).max(axis=(0, 2))
            apart, start = max(apart, float(columns.max())), stop
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doubles", action="store_true", help="in float64, where none may differ")
    options = parser.parse_args()
    tally, apart = Tally(), []
    with doubles() if options.doubles else nullcontext():
        for seed in range(options.seed, options.seed + options.cases):
            compare(seed, tally, is_exact=options.doubles)
            apart.append(logits_apart(seed))
            if (seed + 1) % 25 == 0:
                print(summary(tally), flush=True)
    print(*tally.ties, *tally.drifts, *tally.findings, summary(tally), sep="\n")
    print(
        f"logits of a step: at most {max(apart):.1e} apart, {sum(a > 1e-4 for a in apart)} > 1e-4"
    )
    if tally.findings or (options.doubles and (tally.ties or tally.drifts)):
        raise SystemExit(1)


def summary(tally: Tally) -> str:
    return (
        f"{tally.mixtures} mixtures, {tally.rows} rows ({tally.shared} over a shared context, "
        f"{tally.pinned} pinned, {tally.left} left early), {tally.steps} steps, "
        f"{tally.canvases} canvases: {len(tally.ties)} near ties, "
        f"{len(tally.drifts)} by rounding that steps made larger, {len(tally.findings)} findings"
    )


if __name__ == "__main__":
    main()
