"""Draws conversations with retries and edits, over one store, and compares each answer with the one
without a store: `python -m tests.denoise.conversations`. Not a test.

A text that is read in other pieces is computed by products of other shapes, which round otherwise.
So an answer may differ where its first decision that fell otherwise, of a router or a step, was a
near tie: `mixtures.first_difference` measures that, over all passes that the answer hangs on, those
of earlier turns included. These are counted and shown. Any other difference is a finding.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile

import mlx.core as mx
import numpy as np

from mlx_diffgemma import GenerationSettings, Store
from mlx_diffgemma.config.generation import ResolvedSettings
from mlx_diffgemma.config.model import TextConfig
from mlx_diffgemma.denoise.images import Features, Placed, as_text
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.store import Node
from mlx_diffgemma.events import CanvasCommitted, PrefillDone
from mlx_diffgemma.language.images import ImagePatches
from mlx_diffgemma.model import Context, DiffusionGemma
from tests.denoise.mixtures import UNDECIDED, Trace, first_difference, listening, model_of
from tests.denoise.pictures import draw_picture, ids_of

MODELS = (2, 4, -1)  # canvases of 7 and 64 tokens; the last one is the bundled model


@dataclass
class Told:
    """What the conversations gave."""

    turns: int = 0
    found: int = 0  # tokens that were not read again
    read: int = 0
    ties: list[str] = field(default_factory=list)
    drifts: list[str] = field(default_factory=list)  # rounding that steps had made larger
    findings: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return (
            f"{self.turns} turns, {self.found} tokens found and {self.read} read, "
            f"{len(self.ties)} near ties, {len(self.drifts)} by rounding that steps made larger, "
            f"{len(self.findings)} findings"
        )


Routed = list[np.ndarray]  # the routers' logits of a text, [S, E] in each layer


class Watched(Store):
    """A store that remembers the routers' logits behind what it keeps, twice: parts of full layers
    may come from another reading than sliding layers."""

    trace = Trace()  # of the row that uses it
    found: tuple[Routed, Routed] = ([], [])

    def find(self, tokens: np.ndarray, config: TextConfig) -> Context | None:
        context = super().find(tokens, config)
        self.found = ([], [])
        if context is not None:
            node = self._node(tokens[: context.length])
            parts = [each.parts for each in node.path()]  # type: ignore[attr-defined]
            full = [np.concatenate(layers) for layers in zip(*parts, strict=True)]
            self.found = full, node.at_end  # type: ignore[attr-defined]
        return context

    def keep(self, tokens: np.ndarray, context: Context, config: TextConfig) -> None:
        before = {node: node.sliding for node in self._beginnings(tokens)}
        super().keep(tokens, context, config)
        node = self._node(tokens)
        if node.length < len(tokens):
            return  # it does not fit
        full, at_end = (joined([found, *self._read()]) for found in self.found)
        if node not in before:
            assert node.parent is not None
            node.parts = [layer[node.parent.length :] for layer in full]  # type: ignore[attr-defined]
        if before.get(node) is None:
            node.at_end = at_end  # type: ignore[attr-defined]

    def _read(self) -> list[Routed]:
        return [list(map(np.array, each[1])) for each in self.trace.decisions if each[0] == "read"]

    def _node(self, tokens: np.ndarray) -> Node:
        return max(self._beginnings(tokens), key=lambda n: n.length)


def joined(parts: list[Routed]) -> Routed:
    return [np.concatenate(layers) for layers in zip(*filter(None, parts), strict=True)]


def whole(trace: Trace, found: Routed) -> Trace:
    """What a row and the readings that it goes on from decided, each text as one pass."""
    decisions: list = []
    for kind, group in groupby(trace.decisions, key=lambda each: each[0]):
        if kind == "step":
            decisions.extend(group)
            continue
        parts = [] if decisions else [found]
        parts += [list(map(np.array, each[1])) for each in group]
        decisions.append(("read", joined(parts), None, None))
    return Trace(decisions, trace.events)


@dataclass(frozen=True)
class Answer:
    """An answer, and how it came about."""

    asked: int  # tokens of the prompt
    found: int  # of them in the store
    canvases: list[np.ndarray]
    trace: Trace
    settings: ResolvedSettings


def answer(
    model: DiffusionGemma, text: np.ndarray, seed: int, store: Store | None, piece: int = 512
) -> tuple[list[int], list[np.ndarray]]:
    """The numbers of tokens in all and found, and the canvases."""
    given = answered(model, text, seed, store, piece)
    return [given.asked, given.found], given.canvases


def answered(
    model: DiffusionGemma,
    text: np.ndarray,
    seed: int,
    store: Store | None,
    piece: int = 512,
    images: Sequence[ImagePatches] = (),
) -> Answer:
    settings = GenerationSettings(
        seed=seed, max_denoising_steps=2, prefill_step_size=piece, top_candidates=2
    ).resolve(model.config)
    settings = replace(settings, max_new_tokens=2 * settings.canvas_length)
    trace, counts, canvases = Trace(), (0, 0), []
    if isinstance(store, Watched):
        store.trace = trace
    with listening({0: trace}) as make:
        rows = Rows(model, store)
        rows.add(make(model, settings, text, images=images))
        for event in rows.run():
            if isinstance(event, PrefillDone):
                counts = event.prompt_tokens, event.cached_tokens
            elif isinstance(event, CanvasCommitted):
                canvases.append(np.array(event.tokens)[0])
    return Answer(*counts, canvases, trace, settings)


def common(text: np.ndarray, others: list[np.ndarray]) -> int:
    """How many tokens at the beginning a text shares with one of the others."""
    return max(
        (
            sum(1 for _ in takewhile(bool, (a == b for a, b in zip(text, other, strict=False))))
            for other in others
        ),
        default=0,
    )


def compare(name: str, mine: Answer, plain: Answer, store: Watched, top_k: int, told: Told) -> None:
    """Compare an answer with the one without a store. Its numbers must be the same but for rounding
    even where its tokens are the same, since a model may answer alike to different contexts."""
    is_same = [c.tolist() for c in mine.canvases] == [c.tolist() for c in plain.canvases]
    alone, lines = whole(plain.trace, []), {}
    for found in store.found:
        what, margin, is_drift = first_difference(
            alone, whole(mine.trace, found), plain.settings, top_k
        )
        kind = "tie" if margin < UNDECIDED else "drift" if is_drift else "finding"
        lines[kind] = f"{name}: {what}, margin {margin:.1e}"
    if "tie" in lines or "drift" in lines:
        if not is_same:
            (told.ties if "tie" in lines else told.drifts).append(
                lines.get("tie") or lines["drift"]
            )
    else:
        told.findings.append(lines["finding"])


def converse(
    seed: int,
    store: Store,
    model: DiffusionGemma,
    told: Told,
    *,
    all_kept: bool = False,
    pictures: Sequence[ImagePatches] = (),
) -> None:
    """One conversation: turns, some tried again or written anew from an earlier place on, some with
    pictures. Answers over a `Watched` store are compared with those without one."""
    rng, pick = np.random.default_rng([7, seed]), np.random.default_rng([8, seed])
    end, canvas = 1, GenerationSettings().resolve(model.config).canvas_length
    read: list[np.ndarray] = []  # the texts that the model has read

    shown: list[Placed] = []  # the pictures of the history
    widest = max((picture.soft_tokens for picture in pictures), default=0)

    def turn(start: int) -> np.ndarray:
        words = rng.integers(6, 70, rng.integers(3, 60), dtype=np.int32)
        words = np.where(np.isin(words, model.config.image_token_ids), 5, words).astype(np.int32)
        if pictures and pick.random() < 0.6:
            picture, at = pictures[pick.integers(len(pictures))], int(pick.integers(len(words)))
            words = np.concatenate([words[:at], ids_of(model, picture), words[at:]])
            shown.append(Placed(start + at + 1, picture))
        return np.append(words, np.int32(end))

    history, starts = turn(0), [0]
    for number in range(rng.integers(2, 5)):
        again = rng.integers(4)
        if again == 1 and len(starts) > 1:  # an edit
            start = starts.pop(rng.integers(1, len(starts)))
            shown[:] = [placed for placed in shown if placed.start < start]
            history = np.append(history[:start], turn(start))
        elif again != 2 or number == 0:  # not a retry
            starts.append(len(history))
            history = np.append(history, turn(len(history)))
        if len(history) > 500:
            return
        own = int(rng.integers(1 << 30))
        images = [placed.image for placed in shown]
        text = as_text(history, shown)
        mine = answered(model, history, own, store, images=images)
        asked, found, canvases = mine.asked, mine.found, mine.canvases
        told.turns, told.found = told.turns + 1, told.found + found
        told.read += asked - found
        name = f"conversation {seed}, turn {number}"
        if isinstance(store, Watched):
            plain = answered(model, history, own, None, images=images)
            compare(name, mine, plain, store, model.config.text.top_k_experts, told)
        most = max(store.every, canvas) + asked - common(text, read) + 2 * widest
        if all_kept and asked - found > most:
            told.findings.append(f"{name}: read {asked - found} tokens, expected at most {most}")
        if store.nbytes > store.max_bytes:
            told.findings.append(f"{name}: {store.nbytes} bytes are kept")
        read += [text, np.concatenate([text, *canvases[:-1]])]
        history = np.concatenate([history, *canvases])


def held_bytes(store: Store) -> tuple[int, int]:
    """What a store says that it keeps, and the memory that is free again without it."""
    gc.collect()
    before, said = mx.get_active_memory(), store.nbytes
    store._root.children.clear()
    gc.collect()
    return said, before - mx.get_active_memory()


def run(
    count: int, max_bytes: int = 1 << 30, every: int = 32, first: int = 0, *, pictures: int = 0
) -> tuple[Told, list]:
    """Run conversations over one store for each model, with so many pictures that come again;
    return what they gave, and the bytes that each store said and held."""
    told, held = Told(), []
    cached = mx.set_cache_limit(0)  # or MLX reuses larger buffers, up to two pages for each array
    for place, number in enumerate(MODELS):
        model, store = model_of(number), Watched(max_bytes, every=every)
        rng = np.random.default_rng(number + 9)
        drawn = [draw_picture(model, rng) for _ in range(pictures)]
        for seed in range(first + place, first + count, len(MODELS)):
            converse(seed, store, model, told, all_kept=max_bytes >= 1 << 30, pictures=drawn)
        store.features = Features()
        held.append(held_bytes(store))
        store.trace = Trace()
    mx.set_cache_limit(cached)
    return told, held


def many_turns(turns: int, max_bytes: int) -> tuple[Told, tuple[int, int]]:
    """Run conversations over one small store until there were so many turns; return what they gave,
    and the bytes that the store said and held."""
    told, model, store = Told(), model_of(-1), Store(max_bytes, every=32)
    cached, seed = mx.set_cache_limit(0), 0
    while told.turns < turns:
        converse(seed, store, model, told)
        seed += 1
    held = held_bytes(store)
    mx.set_cache_limit(cached)
    return told, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--turns", type=int, default=500)
    options = parser.parse_args()
    budget, passed = 400_000, True
    cases = (1 << 30, 0, 0), (budget, options.cases, 0), (1 << 30, 0, 4)
    for max_bytes, first, pictures in cases:
        told, held = run(options.cases, max_bytes, first=first, pictures=pictures)
        print(f"store of {max_bytes:,} bytes, {pictures} pictures: {told.summary()}")
        for line in (*told.ties, *told.drifts, *told.findings):
            print(line)
        print(f"bytes said and held, by model: {held}", flush=True)
        passed &= not told.findings and max(most for _, most in held) <= max_bytes
    told, (said, most) = many_turns(options.turns, budget)
    print(
        f"{told.turns} turns over one store of {budget:,} bytes: it says {said:,}, holds {most:,}"
    )
    raise SystemExit(not (passed and not told.findings and 0 < most <= budget))


if __name__ == "__main__":
    main()
