"""Answers of a real model to built-in prompts: how many steps they take, how fast, in how much
memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import mlx.core as mx

from ..checkpoint.choice import SHORT_NAMES
from ..checkpoint.files import resolve
from ..checkpoint.load import load, loading_bytes
from ..checkpoint.memory import recommended_bytes
from ..config.generation import GenerationSettings
from ..config.model import ModelConfig
from ..config.policies import Policy
from ..events import CanvasCommitted, Finished, PrefillDone, Text
from ..model import DiffusionGemma
from ..write.generate import stream_generate

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

POLICIES: tuple[Policy, ...] = get_args(Policy)
SEED = 17
_PUBLISHERS = ("google", "mlx-community")
_CONTEXT = 4096  # tokens for which the memory must suffice


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A prompt, and words that a right answer has."""

    kind: str
    text: str
    expected: str | None = None  # None where there is no single right answer


PROMPTS = (
    BuiltIn("fact", "What is the capital of Australia? Answer with one word.", "Canberra"),
    BuiltIn("arithmetic", "What is 17 * 23? Answer with the number alone.", "391"),
    BuiltIn("counting", "Count from 1 to 40, separated by spaces.", "37 38 39 40"),
    BuiltIn("sorting", "Sort these words: pear, fig, apple, date. Commas between.", "apple, date"),
    BuiltIn("translation", "Translate into German: The cat sleeps.", "schläft"),
    BuiltIn(
        "extraction",
        'Reply with JSON only, keys "name" and "age": Ada Byron turned 36 last spring.',
        "36",
    ),
    BuiltIn("table", "Write a Markdown table of the numbers 1 to 8 and their squares.", "64"),
    BuiltIn(
        "code",
        "Write a Python function that returns the n-th Fibonacci number, without recursion.",
        "def ",
    ),
    BuiltIn(
        "editing",
        "Correct the spelling, change nothing else: Thier freind recieved the adress.",
        "friend received the address",
    ),
    BuiltIn("list", "Name ten things to pack for a week of hiking, one per line."),
    BuiltIn("explanation", "Explain in about 120 words why the sky is blue."),
    BuiltIn("story", "Tell a story of about 150 words about a lighthouse keeper."),
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model that answered; see `public_name`."""

    name: str
    has_adapters: bool
    layers: int
    hidden_size: int
    canvas: int
    packing: str
    needed_bytes: int  # an estimate


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one prompt under one policy: its numbers, not its text."""

    kind: str
    policy: str
    prompt_tokens: int
    new_tokens: int
    canvases: int
    steps: int
    prefill_seconds: float
    seconds: float  # without the prefill
    peak_bytes: int
    as_expected: bool | None  # None where there is no single right answer

    @property
    def ms_per_step(self) -> float:
        """Return the milliseconds per step, commits between canvases included."""
        return 1e3 * self.seconds / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def steps_per_canvas(self) -> float:
        return self.steps / self.canvases if self.canvases else 0.0


@dataclass(frozen=True, slots=True)
class Patient:
    """A model that was found and not loaded yet."""

    folder: Path
    adapter_path: str | None
    facts: ModelFacts

    @property
    def too_large(self) -> str | None:
        """Return one line if the model does not fit the memory, else None."""
        needed, available = self.facts.needed_bytes, recommended_bytes()
        if needed <= available:
            return None
        return (
            f"{self.facts.name} needs about {needed / 1e9:.1f} GB and this device recommends at "
            f"most {available / 1e9:.1f} GB, so it was not loaded; a smaller packing such as "
            "--model 4bit may fit"
        )


def find(source: str, revision: str | None = None, adapter_path: str | None = None) -> Patient:
    """Return a model to examine, downloaded if needed.

    Raises:
      DiffGemmaError: if there is no such model.
    """
    folder = resolve(source, revision)
    config = ModelConfig.from_folder(folder)
    packing = "not packed"
    if config.quantization is not None:
        default = config.quantization.default
        packing = f"{default.bits}-bit {default.mode}, groups of {default.group_size}"
    return Patient(
        folder,
        adapter_path,
        ModelFacts(
            name=public_name(source),
            has_adapters=adapter_path is not None,
            layers=config.text.num_hidden_layers,
            hidden_size=config.text.hidden_size,
            canvas=config.canvas_length,
            packing=packing,
            needed_bytes=loading_bytes(folder, config, _CONTEXT),
        ),
    )


def public_name(source: str) -> str:
    """Return the id of a published model; no name of a folder or of a user's own repository."""
    if os.path.exists(os.path.expanduser(source)):
        return "a local folder"
    repo = SHORT_NAMES.get(source, source)
    return repo if repo.partition("/")[0] in _PUBLISHERS else "another repository"


def answers(patient: Patient) -> Iterator[Answer]:
    """Load the model and yield the answer to each built-in prompt under each policy; one canvas
    each.

    Raises:
      DiffGemmaError: if the model cannot be loaded.
    """
    model, tokenizer = load(patient.folder, adapter_path=patient.adapter_path)
    settings = GenerationSettings(seed=SEED, max_new_tokens=model.config.canvas_length)
    warm_up = replace(settings, max_denoising_steps=2)
    for policy in POLICIES:
        answer(model, tokenizer, PROMPTS[0], replace(warm_up, policy=policy))  # compiles kernels
        for prompt in PROMPTS:
            yield answer(model, tokenizer, prompt, replace(settings, policy=policy))


def answer(
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    prompt: BuiltIn,
    settings: GenerationSettings,
) -> Answer:
    """Return the numbers of the answer to one prompt."""
    mx.reset_peak_memory()
    text, canvases, prefill = "", 0, PrefillDone(0, 0, 0.0)
    started = time.perf_counter()
    for event in stream_generate(model, tokenizer, prompt.text, settings=settings):
        match event:
            case PrefillDone():
                prefill, started = event, time.perf_counter()
            case CanvasCommitted():
                canvases += 1
            case Text(piece=piece, channel="answer"):
                text += piece
            case Finished():
                finished = event
    seconds = time.perf_counter() - started
    return Answer(
        kind=prompt.kind,
        policy=settings.policy or "reference",
        prompt_tokens=prefill.prompt_tokens,
        new_tokens=finished.new_tokens,
        canvases=canvases,
        steps=finished.steps,
        prefill_seconds=prefill.seconds,
        seconds=seconds,
        peak_bytes=mx.get_peak_memory(),
        as_expected=None if prompt.expected is None else prompt.expected in text,
    )
