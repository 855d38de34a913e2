"""What do rows that come and go cost where no clock is right: in host reads, copies and columns?

The bundled model, float32, in the graph that GPUs get, at each policy, as it settles and held to 8
steps a canvas. Eight requests of mixed tasks: four start together, one more joins after each step,
and one of them leaves before its end.
Nothing here depends on the machine.

Bounds:
- 1 host read per step for all rows together. Counted in passes that only take a step; what a row
  reads of its finished canvas comes with the commit.
- 0 bytes of context copied on join or leave: the keys and values of every other row's canvas stay
  where they are, by their addresses, over each step in which a row joins or leaves.
- 0 columns computed for settled rows: together the rows compute as many columns as alone.

    python bench/counts_rows.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, record
from counts import HOST_READS, prompts_of, watched_hosts

from mlx_diffgemma import GenerationSettings, bundled_model, denoise_tokens, encode_prompt, load
from mlx_diffgemma.config.generation import POLICIES
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.events import CanvasCommitted, PrefillDone, StepDone
from mlx_diffgemma.model.backend import as_on_gpu

TOGETHER = 4
COMMON: dict[str, Any] = {"seed": 0, "max_new_tokens": 256}
# A policy -> what keeps its canvases from settling.
HELD = {
    "reference": {"max_denoising_steps": 8, "confidence_threshold": 0},
    "fast": {"max_denoising_steps": 8, "acceptance_confidence": 1.0},
}
BOUNDS = {
    "most host reads in a step": HOST_READS,
    "bytes of context copied on join or leave": 0,
    "columns for settled rows": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bounds: {HOST_READS} host read per step; 0 bytes copied on join or leave; 0 columns")
    model, tokenizer = load(bundled_model())
    model.set_dtype(mx.float32)
    texts = [np.array(encode_prompt(tokenizer, prompt), np.int32) for prompt in prompts_of(1)]
    with as_on_gpu():
        found = {
            f"{policy}, {kind}": count(model, texts, GenerationSettings(policy=policy, **how))
            for policy in POLICIES
            for kind, how in (("as it settles", COMMON), ("8 steps", COMMON | HELD[policy]))
        }
    bounds = [
        {"what": f"{case}, {what}", "value": row[what], "bound": most, "passed": row[what] == most}
        for case, row in found.items()
        for what, most in BOUNDS.items()
        if row[what] is not None
    ]
    for bound in bounds:
        print(f"{bound['what']}: {bound['value']}; bound {bound['bound']}: {bound['passed']}")
    passed = all(bound["passed"] for bound in bounds)
    line = record(
        "counts_rows",
        what="rows that join and leave, bundled model, the graph that GPUs get",
        shape={"model": "bundled", "requests": len(texts), "rows at first": TOGETHER},
        dtype="float32",
        counts=found,
        bounds=bounds,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def count(model: Any, texts: list[np.ndarray], settings: GenerationSettings) -> dict[str, Any]:
    """Run the rows and count."""
    resolved = settings.resolve(model.config)
    rows, waiting = Rows(model), [Row(model, resolved, text) for text in texts]
    rows.add(waiting.pop(0))
    leaver = rows.rows[0]  # it leaves before its end
    for row in [waiting.pop(0) for _ in range(TOGETHER - 1)]:
        rows.add(row)
    together = {id(row): 0 for row in [*rows.rows, *waiting]}
    order = list(together)
    reads, copied, changes, most_rows = [], 0, 0, 0
    while rows.rows or waiting:
        stays = {id(row): addresses(row) for row in rows.rows if row.opened}
        before = {id(row) for row in rows.rows}
        if waiting:
            rows.add(waiting.pop(0))
        if leaver is not None and together[id(leaver)]:
            rows.remove(leaver)
            leaver = None
        with watched_hosts() as counts:
            events = list(rows.advance())
        steps = [(row, event) for row, event in events if isinstance(event, StepDone)]
        most_rows = max(most_rows, len(steps))
        for row, event in steps:
            together[id(row)] += event.draft.shape[-1]
        if steps and not any(isinstance(e, PrefillDone | CanvasCommitted) for _, e in events):
            reads.append(counts["reads"])
        if {id(row) for row in rows.rows} == before:
            continue
        changes += 1
        for row in rows.rows:  # those that had a canvas before and have the same one still
            here, there = stays.get(id(row)), addresses(row)
            if here and there and not any(e for r, e in events if r is row and is_end(e)):
                copied += sum(n for (a, n), (b, _) in zip(here, there, strict=True) if a != b)
    alone = [columns_alone(model, text, settings) for text in texts[1:]]  # all but the leaver
    computed = [together[key] for key in order[1:]]
    return {
        "most host reads in a step": max(reads, default=None),
        "steps counted": len(reads),
        "bytes of context copied on join or leave": copied,
        "joins and leaves": changes,
        "columns for settled rows": sum(computed) - sum(alone),
        "columns": sum(computed),
        "most rows in a step": most_rows,
    }


def is_end(event: Any) -> bool:
    return isinstance(event, CanvasCommitted)


def addresses(row: Row) -> list[tuple[int, int]]:
    """Where the keys and values of a row's open context lie, and their bytes."""
    if not row.opened:
        return []
    arrays = [a for layer in row.opened[0].layers for a in (layer.keys, layer.values)]
    mx.eval(arrays)
    return [(np.asarray(array).ctypes.data, array.nbytes) for array in arrays]


def columns_alone(model: Any, text: np.ndarray, settings: GenerationSettings) -> int:
    """Canvas columns that a request computes alone."""
    events = denoise_tokens(model, mx.array(text[None]), settings)
    return sum(event.draft.shape[-1] for event in events if isinstance(event, StepDone))


if __name__ == "__main__":
    main()
