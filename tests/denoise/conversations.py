"""Draws conversations with retries and edits, over one store, and compares each answer with the one
without a store: `python -m tests.denoise.conversations`. Not a test."""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, field, replace
from itertools import takewhile

import mlx.core as mx
import numpy as np

from mlx_diffgemma import GenerationSettings, Store
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.events import CanvasCommitted, PrefillDone
from mlx_diffgemma.model import DiffusionGemma
from tests.denoise.mixtures import model_of

MODELS = (2, 4, -1)  # canvases of 7 and 64 tokens; the last one is the bundled model


@dataclass
class Told:
    """What the conversations gave."""

    turns: int = 0
    found: int = 0  # tokens that were not read again
    read: int = 0
    undecided: list[str] = field(default_factory=list)  # rounding alone changes the answer too
    findings: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return (
            f"{self.turns} turns, {self.found} tokens found and {self.read} read, "
            f"{len(self.undecided)} undecided, {len(self.findings)} findings"
        )


def answer(
    model: DiffusionGemma, text: np.ndarray, seed: int, store: Store | None, piece: int = 512
) -> tuple[list[int], list[np.ndarray]]:
    """The numbers of tokens in all and found, and the canvases."""
    settings = GenerationSettings(
        seed=seed, max_denoising_steps=2, prefill_step_size=piece
    ).resolve(model.config)
    rows, counts, canvases = Rows(model, store), [], []
    rows.add(Row(model, replace(settings, max_new_tokens=2 * settings.canvas_length), text))
    for event in rows.run():
        if isinstance(event, PrefillDone):
            counts = [event.prompt_tokens, event.cached_tokens]
        elif isinstance(event, CanvasCommitted):
            canvases.append(np.array(event.tokens)[0])
    return counts, canvases


def common(text: np.ndarray, others: list[np.ndarray]) -> int:
    """How many tokens at the beginning a text shares with one of the others."""
    return max(
        (
            sum(1 for _ in takewhile(bool, (a == b for a, b in zip(text, other, strict=False))))
            for other in others
        ),
        default=0,
    )


def converse(seed: int, store: Store, model: DiffusionGemma, told: Told, *, all_kept: bool) -> None:
    """One conversation: turns, some tried again or written anew from an earlier place on."""
    rng = np.random.default_rng([7, seed])
    end, canvas = 1, GenerationSettings().resolve(model.config).canvas_length
    read: list[np.ndarray] = []  # the texts that the model has read

    def turn() -> np.ndarray:
        words = rng.integers(6, 70, rng.integers(3, 60), dtype=np.int32)
        return np.append(words, np.int32(end))

    history, starts = turn(), [0]
    for number in range(rng.integers(2, 5)):
        again = rng.integers(4)
        if again == 1 and len(starts) > 1:  # an edit
            history = np.append(history[: starts.pop(rng.integers(1, len(starts)))], turn())
        elif again != 2 or number == 0:  # not a retry
            starts.append(len(history))
            history = np.append(history, turn())
        if len(history) > 500:
            return
        own = int(rng.integers(1 << 30))
        (asked, found), canvases = answer(model, history, own, store)
        told.turns, told.found = told.turns + 1, told.found + found
        told.read += asked - found
        name = f"conversation {seed}, turn {number}"
        if not same(canvases, plain := answer(model, history, own, None)[1]):
            pieces = [answer(model, history, own, None, piece)[1] for piece in (8, 13, 32)]
            is_found = all(same(plain, other) for other in pieces)
            (told.findings if is_found else told.undecided).append(f"{name}: another answer")
        most = max(store.every, canvas) + asked - common(history, read)
        if all_kept and asked - found > most:
            told.findings.append(f"{name}: read {asked - found} tokens, expected at most {most}")
        if store.nbytes > store.max_bytes:
            told.findings.append(f"{name}: {store.nbytes} bytes are kept")
        read += [history, np.concatenate([history, *canvases[:-1]])]
        history = np.concatenate([history, *canvases])


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return [canvas.tolist() for canvas in one] == [canvas.tolist() for canvas in other]


def held_bytes(store: Store) -> tuple[int, int]:
    """What a store says that it keeps, and the memory that is free again without it."""
    gc.collect()
    before, said = mx.get_active_memory(), store.nbytes
    store._root.children.clear()
    gc.collect()
    return said, before - mx.get_active_memory()


def run(count: int, max_bytes: int = 1 << 30, every: int = 32, first: int = 0) -> tuple[Told, list]:
    """Run conversations over one store for each model; return what they gave, and the bytes that
    each store said and held."""
    told, held = Told(), []
    cached = mx.set_cache_limit(0)  # or MLX reuses larger buffers, up to two pages for each array
    for place, number in enumerate(MODELS):
        model, store = model_of(number), Store(max_bytes, every=every)
        for seed in range(first + place, first + count, len(MODELS)):
            converse(seed, store, model, told, all_kept=max_bytes >= 1 << 30)
        held.append(held_bytes(store))
    mx.set_cache_limit(cached)
    return told, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    options = parser.parse_args()
    told, _ = run(options.cases)
    print(told.summary(), *told.undecided, *told.findings, sep="\n", flush=True)
    small, held = run(options.cases, max_bytes=400_000, first=options.cases)
    print(small.summary(), *small.undecided, *small.findings, sep="\n")
    print("bytes said and held, of 400,000:", held)
    if told.findings or small.findings or any(most > 400_000 for _, most in held):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
