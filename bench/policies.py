"""What does each setting that saves work save, alone and together, and at what exactness?

Counts, not times: canvas positions denoised (rows x steps), positions encoded in commits, steps and
rows x steps until the first text is final. They do not depend on the machine or on its load, so
this may run beside other work. Prompts run 16 at a time; a row writes what it writes alone.

Bounds: none for a single setting. A policy made of them is to need at most 0.4 of the rows x steps
of "reference", and 0.5 of its rows x steps until the first final text, at exact answers within its
95% Wilson interval, over 400 prompts or more. An exact rate that falls below the interval is
marked.

    python bench/policies.py --limit 50
    python bench/policies.py --model ../shared/checkpoints/tiny-tasks --only reference \\
        --settings 'bold:policy="fast",prefix_entropy=0.1'
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from answer import choose, parse_settings, wilson
from common import finish, model_name, record

from mlx_diffgemma import GenerationSettings, bundled_model, encode_prompt, load
from mlx_diffgemma.denoise.loop import RowFailed, Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.events import CanvasCommitted, Finished, StepDone

MAX_NEW_TOKENS = 256
TOGETHER = 16  # rows
ENOUGH = 400  # prompts; fewer say little
REFERENCE = "reference"
FAST: dict[str, Any] = {"policy": "fast"}
# Without what `fast` sets.
WHOLE: dict[str, Any] = {"prefix_commit": "off", "width_mass": 0.0, "lookahead": 1.0}
# The defaults, whatever the checkpoint says.
USUAL = {"acceptance_confidence": 0.9, "prefix_steps": 2, "prefix_entropy": 0.01}
SHRINK, MASS = {"prefix_commit": "shrink"}, {"width_mass": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "fast": FAST,
    "fast, whole": FAST | WHOLE,
    "fast, no mass": FAST | {"width_mass": 0.0},
    "fast, no parts": FAST | {"prefix_commit": "off"},
    "fast, all ahead": FAST | {"lookahead": 1.0},
    "fast, usual": FAST | USUAL,
    "shrink": SHRINK,
    "width": {"canvas_width": "answer", "stop_on": "answer"},
    "width + mass": {"canvas_width": "answer", "stop_on": "answer"} | MASS,
    "width, lookahead": {"canvas_width": "answer", "stop_on": "answer", "lookahead": 0.25},
}
POOLED = "pooled"


@dataclass(slots=True)
class Answer:
    """What an answer cost."""

    steps: int = 0
    positions: int = 0  # rows x steps
    encoded: int = 0  # positions of commits that are read again, behind the prompt
    first_steps: int = 0  # until the first text is final
    first_positions: int = 0
    parts: int = 0
    exact: bool = False


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
        help="one more policy; values are JSON",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="run these alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="every answer as a JSON line, policy by policy; those in it are not run again",
    )
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    further = dict(map(parse_settings, options.settings))
    policies = SETTINGS | further
    if unknown := sorted(set(options.only or ()) - set(policies)):
        parser.error(f"--only: there is no {', '.join(unknown)}, only {', '.join(policies)}")
    names = [n for n in policies if not options.only or n in options.only or n in further]

    folder = options.model or bundled_model()
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    entries = choose(folder, options.limit)
    prompts = [np.array(encode_prompt(tokenizer, e["prompt"]), np.int32) for e in entries]
    answers = read_answers(options.write) if options.write else {}
    for name in names:
        if len(answers.get(name, ())) != len(entries):
            values = {"max_new_tokens": MAX_NEW_TOKENS, **policies[name]}
            answers[name] = run(model, tokenizer, entries, prompts, values, options.seed)
            if options.write:
                write_answers(options.write, entries, name, answers[name])
        print(f"{name}: {len(entries)} prompts", file=sys.stderr, flush=True)
    answers = {name: answers[name] for name in names}

    table = {}
    for task in [*sorted({entry["task"] for entry in entries}), POOLED]:
        places = [i for i, entry in enumerate(entries) if task in (entry["task"], POOLED)]
        table[task] = summarise({n: [given[i] for i in places] for n, given in answers.items()})
    print_table(table)
    line = record(
        "policies",
        what="work and exactness of settings that save steps",
        model=model_name(options.model),
        shape={
            "prompts": len(entries),
            "canvas": model.config.canvas_length,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
        dtype="float32",
        units={
            "positions": "canvas positions denoised per answer: rows x steps",
            "encoded": "positions per answer that commits encode",
            "first_steps, first_positions": "until the first text of an answer is final",
            "parts": "commits per answer",
            "of_reference": "ratios of the means",
            "within": "whether the exact rate reaches the lower end of reference's 95% interval",
        },
        settings={name: policies[name] for name in names},
        groups=table,
        seed=options.seed,
        enough=len(entries) >= ENOUGH,
    )
    finish(line, save=options.save)


def run(
    model: Any,
    tokenizer: Any,
    entries: list[dict[str, str]],
    prompts: list[np.ndarray],
    values: dict[str, Any],
    seed: int,
) -> list[Answer]:
    """All prompts, the prompt's number added to the seed."""
    rows, waiting = Rows(model), iter(range(len(prompts)))
    answers = [Answer() for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]

    def fill() -> Iterator[None]:
        for i in waiting:
            settings = GenerationSettings(**values, seed=seed + i).resolve(model.config)
            rows.add(Row(model, settings, prompts[i], number=i))
            yield

    source = fill()
    while True:
        while len(rows.rows) < TOGETHER and next(source, 0) is None:
            pass
        if not rows.rows:
            break
        for row, event in rows.advance():
            answer = answers[row.number]
            if isinstance(event, RowFailed):
                raise event.error
            if isinstance(event, StepDone):
                answer.steps += 1
                answer.positions += event.draft.shape[1]
            elif isinstance(event, CanvasCommitted):
                texts[row.number] += event.tokens[0].tolist()
                answer.parts += 1
                answer.encoded += event.tokens.shape[1] if not row.is_done else 0
                if answer.parts == 1:
                    answer.first_steps = answer.steps
                    answer.first_positions = answer.positions
            elif isinstance(event, Finished):
                assert event.positions == answer.positions
    ends = set(model.config.eos_token_ids)
    for entry, answer, ids in zip(entries, answers, texts, strict=True):
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        answer.exact = tokenizer.decode(ids[:end], skip_special_tokens=True) == entry["answer"]
    return answers


def read_answers(path: Path) -> dict[str, list[Answer]]:
    """The answers that a file has, by policy."""
    answers: dict[str, list[Answer]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            facts = json.loads(line)
            given = answers.setdefault(facts.pop("policy"), [])
            given.append(Answer(**{k: v for k, v in facts.items() if k not in ("task", "index")}))
    return answers


def write_answers(
    path: Path, entries: list[dict[str, str]], name: str, answers: list[Answer]
) -> None:
    with path.open("a", encoding="utf-8") as file:
        for i, (entry, answer) in enumerate(zip(entries, answers, strict=True)):
            facts = {"task": entry["task"], "index": i, "policy": name, **asdict(answer)}
            file.write(json.dumps(facts) + "\n")


def summarise(answers: dict[str, list[Answer]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, given in answers.items():
        n, exact = len(given), sum(answer.exact for answer in given)
        found[name] = {
            "prompts": n,
            "exact": exact,
            "exact_interval": [round(end, 4) for end in wilson(exact, n)],
        }
        for key in ("steps", "positions", "encoded", "first_steps", "first_positions", "parts"):
            found[name][key] = round(sum(getattr(answer, key) for answer in given) / n, 3)
    if (reference := found.get(REFERENCE)) is None:
        return found
    for name, row in found.items():
        row["of_reference"] = {
            key: round(row[key] / reference[key], 4)
            for key in ("steps", "positions", "first_steps", "first_positions")
        }
        row["within"] = row["exact"] / row["prompts"] >= reference["exact_interval"][0]
        pairs = zip(answers[name], answers[REFERENCE], strict=True)
        both = [(here.exact, there.exact) for here, there in pairs]
        only = both.count((True, False)), both.count((False, True))
        row["exact_only_here"], row["exact_only_there"] = only
        row["standard_errors_apart"] = round((only[0] - only[1]) / math.sqrt(sum(only) or 1), 2)
    return found


def print_table(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(
        f"{'task':10} {'settings':16} {'exact':>9} {'steps':>7} {'rows x steps':>13} "
        f"{'encoded':>8} {'parts':>6} {'first steps':>12} {'first rows x steps':>19}"
    )
    for task, rows in table.items():
        for name, row in rows.items():
            ratios = row.get("of_reference", {})

            def cell(key: str, row: Any = row, ratios: Any = ratios) -> str:
                return f"{row[key]:.1f}" + (f" {ratios[key]:.2f}" if ratios else "")

            mark = "" if row.get("within", True) else " below"
            exact = f"{row['exact']}/{row['prompts']}"
            print(
                f"{task:10} {name:16} {exact:>9} {row['steps']:7.2f} {cell('positions'):>13} "
                f"{row['encoded']:8.1f} {row['parts']:6.2f} {cell('first_steps'):>12} "
                f"{cell('first_positions'):>19}{mark}"
            )


if __name__ == "__main__":
    main()
