"""How long until the first step of a turn, with contexts kept and without, and what do they take?

1. A chat of ten turns: the first prompt has 4,096 random tokens, each later one 200 more behind the
   answer of one canvas. Turns 2 to 10, without a store, with one, and the last one again from disk
   by a new store, as after a restart.
2. A prompt of 1K, 8K and 32K tokens that was read once, changed 22 tokens before its end: without a
   store, with one, and from disk.

Time is from the row's joining to the draft of its first step. The model is small and random, one
sliding layer with the real window and one full layer, so that 32K tokens can be read on a CPU:
times show how the work falls, not what a real model takes. What a store holds is measured by MLX's
active memory with and without it.

What the 26B model's contexts take is computed from its config.

Bounds: a turn and a changed prompt read at most N tokens, the distance of two snapshots, and those
that are new; the store holds and the folder takes no more than their budgets; turn 10 and the
changed prompts above N tokens take at most half of the time without a store. Floor: the new tokens.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/cache.py
    python bench/cache.py --tokens 1024 --turns 3
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, record
from runtimes import checkpoint, text_tokens

from mlx_diffgemma import GenerationSettings, Store, load_model
from mlx_diffgemma.checkpoint.memory import context_bytes
from mlx_diffgemma.config.model import TextConfig
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.doctor.published import published_model
from mlx_diffgemma.events import CanvasCommitted, PrefillDone, StepDone
from mlx_diffgemma.model import DiffusionGemma

TOKENS = (1024, 8192, 32768)
FIRST, NEW, CHANGED = 4096, 200, 22  # tokens
EVERY = 2048  # as by default
BUDGET, FOLDER_BUDGET = 20_000_000, 30_000_000  # bytes; less than all of the contexts
CANVAS = 64
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_experts": 2,
    "top_k_experts": 1,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "vocab_size": 4096,
    "sliding_window": 1024,
}
MOST_TIME = 0.5  # of the time without a store
REAL_TOKENS = 32768


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, action="append", help=f"repeatable; {TOKENS}")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(
        f"bounds: reads at most {EVERY:,} tokens and the new ones; budgets hold; turn 10 and "
        f"changed prompts above {EVERY:,} tokens take at most {MOST_TIME} of the time without"
    )
    real = real_bytes(published_model().text)
    print(f"26B model: {real}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(Path(scratch) / "model", "scaled", "dense", canvas=CANVAS, **SHAPE)
        model = load_model(folder)
        mx.eval(model.parameters())
        mx.set_cache_limit(0)  # what is freed is not held
        bench = Bench(model, folder, Path(scratch) / "contexts")
        turns, chat_bounds = bench.chat(options.turns)
        changed, changed_bounds = bench.changed(options.tokens or TOKENS)
        stored = bench.stored()
    bounds = [*chat_bounds, *changed_bounds, *stored.pop("bounds")]
    print_tables(turns, changed, stored)
    for bound in bounds:
        print(f"{'holds' if bound['passed'] else 'MISSED'}: {bound['bound']}, {bound['measured']}")
    passed = all(bound["passed"] for bound in bounds)
    finish(
        record(
            "cache",
            what="time to the first step with kept contexts and without, and what these take",
            shape={"canvas": CANVAS, "batch": 1, **SHAPE},
            dtype=compute_dtype_of(model),
            units={
                "without, memory, disk": "seconds to the first step: no store, a store, and a new "
                "store over its folder",
                "read": "tokens that were read with a store",
                "said, held, files": "bytes",
            },
            every=EVERY,
            turns=turns,
            changed=changed,
            stored=stored,
            real=real,
            bounds=bounds,
            passed=passed,
        ),
        save=options.save,
    )
    sys.exit(not passed)


class Bench:
    """A model, a store of it, and the folder that it writes to."""

    def __init__(self, model: DiffusionGemma, folder: Path, contexts: Path) -> None:
        self.model, self.folder, self.contexts = model, folder, contexts
        self.store = self.new_store()

    def new_store(self) -> Store:
        store = Store(BUDGET, every=EVERY, folder=self.contexts, folder_bytes=FOLDER_BUDGET)
        store.serve(self.model)
        return store

    def text(self, count: int, seed: int) -> np.ndarray:
        """Random tokens without ends of turns, where there would be further snapshots."""
        tokens = np.array(text_tokens(self.folder, count, seed), np.int32)
        ends = GenerationSettings().resolve(self.model.config).eos_token_ids
        return np.where(np.isin(tokens, ends), 20, tokens).astype(np.int32)

    def first_step(
        self, text: np.ndarray, store: Store | None
    ) -> tuple[float, PrefillDone, list[np.ndarray]]:
        """Seconds to the first step of an answer, how much was known, and its canvas."""
        settings = GenerationSettings(seed=1, max_denoising_steps=1, max_new_tokens=CANVAS)
        rows, seconds, canvases = Rows(self.model, store), 0.0, []
        started = time.perf_counter()
        rows.add(Row(self.model, settings.resolve(self.model.config), text))
        for event in rows.run():
            if isinstance(event, PrefillDone):
                prefill = event
            elif isinstance(event, StepDone) and event.step == 0:
                mx.eval(event.draft)
                seconds = time.perf_counter() - started
            elif isinstance(event, CanvasCommitted):
                canvases.append(np.array(event.tokens)[0])
        return seconds, prefill, canvases

    def all_three(self, text: np.ndarray, *, from_disk: bool) -> tuple[dict[str, Any], np.ndarray]:
        """One prompt without a store, with it, and from disk; and its answer."""
        without, _, canvases = self.first_step(text, None)
        disk = None
        if from_disk:
            self.store.flush()
            disk, known, _ = self.first_step(text, self.new_store())
        memory, prefill, same = self.first_step(text, self.store)
        row = {
            "prompt": prefill.prompt_tokens,
            "read": prefill.prompt_tokens - prefill.cached_tokens,
            "read_from_disk": known.prompt_tokens - known.cached_tokens if from_disk else None,
            "without": round(without, 4),
            "memory": round(memory, 4),
            "disk": None if disk is None else round(disk, 4),
            "ratio": round(memory / without, 4),
            "same_answer": [c.tolist() for c in canvases] == [c.tolist() for c in same],
        }
        print(row, flush=True)
        return row, np.concatenate(same)

    def chat(self, turns: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Turns of a long chat, and their bounds."""
        history = self.text(FIRST, 1)
        said = np.concatenate(self.first_step(history, self.store)[2])
        rows = []
        for turn in range(2, turns + 1):
            new = self.text(NEW, turn)
            history = np.concatenate([history, said, new])
            row, said = self.all_three(history, from_disk=turn == turns)
            rows.append({"turn": turn, **row})
        most = max(row["read"] for row in rows)
        return rows, [
            reads(f"turns 2 to {turns}", most, EVERY + NEW + CANVAS),
            reads("turn after a restart", rows[-1]["read_from_disk"], EVERY + NEW + CANVAS),
            is_fast(f"turn {turns}", rows[-1]["ratio"]),
        ]

    def changed(self, sizes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Prompts that are changed near their ends, and their bounds."""
        rows, bounds = [], []
        for tokens in sizes:
            text = self.text(tokens, 100 + tokens)
            self.first_step(text, self.store)
            text[-CHANGED] = 20 + (text[-CHANGED] - 19) % 1000
            row, _ = self.all_three(text, from_disk=True)
            rows.append(row)
            name = f"{tokens:,} tokens, changed {CHANGED} before the end"
            bounds.append(reads(name, max(row["read"], row["read_from_disk"]), EVERY + CHANGED))
            if tokens > EVERY + CHANGED:
                bounds.append(is_fast(name, row["ratio"]))
        return rows, bounds

    def stored(self) -> dict[str, Any]:
        """What the store holds, and what its files take."""
        self.store.flush()
        said, files = self.store.nbytes, list(self.contexts.iterdir())
        taken = sum(file.stat().st_size for file in files)
        gc.collect()
        before = mx.get_active_memory()
        del self.store
        gc.collect()
        held = before - mx.get_active_memory()
        return {
            "budget": BUDGET,
            "said": said,
            "held": held,
            "folder_budget": FOLDER_BUDGET,
            "files": taken,
            "count": len(files),
            "bounds": [
                {
                    "bound": f"the store holds at most {BUDGET:,} bytes",
                    "measured": held,
                    "passed": 0 < held <= BUDGET,
                },
                {
                    "bound": f"the folder takes at most {FOLDER_BUDGET:,} bytes",
                    "measured": taken,
                    "passed": 0 < taken <= FOLDER_BUDGET,
                },
            ],
        }


def reads(what: str, read: int, most: int) -> dict[str, Any]:
    return {
        "bound": f"{what}: at most {most:,} tokens are read",
        "measured": read,
        "passed": read <= most,
    }


def is_fast(what: str, ratio: float) -> dict[str, Any]:
    return {
        "bound": f"{what}: at most {MOST_TIME} of the time without a store",
        "measured": ratio,
        "passed": ratio <= MOST_TIME,
    }


def real_bytes(text: TextConfig, store_bytes: int = 2_000_000_000) -> dict[str, Any]:
    """What the contexts of a chat take at a model's shape, in 16 bits, and the distance of
    snapshots over the whole text that a store has room for."""
    whole = context_bytes(text, REAL_TOKENS)
    full = context_bytes(text, REAL_TOKENS + 1) - whole  # bytes of one more token
    sliding = whole - full * REAL_TOKENS
    snapshots = (store_bytes - full * REAL_TOKENS) // sliding
    return {
        "tokens": REAL_TOKENS,
        "context_bytes": whole,
        "full_bytes_per_token": full,
        "full_bytes": full * REAL_TOKENS,
        "snapshot_bytes": sliding,
        "snapshots_at_default_every": REAL_TOKENS // EVERY,
        "bytes_with_all_of_them": full * REAL_TOKENS + sliding * (REAL_TOKENS // EVERY),
        "store_bytes": store_bytes,
        "snapshots_in_store": snapshots,
        "every_over_whole_text": -(-REAL_TOKENS // snapshots),
    }


def compute_dtype_of(model: DiffusionGemma) -> str:
    return str(model.dtype).removeprefix("mlx.core.")


def print_tables(
    turns: list[dict[str, Any]], changed: list[dict[str, Any]], stored: dict[str, Any]
) -> None:
    heads = ("prompt", "read", "without", "memory", "disk", "ratio")
    print(f"\n{'':>10}" + "".join(f"{head:>10}" for head in heads))
    for row in [*turns, *changed]:
        name = f"turn {row['turn']}" if "turn" in row else "changed"
        cells = ["-" if row[head] is None else f"{row[head]:,}" for head in heads]
        print(f"{name:>10}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"stored: {stored}\n")


if __name__ == "__main__":
    main()
