"""What does a rewriting cost from the text that stands there, and is it as often right?

The tasks are those of rewritings.py. Each is written whole (`generate`, as a retry or the server's
apply route) and as a part (`fill`, as `edit` does: the changed part with up to 4 tokens on both
sides is the slot, the rest is pinned, and the number of tokens is open; tasks whose part a canvas
does not hold are left out), in these ways:
- cold: from noise;
- agreed: after a first step from noise, which does not see the standing text, from those of its
  tokens that have a share of the likeliest one's probability (`warm_start`);
- read: the standing text is read first, and its tokens are committed while they have a share of the
  likeliest one's probability (`warm_read`); what is denoised is agreed 0.1. For whole texts alone.
  Columns that were read and not kept count as work;
- noised: from the standing text of which each token became noise with a probability, the schedule
  begun there; for whole texts alone. The package has no such setting: it does worse.

Float32, a seed per task; 95% Wilson intervals. Work is rows x steps (canvas columns computed, of
all canvases), which does not depend on the machine. "settled" counts the steps until the first
text is committed: none where it was read. "copied" counts answers that are the standing text, which
is never right.

Bounds, of read 0.5 against cold, all kinds together, whole: rows x steps at most 0.3, exact
answers no fewer; of a model that was trained to read too and takes many steps, as the first tiny
one. The bundled model and the bench model were not trained to read. Floor: nothing is denoised. Of
agreed alone: one look at each canvas and one that confirms it, 2 steps a canvas.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/warm.py --model FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from answer import wilson
from common import finish, record
from rewritings import TASKS, Rewriting, drawn

from mlx_diffgemma import GenerationSettings, Request, Template, bundled_model, load
from mlx_diffgemma.denoise.canvas import Canvas
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.denoise.standing import NONE, Kept, Standing, StandingAnswer
from mlx_diffgemma.denoise.warm import going_on
from mlx_diffgemma.events import CanvasCommitted, Finished, StepDone, Text
from mlx_diffgemma.language.template import Slot
from mlx_diffgemma.write import generate
from mlx_diffgemma.write.fill import Filled, FillTask
from mlx_diffgemma.write.job import Job, run_jobs

MOST_TOKENS = {"small": 160, "steps": 256}  # of an answer, by tasks
AROUND = 4  # tokens beside a change that an edit selects too
AT_ONCE = 16  # tasks that are computed together
WORK_AT_MOST = 0.3
JUDGED = "whole read 0.5"


@dataclass(frozen=True)
class Outcome:
    text: str
    steps: int
    canvases: int
    positions: int
    settled: int  # steps of the first canvas


class Noised(StandingAnswer):
    """A standing text that a canvas shows from the beginning, a part of it made noise."""

    def __init__(self, tokens: np.ndarray, ends: tuple[int, int], level: float, seed: int):
        super().__init__(tokens, ends)
        self._level, self._rng = level, np.random.default_rng([seed, 1])

    def columns(self, width: int) -> int:
        return width

    def texts(self, begin: int, width: int) -> Sequence[Standing]:
        return ()

    def kept(self, kept: Kept) -> None:
        raise AssertionError("nothing is looked for")

    def shown(self, width: int) -> np.ndarray:
        part, begins = self._near(width)
        is_noise = self._rng.random(width) < self._level
        return np.where(is_noise, NONE, part[begins : begins + width]).astype(np.int32)


class NoisedRow(Row):
    """A row whose canvases begin with what `Noised` shows."""

    def _warm(self, canvas: Canvas) -> Canvas:
        if not isinstance(self._stands, Noised):
            return super()._warm(canvas)
        return going_on(canvas, self._stands.shown(self.settings.canvas_length)[None])


def part_of(task: Rewriting) -> tuple[str, str, str, str]:
    """The text before a changed part, what stands there, what is right, and the text behind."""
    old, new = task.stands, task.answer
    before = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    before = min(len(old), len(new)) if before is None else before
    most = min(len(old), len(new)) - before
    behind = next((i for i in range(most) if old[-1 - i] != new[-1 - i]), most)
    before, behind = max(0, before - AROUND), max(0, behind - AROUND)
    stop = len(old) - behind
    return old[:before], old[before:stop], new[before : len(new) - behind], old[stop:]


class Ways:
    """A model, and the ways in which it rewrites."""

    def __init__(self, model: Any, tokenizer: Any, policy: str, most: int):
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self.most = most  # tokens of an answer

    def settings(self, seed: int, way: Mapping[str, float]) -> GenerationSettings:
        plain = GenerationSettings(seed=seed, policy=self.policy, max_new_tokens=self.most)
        return replace(plain, **way)

    def whole(
        self, wanted: Sequence[Rewriting], way: Mapping[str, float], level: float | None = None
    ) -> list[Outcome]:
        found: list[Outcome] = []
        for start in range(0, len(wanted), AT_ONCE):
            some = range(start, min(len(wanted), start + AT_ONCE))
            found += self._run([self._job(wanted[i], i, way, level) for i in some])
        return found

    def _job(
        self, task: Rewriting, seed: int, way: Mapping[str, float], level: float | None
    ) -> Job[Any]:
        if level is not None:
            way = {"warm_start": 0.5}  # the package refuses a standing text where it is off
        settings = self.settings(seed, way)
        request = Request(task.prompt, settings, standing=task.stands if way else None)
        if level is None:
            return request.job(self.model, self.tokenizer)

        def noised(tokens: np.ndarray, ends: tuple[int, int]) -> Noised:
            return Noised(tokens, ends, level, seed)

        with patch.multiple(generate, StandingAnswer=noised, Row=NoisedRow):
            return request.job(self.model, self.tokenizer)

    def _run(self, jobs: list[Job[Any]]) -> list[Outcome]:
        texts, first = [""] * len(jobs), [0] * len(jobs)
        done: dict[int, Finished] = {}
        for number, event in run_jobs(self.model, jobs):
            if isinstance(event, Text):
                texts[number] += event.piece
            elif isinstance(event, CanvasCommitted) and event.canvas_index == 0:
                first[number] = event.steps
            elif isinstance(event, Finished):
                done[number] = event
        return [
            Outcome(text, done[i].steps, done[i].canvases, done[i].positions, first[i])
            for i, text in enumerate(texts)
        ]

    def holds(self, task: Rewriting) -> bool:
        """Whether a canvas holds the part of a task."""
        return self._tokens(part_of(task)[1]) <= self.model.config.canvas_length

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def parts(self, wanted: Sequence[Rewriting], way: Mapping[str, float]) -> list[Outcome]:
        found: list[Outcome] = []
        for number, task in enumerate(wanted):
            found += self._part(task, number, way)
        return found

    def _part(self, task: Rewriting, seed: int, way: Mapping[str, float]) -> Iterator[Outcome]:
        before, old, _, behind = part_of(task)
        count = self._tokens(old)
        low, high = max(1, count // 2), min(2 * count + 8, self.model.config.canvas_length)
        slot = Slot("part", "gap", low, high)
        fill = FillTask(
            template=Template(tuple(part for part in (before, slot, behind) if part != "")),
            prompt=task.prompt,
            settings=self.settings(seed, way),
            standing={"part": old} if way else {},
        )
        steps = 0
        for _, event in run_jobs(self.model, [fill.job(self.model, self.tokenizer)]):
            if isinstance(event, StepDone) and event.canvas_index == 0:
                steps += 1
            elif isinstance(event, Filled):
                yield Outcome(event.text, event.steps, event.canvases, event.positions, steps)


def summed(wanted: Sequence[Rewriting], found: Sequence[Outcome]) -> dict[str, Any]:
    exact = sum(o.text == task.answer for task, o in zip(wanted, found, strict=True))
    return {
        "tasks": len(found),
        "exact": exact,
        "rate": round(exact / len(found), 4),
        "interval": [round(bound, 4) for bound in wilson(exact, len(found))],
        "copied": sum(o.text == task.stands for task, o in zip(wanted, found, strict=True)),
        "positions": round(fmean(o.positions for o in found), 1),
        "steps_per_canvas": round(sum(o.steps for o in found) / sum(o.canvases for o in found), 2),
        "settled": round(fmean(o.settled for o in found), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="by default the bundled one")
    parser.add_argument("--limit", type=int, default=80, help="tasks per kind")
    parser.add_argument("--tasks", choices=TASKS, default="small", help="steps: the bench model's")
    parser.add_argument(
        "--kind",
        action="append",
        choices=list(chain(*TASKS.values())),
        help="these alone; repeatable",
    )
    parser.add_argument("--form", action="append", choices=("whole", "part"), help="repeatable")
    parser.add_argument("--policy", choices=("reference", "fast"), default="reference")
    parser.add_argument("--agreement", type=float, action="append", help="repeatable; 0.1")
    parser.add_argument("--read", type=float, action="append", help="repeatable; 0.5")
    parser.add_argument("--level", type=float, action="append", default=[], help="repeatable; none")
    parser.add_argument("--digits", type=int, default=1, help="of a table's last number, at least")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    forms, known = options.form or ["whole", "part"], TASKS[options.tasks]
    kinds = options.kind or list(known)
    if unknown := [kind for kind in kinds if kind not in known]:
        parser.error(f"--kind: {unknown[0]} is not among {', '.join(known)}")
    starts: dict[str, dict[str, float]] = {"cold": {}}
    starts |= {f"agreed {share}": {"warm_start": share} for share in options.agreement or [0.1]}
    starts |= {
        f"read {share}": {"warm_start": 0.1, "warm_read": share} for share in options.read or [0.5]
    }
    print(f"bounds: {JUDGED}: rows x steps at most {WORK_AT_MOST} of cold, no fewer exact")
    model, tokenizer = load(options.model or bundled_model())
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    ways = Ways(model, tokenizer, options.policy, MOST_TOKENS[options.tasks])
    wanted = {
        kind: drawn(known, kind, options.limit, options.seed, options.digits) for kind in kinds
    }
    asked = {"whole": wanted}
    asked["part"] = {kind: [t for t in some if ways.holds(t)] for kind, some in wanted.items()}
    found: dict[str, dict[str, list[Outcome]]] = {}
    for form in forms:
        for name, start in starts.items():
            if form == "part" and "warm_read" in start:
                continue
            found[way := f"{form} {name}"] = {}
            for kind, some in asked[form].items():
                found[way][kind] = (ways.whole if form == "whole" else ways.parts)(some, start)
                print(f"{way} {kind}: {summed(some, found[way][kind])}", flush=True)
    for level in options.level if "whole" in forms else ():
        found[way := f"whole noised {level}"] = {}
        for kind, some in wanted.items():
            found[way][kind] = ways.whole(some, {}, level)
            print(f"{way} {kind}: {summed(some, found[way][kind])}", flush=True)
    pooled = {
        way: summed(
            [task for some in asked[way.split()[0]].values() for task in some],
            [outcome for some in kinds.values() for outcome in some],
        )
        for way, kinds in found.items()
    }
    passed = None  # until the way with a bound has been run
    for way, row in pooled.items():
        cold = pooled[f"{way.split()[0]} cold"]
        row["of_cold"] = round(row["positions"] / cold["positions"], 3)
        print(f"{way}, pooled: {row}", flush=True)
        if way == JUDGED:
            passed = row["of_cold"] <= WORK_AT_MOST and row["exact"] >= cold["exact"]
    print({True: "within the bounds", False: "NOT within the bounds", None: "not judged"}[passed])
    finish(
        record(
            "warm",
            what="rewritings from the text that stands there, against from noise",
            model=Path(options.model).name if options.model else "bundled",
            shape={
                "tasks": options.tasks,
                "tasks_per_kind": options.limit,
                "canvas": model.config.canvas_length,
                "max_new_tokens": MOST_TOKENS[options.tasks],
            },
            dtype="float32",
            units={
                "exact, copied": "tasks",
                "rate": "of all tasks; interval: Wilson, 95%",
                "positions": "rows x steps, mean",
                "settled": "steps until the first canvas is committed, mean",
                "of_cold": "rows x steps over those of cold",
            },
            policy=options.policy,
            seed=options.seed,
            by_kind={
                way: {
                    kind: summed(asked[way.split()[0]][kind], some) for kind, some in kinds.items()
                }
                for way, kinds in found.items()
            },
            pooled=pooled,
            passed=passed,
        ),
        save=options.save,
    )
    sys.exit(passed is False)


if __name__ == "__main__":
    main()
