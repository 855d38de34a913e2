"""Requests for tests of the engine. Not a test."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma import Engine, GenerationSettings, Request, bundled_model, load
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.write.job import Job, run_jobs

# Some of every style: sampler, width, self-conditioning, stops, candidates, budget.
REQUESTS = (
    Request("Sort: 6 3 1 7 0 6", GenerationSettings(seed=3)),
    Request(
        "Count from 12 to 40.", GenerationSettings(seed=1, canvas_width="answer", stop_on="answer")
    ),
    Request("Reverse: kaa", GenerationSettings(seed=2, policy="fast", top_candidates=3)),
    Request("Count from 38 to 44.", GenerationSettings(seed=4, temperature=0), stop="42"),
    Request("Fill: Monday _______ Wednesday", GenerationSettings(seed=5, max_new_tokens=9)),
    Request("Sort: 9 8 7", GenerationSettings(seed=6, prefill_step_size=2)),
)
# Two hundred steps on one canvas, unless it is stopped.
LONG = Request(
    "Count from 12 to 40.",
    GenerationSettings(seed=1, max_denoising_steps=200, stability_threshold=200),
)
PATIENCE = 60.0  # seconds; what takes longer hangs


@functools.cache
def loaded() -> tuple[DiffusionGemma, Any]:
    return load(bundled_model())


class Near:
    """Numbers that equal others up to rounding: rows together are multiplied in other groups."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = np.array(numbers, np.float64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Near) or self.numbers.shape != other.numbers.shape:
            return False
        return np.allclose(self.numbers, other.numbers, atol=1e-3)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Near({self.numbers.tolist()})"


def plain(said: Any) -> Any:
    """An event as plain values, without the time. Ids are compared exactly."""
    if isinstance(said, mx.array):
        is_float = mx.issubdtype(said.dtype, mx.floating)
        return Near(said) if is_float else np.array(said).tolist()
    if isinstance(said, float):
        return Near(said)
    if isinstance(said, (tuple, list)):
        return tuple(map(plain, said))
    if isinstance(said, dict):
        return {name: plain(value) for name, value in said.items()}
    if is_dataclass(said):
        named = [(f.name, getattr(said, f.name)) for f in fields(said) if f.name != "seconds"]
        return (type(said).__name__, *((name, plain(value)) for name, value in named))
    return said


def alone(task: Any) -> list[Any]:
    """The events of a task without an engine."""
    model, tokenizer = loaded()
    return [plain(event) for _, event in run_jobs(model, [task.job(model, tokenizer)])]


@dataclass(frozen=True)
class Made:
    """A task whose job a test writes."""

    make: Callable[[DiffusionGemma, Any], Job[Any]]

    def job(self, model: DiffusionGemma, tokenizer: Any) -> Job[Any]:
        return self.make(model, tokenizer)


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Hold the engine's thread, so that what is submitted meanwhile begins together."""
    is_held, go_on = threading.Event(), threading.Event()

    def make(model: DiffusionGemma, tokenizer: Any) -> Job[str]:
        is_held.set()
        assert go_on.wait(PATIENCE)
        yield "held"

    run = engine.submit(Made(make))
    assert is_held.wait(PATIENCE)
    try:
        yield
    finally:
        go_on.set()
        assert list(run) == ["held"]


def eventually(happens: Callable[[], bool]) -> bool:
    """Whether something happens within a while."""
    end = time.monotonic() + PATIENCE
    while not (has_happened := happens()) and time.monotonic() < end:
        time.sleep(0.005)
    return has_happened


def is_idle(engine: Engine) -> bool:
    return engine.counts == {"waiting": 0, "running": 0, "rows": 0}


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises in a thread of its own."""
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)
    assert result, "the thread hangs"
    return result[0]
