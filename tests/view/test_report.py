"""Events as JSON: what a program needs to show a draft."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_diffgemma import GenerationSettings, bundled_model, load, stream_generate
from mlx_diffgemma.events import StepDone, TrialStarted
from mlx_diffgemma.language.prompt import special_tokens
from mlx_diffgemma.view.report import Drafts, as_object

MODEL, TOKENIZER = load(bundled_model())


def step(ids: list[int], accepted: list[bool], certainty: list[float]) -> StepDone:
    row = mx.array([certainty])
    return StepDone(0, 0, mx.array([ids]), mx.array([accepted]), mx.zeros_like(row), row)


def test_a_draft_ends_at_the_first_end_token_and_leaves_control_tokens_out():
    special = special_tokens(TOKENIZER)
    a, b = TOKENIZER.encode("ab", add_special_tokens=False)
    half = TOKENIZER.convert_tokens_to_ids("<0xE2>")
    ids = [a, special["<|channel>"], half, b, special["<eos>"], b]
    event = step(ids, [True, False, True, True, True, True], [0.5, 0.25, 0.75, 1.0, 1.0, 1.0])
    found = as_object(event, drafts=Drafts(TOKENIZER, [special["<eos>"]]))
    assert found["draft"] == "a\ufffdb"
    assert found["tokens"] == [
        {"text": "a", "accepted": True, "certainty": 0.5},
        {"text": "<|channel>", "accepted": False, "certainty": 0.25},
        {"text": "<0xE2>", "accepted": True, "certainty": 0.75},
        {"text": "b", "accepted": True, "certainty": 1.0},
    ]
    assert "draft" not in as_object(event)


def test_pinned_tokens_are_told_after_a_trial_has_started():
    drafts = Drafts(TOKENIZER, [1])
    ids = TOKENIZER.encode("ab", add_special_tokens=False)
    trial = TrialStarted(0, ("n", "m"), (1, None), mx.array([[True, False]]), is_final=False)
    assert as_object(trial, drafts=drafts) == {
        "event": "trial",
        "canvas": 0,
        "final": False,
        "lengths": {"n": 1, "m": None},
    }
    found = as_object(step(ids, [True, True], [1.0, 1.0]), drafts=drafts)
    assert [token["pinned"] for token in found["tokens"]] == [True, False]


def test_the_last_draft_of_a_run_is_its_answer():
    settings = GenerationSettings(seed=3)
    resolved = settings.resolve(MODEL.config)
    drafts, last, text = Drafts(TOKENIZER, resolved.eos_token_ids), {}, ""
    for event in stream_generate(MODEL, TOKENIZER, "Squares from 2 to 3.", settings=settings):
        made = json.loads(json.dumps(as_object(event, drafts=drafts)))
        last = made if made["event"] == "step" else last
        text += made.get("text", "")
    assert last["draft"] == text == "".join(token["text"] for token in last["tokens"])
    assert last["accepted"] >= sum(token["accepted"] for token in last["tokens"])
    assert [t["certainty"] for t in last["tokens"]] == pytest.approx([1] * len(text), abs=0.5)
