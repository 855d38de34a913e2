"""Draws runs under constraints, and checks that every answer fits: `python -m
tests.write.constrained_runs`. Not a test."""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import jsonschema
import mlx.core as mx

from mlx_diffgemma import (
    Constraint,
    GenerationSettings,
    PromptOptions,
    Request,
    bundled_model,
    load_model,
    load_tokenizer,
)
from mlx_diffgemma.errors import ConstraintError
from mlx_diffgemma.events import CanvasCommitted, Finished, StepDone, Text, ToolCall
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.write.constrained import over_tokens
from mlx_diffgemma.write.job import run_jobs
from tests.checkpoints import load_drawn

PATTERNS = (r"[0-9]+(\.[0-9]+)?", r"a(,a)*", r"(yes|no)!?", r"[a-c]{3,9}", r"é+|\w \d", r".{2,5}")
TEMPLATES = (
    "12 {{gap}} 15",
    '{"vip": {{one of: true | false}}, "price": {{match: [0-9]+(\\.[0-9]+)?}}}',
    "{{one of: a | bb | ccc}}: {{gap}}",
)
CHOICES = (["yes", "no", "maybe"], ["a", "ab", "abc"], ["12 13", "é"])
STYLES: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "fast"},
    {"temperature": 0},
    {"acceptance": "confidence"},
    {"canvas_width": "answer", "stop_on": "answer"},
    {"self_conditioning": "sparse", "sparse_tokens": 4},
)
SLACK = (0, 0, 1, 5, 40, 150)  # tokens beyond the fewest
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
            "required": ["a"],
        },
    },
}


@functools.cache
def model_of(number: int) -> DiffusionGemma:
    """A drawn model with the bundled vocabulary, or the bundled one for -1."""
    if number < 0:
        return load_model(bundled_model())
    return load_drawn(number, vocab_size=384, canvas_length=32)


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(bundled_model())


def draw_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["integer", "number", "string", "boolean", "enum"] + ["object", "array"] * (depth > 0)
    match draw.choice(kinds):
        case "enum":
            return {"enum": draw.sample(["a", "bb", 3, None, True, 1.5], draw.randint(1, 4))}
        case "string":
            return {"type": "string", "maxLength": draw.randint(0, 6)}
        case "integer":
            return {"type": "integer", "minimum": draw.randint(-9, 9), "maximum": 99}
        case "object":
            names = draw.sample("abcd", draw.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: draw_schema(draw, depth - 1) for name in names},
                "required": draw.sample(names, draw.randint(0, len(names))),
                "additionalProperties": False,
            }
        case "array":
            return {"type": "array", "items": draw_schema(draw, depth - 1), "maxItems": 3}
        case kind:
            return {"type": kind}


def draw_constraint(draw: random.Random) -> tuple[Constraint, Any]:
    """A constraint, and what it was made of."""
    match draw.choice(["schema", "schema", "schema", "regex", "choices", "template", "call"]):
        case "schema":
            schema = draw_schema(draw)
            layout: dict[str, Any] = draw.choice([{}, {"compact": True}, {"indent": 1}])
            return Constraint.json_schema(schema, **layout), schema
        case "regex":
            pattern = draw.choice(PATTERNS)
            return Constraint.regex(pattern), pattern
        case "choices":
            texts = draw.choice(CHOICES)
            return Constraint.choices(texts), texts
        case "template":
            text = draw.choice(TEMPLATES)
            return Constraint.template(text), text
        case _:
            required = draw.random() < 0.7
            return Constraint.tool_call([TOOL], required=required), TOOL


def fits(constraint: Constraint, made_of: Any, text: str, calls: list[ToolCall]) -> bool:
    """Whether an answer fits, by other means than the constraint's own where there are some."""
    match constraint.kind:
        case "json_schema":
            kind = jsonschema.Draft202012Validator
            return kind(made_of).is_valid(json.loads(text)) and not calls
        case "regex":
            return re.fullmatch(made_of, text) is not None
        case "choices":
            return text in made_of
        case "template":
            return constraint.accepts(text)
        case _:
            schema = made_of["function"]["parameters"]
            right = all(jsonschema.validators.validate(c.arguments, schema) is None for c in calls)
            enough = len(calls) == 1 or (not constraint.is_required and not calls)
            return right and enough and (not constraint.is_required or not text)


@dataclass
class Told:
    """What was seen."""

    rows: int = 0
    canvases: int = 0
    steps: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def compare(seed: int, told: Told) -> None:
    """One run of 1 to 4 rows under constraints of their own."""
    draw = random.Random(seed)
    model = model_of(draw.choice([-1, 1, 2]))
    widest = model.config.canvas_length
    requests, made = [], []
    for number in range(draw.randint(1, 4)):
        constraint, made_of = draw_constraint(draw)
        style = draw.choice(STYLES)
        settings = GenerationSettings(
            seed=seed * 10 + number,
            canvas_length=draw.choice([16, widest]),
            max_denoising_steps=draw.choice([1, 2, 4]),
            max_new_tokens=1,
            **style,
        )
        resolved = settings.resolve(model.config)
        bound = over_tokens(constraint, model, tokenizer(), resolved, thinking=False)
        least = int(bound.automaton.distance[0])
        where = f"seed {seed}, row {number}: {constraint.kind} {made_of!r}"
        if least > 1:
            fewer = settings_of(settings, least - 1)
            too_small = Request("Sort: 3 1", fewer, constraint=constraint)
            try:
                too_small.job(model, tokenizer())
            except ConstraintError as error:
                if str(least) not in str(error):
                    told.findings.append(f"{where}: {error}")
            else:
                told.findings.append(f"{where}: {least - 1} tokens are not refused")
        budget = least + draw.choice(SLACK)
        requests.append(
            Request("Sort: 3 1", settings_of(settings, budget), PromptOptions(), (), constraint)
        )
        made.append((where, constraint, made_of))
        told.kinds[constraint.kind] += 1
    texts: dict[int, str] = dict.fromkeys(range(len(requests)), "")
    calls: dict[int, list[ToolCall]] = {i: [] for i in range(len(requests))}
    done = set()
    for number, event in run_jobs(model, [r.job(model, tokenizer()) for r in requests]):
        if isinstance(event, Text) and event.channel == "answer":
            texts[number] += event.piece
        elif isinstance(event, ToolCall):
            calls[number].append(event)
        elif isinstance(event, StepDone):
            told.steps += 1
        elif isinstance(event, CanvasCommitted):
            told.canvases += 1
        elif isinstance(event, Finished):
            done.add(number)
            if (event.reason, event.constraint) != ("stop", "kept"):
                told.findings.append(f"{made[number][0]}: ended by {event.reason}")
    for number, (where, constraint, made_of) in enumerate(made):
        told.rows += 1
        if number not in done or not fits(constraint, made_of, texts[number], calls[number]):
            told.findings.append(f"{where}: {texts[number]!r} {calls[number]}")


def settings_of(settings: GenerationSettings, budget: int) -> GenerationSettings:
    return replace(settings, max_new_tokens=budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    told, started = Told(), time.process_time()
    for seed in range(options.first, options.first + options.runs):
        compare(seed, told)
        if seed % 50 == 0:
            mx.clear_cache()
    print(
        f"{options.runs} runs, {told.rows} rows, {told.canvases} canvases, {told.steps} steps, "
        f"{time.process_time() - started:.0f} s of processor time: {dict(told.kinds)}"
    )
    print(*told.findings[:20], f"{len(told.findings)} findings", sep="\n")
    if told.findings:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
