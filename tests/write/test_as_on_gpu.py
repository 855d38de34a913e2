"""Whole answers of packed checkpoints on the graph that GPUs get, mostly in bfloat16: what every
Mac computes.

Packed products in bfloat16 are slow on the CPU backend and add up in low precision, so the prompts
are short ones that the model is sure of, and most canvases have 24 tokens.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import (
    GenerationSettings,
    PromptOptions,
    Template,
    batch_generate,
    bundled_model,
    edit,
    encode_prompt,
    fill,
    generate,
    load,
    stream_generate,
)
from mlx_diffgemma.checkpoint.headers import read_headers
from mlx_diffgemma.config.policies import POLICIES
from mlx_diffgemma.convert import convert
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.events import CanvasCommitted, Finished, PrefillDone, StepDone, Text
from mlx_diffgemma.model import backend
from mlx_diffgemma.model.backend import as_on_gpu
from tests.sampled import first, one_in

PACKINGS: dict[str, dict[str, Any]] = {
    "mixed 4-bit": {},
    "8-bit": {"q_bits": 8},
    "mxfp4": {"q_mode": "mxfp4"},
    "mxfp8": {"q_mode": "mxfp8"},
    "nvfp4": {"q_mode": "nvfp4"},
    "uniform nvfp4": {"q_mode": "nvfp4", "recipe": "uniform"},  # the embedding table too
}
POLICY_NAMES = tuple(POLICIES)
ANSWERS = {  # up to 25 tokens with the end
    "Reverse: kaa": "aak",
    "Sort: 6 3 1 7 0 6": "0 1 3 6 6 7",
    "Count from 38 to 44.": "38 39 40 41 42 43 44",
    "Fill: Monday _______ Wednesday": "Monday Tuesday Wednesday",
}
PROMPTS = tuple(ANSWERS)
HARD = "Sudoku:\n2..3\n.3..\n4...\n..4."  # three steps, of which two are unsure
LONG = "Count from 12 to 24."  # 39 tokens with the end, two canvases of 24
NUMBERS = " ".join(map(str, range(12, 25)))


@functools.cache
def packed(name: str, dtype: mx.Dtype = mx.bfloat16):
    """The bundled model, packed by our converter, as a Mac loads it: nothing in float32."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        convert(bundled_model(), out, quantize=True, **PACKINGS[name])
        model, tokenizer = load(out)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model, tokenizer


@pytest.fixture(autouse=True)
def graph():
    with as_on_gpu():
        yield


def short(policy: str, seed: int = 1, **more: Any) -> GenerationSettings:
    return GenerationSettings(policy=policy, seed=seed, canvas_length=24, **more)


def test_the_types_are_those_in_the_files(tmp_path):
    convert(bundled_model(), tmp_path / "out", quantize=True)
    model, _ = load(tmp_path / "out", fused=False)
    model.set_dtype(mx.bfloat16)
    ours = {str(array.dtype) for _, array in tree_flatten(model.parameters())}
    stored = {info.dtype for info in read_headers(tmp_path / "out").values()}
    assert ours == {"mlx.core.bfloat16", "mlx.core.uint32"} and stored == {"BF16", "U32"}


@pytest.mark.parametrize("packing", one_in(2, [n for n in PACKINGS if n != "mixed 4-bit"]))
def test_answers_are_right_in_every_packing_and_policy(packing):
    """Mixed 4-bit is in the tests below."""
    loaded, at = packed(packing), list(PACKINGS).index(packing)
    for i, policy in enumerate(POLICY_NAMES):
        prompt = PROMPTS[(at + i) % 2]
        settings = replace(short(policy), canvas_length=16)
        assert generate(*loaded, prompt, settings=settings) == ANSWERS[prompt], policy


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_rows_of_a_batch_are_right_and_what_they_are_alone(policy):
    loaded, prompts = packed("mixed 4-bit"), PROMPTS[:2] if policy == "fast" else PROMPTS[:3:2]
    response = batch_generate(*loaded, prompts, settings=short(policy, seed=5))
    alone = [
        list(stream_generate(*loaded, prompt, settings=short(policy, seed=5 + i)))
        for i, prompt in enumerate(prompts)
    ]
    assert response.texts == [text_of(events) for events in alone]
    assert response.texts == [ANSWERS[prompt] for prompt in prompts]
    finished = [events[-1] for events in alone]
    for row, end in zip(response.finished, finished, strict=True):
        assert (row.new_tokens, row.steps) == (end.new_tokens, end.steps)


def test_a_choice_is_the_one_that_fits_its_surroundings():
    loaded = packed("mixed 4-bit")
    template = Template.parse("a{{one of: b | a}}k")
    filled = fill(*loaded, template, prompt="Reverse: kaa", settings=short("reference"))
    assert filled.text == "aak"


def test_the_length_of_a_gap_is_found():
    loaded, template = packed("mixed 4-bit"), Template.parse("12 {{n = gap:4..5}} 15")
    settings = short("fast", max_denoising_steps=2)
    filled = fill(*loaded, template, prompt="Count from 12 to 15.", settings=settings)
    assert filled.text == "12 13 14 15"
    lengths = filled.slots["n"].lengths
    assert max(lengths, key=lengths.get) == 5


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_sudoku_is_solved_around_its_givens(policy):
    template = Template.parse("2{{gap:1}}13\n{{gap:1}}3{{gap:1}}4\n413{{gap:1}}\n3241")
    filled = fill(
        *packed("nvfp4"),
        template,
        prompt="Sudoku:\n2.13\n.3.4\n413.\n3241",
        settings=short(policy),
    )
    assert filled.text == "2413\n1324\n4132\n3241"
    assert all(slot.certainty > 0.9 for slot in filled.slots.values())


@pytest.mark.parametrize("policy", first(1, POLICY_NAMES))
def test_a_selection_is_rewritten_and_the_rest_stays(policy):
    edited = edit(
        *packed("mixed 4-bit"),
        "12 13 14 xx 16",
        "1:10-1:12",
        "Count from 12 to 16.",
        gap_tokens=(2, 2),
        settings=short(policy, max_denoising_steps=2),  # the model knows no such prompts
    )
    assert edited.text.startswith("12 13 14 ") and edited.text.endswith(" 16")
    assert len(edited.text) == 14


@pytest.mark.parametrize("policy", first(1, POLICY_NAMES))
def test_a_stream_over_two_canvases_has_all_of_its_events(policy):
    settings = short(policy, top_candidates=2)
    events = list(stream_generate(*packed("mixed 4-bit"), LONG, settings=settings))
    assert text_of(events) == NUMBERS
    assert isinstance(events[0], PrefillDone) and isinstance(events[-1], Finished)
    canvases = [event for event in events if isinstance(event, CanvasCommitted)]
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [canvas.canvas_index for canvas in canvases] == [0, 1]
    assert [(e.canvas_index, e.step) for e in steps] == [
        (canvas.canvas_index, step) for canvas in canvases for step in range(canvas.steps)
    ]
    assert events[-1].steps == len(steps) and events[-1].reason == "stop"
    for event in steps:  # read only now: no later step may have overwritten what they hold
        certainty, entropy = np.array(event.certainty), np.array(event.entropy)
        ids, chances = map(np.array, event.candidates)
        assert event.draft.shape == event.accepted.shape == certainty.shape == ids.shape[:2]
        assert ((certainty > 0) & (certainty <= 1.01)).all() and np.isfinite(entropy).all()
        assert (chances[..., 0] >= chances[..., 1]).all()
        likeliest = ids[..., 0] == np.array(event.draft)
        np.testing.assert_allclose(chances[..., 0][likeliest], certainty[likeliest], atol=2e-2)
        assert likeliest.mean() > 0.9
    for canvas, last in zip(canvases, [e for e in steps if is_last(e, canvases)], strict=True):
        answer = np.array(canvas.tokens)
        end = np.flatnonzero(answer[0] == 0)
        width = min(end[0] if end.size else answer.shape[1], last.draft.shape[1])
        np.testing.assert_array_equal(np.array(last.draft)[0, :width], answer[0, :width])


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_context_is_as_it_was_after_a_run_and_serves_another(policy):
    model, tokenizer = packed("mixed 4-bit", mx.float32)
    ids = encode_prompt(tokenizer, LONG, PromptOptions())
    context = model.prefill(mx.array([ids], dtype=mx.int32))
    before = [np.array(array) for array in context.arrays]
    settings = short(policy).resolve(model.config)
    runs = []
    for _ in range(2):
        rows = Rows(model)
        rows.add(Row(model, settings, context=context))
        events = list(rows.run())
        runs.append([e.tokens.tolist() for e in events if isinstance(e, CanvasCommitted)])
        for array, old in zip(context.arrays, before, strict=True):
            np.testing.assert_array_equal(np.array(array), old)
    assert runs[0] == runs[1] and len(runs[0]) == 2


@pytest.mark.parametrize("packing", first(1, ["mixed 4-bit", "mxfp4", "uniform nvfp4"]))
def test_in_float32_every_policy_writes_what_the_cpu_graph_writes(packing):
    """The same ids in the same steps, and the numbers of the last step to rounding."""
    loaded = packed(packing, mx.float32)
    rows: dict[str, dict[str, Any]] = {policy: {} for policy in POLICY_NAMES}
    rows["sparse"] = {"self_conditioning": "sparse", "sparse_tokens": 16}
    for i, (name, more) in enumerate(rows.items()):
        settings = short("reference" if name == "sparse" else name, seed=i, **more)
        prompt = PROMPTS[1] if name == "fast" else HARD
        on_gpu = list(stream_generate(*loaded, prompt, settings=settings))
        with on_cpu():
            expected = list(stream_generate(*loaded, prompt, settings=settings))
        assert [type(event) for event in on_gpu] == [type(event) for event in expected], name
        for one, other in zip(on_gpu, expected, strict=True):
            if isinstance(one, CanvasCommitted):
                assert one.tokens.tolist() == other.tokens.tolist(), name
            elif isinstance(one, StepDone):
                assert one.draft.tolist() == other.draft.tolist(), name
                for field in ("entropy", "certainty"):
                    close = np.array(getattr(one, field)), np.array(getattr(other, field))
                    np.testing.assert_allclose(*close, atol=1e-4)


@contextmanager
def on_cpu():
    """Build the CPU backend's graph, within the fixture that builds the other."""
    token = backend._as_on_gpu.set(False)
    try:
        yield
    finally:
        backend._as_on_gpu.reset(token)


def text_of(events) -> str:
    return "".join(event.piece for event in events if isinstance(event, Text))


def is_last(event: StepDone, canvases: list[CanvasCommitted]) -> bool:
    return event.step == canvases[event.canvas_index].steps - 1
