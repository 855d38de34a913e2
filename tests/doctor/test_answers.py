"""Answers of the bundled model to prompts that it was trained on, and to the built-in ones."""

from __future__ import annotations

import pytest

from mlx_diffgemma import bundled_model
from mlx_diffgemma.doctor import answers as module
from mlx_diffgemma.doctor.answers import PROMPTS, BuiltIn, answers, find, public_name
from mlx_diffgemma.doctor.block import by_policy
from mlx_diffgemma.doctor.report import Note
from mlx_diffgemma.doctor.run import examine
from mlx_diffgemma.errors import SourceError

OWN = (
    BuiltIn("table", "Squares from 2 to 3.", "|3|9|"),
    BuiltIn("wrong", "Reverse: abc", "abcabc"),
    BuiltIn("free", "Sort: 3 1 2"),
)


@pytest.fixture(scope="module")
def found():
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "PROMPTS", OWN)
    result = list(answers(find(str(bundled_model()))))
    patch.undo()
    return result


def test_every_prompt_is_answered_under_both_policies(found):
    kinds = [(answer.policy, answer.kind) for answer in found]
    assert kinds == [(p, prompt.kind) for p in ("reference", "fast") for prompt in OWN]
    assert [a.as_expected for a in found] == [True, False, None] * 2


def test_numbers_of_an_answer_fit_together(found):
    for answer in found:
        assert answer.canvases == 1 and 1 <= answer.steps <= 48
        assert answer.steps_per_canvas == answer.steps
        assert answer.ms_per_step == pytest.approx(1e3 * answer.seconds / answer.steps)
        assert answer.tokens_per_second == pytest.approx(answer.new_tokens / answer.seconds)
        assert answer.prompt_tokens > 5 and answer.prefill_seconds > 0 and answer.peak_bytes > 0
    # A token for each character, and the end token.
    assert found[0].new_tokens == len("|n|n*n|\n|-|-|\n|2|4|\n|3|9|") + 1


def test_answers_of_a_policy_are_counted_together(found):
    reference, fast = by_policy(found)
    assert (reference.policy, fast.policy) == ("reference", "fast")
    assert (reference.as_expected, reference.checkable, reference.answers) == (1, 2, 3)
    own = found[:3]
    assert reference.steps_per_canvas == pytest.approx(sum(a.steps for a in own) / 3)
    assert reference.tokens_per_second == pytest.approx(
        sum(a.new_tokens for a in own) / sum(a.seconds for a in own)
    )


def test_twelve_prompts_of_twelve_kinds_are_built_in():
    assert len(PROMPTS) == len({prompt.kind for prompt in PROMPTS}) == 12
    assert sum(prompt.expected is not None for prompt in PROMPTS) >= 8


def test_a_model_that_does_not_fit_is_left_out_in_one_line(monkeypatch):
    patient = find(str(bundled_model()))
    assert patient.too_large is None
    monkeypatch.setattr(module, "recommended_bytes", lambda: patient.facts.needed_bytes - 1)
    events = list(examine(["answers"], patient))
    assert isinstance(events[-1], Note) and not events[-1].has_failed
    assert "recommends at most" in events[-1].text and "4bit" in events[-1].text


def test_a_model_that_is_not_there_is_refused_before_the_work():
    with pytest.raises(SourceError):
        find("/nowhere/at/all")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("4bit", "mlx-community/diffusiongemma-26B-A4B-it-4bit"),
        ("google/diffusiongemma-26B-A4B-it", "google/diffusiongemma-26B-A4B-it"),
        ("janedoe/secret", "another repository"),
        (str(bundled_model()), "a local folder"),
    ],
)
def test_only_published_models_are_named(source, name):
    assert public_name(source) == name
