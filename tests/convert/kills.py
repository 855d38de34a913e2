"""Kills conversions with SIGKILL at random moments, resumes each, and compares the bytes.

usage: python -m tests.convert.kills [--kills 60] [--seed 0]

The moments are uniform over the duration of an uninterrupted run, but for one in four, which falls
on the end, where the side files are written and the folder is renamed. After one in three, the next
run is killed as well, before the last may finish. Exits 1 if a result differs. Three kills run with
every test, in test_convert_kills.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_diffgemma import bundled_model
from mlx_diffgemma.convert import convert, plan, shards
from tests.convert.cases import sums

SHARDS = 4
# A process begins with all imports done, so that kills fall into the conversion.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["mlx_diffgemma.convert", "tests.convert.cases"])


@dataclass
class Tally:
    """Where the kills fell, and which results were wrong."""

    kills: int = 0
    too_late: int = 0
    states: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def converting(target: Path, shard_bytes: int, pipe: Connection) -> None:
    """What is killed. Sends a word when it begins, when the last tensor is written, and at the
    end."""
    plan.SHARD_BYTES = shard_bytes
    shards._SYNC_BYTES = 32 << 10  # so that there is something to go on from

    def progress(done: int, total: int, name: str) -> None:
        if done == total:
            pipe.send("finishing")

    pipe.send("begun")
    convert(bundled_model(), target, quantize=True, progress=progress)
    pipe.send("done")


def start(target: Path, shard_bytes: int) -> tuple[ForkServerProcess, Connection]:
    """Returns when the conversion begins."""
    pipe, other = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=converting, args=(target, shard_bytes, other))
    process.start()
    other.close()
    assert pipe.recv() == "begun"
    return process, pipe


def kill(target: Path, shard_bytes: int, delay: float, *, at_end: bool) -> str:
    """Kills a conversion `delay` seconds after it began, or after its last tensor. Returns what it
    left."""
    process, pipe = start(target, shard_bytes)
    if at_end:
        assert pipe.recv() == "finishing"
    time.sleep(delay)
    process.kill()
    process.join()
    partial = target.with_name(target.name + ".partial")
    if target.exists():
        return "renamed, work not removed" if partial.exists() else "finished"
    if (partial / "out/conversion.json").exists():
        return "record written"
    if (partial / "out/config.json").exists():
        return "side files"
    return "tensors" if (partial / "journal").exists() else "nothing"


def run(kills: int, seed: int, scratch: Path, *, log: bool = False) -> Tally:
    rng = random.Random(seed)
    summary = convert(bundled_model(), scratch / "one", quantize=True)
    shard_bytes = summary.plan.tensor_bytes // (SHARDS - 1)
    process, pipe = start(scratch / "whole", shard_bytes)
    times = [time.perf_counter()]
    for word in ("finishing", "done"):
        assert pipe.recv() == word
        times.append(time.perf_counter())
    process.join()
    duration, end = times[2] - times[0], times[2] - times[1]
    expected = sums(scratch / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) >= SHARDS - 1
    if log:
        print(f"uninterrupted: {duration:.2f} s, of which the end {end:.3f} s", flush=True)
    tally = Tally()
    while tally.kills < kills:
        target = scratch / "out"
        at_end = rng.random() < 0.25
        state = kill(
            target, shard_bytes, rng.uniform(0, end if at_end else duration), at_end=at_end
        )
        if state == "finished":  # runs differ in duration
            tally.too_late += 1
            shutil.rmtree(target)
            continue
        tally.kills += 1
        tally.states[state] += 1
        if rng.random() < 1 / 3:
            kill(target, shard_bytes, rng.uniform(0, duration / 2), at_end=False)
        there = resume(target, shard_bytes)
        if sums(target) != expected or {p.name for p in scratch.iterdir()} != {
            "one",
            "whole",
            "out",
        }:
            tally.wrong.append(f"kill {tally.kills} ({state})")
        if log:
            print(f"kill {tally.kills}: {state}, {there} tensors were there", flush=True)
        shutil.rmtree(target)
    return tally


def resume(target: Path, shard_bytes: int) -> int:
    before, plan.SHARD_BYTES = plan.SHARD_BYTES, shard_bytes
    try:
        return convert(bundled_model(), target, quantize=True).resumed_moves
    finally:
        plan.SHARD_BYTES = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        tally = run(options.kills, options.seed, Path(scratch), log=True)
    print(
        f"{tally.kills} kills ({tally.too_late} more came too late) left {dict(tally.states)}; "
        f"{tally.kills - len(tally.wrong)} byte-identical results"
    )
    if tally.wrong:
        raise SystemExit("wrong: " + ", ".join(tally.wrong))


if __name__ == "__main__":
    main()
