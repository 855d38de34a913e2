"""How well does the bundled model fill gaps, their length being known or not?

1. Sudoku, 200 grids each of 4 x 4 and 6 x 6: asked by prompt, as a left-to-right model must be
   asked, and filled, the givens pinned in the canvas. Solved means a valid grid that holds the
   givens. An altered given is a cell that was given and stands otherwise in the answer.
2. Counting, sorting, tables, series of words and code, 200 answers each: a random span of 1 to 8
   tokens is taken out of the right answer and filled. Its length is
   - known;
   - found: any that fits the canvas, as `fill` finds it;
   - and whole: as found, but the text is that of the canvas in which the length is looked for,
     denoised to its end.
   Exact means that the very same text came back.
3. With --hard, the same spans under the default prompt, which only shows the text with a blank. The
   bundled model was not trained on such.

Float32, seeds by prompt, 95% Wilson intervals; work in rows x steps (canvas positions denoised).
A line of bench/results/ with "trials" is of the lengths tried as rows, which `fill` did before, on
the same spans and seeds.

Bounds: no given is ever altered by filling, and nothing outside of the gaps; filling solves at
least as many grids as asking; of found lengths, at most 2 in 100 answers less than of known ones
are exact, at no more than twice their rows x steps. Floor of the work: one look at the gap's
canvas, 64 rows x steps.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/infill.py
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import fmean
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from answer import choose, wilson
from common import finish, record

from mlx_diffgemma import GenerationSettings, Template, bundled_model, fill, load, stream_generate
from mlx_diffgemma.events import Finished, StepDone, Text, TrialStarted
from mlx_diffgemma.language.template import Slot
from mlx_diffgemma.write import lengths
from mlx_diffgemma.write.fill import Filled, stream_fill

GRIDS = ("sudoku4", "sudoku6")
TASKS = ("count", "sort", "table", "words", "code")
BOXES = {4: (2, 2), 6: (2, 3)}  # rows and columns of a box, by size of the grid
LONGEST_SPAN = 8
WAYS = ("known", "found", "whole")
FEWER_AT_MOST, WORK_AT_MOST = 0.02, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=200, help="prompts per task")
    parser.add_argument("--task", action="append", choices=TASKS, help="these alone; repeatable")
    parser.add_argument("--hard", action="store_true", help="spans under the default prompt")
    parser.add_argument("--policy", choices=("reference", "fast"), default="reference")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    options.task = options.task or list(TASKS)
    print(
        "bounds: no given altered; filling solves as many as asking; found lengths: at most 2 in "
        "100 fewer exact, at most twice the work of known ones"
    )
    model, tokenizer = load(bundled_model())
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    run = Runner(model, tokenizer, options.policy)
    entries: dict[str, list[dict[str, str]]] = {}
    for entry in choose(options.limit):
        entries.setdefault(entry["task"], []).append(entry)
    sudoku = {}
    for task in () if options.hard else GRIDS:
        sudoku[task] = grids(run, entries[task])
        print(f"{task}: {sudoku[task]}", flush=True)
    restored = {}
    for task in options.task:
        restored[task] = restoration(run, entries[task], is_hard=options.hard)
        print(f"{task}: {restored[task]}", flush=True)
    pooled = {
        how: {
            "exact": sum(row[how]["exact"] for row in restored.values()),
            "prompts": sum(row[how]["prompts"] for row in restored.values()),
            "length_right": sum(row[how]["length_right"] for row in restored.values()),
            "positions": round(fmean(row[how]["positions"] for row in restored.values())),
        }
        for how in WAYS
    }
    print(f"pooled: {pooled}", flush=True)
    found, known = pooled["found"], pooled["known"]
    passed = (
        all(grid["filled"]["altered_givens"] == 0 for grid in sudoku.values())
        and all(grid["filled"]["solved"] >= grid["asked"]["solved"] for grid in sudoku.values())
        and known["exact"] - found["exact"] <= FEWER_AT_MOST * known["prompts"]
        and found["positions"] <= WORK_AT_MOST * known["positions"]
        and all(row["literals_altered"] == 0 for row in restored.values())
    )
    print("within the bounds" if passed else "NOT within the bounds")
    finish(
        record(
            "infill",
            what="gaps filled by the bundled model, against asking and against known lengths"
            + (", under the default prompt" if options.hard else ""),
            shape={
                "prompts_per_task": options.limit,
                "canvas": model.config.canvas_length,
                "batch": 1,
            },
            dtype="float32",
            units={
                "solved, exact": "prompts",
                "rate": "of all prompts; interval: Wilson, 95%",
                "altered_givens": "cells, over all grids",
                "grids_with_altered_givens": "grids",
                "positions": "rows x steps, mean",
                "seconds": "mean, on a shared machine",
            },
            policy=options.policy,
            **sudoku,
            restored=restored,
            pooled=pooled,
            passed=passed,
        ),
        save=options.save,
    )
    sys.exit(not passed)


class Runner:
    """The bundled model, asked and filled."""

    def __init__(self, model: Any, tokenizer: Any, policy: str):
        self.model, self.tokenizer, self.policy = model, tokenizer, policy

    def settings(self, seed: int) -> GenerationSettings:
        return GenerationSettings(seed=seed, policy=self.policy, max_new_tokens=64)

    def ask(self, prompt: str, seed: int) -> tuple[str, int]:
        """The answer and its rows x steps."""
        text, positions = "", 0
        for event in stream_generate(
            self.model, self.tokenizer, prompt, settings=self.settings(seed)
        ):
            if isinstance(event, Text):
                text += event.piece
            elif isinstance(event, Finished):
                positions = event.positions
        return text, positions

    def fill(self, parts: list[str | Slot], prompt: str | None, seed: int) -> Filled:
        template = Template(tuple(part for part in parts if part != ""))
        return fill(
            self.model, self.tokenizer, template, prompt=prompt, settings=self.settings(seed)
        )

    def whole(self, parts: list[str | Slot], prompt: str | None, seed: int) -> tuple[str, int]:
        """The text of the canvas in which the length is looked for, and its rows x steps."""
        template = Template(tuple(part for part in parts if part != ""))
        settings, last, positions = self.settings(seed), None, 0
        with patch.multiple(lengths, DECIDED=2.0, SEARCH_STEPS=settings.max_denoising_steps or 48):
            for event in stream_fill(
                self.model, self.tokenizer, template, prompt=prompt, settings=settings
            ):
                if isinstance(event, StepDone):
                    last, positions = event, positions + event.draft.shape[1]
                elif isinstance(event, TrialStarted) and event.is_final:
                    break
        assert last is not None
        ids = last.draft[0].tolist()
        end = next((i for i, t in enumerate(ids) if t in self.model.config.eos_token_ids), len(ids))
        return self.tokenizer.decode(ids[:end]), positions


def grids(run: Runner, entries: list[dict[str, str]]) -> dict[str, Any]:
    """Each grid asked and filled."""
    rows: dict[str, list[tuple[bool, int, int, float]]] = {"asked": [], "filled": []}
    for seed, entry in enumerate(entries):
        given = entry["prompt"].partition("\n")[2]
        started = time.perf_counter()
        text, positions = run.ask(entry["prompt"], seed)
        rows["asked"].append(judged(given, text, positions, started))
        parts: list[str | Slot] = []
        for i, cell in enumerate(given):
            parts.append(Slot(str(i), "gap", 1, 1) if cell == "." else cell)
        started = time.perf_counter()
        filled = run.fill(joined(parts), entry["prompt"], seed)
        rows["filled"].append(judged(given, filled.text, filled.positions, started))
    return {
        how: {
            "grids": len(found),
            "solved": (solved := sum(row[0] for row in found)),
            **rate(solved, len(found)),
            "altered_givens": sum(row[1] for row in found),
            "grids_with_altered_givens": sum(row[1] > 0 for row in found),
            "positions": round(fmean(row[2] for row in found), 1),
            "seconds": round(fmean(row[3] for row in found), 4),
        }
        for how, found in rows.items()
    }


def judged(given: str, text: str, positions: int, started: float) -> tuple[bool, int, int, float]:
    """Solved, givens altered, rows x steps, seconds."""
    seconds = time.perf_counter() - started
    padded = text.ljust(len(given))
    altered = sum(a not in (".", b) for a, b in zip(given, padded, strict=False))
    return altered == 0 and is_solved(text), altered, positions, seconds


def is_solved(text: str) -> bool:
    """Whether it is a grid with every digit once in each row, column and box."""
    rows = text.split("\n")
    size = len(rows)
    if size not in BOXES or any(len(row) != size for row in rows):
        return False
    height, width = BOXES[size]
    digits = set("123456789"[:size])
    columns = ["".join(row[i] for row in rows) for i in range(size)]
    boxes = [
        "".join(rows[r + i][c : c + width] for i in range(height))
        for r in range(0, size, height)
        for c in range(0, size, width)
    ]
    return all(set(unit) == digits for unit in [*rows, *columns, *boxes])


def joined(parts: list[str | Slot]) -> list[str | Slot]:
    """With neighbouring literals as one."""
    out: list[str | Slot] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return out


def restoration(run: Runner, entries: list[dict[str, str]], *, is_hard: bool) -> dict[str, Any]:
    """Each answer with a span taken out and put back."""
    found: dict[str, list[tuple[bool, bool, int, float]]] = {how: [] for how in WAYS}
    altered, draw = 0, random.Random(0)
    for seed, entry in enumerate(entries):
        answer = entry["answer"]
        count = draw.randint(1, min(LONGEST_SPAN, len(answer) - 1))
        start = draw.randint(0, len(answer) - count)
        span = answer[start : start + count]
        prompt = None if is_hard else entry["prompt"]
        for how in WAYS:
            slot = Slot("gap", "gap", count, count) if how == "known" else Slot("gap", "gap")
            parts = [answer[:start], slot, answer[start + count :]]
            started = time.perf_counter()
            if how == "whole":
                text, positions = run.whole(parts, prompt, seed)
                seconds = time.perf_counter() - started
                # In a window that does not reach the end, some of the text behind is to be seen.
                is_exact = span in text and text in answer and len(text) > len(span)
                found[how].append((is_exact, is_exact, positions, seconds))
                continue
            filled = run.fill(parts, prompt, seed)
            seconds = time.perf_counter() - started
            got = filled.slots["gap"]
            altered += filled.text != answer[:start] + got.text + answer[start + count :]
            right = len(got.tokens) == count  # one token per character here
            found[how].append((got.text == span, right, filled.positions, seconds))
    return {
        how: {
            "prompts": len(rows),
            "exact": (exact := sum(row[0] for row in rows)),
            **rate(exact, len(rows)),
            "length_right": sum(row[1] for row in rows),
            "positions": round(fmean(row[2] for row in rows), 1),
            "seconds": round(fmean(row[3] for row in rows), 4),
        }
        for how, rows in found.items()
    } | {"literals_altered": altered}


def rate(count: int, total: int) -> dict[str, Any]:
    return {"rate": round(count / total, 4), "interval": wilson(count, total)}


if __name__ == "__main__":
    main()
