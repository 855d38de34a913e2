"""Many requests against one engine in random order, from several threads and event loops, with
cancels, dropped iterators, errors and full queues: `python -m tests.engine.soak`. Not a test."""

from __future__ import annotations

import argparse
import asyncio
import gc
import queue
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_diffgemma import Engine, GenerationSettings, Request, Store
from mlx_diffgemma.engine.run import Run
from mlx_diffgemma.errors import EngineError
from mlx_diffgemma.events import Finished
from tests.engine.cases import PATIENCE, Made, alone, eventually, is_idle, loaded, plain
from tests.engine.test_engine import fails_at_once, fails_in_its_listener, fails_later

PROMPTS = ("Sort: 6 3 1 7 0 6", "Count from 12 to 40.", "Reverse: kaa", "Sort: 9 8 7")
REQUESTS = [
    Request(prompt, GenerationSettings(seed=seed, max_denoising_steps=3, max_new_tokens=70))
    for seed, prompt in enumerate(PROMPTS)
]
FAILING = (fails_at_once, fails_in_its_listener, fails_later)
WAYS = ("read", "read", "read later", "cancel", "drop", "fail", "read async", "cancel async")


@dataclass
class Found:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: int = 0  # since the queue was full; they were made again
    bytes: list[int] = field(default_factory=list)  # of MLX's active memory, when all was quiet
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, outcome: str, wrong: str = "") -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if wrong:
                self.wrong.append(wrong)


def ask(engine: Engine, way: str, draw: random.Random, expected: list[list], found: Found) -> None:
    """Make one request and end it in one of the ways."""
    number = draw.randrange(len(REQUESTS))
    task = Made(draw.choice(FAILING)) if way == "fail" else REQUESTS[number]
    run = submit(engine, task, found)
    if way == "fail":
        try:
            list(run)
        except ValueError:
            found.say("failed")
        else:
            found.say("failed", "an error was lost")
        return
    if way == "drop":
        for _ in range(draw.randrange(3)):
            next(run, None)
        found.say("dropped")
        return
    if way.startswith("cancel"):
        for _ in range(draw.randrange(3)):
            next(run, None)
        run.cancel()
    if way == "read later":
        time.sleep(draw.random() / 20)

    async def read() -> list:
        return [event async for event in run]

    events = asyncio.run(read()) if way.endswith("async") else list(run)
    if way.startswith("cancel"):
        found.say("cancelled")
        return
    is_whole = bool(events) and isinstance(events[-1], Finished)
    right = is_whole and texts(list(map(plain, events))) == expected[number]
    found.say("answered", "" if right else f"request {number} has another answer")


def submit(engine: Engine, task: Any, found: Found) -> Run:
    """Submit a task, again while the queue is full."""
    while True:
        try:
            return engine.submit(task)
        except EngineError as error:
            assert str(error).startswith("the queue is full")
            found.refused += 1
            time.sleep(0.02)


def texts(events: list) -> list:
    """The events that hold no rounded numbers; a store changes how much is read."""
    return [event for event in events if event[0] in ("CanvasCommitted", "Text", "Finished")]


def soak(engine: Engine, count: int, threads: int, seed: int, until: float, found: Found) -> int:
    """Make requests from several threads; return how many were made."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        todo.put(number)
    expected = [texts(alone(request)) for request in REQUESTS]
    made = []

    def work() -> None:
        while time.monotonic() < until:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            made.append(number)
            draw = random.Random(seed * 1_000_000 + number)
            ask(engine, draw.choice(WAYS), draw, expected, found)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0, until - time.monotonic()) + PATIENCE)
        if worker.is_alive():
            found.wrong.append("a thread hangs")
    if not eventually(lambda: is_idle(engine)):
        found.wrong.append(f"the engine is not idle: {engine.counts}")
    kept = engine._store.nbytes if engine._store else 0
    found.bytes.append(quiet_memory() - kept)
    return len(made)


def quiet_memory() -> int:
    """MLX's active memory once the engine's thread has left the frames of its last step."""
    seen = []
    for _ in range(8):
        gc.collect()
        seen.append(mx.get_active_memory())
        time.sleep(0.05)
    return min(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3600)
    options = parser.parse_args()
    model, tokenizer = loaded()
    mx.set_cache_limit(0)  # or MLX reuses larger buffers, and the memory varies
    before, found = threading.active_count(), Found()
    until, start = time.monotonic() + options.seconds, time.monotonic()
    with Engine(
        model, tokenizer, max_rows=3, max_queue=2, store=Store(3_000_000, every=64)
    ) as engine:
        made, part = 0, 100
        for first in range(0, options.cases, part):
            made += soak(engine, min(part, options.cases - first), 7, first, until, found)
    seconds = time.monotonic() - start
    if threading.active_count() != before:
        found.wrong.append(f"{threading.active_count() - before} threads are left")
    if sum(found.outcomes.values()) != made:
        found.wrong.append(f"{made - sum(found.outcomes.values())} requests were lost")
    after_first, most = found.bytes[0], max(found.bytes)
    if most > 1.02 * after_first:
        found.wrong.append(f"memory grew from {after_first} to {most} bytes")
    print(f"{made} requests in {seconds:.0f} s: {dict(found.outcomes)}, {found.refused} refusals")
    print(f"active memory after 100 requests {after_first:,} bytes, then at most {most:,},")
    print(f"at last {found.bytes[-1]:,}; {threading.active_count()} threads, as before: {before}")
    print(*found.wrong[:20], f"{len(found.wrong)} findings", sep="\n")
    if found.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
