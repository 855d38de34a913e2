"""Are this runtime's answers as often exactly right as those of transformers?

Bound: over the bundled model's 1,600 prompts (eight tasks), the pooled rates of exact answers
differ by at most two standard errors of their difference, sqrt(p1 q1 / n + p2 q2 / n). The two
runtimes draw different random numbers, so single answers differ; only rates can agree. At a rate of
0.9 the standard error is 1.1 percentage points: this tells a loss of 3 points from luck, not one
of 1.

Ours runs through `batch_generate`, a task at a time, with rows of different lengths together;
transformers in batches of equal prompt length, since it does not correct positions for padding.
Both float32, and with the checkpoint's own settings.

    python bench/accuracy.py
    python bench/accuracy.py --model build/bundled/model
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import finish, record

from mlx_diffgemma import GenerationSettings, batch_generate, bundled_model, encode_prompt, load
from mlx_diffgemma.config.model import ModelConfig

BOUND = 2.0  # standard errors


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    new_tokens: int
    steps: int
    canvases: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder with prompts.json; the bundled one")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--limit", type=int, help="only the first prompts; says nothing then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    folder = options.model or bundled_model()
    entries = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    entries = entries[: options.limit]
    print(
        f"bound: pooled rates over {len(entries):,} prompts at most {BOUND:g} standard errors apart"
    )
    answers, seconds = {}, {}
    for name, run in (("ours", ours), ("transformers", transformers)):
        started = time.perf_counter()
        answers[name] = run(folder, entries, options.batch, options.seed)
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {len(answers[name])} answers in {seconds[name]:.0f} s", flush=True)
    table = {}
    for task in [*sorted({entry["task"] for entry in entries}), "pooled"]:
        chosen = [i for i, entry in enumerate(entries) if task in (entry["task"], "pooled")]
        table[task] = {
            name: summarise([entries[i] for i in chosen], [given[i] for i in chosen])
            for name, given in answers.items()
        }
    print_table(table)
    pooled = {name: table["pooled"][name] for name in answers}
    n = len(entries)
    p, q = pooled["ours"]["exact_rate"], pooled["transformers"]["exact_rate"]
    error = math.sqrt(p * (1 - p) / n + q * (1 - q) / n)
    apart = abs(p - q) / error if error else (0.0 if p == q else math.inf)
    passed = apart <= BOUND and n >= 1000
    print(
        f"pooled: ours {p:.1%}, transformers {q:.1%}, {apart:.2f} standard errors "
        f"(of {error:.2%}) apart"
    )
    line = record(
        "accuracy",
        what="exact answers on the bundled model's prompts, ours and transformers'",
        model="bundled" if options.model is None else folder.name,
        shape={"prompts": n, "batch": options.batch},
        dtype="float32",
        units={
            "exact_rate": "answers equal to the expected text / prompts",
            "steps_per_canvas": "denoise steps / canvases, over all rows",
            "tokens_per_forward": "new tokens with the end token / denoise steps, over all rows",
            "seconds": "wall time on a shared machine, loading included; not a benchmark of speed",
        },
        bound_standard_errors=BOUND,
        standard_errors_apart=round(apart, 3),
        standard_error=round(error, 5),
        tasks=table,
        seconds=seconds,
        seed=options.seed,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def ours(folder: Path, entries: list[dict[str, str]], batch: int, seed: int) -> list[Answer]:
    """By task and length of answer, since a batch takes as long as its slowest row; prompts still
    differ in length. Seeds of batches do not overlap."""
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    answers: dict[int, Answer] = {}
    order = sorted(
        range(len(entries)), key=lambda i: (entries[i]["task"], len(entries[i]["answer"]))
    )
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        settings = GenerationSettings(seed=seed + start)
        prompts = [entries[i]["prompt"] for i in part]
        response = batch_generate(model, tokenizer, prompts, settings=settings)
        for i, text, done in zip(part, response.texts, response.finished, strict=True):
            answers[i] = Answer(text, done.new_tokens, done.steps, done.canvases)
        print(f"ours: {len(answers)} of {len(entries)}", file=sys.stderr, flush=True)
    return [answers[i] for i in range(len(entries))]


def transformers(
    folder: Path, entries: list[dict[str, str]], batch: int, seed: int
) -> list[Answer]:
    """The reference, batched by prompt length so that no row is padded."""
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    torch.manual_seed(seed)
    torch.set_num_threads(1)  # threads of so small a model mostly wait for each other
    config = ModelConfig.from_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for i, entry in enumerate(entries):
        chat = [{"role": "user", "content": entry["prompt"]}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != encode_prompt(tokenizer, entry["prompt"]):
            raise SystemExit(f"prompt {i} is not the same tokens on both sides")
        by_length[len(ids)].append((i, ids))
    answers: dict[int, Answer] = {}
    for length, rows in sorted(by_length.items()):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            out = model.generate(torch.tensor([ids for _, ids in part]))
            for (i, _), sequence, rate in zip(
                part, out.sequences.tolist(), out.tokens_per_forward.tolist(), strict=True
            ):
                answers[i] = reference_answer(sequence[length:], rate, config, tokenizer)
    return [answers[i] for i in range(len(entries))]


def reference_answer(new: list[int], rate: float, config: ModelConfig, tokenizer: Any) -> Answer:
    """Text up to the end token; steps from tokens per forward, which counts the end token too."""
    end = next((i for i, token in enumerate(new) if token in config.eos_token_ids), None)
    text = tokenizer.decode(new[:end], skip_special_tokens=True)
    count = len(new) if end is None else end + 1
    return Answer(text, count, round(count / rate), -(-count // config.canvas_length))


def summarise(entries: list[dict[str, str]], answers: list[Answer]) -> dict[str, Any]:
    pairs = zip(entries, answers, strict=True)
    exact = sum(answer.text == entry["answer"] for entry, answer in pairs)
    steps = sum(answer.steps for answer in answers)
    canvases = sum(answer.canvases for answer in answers)
    return {
        "prompts": len(answers),
        "exact": exact,
        "exact_rate": exact / len(answers),
        "steps_per_canvas": round(steps / canvases, 2),
        "tokens_per_forward": round(sum(answer.new_tokens for answer in answers) / steps, 2),
        "canvases": round(canvases / len(answers), 2),
    }


def print_table(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(f"{'task':10} {'runtime':13} {'exact':>10} {'steps/canvas':>13} {'tokens/forward':>15}")
    for task, by_runtime in table.items():
        for name, row in by_runtime.items():
            exact = f"{row['exact']}/{row['prompts']}"
            print(
                f"{task:10} {name:13} {exact:>10} {row['steps_per_canvas']:>13} "
                f"{row['tokens_per_forward']:>15}"
            )


if __name__ == "__main__":
    main()
