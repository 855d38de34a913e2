from __future__ import annotations

import json
import random
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_diffgemma import DiffGemmaError
from mlx_diffgemma.convert.write import prepare
from tests.convert.cases import official
from tests.convert.fuzz import SMALL, VALUES, Tally, case, run


def test_mutated_headers_and_configs_end_in_an_error_or_a_right_result(tmp_path):
    tally = run(120, 1, tmp_path)
    assert tally.findings == []
    assert tally.results > 10 and tally.errors["WeightsError"] > 10


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return official(tmp_path_factory.mktemp("fuzz") / "source", **SMALL)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=st.sampled_from(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim sliding_window num_experts top_k_experts "
        "moe_intermediate_size global_head_dim num_global_key_value_heads layer_types "
        "rope_parameters rms_norm_eps final_logit_softcapping per_layer_config eos_token_id".split()
    ),
    value=st.sampled_from(VALUES) | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
)
def test_any_value_in_the_text_config_is_planned_or_refused(source, key, value):
    text = (source / "config.json").read_text()
    config = json.loads(text)
    config["text_config"][key] = value
    (source / "config.json").write_text(json.dumps(config))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(source, quantize=True)
    except DiffGemmaError as error:
        assert str(error) and "\n" not in str(error)
    finally:
        (source / "config.json").write_text(text)


def test_the_fuzzer_sees_a_result_that_is_wrong(source, tmp_path, monkeypatch):
    """Were a tensor written as zeros, and its checksum those of zeros, it would have to say so."""
    from mlx_diffgemma.convert import shards

    real = shards._raw
    monkeypatch.setattr(shards, "_raw", lambda array: bytes(len(real(array))))
    tally = Tally()
    for number in range(40):
        place = tmp_path / str(number)
        place.mkdir()
        case(source, place, random.Random(number), tally)
    assert tally.findings
