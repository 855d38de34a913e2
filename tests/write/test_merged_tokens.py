"""Constraints over tokens of several characters, from the prompt to the text."""

import pytest

from mlx_diffgemma import Constraint, GenerationSettings, generate
from mlx_diffgemma.language.controls import special_tokens
from mlx_diffgemma.write.constrained import over_tokens
from tests.checkpoints import load_drawn
from tests.write import merged_tokens


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    tokenizer = merged_tokens.made_tokenizer(tmp_path_factory.mktemp("merged"))
    model = load_drawn(3, vocab_size=len(tokenizer), canvas_length=32)
    return model, tokenizer


def test_every_answer_fits_over_merged_tokens(loaded):
    seen = merged_tokens.run(merged_tokens.schemas_of(None, 12), *loaded, 32)
    assert seen.findings == [] and not seen.refused
    assert seen.answers == {"json_schema": 12, "regex": 6, "choices": 3, "tool_call": 1}
    assert len(seen.host_ms) == seen.steps > 0 and seen.crossing > 0


def test_a_wrong_answer_would_be_found(loaded, monkeypatch):
    monkeypatch.setattr(merged_tokens, "fits", lambda *_: False)
    seen = merged_tokens.run([], *loaded, 32)
    assert len(seen.findings) == 10


def test_tokens_may_cross_what_is_fixed_and_what_is_free(loaded):
    """`{"city": ` and `true` are one literal and one slot, and `▁true` is one token."""
    model, tokenizer = loaded
    constraint = Constraint.template('{"city": {{one of: true | null}}, "age": {{match: [0-9]}}}')
    resolved = GenerationSettings(max_new_tokens=40).resolve(model.config)
    bound = over_tokens(constraint, model, tokenizer, resolved, thinking=False)
    text = '{"city": true, "age": 1}'
    tokens = tokenizer.encode(text, add_special_tokens=False)
    spelled = tokenizer.convert_ids_to_tokens(tokens)
    assert any("true" in one and one != "true" for one in spelled), spelled
    end = tokenizer.eos_token_id
    assert bound.after([*tokens, end], 0) == bound.automaton.end
    assert not set(tokens) & set(special_tokens(tokenizer).values())
    settings = GenerationSettings(seed=1, max_new_tokens=40, max_denoising_steps=2)
    assert constraint.accepts(
        generate(model, tokenizer, tokens, settings=settings, constraint=constraint)
    )
