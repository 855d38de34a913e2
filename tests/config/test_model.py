"""config.json and generation_config.json: both spellings read, impossible values refused."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma import GenerationSettings, bundled_model
from mlx_diffgemma.config.model import LayerConfig, ModelConfig, RopeConfig
from mlx_diffgemma.config.quantization import Quantization, QuantizationConfig
from mlx_diffgemma.config.reading import read_json
from mlx_diffgemma.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
# The published values of google/diffusiongemma-26B-A4B-it.
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2816,
    "initializer_range": 0.02,
    "intermediate_size": 2112,
    "layer_types": [*[SLIDING] * 5, FULL] * 5,
    "max_position_embeddings": 262144,
    "model_type": "diffusion_gemma_text",
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_experts": 128,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        FULL: {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "top_k_experts": 8,
    "use_bidirectional_attention": "vision",
    "vocab_size": 262144,
}
CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "boi_token_id": 255999,
    "canvas_length": 256,
    "dtype": "bfloat16",
    "eoi_token_id": 258882,
    "eos_token_id": [1, 106],
    "image_token_id": 258880,
    "initializer_range": 0.02,
    "model_type": "diffusion_gemma",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "transformers_version": "5.8.0.dev0",
    "vision_config": {"model_type": "gemma4_vision", "rope_parameters": {"rope_type": "default"}},
    "vision_soft_tokens_per_image": 280,
}
GENERATION: dict[str, Any] = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "t_max": 0.8,
    "t_min": 0.4,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "transformers_version": "5.8.0.dev0",
}
FULL_LAYERS = (5, 11, 17, 23, 29)
ABSENT = object()


def config(
    *, text: dict[str, Any] | None = None, generation: Any = GENERATION, **top: Any
) -> ModelConfig:
    """The published config with some keys changed; ABSENT takes a key away."""
    return ModelConfig.from_dict(raw(text=text, **top), generation)


def raw(*, text: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    changed = {"text_config": without_absent(TEXT | (text or {}))} | top
    return without_absent(CONFIG | changed)


def without_absent(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not ABSENT}


def refusal(*, text: dict[str, Any] | None = None, generation: Any = GENERATION, **top: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        config(text=text, generation=generation, **top)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def new_spelling(entry: Any, layers: tuple[int, ...] = FULL_LAYERS) -> dict[str, Any]:
    return {
        "global_head_dim": ABSENT,
        "num_global_key_value_heads": ABSENT,
        "per_layer_config": {str(i): entry for i in layers},
    }


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def full_layer(parsed: ModelConfig) -> LayerConfig:
    return parsed.text.layers[-1]


# --- what is read ---


def test_the_published_values_are_read_as_they_are():
    parsed = config()
    assert parsed.canvas_length == 256
    assert parsed.eos_token_ids == (1, 50, 106)
    assert parsed.pad_token_id == 0
    assert parsed.image_token_ids == (255999, 258880, 258882)
    assert parsed.vision is not None and parsed.image_token_id == 258880
    assert parsed.quantization is None
    text = parsed.text
    assert [i for i, layer in enumerate(text.layers) if not layer.is_sliding] == [*FULL_LAYERS]
    assert set(text.layers) == {LayerConfig(SLIDING, 256, 8), LayerConfig(FULL, 512, 2)}
    assert text.rope == {
        SLIDING: RopeConfig("default", 1e4, 1.0),
        FULL: RopeConfig("proportional", 1e6, 0.25),
    }
    assert parsed.generation == GenerationSettings(
        max_new_tokens=256,
        max_denoising_steps=48,
        entropy_bound=0.1,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
    )


def test_both_spellings_of_the_per_layer_keys_mean_the_same():
    assert config(text=new_spelling({"head_dim": 512, "num_key_value_heads": 2})) == config()


def test_both_spellings_together_are_read_where_they_agree():
    entry = {"head_dim": 512, "num_key_value_heads": 2}
    both = {"per_layer_config": {str(i): entry for i in FULL_LAYERS}}
    assert config(text=both) == config()


@pytest.mark.parametrize(
    ("entry", "layer"),
    [
        ({}, LayerConfig(FULL, 256, 8)),
        ({"head_dim": 512}, LayerConfig(FULL, 512, 8)),
        ({"num_key_value_heads": 2}, LayerConfig(FULL, 256, 2)),
    ],
)
def test_an_entry_lists_only_what_differs_from_the_base(entry, layer):
    assert full_layer(config(text=new_spelling(entry))) == layer


def test_an_empty_per_layer_config_gives_full_layers_the_base_values():
    assert full_layer(config(text=new_spelling({}, layers=()))) == LayerConfig(FULL, 256, 8)


def test_without_either_spelling_full_heads_are_512_wide():
    neither = {"global_head_dim": ABSENT, "num_global_key_value_heads": ABSENT}
    assert full_layer(config(text=neither)) == LayerConfig(FULL, 512, 8)
    assert full_layer(config(text={"num_global_key_value_heads": None})).num_key_value_heads == 8


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ({"per_layer_config": {str(i): {"head_dim": 256} for i in FULL_LAYERS}}, ("256", "512")),
        (
            {
                "per_layer_config": {
                    str(i): {"head_dim": 512, "num_key_value_heads": 4} for i in FULL_LAYERS
                }
            },
            ("num_key_value_heads 4", "2"),
        ),
        ({"per_layer_config": {}}, ("256", "512")),
    ],
)
def test_spellings_that_contradict_each_other_are_refused(text, numbers):
    message = refusal(text=text)
    assert "the two spellings disagree" in message
    assert all(number in message for number in numbers)


def test_the_last_layer_is_full_whatever_the_file_says():
    types = [*TEXT["layer_types"][:-1], SLIDING]
    assert config(text={"layer_types": types}) == config()


def test_without_layer_types_every_sixth_layer_is_full():
    assert config(text={"layer_types": ABSENT}) == config()
    eight = config(text={"layer_types": ABSENT, "num_hidden_layers": 8}).text.layers
    assert [layer.is_sliding for layer in eight] == [True] * 5 + [False, True, False]


def test_without_rope_parameters_the_references_defaults_hold():
    assert config(text={"rope_parameters": ABSENT}) == config()
    assert config(text={"rope_parameters": None}) == config()


@pytest.mark.parametrize(
    ("top", "text", "generation", "expected"),
    [
        ([1, 106], 1, [1, 106, 50], (1, 50, 106)),
        (7, ABSENT, ABSENT, (7,)),
        (ABSENT, [3, 4], 5, (3, 4, 5)),
        (None, None, None, ()),
        (ABSENT, ABSENT, ABSENT, ()),
        ([9, 9], 9, [9], (9,)),
    ],
)
def test_end_tokens_are_the_union_of_all_files_as_numbers_or_lists(top, text, generation, expected):
    parsed = config(
        eos_token_id=top,
        text={"eos_token_id": text},
        generation=without_absent(GENERATION | {"eos_token_id": generation}),
    )
    assert parsed.eos_token_ids == expected


def test_what_suits_a_checkpoint_stands_in_config_json_and_comes_first():
    suits = {"prefix_steps": 1, "t_max": 0.7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = config(mlx_diffgemma=suits, generation=GENERATION | {"t_max": 0.9}).generation
    assert (read.prefix_steps, read.t_max, read.t_min) == (1, 0.7, GENERATION["t_min"])
    assert read.acceptance_confidence is None
    assert "mlx_diffgemma: prefix_steps must be" in refusal(mlx_diffgemma={"prefix_steps": 0})
    assert "mlx_diffgemma must be an object" in refusal(mlx_diffgemma=3)
    with pytest.warns(UserWarning, match="unknown keys are ignored: nosuch"):
        config(mlx_diffgemma={"nosuch": 1})


def test_a_generation_config_inside_config_json_counts_where_there_is_no_file():
    inner = GENERATION | {"max_denoising_steps": 7, "eos_token_id": [200]}
    embedded = config(generation=None, generation_config=inner)
    assert embedded.generation.max_denoising_steps == 7
    assert embedded.eos_token_ids == (1, 106, 200)
    assert config(generation_config=inner).generation.max_denoising_steps == 48
    assert config(generation=None, generation_config=None).generation == GenerationSettings()


def test_the_padding_token_is_taken_from_the_first_file_that_names_it():
    unset = without_absent(GENERATION | {"pad_token_id": ABSENT})
    assert config(generation=GENERATION | {"pad_token_id": 5}).pad_token_id == 5
    assert config(generation=unset, pad_token_id=6).pad_token_id == 6
    assert config(generation=unset, text={"pad_token_id": 7}).pad_token_id == 7
    assert config(generation=unset, text={"pad_token_id": None}).pad_token_id == 0


# --- keys that nobody knows ---


def test_unknown_keys_are_named_in_one_warning_per_block():
    with pytest.warns(UserWarning) as caught:
        config(text={"zoom": 1, "attention_k_eq_v": True}, fresh=2)
    assert [str(w.message) for w in caught] == [
        "config.json: unknown keys are ignored: fresh",
        "config.json, text_config: unknown keys are ignored: attention_k_eq_v, zoom",
    ]


def test_inert_keys_of_published_files_are_silent():
    legacy = {"_name_or_path": "", "id2label": {"0": "LABEL_0"}, "is_encoder_decoder": False}
    quantized = {"group_size": 64, "bits": 4}
    config(
        **legacy,
        audio_config=None,
        generation_config=GENERATION,
        quantization=quantized,
        quantization_config=quantized,
        text=legacy | {"use_cache": True, "architectures": None, "chunk_size_feed_forward": 0},
    )
    ModelConfig.from_folder(bundled_model())


# --- what is refused ---


COUNTS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim sliding_window num_experts top_k_experts "
    "moe_intermediate_size max_position_embeddings"
).split()


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "8", [8], {}])
def test_a_size_that_is_not_a_whole_number_above_0_is_refused(key, value):
    message = refusal(text={key: value})
    assert f"{key} must be a whole number of at least 1, got {value!r}" in message


@pytest.mark.parametrize("key", COUNTS)
def test_a_missing_size_is_named(key):
    assert f"{key} is missing" in refusal(text={key: ABSENT})
    assert f"{key} is missing" in refusal(text={key: None})


ROPE = TEXT["rope_parameters"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"top_k_experts": 129}, "top_k_experts is 129, but there are only 128 experts"),
        ({"num_attention_heads": 12}, "12 attention heads cannot share 8 key/value heads"),
        ({"num_global_key_value_heads": 3}, "cannot share 3 key/value heads (full_attention)"),
        ({"head_dim": 255}, "head size 255 (sliding_attention) must be even"),
        ({"global_head_dim": 511}, "head size 511 (full_attention) must be even"),
        ({"global_head_dim": 0}, "global_head_dim must be a whole number"),
        ({"num_global_key_value_heads": "2"}, "num_global_key_value_heads must be a whole number"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"hidden_activation": None}, "hidden_activation is None"),
        ({"hidden_activation": ["gelu_pytorch_tanh"]}, "hidden_activation is ['gelu"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number above 0"),
        ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping must be a number"),
        ({"final_logit_softcapping": 10**400}, "final_logit_softcapping must be a number"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping must be a number"),
        ({"num_hidden_layers": 29}, "layer_types lists 30 layers, num_hidden_layers is 29"),
        ({"num_hidden_layers": 2**70, "layer_types": None}, "num_hidden_layers is 11805916207"),
        ({"layer_types": "full"}, "layer_types lists 'full' layers"),
        ({"layer_types": ["chunked"] * 30}, "layer_types holds ['chunked']"),
        ({"layer_types": [[]] * 30}, "layer_types holds ['[]']"),
        ({"per_layer_config": None}, "per_layer_config must be an object"),
        ({"per_layer_config": [{}]}, "per_layer_config must be an object"),
        (new_spelling({}, layers=(30,)), "keys are layer indices below 30"),
        (new_spelling({}, layers=(-1,)), "keys are layer indices below 30"),
        (new_spelling({}, layers=("x",)), "keys are layer indices below 30"),
        (new_spelling({}, layers=("9" * 5000,)), "keys are layer indices below 30"),
        (new_spelling([]), "keys are layer indices below 30"),
        (new_spelling({"sliding_window": 5}), "sets ['sliding_window'], which is not supported"),
        (new_spelling({"head_dim": 0}), "head_dim must be a whole number"),
        (new_spelling({"head_dim": 512}, layers=(5,)), "layers of one type different"),
        (new_spelling({"head_dim": 512}, layers=(0,)), "layers of one type different"),
        ({"rope_parameters": {}}, "rope_parameters has no entry for sliding_attention"),
        ({"rope_parameters": [1]}, "rope_parameters has no entry"),
        ({"rope_parameters": {SLIDING: ROPE[SLIDING]}}, "no entry for full_attention"),
        ({"rope_parameters": ROPE | {FULL: None}}, "no entry for full_attention"),
    ],
)
def test_a_text_config_that_cannot_be_is_refused(text, said):
    assert said in refusal(text=text)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (FULL, {"rope_type": "yarn"}, "rope_type is 'yarn'"),
        (FULL, {"rope_type": ABSENT}, "rope_type is None"),
        (SLIDING, {"rope_type": ["default"]}, "rope_type is ['default']"),
        (SLIDING, {"factor": 8.0}, "['factor'] is not supported"),
        (SLIDING, {"rope_theta": ABSENT}, "rope_theta is missing"),
        (SLIDING, {"rope_theta": 0}, "rope_theta must be a number above 0"),
        (SLIDING, {"rope_theta": "1e4"}, "rope_theta must be a number above 0"),
        (SLIDING, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not possible"),
        (FULL, {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 is not possible"),
        (FULL, {"partial_rotary_factor": -1}, "partial_rotary_factor must be a number above 0"),
    ],
)
def test_a_rotary_embedding_that_we_do_not_have_is_refused(kind, change, said):
    entry = without_absent(ROPE[kind] | change)
    message = refusal(text={"rope_parameters": ROPE | {kind: entry}})
    assert said in message and kind in message


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ({"model_type": "gemma4"}, "model_type is 'gemma4', expected 'diffusion_gemma'"),
        ({"model_type": ABSENT}, "model_type is None"),
        ({"model_type": ["diffusion_gemma"]}, "model_type is ['diffusion_gemma']"),
        ({"text_config": ABSENT}, "text_config is missing"),
        ({"text_config": [1]}, "text_config is missing"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"canvas_length": 0}, "canvas_length must be a whole number"),
        ({"canvas_length": ABSENT}, "canvas_length is missing"),
        ({"eos_token_id": 262144}, "eos_token_id 262144 is outside the vocabulary of 262144"),
        ({"eos_token_id": [1, -1]}, "eos_token_id -1 is outside"),
        ({"eos_token_id": [True]}, "eos_token_id True is outside"),
        ({"eos_token_id": "1"}, "eos_token_id '1' is outside"),
        ({"eos_token_id": [[1]]}, "eos_token_id [1] is outside"),
        ({"generation": GENERATION | {"eos_token_id": 1.5}}, "eos_token_id 1.5 is outside"),
        ({"generation": GENERATION | {"pad_token_id": -1}}, "pad_token_id -1 is outside"),
        ({"generation": GENERATION | {"pad_token_id": [0]}}, "pad_token_id [0] is outside"),
        ({"image_token_id": 2**18}, "image_token_id 262144 is outside"),
        ({"boi_token_id": "x"}, "boi_token_id 'x' is outside"),
        ({"generation": None, "generation_config": [1]}, "generation_config must be an object"),
        ({"generation": None, "generation_config": "x"}, "generation_config must be an object"),
        ({"generation": GENERATION | {"t_min": 0}}, "t_min must be a number above 0"),
        ({"generation": GENERATION | {"sampler_config": [1]}}, "sampler_config must be an object"),
    ],
)
def test_a_config_that_cannot_be_is_refused(top, said):
    assert said in refusal(**top)


# --- quantization ---

MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def test_an_override_without_a_mode_is_affine_whatever_the_files_own_mode_is():
    block = MXFP4 | {"model.decoder.embed_tokens": {"group_size": 64, "bits": 8}}
    found = config(quantization=block).quantization
    assert found.default == Quantization(32, 4, "mxfp4")
    assert found.for_module("model.decoder.embed_tokens") == Quantization(64, 8, "affine")
    assert found.for_module("anything.else") == Quantization(32, 4, "mxfp4")


def test_a_block_without_a_mode_is_affine():
    assert config(quantization={"group_size": 64, "bits": 5}).quantization == QuantizationConfig(
        Quantization(64, 5, "affine"), {}
    )


def test_false_leaves_a_module_alone_and_true_gives_it_the_files_own_packing():
    found = config(quantization=MXFP4 | {"a": False, "b": True}).quantization
    assert found.for_module("a") is None
    assert found.for_module("b") == found.default


@pytest.mark.parametrize("empty", [ABSENT, None, {}])
def test_quantization_config_counts_where_quantization_says_nothing(empty):
    found = config(quantization=empty, quantization_config=MXFP4).quantization
    assert found.default.mode == "mxfp4"
    assert config(quantization=empty).quantization is None


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"bits": 4}, "group_size is missing"),
        ({"group_size": 64}, "bits is missing"),
        ({"group_size": 64, "bits": 7}, "affine cannot pack 7 bits in groups of 64"),
        ({"group_size": 16, "bits": 4}, "affine cannot pack 4 bits in groups of 16"),
        ({"group_size": 64, "bits": "4"}, "bits must be a whole number"),
        (MXFP4 | {"group_size": 64}, "mxfp4 cannot pack 4 bits in groups of 64"),
        (MXFP4 | {"mode": "mxfp8"}, "mxfp8 cannot pack 4 bits"),
        (MXFP4 | {"mode": "int4"}, "mode 'int4' is not one of affine, mxfp4, mxfp8, nvfp4"),
        (MXFP4 | {"mode": None}, "mode None is not one of"),
        (MXFP4 | {"mode": ["mxfp4"]}, "mode ['mxfp4'] is not one of"),
        (MXFP4 | {"a.b": {"bits": 8}}, "quantization of a.b: group_size is missing"),
        (MXFP4 | {"a.b": {"bits": 1, "group_size": 64}}, "quantization of a.b: affine cannot"),
        ({"quant_method": "modelopt"}, "packed as ModelOpt, which does not load directly"),
        ([4], "quantization must be an object"),
        ("4bit", "quantization must be an object"),
        (4, "quantization must be an object"),
    ],
)
def test_a_quantization_that_mlx_cannot_pack_is_refused(block, said):
    assert said in refusal(quantization=block)


# --- files ---


def test_a_folder_is_read_from_its_two_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert ModelConfig.from_folder(tmp_path).generation == GenerationSettings()
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    assert ModelConfig.from_folder(tmp_path) == config()


def test_a_folder_without_config_json_says_what_is_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json; a DiffusionGemma checkpoint"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "holds a JSON list, expected an object"),
        (b"null", "holds a JSON NoneType, expected an object"),
    ],
    ids=["empty", "half", "not UTF-8", "deep", "endless number", "list", "null"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, name, content, said):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_folder(tmp_path)
    assert name in str(raised.value) and said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path)


# --- anything at all ---

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([SLIDING, FULL, "affine", "default", "yarn"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["bits", "0", "29"]), inner)
    ),
    max_leaves=8,
)
TOP_KEYS = [*CONFIG, "quantization", "quantization_config", "generation_config", "pad_token_id"]
PLACES = st.one_of(
    st.tuples(st.just("top"), st.sampled_from(TOP_KEYS)),
    st.tuples(st.just("text"), st.sampled_from([*TEXT, "per_layer_config"])),
    st.tuples(st.just("generation"), st.sampled_from([*GENERATION])),
    st.tuples(st.just("sampler"), st.sampled_from(["_cls_name", "entropy_bound"])),
    st.tuples(st.just("rope"), st.sampled_from([SLIDING, FULL])),
    st.tuples(st.just("full rope"), st.sampled_from([*ROPE[FULL]])),
    st.tuples(st.just("quantization"), st.sampled_from(["bits", "group_size", "mode", "a.b"])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=3))
def test_any_value_in_any_key_is_read_or_refused_in_one_line(changes):
    top, generation = copy.deepcopy(CONFIG), copy.deepcopy(GENERATION)
    quantization = {"group_size": 64, "bits": 4}
    blocks = {
        "top": top,
        "text": top["text_config"],
        "generation": generation,
        "sampler": generation["sampler_config"],
        "rope": top["text_config"]["rope_parameters"],
        "full rope": top["text_config"]["rope_parameters"][FULL],
        "quantization": quantization,
    }
    top["quantization"] = quantization
    for (block, key), value in changes:
        blocks[block][key] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parsed = ModelConfig.from_dict(top, generation)
        except ConfigError as error:
            assert "\n" not in str(error)
        else:
            parsed.generation.resolve(parsed) if settles(parsed) else None


def settles(parsed: ModelConfig) -> bool:
    """Whether the temperatures, which are compared only when a run begins, are in order."""
    low, high = parsed.generation.t_min or 0.4, parsed.generation.t_max or 0.8
    return low <= high
