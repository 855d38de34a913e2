"""Runs constraints over a vocabulary of whole words, where tokens cross the borders of what a
constraint fixes: `python -m tests.write.merged_tokens --tokenizer FOLDER --cases FILE`. Not a test.

The model is random, and so small that its vocabulary is nearly all of it. Without a tokenizer, one
is made whose tokens are merged from JSON texts. Cases are JSON lines, {"name", "schema"}, as
bench/constraint.py takes them; a part of them is drawn, and there are always some expressions,
choices, and a tool call. Every answer is read and validated by other means than the constraint's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import jsonschema
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma import Constraint, GenerationSettings, Request, load_tokenizer
from mlx_diffgemma.denoise import constrained
from mlx_diffgemma.errors import ConstraintError, TemplateError
from mlx_diffgemma.events import CanvasCommitted, Finished, StepDone, Text, ToolCall
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.write.constrained import over_tokens
from mlx_diffgemma.write.job import run_jobs
from tests.checkpoints import load_drawn
from tests.write.constrained_runs import CHOICES, PATTERNS, TOOL, draw_schema, fits

SPECIALS = "<pad> <eos> <bos> <unk> <mask> <turn|>".split()
SPECIALS += ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
END = "<turn|>"
WORDS = "true false null name age city size note price yes no maybe 12 34 2024 the of and".split()
MOST_TOKENS = 64  # beyond the fewest


def made_tokenizer(folder: Path, size: int = 1500) -> Any:
    """A byte-fallback BPE tokenizer in SentencePiece's spelling, merged from JSON texts."""
    draw, texts = random.Random(0), []
    for _ in range(400):
        keys = draw.sample(WORDS, 4)
        value = {key: draw.choice([True, None, 1.5, [1, 2], "the city", key]) for key in keys}
        texts.append(json.dumps(value, indent=draw.choice([None, None, 2])))
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    spelled = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(0x21, 0x7F)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=spelled, initial_alphabet=[*alphabet, "▁", "é", "\n"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The bytes were named to get their ids; they are no control tokens.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] in SPECIALS
    ]
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        additional_special_tokens=SPECIALS[4:],
        **names,
    )
    made.save_pretrained(folder)
    return load_tokenizer(folder)


@dataclass
class Seen:
    """What was seen."""

    answers: Counter[str] = field(default_factory=Counter)  # by kind
    refused: Counter[str] = field(default_factory=Counter)  # schemas, by keyword
    findings: list[str] = field(default_factory=list)
    steps: int = 0
    canvases: int = 0
    crossing: int = 0  # tokens of several characters that hold a quote and something else
    host_ms: list[float] = field(default_factory=list)  # of each step
    sizes: list[tuple[int, int]] = field(default_factory=list)  # states and classes


def constraints(schemas: list[Any], seen: Seen) -> Iterator[tuple[Constraint, Any]]:
    """Yield constraints, and what they were made of."""
    for schema in schemas:
        try:
            yield Constraint.json_schema(schema), schema
        except ConstraintError as error:
            seen.refused[str(error.keyword)] += 1
    for pattern in PATTERNS:
        yield Constraint.regex(pattern), pattern
    for texts in CHOICES:
        yield Constraint.choices(texts), texts
    yield Constraint.tool_call([TOOL]), TOOL


def ask(
    constraint: Constraint,
    made_of: Any,
    model: DiffusionGemma,
    tokenizer: Any,
    settings: GenerationSettings,
    seen: Seen,
) -> None:
    """Answer once, and check the answer."""
    where = f"{constraint.kind} {json.dumps(made_of)[:200]}"
    bound = over_tokens(
        constraint, model, tokenizer, settings.resolve(model.config), thinking=False
    )
    seen.sizes.append((bound.automaton.maps.shape[1], len(bound.automaton.sizes)))
    request = Request([2, 7, 9], settings, constraint=constraint)
    text, calls, ended = "", [], None
    for _, event in run_jobs(model, [request.job(model, tokenizer)]):
        if isinstance(event, Text):
            text += event.piece
        elif isinstance(event, ToolCall):
            calls.append(event)
        elif isinstance(event, CanvasCommitted):
            seen.canvases += 1
            spelled = tokenizer.convert_ids_to_tokens(event.tokens[0].tolist())
            seen.crossing += sum(len(one) > 1 and '"' in one and one[0] != "<" for one in spelled)
        elif isinstance(event, Finished):
            ended = event.constraint
        seen.steps += isinstance(event, StepDone)
    seen.answers[constraint.kind] += 1
    if ended != "kept" or not fits_alone(constraint, made_of, text, calls):
        seen.findings.append(f"{where}: {text[:300]!r} {calls}")


def fits_alone(constraint: Constraint, made_of: Any, text: str, calls: list[ToolCall]) -> bool:
    """Whether an answer fits, by other means."""
    if constraint.kind != "json_schema":
        return fits(constraint, made_of, text, calls)
    kind = jsonschema.validators.validator_for(made_of, jsonschema.Draft202012Validator)
    return not calls and kind(made_of).is_valid(json.loads(text))


def run(schemas: list[Any], model: DiffusionGemma, tokenizer: Any, canvas: int) -> Seen:
    """Ask once under every constraint."""
    seen, choose = Seen(), constrained._choose
    end = tokenizer.convert_tokens_to_ids(END)

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        choice = choose(*arguments)
        seen.host_ms.append(1e3 * (time.process_time() - started))
        return choice

    with mock.patch.object(constrained, "_choose", timed):
        for number, (constraint, made_of) in enumerate(constraints(schemas, seen)):
            settings = GenerationSettings(
                seed=number,
                canvas_length=canvas,
                max_denoising_steps=2,
                max_new_tokens=1,
                extra_eos_token_ids=(end,),
            )
            try:
                least = fewest(constraint, model, tokenizer, settings)
            except TemplateError as error:
                seen.findings.append(f"{constraint.kind} {json.dumps(made_of)[:200]}: {error}")
                continue
            budget = GenerationSettings(
                seed=number,
                canvas_length=canvas,
                max_denoising_steps=2,
                max_new_tokens=least + (number % 3) * MOST_TOKENS // 2,
                extra_eos_token_ids=(end,),
            )
            ask(constraint, made_of, model, tokenizer, budget, seen)
    return seen


def fewest(
    constraint: Constraint, model: DiffusionGemma, tokenizer: Any, settings: GenerationSettings
) -> int:
    """The fewest tokens of an answer, its end included."""
    resolved = settings.resolve(model.config)
    bound = over_tokens(constraint, model, tokenizer, resolved, thinking=False)
    return int(bound.automaton.distance[0])


def schemas_of(file: Path | None, count: int) -> list[Any]:
    """So many schemas: of a file, spread over it, or drawn ones."""
    if file is None:
        draw = random.Random(1)
        return [draw_schema(draw) for _ in range(count)]
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        schemas = [json.loads(line)["schema"] for line in lines]
    return schemas[:: max(1, len(schemas) // count)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json")
    parser.add_argument("--cases", type=Path, help="JSON lines, may be gzipped")
    parser.add_argument("--count", type=int, default=40, help="schemas")
    parser.add_argument("--canvas", type=int, default=64)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        own = options.tokenizer
        tokenizer = load_tokenizer(own) if own else made_tokenizer(Path(folder))
    model = load_drawn(
        3,
        vocab_size=len(tokenizer),
        canvas_length=options.canvas,
        hidden_size=16,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    started = time.process_time()
    seen = run(schemas_of(options.cases, options.count), model, tokenizer, options.canvas)
    states, classes = zip(*seen.sizes, strict=True)
    print(
        f"{len(tokenizer):,} tokens; {dict(seen.answers)}, refused {dict(seen.refused)}; "
        f"{seen.canvases} canvases of {options.canvas}, {seen.steps} steps, "
        f"{seen.crossing} tokens across a quote; {time.process_time() - started:.0f} s\n"
        f"states up to {max(states):,}, classes up to {max(classes):,}; on the host "
        f"{median(seen.host_ms):.1f} ms per step, at most {max(seen.host_ms):.1f}"
    )
    print(*seen.findings, f"{len(seen.findings)} findings", sep="\n")
    if seen.findings:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
