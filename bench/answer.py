"""What does an answer cost, and is it as often right?

Over the prompts that a model brings (prompts.json; the bundled model's, or those of a model that
recipes/steps made), one at a time as a user runs them, float32, at most 256 new tokens: ours under
each policy, mlx-vlm as it comes (confidence threshold 0.9, greedy, freezing) and in its entropy-
bound mode (full canvas, temperature 1), and transformers on torch with one thread, which is the
fastest at this size. Each runs its own loop. They take turns prompt by prompt in one process,
forwards and backwards, so that noise of the machine hits all alike. Wall time is from token ids to
text, prefill included. One BLAS thread, as torch has one: products are so small here that a second
one costs each runtime about what it gains.

Bounds, of the policy "fast", for the bundled model, and in brackets for one whose answers take
many steps:
- exact answers, per task and pooled: a rate not below the lower end of the 95% Wilson interval of
  "reference". Of two policies equally good, one falls below it by luck in about 8% of comparisons,
  since the interval knows the noise of one side only; the difference in standard errors is
  recorded beside it.
- rows x steps (canvas positions denoised, the work that does not depend on the machine): at most
  mlx-vlm's as it comes, half (0.4) of "reference", and a third of it where the answer fills less
  than half a canvas.
- mean wall time: at most 0.6 of mlx-vlm's as it comes, and 0.4 (0.35) of its entropy-bound mode's.
- (mean wall time to the first final text: at most half of that of "reference".)
Floor: a runtime that knew each answer would denoise every canvas once, at the width of the answer.

    OPENBLAS_NUM_THREADS=1 python bench/answer.py
    OPENBLAS_NUM_THREADS=1 python bench/answer.py --model recipes/steps/bench-model --limit 100
    python bench/answer.py --limit 10 --only reference --only wider \\
        --settings 'wider:policy="reference",entropy_bound=0.4'
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from common import finish, model_name, record

from mlx_diffgemma import GenerationSettings, bundled_model, encode_prompt, load, stream_generate
from mlx_diffgemma.events import Finished, Text

MAX_NEW_TOKENS = 256
ENOUGH = 300  # prompts, of all tasks; fewer say nothing
POLICIES: dict[str, dict[str, Any]] = {
    "reference": {"policy": "reference"},
    "fast": {"policy": "fast"},
}
MLX_VLM: dict[str, dict[str, Any]] = {
    "mlx-vlm": {},
    "mlx-vlm-entropy": {
        "diffusion_sampler": "entropy-bound",
        "diffusion_full_canvas": True,
        "temperature": 1.0,
    },
}
TRANSFORMERS = "transformers"
PAIRS = (("fast", "mlx-vlm"), ("fast", "mlx-vlm-entropy"), ("fast", "reference"))
COMPARED = ("positions", "steps", "seconds_mean", "seconds_median", "first_seconds_mean")
POOLED, SHORT = "pooled", "under half a canvas"
LENGTHS = {  # tokens of the expected answer with its end
    "under 16 tokens": range(16),
    "16 to 48 tokens": range(16, 49),
    "over 48 tokens": range(49, MAX_NEW_TOKENS + 1),
}
Bound = tuple[str, str, str, float]  # group, measure of fast, against, at most this ratio
RATIO_BOUNDS: tuple[Bound, ...] = (
    (POOLED, "positions", "mlx-vlm", 1.0),
    (POOLED, "positions", "reference", 1 / 2),
    (SHORT, "positions", "reference", 1 / 3),
    (POOLED, "seconds_mean", "mlx-vlm", 0.6),
    (POOLED, "seconds_mean", "mlx-vlm-entropy", 0.4),
)
MANY_STEPS_BOUNDS: tuple[Bound, ...] = (  # of models other than the bundled one
    (POOLED, "positions", "mlx-vlm", 1.0),
    (POOLED, "positions", "reference", 0.4),
    (POOLED, "seconds_mean", "mlx-vlm", 0.6),
    (POOLED, "seconds_mean", "mlx-vlm-entropy", 0.35),
    (POOLED, "first_seconds_mean", "reference", 0.5),
)


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    new_tokens: int  # with the end token
    canvases: int
    steps: int
    positions: int  # rows x steps
    first_seconds: float  # until its first final text
    seconds: float = 0.0
    exact: bool = False


Run = Callable[[list[int], int], Answer]  # prompt ids and a seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder with prompts.json; the bundled one")
    parser.add_argument("--limit", type=int, help="prompts per task")
    parser.add_argument(
        "--settings",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="one more runtime: ours under these settings; values are JSON",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="run these runtimes alone")
    parser.add_argument("--write", type=Path, metavar="FILE", help="every answer as a JSON line")
    parser.add_argument("--warmup", type=int, default=5, help="prompts per runtime, not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    policies = POLICIES | dict(map(parse_settings, options.settings))
    names = [*policies, *MLX_VLM, TRANSFORMERS]
    if unknown := sorted(set(options.only or ()) - set(names)):
        parser.error(f"--only: there is no {', '.join(unknown)}, only {', '.join(names)}")
    names = [name for name in names if not options.only or name in options.only]
    print("bounds of fast: exact rate per task and pooled within reference's 95% interval or above")
    ratio_bounds = MANY_STEPS_BOUNDS if options.model else RATIO_BOUNDS
    for group, measure, against, limit in ratio_bounds:
        print(f"bounds of fast: {measure} at most {limit:.2g} of {against}, {group}")

    folder = options.model or bundled_model()
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    config = model.config
    runs: dict[str, Run] = {}
    for name in names:
        if name in policies:
            runs[name] = ours(model, tokenizer, policies[name])
        elif name in MLX_VLM:
            runs[name] = mlx_vlm(folder, tokenizer, config.eos_token_ids, MLX_VLM[name])
        else:
            runs[name] = transformers(folder, tokenizer, config)
    entries = choose(folder, options.limit)
    prompts = [encode_prompt(tokenizer, entry["prompt"]) for entry in entries]
    expected = [
        len(tokenizer.encode(entry["answer"], add_special_tokens=False)) + 1 for entry in entries
    ]
    for run in runs.values():
        for ids in prompts[: options.warmup]:
            run(ids, options.seed)
    answers = take_turns(runs, entries, prompts, options.seed)
    if options.write:
        write_answers(options.write, entries, expected, answers)

    table, ratios = {}, {}
    for group, chosen in group_prompts(entries, expected, config.canvas_length).items():
        part = {name: [given[i] for i in chosen] for name, given in answers.items()}
        table[group] = {name: summarise(given) for name, given in part.items()}
        ratios[group] = compare(part, table[group])
    print_table(table)
    bounds = check_bounds(ratio_bounds, table, ratios)
    for bound in bounds:
        value = "not measured" if bound["value"] is None else f"{bound['value']:.3f}"
        print(f"{bound['what']}: {value}; bound {bound['bound']}, passed {bound['passed']}")
    passed = len(entries) >= ENOUGH and all(bound["passed"] for bound in bounds)
    line = record(
        "answer",
        what="cost and correctness of single answers of small models, by runtime",
        model=model_name(options.model),
        shape={
            "prompts": len(entries),
            "batch": 1,
            "canvas": config.canvas_length,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
        dtype="float32",
        units={
            "exact_rate": "answers equal to the expected text / prompts",
            "exact_interval": "Wilson, 95%",
            "canvases, steps, positions": "mean per answer; positions are rows x steps denoised",
            "seconds": "wall time per answer, prefill included, on a shared machine",
            "first_seconds": "wall time to the first final text; transformers has no such thing",
            "tokens_per_second": "new tokens with the end token / wall time",
            "tokens_per_forward": "new tokens with the end token / denoise steps",
            "ms_per_step": "wall time / denoise steps; so prefill and commits are in it",
            "ratios": "of the means, and of the median wall times",
            "standard_errors_apart": "difference of exact rates over its standard error",
            "exact_only_here, exact_only_there": "prompts that one of the two alone answers",
        },
        settings={name: policies[name] for name in names if name in policies},
        groups=table,
        ratios=ratios,
        bounds=bounds,
        warmup=options.warmup,
        seed=options.seed,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def parse_settings(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:key=value,key=value; a comma that no key follows belongs to a value."""
    name, _, rest = text.partition(":")
    values = {}
    for part in re.split(r",(?=\w+=)", rest) if rest else ():
        key, _, value = part.partition("=")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError as error:
            raise SystemExit(f"--settings {text}: {value!r} of {key} is not JSON") from error
        values[key] = tuple(parsed) if isinstance(parsed, list) else parsed
    return name, values


def choose(folder: Path, limit: int | None) -> list[dict[str, str]]:
    """The first prompts of each task, in the order of the file, where tasks are mixed."""
    chosen: list[dict[str, str]] = []
    seen: dict[str, int] = {}
    for entry in json.loads((folder / "prompts.json").read_text(encoding="utf-8")):
        seen[entry["task"]] = seen.get(entry["task"], 0) + 1
        if limit is None or seen[entry["task"]] <= limit:
            chosen.append(entry)
    return chosen


def ours(model: Any, tokenizer: Any, values: dict[str, Any]) -> Run:
    def run(ids: list[int], seed: int) -> Answer:
        settings = GenerationSettings(**{"max_new_tokens": MAX_NEW_TOKENS, "seed": seed, **values})
        pieces, done, first, begun = [], None, 0.0, time.perf_counter()
        for event in stream_generate(model, tokenizer, ids, settings=settings):
            if isinstance(event, Text) and event.channel == "answer":
                first = first or time.perf_counter() - begun
                pieces.append(event.piece)
            elif isinstance(event, Finished):
                done = event
        assert done is not None
        counts = done.new_tokens, done.canvases, done.steps, done.positions
        return Answer("".join(pieces), *counts, first or time.perf_counter() - begun)

    return run


def mlx_vlm(folder: Path, tokenizer: Any, ends: tuple[int, ...], arguments: dict[str, Any]) -> Run:
    """Its own loop; ids are collected where it would detokenize, and decoded at the end."""
    from mlx_vlm.generate import diffusion
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    stub = SimpleNamespace(stopping_criteria=_Ends(ends))

    def run(ids: list[int], seed: int) -> Answer:
        mx.random.seed(seed)
        collector = _Collector()
        diffusion.make_streaming_detokenizer = lambda processor: collector
        canvases, last, begun = 0, None, time.perf_counter()
        for result in diffusion.stream_diffusion_generate(
            model,
            None,
            stub,
            mx.array([ids], dtype=mx.int32),
            None,
            None,
            max_tokens=MAX_NEW_TOKENS,
            skip_special_token_ids=[],
            **arguments,
        ):
            canvases += result.diffusion_block_complete
            last = result
        assert last is not None
        text = tokenizer.decode(collector.ids, skip_special_tokens=True)
        steps, positions = last.diffusion_denoising_steps, last.diffusion_work_tokens
        first = (collector.first or time.perf_counter()) - begun
        return Answer(text, last.generation_tokens, canvases, steps, positions, first)

    return run


class _Ends:
    """All that mlx-vlm's loop asks of a tokenizer: which tokens end an answer."""

    def __init__(self, ends: tuple[int, ...]):
        self.ends = set(ends)

    def add_eos_token_ids(self, ids: list[int]) -> None:
        self.ends |= set(ids)

    def __call__(self, token: int) -> bool:
        return token in self.ends


class _Collector:
    """All that mlx-vlm's loop asks of a detokenizer."""

    last_segment = ""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.first = 0.0  # when the first one came

    def add_token(self, token: int, skip_special_token_ids: Any = None) -> None:
        self.first = self.first or time.perf_counter()
        self.ids.append(token)

    def finalize(self) -> None:
        pass


def transformers(folder: Path, tokenizer: Any, config: Any) -> Run:
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    torch.set_num_threads(1)  # threads of so small a model mostly wait for each other
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    def run(ids: list[int], seed: int) -> Answer:
        torch.manual_seed(seed)
        begun = time.perf_counter()
        out = model.generate(torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS)
        new = out.sequences[0, len(ids) :].tolist()
        end = next((i for i, token in enumerate(new) if token in config.eos_token_ids), None)
        text = tokenizer.decode(new[:end], skip_special_tokens=True)
        # It tells tokens per step alone, and counts all that is not padding.
        counted = sum(token != config.pad_token_id for token in new)
        steps = round(counted / out.tokens_per_forward[0].item())
        count = len(new) if end is None else end + 1
        canvases = -(-len(new) // config.canvas_length)
        seconds = time.perf_counter() - begun
        return Answer(text, count, canvases, steps, steps * config.canvas_length, seconds)

    return run


def take_turns(
    runs: dict[str, Run], entries: list[dict[str, str]], prompts: list[list[int]], seed: int
) -> dict[str, list[Answer]]:
    """Every runtime on every prompt; on each second prompt in the opposite order."""
    answers: dict[str, list[Answer]] = {name: [] for name in runs}
    started = time.perf_counter()
    for i, (entry, ids) in enumerate(zip(entries, prompts, strict=True)):
        for name in reversed(runs) if i % 2 else runs:
            begun = time.perf_counter()
            answer = runs[name](ids, seed + i)
            seconds = time.perf_counter() - begun
            exact = answer.text == entry["answer"]
            answers[name].append(replace(answer, seconds=seconds, exact=exact))
        if (i + 1) % 50 == 0:
            spent = time.perf_counter() - started
            print(f"{i + 1} of {len(prompts)}: {spent:.0f} s", file=sys.stderr, flush=True)
    return answers


def write_answers(
    path: Path,
    entries: list[dict[str, str]],
    expected: list[int],
    answers: dict[str, list[Answer]],
) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i, (entry, tokens) in enumerate(zip(entries, expected, strict=True)):
            for name, given in answers.items():
                facts = {"task": entry["task"], "index": i, "runtime": name}
                facts |= asdict(given[i]) | {"expected_tokens": tokens}
                file.write(json.dumps(facts, ensure_ascii=False) + "\n")


def group_prompts(
    entries: list[dict[str, str]], expected: list[int], canvas: int
) -> dict[str, list[int]]:
    """Prompts by task, all of them, and by the length of the expected answer."""
    groups = {
        task: [i for i, entry in enumerate(entries) if entry["task"] == task]
        for task in sorted({entry["task"] for entry in entries})
    }
    groups[POOLED] = list(range(len(entries)))
    for name, tokens in LENGTHS.items():
        groups[name] = [i for i, count in enumerate(expected) if count in tokens]
    groups[SHORT] = [i for i, count in enumerate(expected) if count < canvas / 2]
    return {name: chosen for name, chosen in groups.items() if chosen}


def summarise(answers: list[Answer]) -> dict[str, Any]:
    n, exact = len(answers), sum(answer.exact for answer in answers)
    seconds = [answer.seconds for answer in answers]
    new_tokens, canvases, steps, positions = (
        sum(getattr(answer, name) for answer in answers)
        for name in ("new_tokens", "canvases", "steps", "positions")
    )
    return {
        "prompts": n,
        "exact": exact,
        "exact_rate": round(exact / n, 4),
        "exact_interval": [round(end, 4) for end in wilson(exact, n)],
        "canvases": round(canvases / n, 3),
        "steps": round(steps / n, 3),
        "steps_per_canvas": round(steps / canvases, 2),
        "positions": round(positions / n, 1),
        "seconds_mean": round(fmean(seconds), 4),
        "seconds_median": round(median(seconds), 4),
        "first_seconds_mean": round(fmean(answer.first_seconds for answer in answers), 4),
        "seconds_min": round(min(seconds), 4),
        "ms_per_step": round(1e3 * sum(seconds) / steps, 2),
        "tokens_per_second": round(new_tokens / sum(seconds), 2),
        "tokens_per_forward": round(new_tokens / steps, 2),
    }


def wilson(exact: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Source: Wilson 1927, the score interval of a proportion."""
    p, spread = exact / n, z * z / n
    middle = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def compare(
    answers: dict[str, list[Answer]], row: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Each pair's ratios in one group, and how far apart their exact rates are."""
    ratios = {}
    for name, other in PAIRS:
        if name not in row or other not in row:
            continue
        a, b = row[name], row[other]
        p, q, n = a["exact_rate"], b["exact_rate"], a["prompts"]
        error = math.sqrt(p * (1 - p) / n + q * (1 - q) / n)
        both = [(x.exact, y.exact) for x, y in zip(answers[name], answers[other], strict=True)]
        ratios[f"{name} / {other}"] = {key: round(a[key] / b[key], 4) for key in COMPARED} | {
            "standard_errors_apart": round((p - q) / error, 3) if error else 0.0,
            "exact_only_here": both.count((True, False)),
            "exact_only_there": both.count((False, True)),
        }
    return ratios


def check_bounds(
    ratio_bounds: tuple[Bound, ...],
    table: dict[str, dict[str, dict[str, Any]]],
    ratios: dict[str, dict[str, dict[str, float]]],
) -> list[dict[str, Any]]:
    """What was measured, its bound, and whether it holds; None where a runtime was left out."""
    bounds = []

    def add(what: str, value: float | None, bound: float | None, *, at_least: bool) -> None:
        measured = value is not None and bound is not None
        passed = (value >= bound if at_least else value <= bound) if measured else None
        words = f"at {'least' if at_least else 'most'} {'?' if bound is None else f'{bound:.3f}'}"
        bounds.append({"what": what, "value": value, "bound": words, "passed": passed})

    for group, row in table.items():
        if group not in LENGTHS and group != SHORT:
            value = row.get("fast", {}).get("exact_rate")
            low, _ = row.get("reference", {}).get("exact_interval", (None, None))
            add(f"exact rate of fast, {group}", value, low, at_least=True)
    for group, measure, against, limit in ratio_bounds:
        value = ratios.get(group, {}).get(f"fast / {against}", {}).get(measure)
        add(f"{measure} of fast / {against}, {group}", value, limit, at_least=False)
    return bounds


def print_table(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(
        f"{'group':19} {'runtime':15} {'exact':>9} {'95% interval':>13} {'canvases':>8} "
        f"{'steps':>6} {'rows x steps':>12} {'mean ms':>8} {'median':>7} {'tokens/s':>8} "
        f"{'tok/step':>8}"
    )
    for group, by_runtime in table.items():
        for name, row in by_runtime.items():
            exact = f"{row['exact']}/{row['prompts']}"
            low, high = row["exact_interval"]
            print(
                f"{group:19} {name:15} {exact:>9} {low:>6.1%}-{high:6.1%} {row['canvases']:8.2f} "
                f"{row['steps']:6.2f} {row['positions']:12.1f} {1e3 * row['seconds_mean']:8.1f} "
                f"{1e3 * row['seconds_median']:7.1f} {row['tokens_per_second']:8.1f} "
                f"{row['tokens_per_forward']:8.2f}"
            )


if __name__ == "__main__":
    main()
