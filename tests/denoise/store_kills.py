"""Kills processes with SIGKILL while they write contexts to a folder, and lets several use one
folder: `python -m tests.denoise.store_kills`. Not a test.

Each killed process writes texts to a folder that all share. Behind each kill, these texts are
looked for in the folder: what is found must be, bit for bit, what was to be written. The moments
are uniform over the duration of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np

from mlx_diffgemma import Store
from mlx_diffgemma.model import Context
from mlx_diffgemma.model.context import LayerContext
from tests.denoise.conversations import answer
from tests.denoise.mixtures import model_of

MODEL, EVERY = -1, 64  # the bundled model
TEXTS, PARTS = 3, 3  # texts that a killed process writes, each in so many parts
# A process begins with all imports done, so that kills fall into its work.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.denoise.conversations"])


@dataclass
class Tally:
    """What the folder gave."""

    kills: int = 0
    left: Counter[str] = field(default_factory=Counter)  # by the kills
    found: int = 0  # tokens
    missed: int = 0
    warned: int = 0
    wrong: list[str] = field(default_factory=list)


def text_of(number: int) -> np.ndarray:
    rng = np.random.default_rng([31, number])
    return rng.integers(6, 70, 300, dtype=np.int32)


def parts_of(text: np.ndarray) -> list[np.ndarray]:
    return [text[: len(text) * part // PARTS] for part in range(1, PARTS + 1)]


def context_of(number: int, length: int) -> Context:
    """The context of a text's beginning: any numbers, since no model reads it."""
    text, rng, layers = model_of(MODEL).config.text, np.random.default_rng([32, number]), []
    for layer in text.layers:
        shape = (1, layer.num_key_value_heads, len(text_of(number)), layer.head_dim)
        first = max(0, length - text.sliding_window + 1) if layer.is_sliding else 0
        keys, values = (rng.standard_normal(shape, np.float32) for _ in range(2))
        layers.append(
            LayerContext(*(mx.array(each[:, :, first:length]) for each in (keys, values)))
        )
    return Context(tuple(layers), length, 1)


def store_of(folder: Path, budget: int) -> Store:
    store = Store(1 << 30, every=EVERY, folder=folder, folder_bytes=budget)
    store.serve(model_of(MODEL))
    return store


def writing(folder: Path, numbers: list[int], budget: int, pipe: Connection) -> None:
    """What is killed. Sends a word when it begins, and at the end."""
    parts = [(number, part) for number in numbers for part in parts_of(text_of(number))]
    contexts = [context_of(number, len(part)) for number, part in parts]
    store = store_of(folder, budget)
    pipe.send("begun")
    for (_, part), context in zip(parts, contexts, strict=True):
        store.keep(part, context, model_of(MODEL).config.text)
    store.flush()
    pipe.send("done")


def write(folder: Path, numbers: list[int], budget: int, delay: float | None) -> float:
    """Write texts in a process, which is killed so many seconds after it began. Return how long it
    took."""
    pipe, other = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=writing, args=(folder, numbers, budget, other))
    process.start()
    other.close()
    assert pipe.recv() == "begun"
    started = time.perf_counter()
    if delay is None:
        assert pipe.recv() == "done"
    else:
        time.sleep(delay)
        process.kill()
    seconds = time.perf_counter() - started
    process.join()
    return seconds


def check(folder: Path, numbers: list[int], budget: int, tally: Tally) -> None:
    """Look for texts as a new process does, and compare what is found with what the model reads."""
    for number in numbers:
        store = store_of(folder, budget)  # with nothing in memory
        text = text_of(number)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            context = store.find(np.append(text, np.int32(2)), model_of(MODEL).config.text)
        tally.warned += len(said)
        if context is None:
            tally.missed += 1
            continue
        tally.found += context.length
        expected = context_of(number, context.length)
        for mine, right in zip(context.arrays, expected.arrays, strict=True):
            if not mx.array_equal(mine, right):
                tally.wrong.append(f"text {number}: other numbers behind {context.length} tokens")


def bytes_in(folder: Path) -> int:
    """What the files in a folder take together at one moment, while others write and remove."""
    before = None
    while True:
        files = {}
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    files[entry.name] = entry.stat().st_size
        if files == before:
            return sum(files.values())
        before = files


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


def kills(count: int, seed: int, folder: Path, *, log: bool = False) -> Tally:
    """Kill writers of one folder, and check it behind each kill."""
    rng, tally, budget = random.Random(seed), Tally(), 4_000_000
    numbers = list(range(TEXTS))
    duration = write(folder / "whole", numbers, budget, None)
    shared = folder / "shared"
    while tally.kills < count:
        tally.kills += 1
        # New texts, and those of the last process, which may have been cut off.
        numbers = [tally.kills * TEXTS + i for i in range(TEXTS)]
        again = [number - TEXTS for number in numbers]
        before = names_in(shared)
        write(shared, [*again, *numbers], budget, rng.uniform(0, 2 * duration))
        new = names_in(shared) - before
        halves = sum(name.startswith(".context-") for name in new)
        state = "nothing new" if not new else "half a file" if halves else "whole files"
        tally.left[state] += 1
        check(shared, [*again, *numbers], budget, tally)
        if (total := bytes_in(shared)) > budget:
            tally.wrong.append(f"kill {tally.kills}: {total:,} bytes in the folder")
        if log:
            print(f"kill {tally.kills}: {state}, {len(new) - halves} whole ones", flush=True)
    return tally


def answering(folder: Path, turns: int, seed: int, budget: int, pipe: Connection) -> None:
    """Answer prompts over a folder that others use; send what was found and what was wrong."""
    rng, model, found, wrong = np.random.default_rng(seed), model_of(MODEL), 0, []
    largest = 0
    for turn in range(turns):
        text = text_of(int(rng.integers(3)))[: int(rng.integers(20, 300))]
        if rng.random() < 0.3:
            text[-10] = 6 + (text[-10] + 1) % 64
        store = Store(1 << 30, every=EVERY, folder=folder, folder_bytes=budget)
        (_, cached), canvases = answer(model, text, turn, store)
        _, plain = answer(model, text, turn, None)
        found += cached
        if [c.tolist() for c in canvases] != [c.tolist() for c in plain]:
            wrong.append(f"process {seed}, turn {turn}: another answer")
        largest = max(largest, bytes_in(folder))
    pipe.send(json.dumps([found, wrong, largest]))


def together(processes: int, turns: int, seed: int, folder: Path) -> Tally:
    """Let processes use one folder, whose budget is too small for all of their texts."""
    tally, budget, running = Tally(), 3_000_000, []
    for number in range(processes):
        pipe, other = _PROCESSES.Pipe(duplex=False)
        arguments = (folder, turns, 100 * seed + number, budget, other)
        process = _PROCESSES.Process(target=answering, args=arguments)
        process.start()
        other.close()
        running.append((process, pipe))
    for process, pipe in running:
        found, wrong, largest = json.loads(pipe.recv())
        process.join()
        tally.found += found
        tally.wrong += wrong
        if largest > budget:
            tally.wrong.append(f"{largest:,} bytes in the folder, of {budget:,}")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--turns", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        killed = kills(options.kills, options.seed, Path(scratch), log=True)
        folder = Path(scratch) / "together"
        shared = together(2, options.turns, options.seed, folder)
    print(
        f"{killed.kills} kills left {dict(killed.left)}; {killed.found} tokens found, "
        f"{killed.missed} texts not, {killed.warned} warnings, {len(killed.wrong)} wrong"
    )
    print(
        f"2 processes, {options.turns} turns each: {shared.found} tokens found, "
        f"{len(shared.wrong)} wrong"
    )
    for line in (*killed.wrong, *shared.wrong):
        print(line)
    raise SystemExit(bool(killed.wrong or shared.wrong))


if __name__ == "__main__":
    main()
