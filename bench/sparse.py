"""How far is sparse self-conditioning from the dense one, at which entropy?

Dense is the mean of all embeddings under a position's distribution; sparse keeps the likeliest
tokens and gives the rest of the probability to the mean of all embeddings. Compared after an RMS
norm, as the next step sees it: relative error, the norm of the difference over that of the dense
one. No bound of its own: the table is what `sparse_tokens` and `sparse_entropy` are chosen by.
Yardsticks: packed rows carry an error of their own, about 0.5% in 8 bits and 9% in 4.

Three sources: the bundled model's own steps on its own prompts, through the loop; random tables
of 32,768 x 512 whose rows share nothing; and such tables whose rows share a mean of 30% of their
size. There, distributions are softmaxes of random logits, from sharp to flat.

    python bench/sparse.py
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from common import finish, record

from mlx_diffgemma import GenerationSettings, SeededNoise, bundled_model, encode_prompt, load
from mlx_diffgemma.denoise.sampler import Statistics, decide, shortlist, statistics
from mlx_diffgemma.denoise.schedule import temperature
from mlx_diffgemma.model import DiffusionGemma

EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # nats
Errors = dict[int, list[tuple[float, float]]]  # by tokens kept: (entropy, error) per position


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=10, help="of each task")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    tables = {
        "bundled model": bundled(options.prompts, (4, 16, 64)),
        "random, nothing shared": made_up(0.0, (16, 64, 256)),
        "random, 30% shared": made_up(0.3, (16, 64, 256)),
    }
    results = {}
    for name, errors in tables.items():
        results[name] = {count: binned(pairs) for count, pairs in errors.items()}
        print(f"\n{name}: mean (largest) relative error, by entropy in nats")
        bins = sorted({edge for rows in results[name].values() for edge in rows}, key=float)
        print(f"{'entropy':>12} {'positions':>10}" + "".join(f"{f'k={k}':>18}" for k in errors))
        for edge in bins:
            cells = [rows.get(edge) for rows in results[name].values()]
            count = next(cell["positions"] for cell in cells if cell)
            line = "".join(
                f"{cell['mean']:>9.4f} ({cell['largest']:.3f})" if cell else f"{'-':>18}"
                for cell in cells
            )
            print(f"{'from ' + edge:>12} {count:>10}{line}")
    line = record(
        "sparse",
        what="relative error of the sparse soft embedding after an RMS norm",
        shape={"bundled vocabulary": 384, "random tables": [32768, 512]},
        dtype="float32",
        units="norm of the difference / norm of the dense one; entropy in nats, lower edge of bin",
        tables=results,
    )
    finish(line, save=options.save)


def bundled(prompts: int, counts: tuple[int, ...]) -> Errors:
    """Every position of every step of the reference policy."""
    model, tokenizer = load(bundled_model())
    mean_row, errors = model.mean_row(), defaultdict(list)
    for seed, ids in enumerate(prompt_ids(tokenizer, prompts)):
        for seen in steps(model, ids, seed):
            dense = model.mean_embedding(seen.weights, seen.total)
            entropy = np.array(seen.entropy).flatten().tolist()
            for count in counts:
                ids_and_p = shortlist(seen.weights, seen.total, count)
                sparse = model.sparse_embedding(*ids_and_p, mean_row)
                errors[count] += zip(entropy, distance(sparse, dense), strict=True)
    return dict(errors)


def prompt_ids(tokenizer: object, count: int) -> Iterator[list[int]]:
    by_task = defaultdict(list)
    for entry in json.loads((bundled_model() / "prompts.json").read_text(encoding="utf-8")):
        by_task[entry["task"]].append(entry["prompt"])
    for texts in by_task.values():
        for text in texts[:count]:
            yield encode_prompt(tokenizer, text)


def steps(model: DiffusionGemma, ids: list[int], seed: int) -> Iterator[Statistics]:
    """The first eight steps of a canvas, by the verbs."""
    settings = GenerationSettings(seed=seed).resolve(model.config)
    noise, cap = SeededNoise(seed), model.config.text.final_logit_softcapping
    shape, vocab_size = (1, model.config.canvas_length), model.config.text.vocab_size
    opened = [model.open(model.prefill(mx.array([ids], dtype=mx.int32)), shape[1])]
    canvas, soft = noise.start(0, shape, vocab_size), None
    for step in range(8):
        states, opened = model.canvas_states([canvas], opened, self_conditioning=soft)
        outputs = model.outputs(states)
        seen = statistics(outputs, temperature(step, settings), cap)
        fresh = noise.renoise(0, step, shape, vocab_size)
        canvas = decide(
            seen.entropy, seen.draft, fresh, entropy_bound=settings.entropy_bound
        ).canvas
        soft = model.mean_embedding(seen.weights, seen.total)
        mx.eval(canvas, soft, seen)
        yield seen


def made_up(shared: float, counts: tuple[int, ...]) -> Errors:
    """Softmaxes of Gaussian logits whose deviation runs from 0.5 (flat) to 12 (sharp)."""
    rng = np.random.default_rng(0)
    V, M, errors = 32768, 512, defaultdict(list)
    table = rng.normal(size=(V, M)).astype(np.float32)
    table = mx.array((1 - shared) * table + shared * rng.normal(size=M).astype(np.float32))
    mean_row = table.mean(axis=0)
    for deviation in np.linspace(0.5, 12, 24):
        seen = statistics(mx.array(rng.normal(0, deviation, (1, 8, V)).astype(np.float32)))
        dense = (seen.weights @ table) / seen.total[..., None]
        entropy = np.array(seen.entropy).flatten().tolist()
        for count in counts:
            ids, p = shortlist(seen.weights, seen.total, count)
            rest = 1 - p.sum(axis=-1, keepdims=True)
            sparse = (p[..., None, :] @ table[ids])[..., 0, :] + rest * mean_row
            errors[count] += zip(entropy, distance(sparse, dense), strict=True)
    return dict(errors)


def distance(some: mx.array, other: mx.array) -> list[float]:
    some, other = (mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6) for x in (some, other))
    norm = mx.linalg.norm(some - other, axis=-1) / mx.linalg.norm(other, axis=-1)
    return np.array(norm).flatten().tolist()


def binned(pairs: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    entropy, error = np.array(pairs).T
    bins = np.digitize(entropy, EDGES) - 1
    return {
        f"{EDGES[i]:g}": {
            "positions": int((bins == i).sum()),
            "mean": round(float(error[bins == i].mean()), 6),
            "largest": round(float(error[bins == i].max()), 6),
        }
        for i in sorted(set(bins.tolist()))
    }


if __name__ == "__main__":
    main()
