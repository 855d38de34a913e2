"""Whole runs of the bundled model against transformers: its own draws are recorded and replayed
through our loop."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed")

from transformers.models.diffusion_gemma.generation_diffusion_gemma import (  # noqa: E402
    EntropyBoundSampler,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (  # noqa: E402
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma import (  # noqa: E402
    GenerationSettings,
    PromptOptions,
    bundled_model,
    denoise_tokens,
    encode_prompt,
    load,
)
from mlx_diffgemma.events import CanvasCommitted, StepDone  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("error::FutureWarning")]
torch.set_num_threads(1)  # models this small only wait for one another's threads

TASKS = ("sudoku4", "sudoku6", "count", "sort", "reverse", "table", "words", "code")
PER_TASK = 10
CANVASES = 3  # a multiple of the canvas, since transformers returns whole canvases
# A decision in the reference that hangs on less than this may fall otherwise by rounding alone.
UNDECIDED = 1e-5


@dataclass
class Canvas:
    """What transformers drew and computed on one canvas."""

    start: np.ndarray
    proposals: list[np.ndarray] = field(default_factory=list)
    fresh: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)  # temperature-scaled
    accepted: list[np.ndarray] = field(default_factory=list)


class Recorder:
    """Listens to the draws of `model.generate`. A canvas of random tokens that follows a proposal
    refills what was not accepted; any other begins a canvas."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.canvases: list[Canvas] = []
        multinomial = torch.multinomial
        initialize, accept = (
            EntropyBoundSampler.initialize_canvas,
            EntropyBoundSampler.accept_canvas,
        )

        def record_multinomial(*args, **kwargs):
            drawn = multinomial(*args, **kwargs)
            self.canvases[-1].proposals.append(drawn.numpy().reshape(1, -1))
            return drawn

        def record_initialize(sampler, *args, **kwargs):
            tokens = initialize(sampler, *args, **kwargs)
            if self.canvases and len(self.canvases[-1].fresh) < len(self.canvases[-1].proposals):
                self.canvases[-1].fresh.append(tokens.numpy())
            else:
                self.canvases.append(Canvas(tokens.numpy()))
            return tokens

        def record_accept(sampler, canvas, proposal, logits, step):
            out = accept(sampler, canvas, proposal, logits, step)
            self.canvases[-1].logits.append(logits.numpy())
            self.canvases[-1].accepted.append(sampler.accepted_token_mask.numpy())
            return out

        patch.setattr(torch, "multinomial", record_multinomial)
        patch.setattr(EntropyBoundSampler, "initialize_canvas", record_initialize)
        patch.setattr(EntropyBoundSampler, "accept_canvas", record_accept)


class Replay:
    """transformers' draws as a `Noise`. Our loop builds one step ahead, so it may ask for a step
    that transformers never ran: the answer is never computed with."""

    def __init__(self, canvases: list[Canvas]):
        self.canvases = canvases

    def start(self, canvas_index, shape, vocab_size):
        return mx.array(self.canvases[canvas_index].start.astype(np.int32))

    def sample(self, canvas_index, step, logits):
        return self._drawn(self.canvases[canvas_index].proposals, step, logits.shape[:2])

    def renoise(self, canvas_index, step, shape, vocab_size):
        return self._drawn(self.canvases[canvas_index].fresh, step, shape)

    def _drawn(self, draws, step, shape):
        if step >= len(draws):
            return mx.zeros(shape, dtype=mx.int32)
        return mx.array(draws[step].astype(np.int32))


@dataclass(frozen=True)
class Outcome:
    canvases: int
    is_equal: bool
    difference: str = ""  # where a run first differs, and on how little that hung
    margin: float = 0.0


@functools.cache
def models():
    folder = bundled_model()
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32)
    return reference, *load(folder)


@functools.cache
def prompts(task: str) -> tuple[str, ...]:
    entries = json.loads((bundled_model() / "prompts.json").read_text())
    asked = [e for e in entries if e["task"] == task]
    if task == "count":  # its longest answers take two canvases
        asked.sort(key=lambda e: len(e["answer"]), reverse=True)
    return tuple(e["prompt"] for e in asked)[:PER_TASK]


@functools.cache
def compare(task: str, index: int) -> Outcome:
    reference, model, tokenizer = models()
    ids = encode_prompt(tokenizer, prompts(task)[index], PromptOptions())
    max_new_tokens = CANVASES * model.config.canvas_length
    torch.manual_seed(index)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        output = reference.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens)
    theirs = output.sequences[0, len(ids) :].tolist()
    their_steps = [len(canvas.proposals) for canvas in recorder.canvases]

    ours, our_steps, steps = [], [], []
    for event in denoise_tokens(
        model,
        mx.array([ids], dtype=mx.int32),
        GenerationSettings(max_new_tokens=max_new_tokens),
        noise=Replay(recorder.canvases),
    ):
        if isinstance(event, StepDone):
            steps.append(event)
            if event.step >= len(recorder.canvases[event.canvas_index].proposals):
                break  # beyond the reference's draws there is nothing to compare
        elif isinstance(event, CanvasCommitted):
            ours += event.tokens[0].tolist()
            our_steps.append(event.steps)
            if event.canvas_index + 1 == len(recorder.canvases):
                break
    if ours == theirs and our_steps == their_steps:
        return Outcome(len(their_steps), True)
    return Outcome(len(their_steps), False, *first_difference(recorder.canvases, steps))


def first_difference(canvases: list[Canvas], steps: list[StepDone]) -> tuple[str, float]:
    """Where the run first left the reference, and the reference's margin of that decision."""
    for event in steps:
        canvas, where = canvases[event.canvas_index], f"canvas {event.canvas_index}"
        where += f", step {event.step}"
        if event.step >= len(canvas.proposals):
            return f"{where}: the reference had settled", stop_margin(canvas.logits[-1])
        logits = canvas.logits[event.step][0]
        top = np.sort(logits, axis=-1)
        differs = np.array(event.draft[0]) != logits.argmax(axis=-1)
        if differs.any():
            return f"{where}: argmax", float((top[:, -1] - top[:, -2])[differs].min())
        differs = np.array(event.accepted) != canvas.accepted[event.step]
        if differs.any():
            entropy = np.sort(token_entropy(logits))
            spent_before = np.cumsum(entropy) - entropy
            return f"{where}: acceptance", float(np.abs(spent_before - 0.1).min())
    last = canvases[steps[-1].canvas_index].logits[steps[-1].step]
    return "the reference went on", stop_margin(last)


def token_entropy(logits: np.ndarray) -> np.ndarray:
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return -(np.exp(log_p) * log_p).sum(axis=-1)


def stop_margin(logits: np.ndarray) -> float:
    return float(abs(token_entropy(logits[0]).mean() - 0.005))


@pytest.mark.parametrize("index", range(PER_TASK))
@pytest.mark.parametrize("task", TASKS)
def test_replayed_draws_give_the_ids_and_step_counts_of_transformers(task, index):
    outcome = compare(task, index)
    if not outcome.is_equal:
        print(f"{task} {index}: {outcome.difference}, margin {outcome.margin:.1e}")
        assert outcome.margin < UNDECIDED, outcome.difference


def test_at_least_sixty_prompts_over_all_tasks_are_compared(capsys):
    outcomes = [compare(task, index) for task in TASKS for index in range(PER_TASK)]
    several = sum(outcome.canvases > 1 for outcome in outcomes)
    equal = sum(outcome.is_equal for outcome in outcomes)
    with capsys.disabled():
        print(f"\ntrajectories: {equal} of {len(outcomes)} equal, {several} over several canvases")
        for outcome in outcomes:
            if not outcome.is_equal:
                print(f"  {outcome.difference}: margin {outcome.margin:.1e}")
    assert len(outcomes) >= 60 and several >= 10
