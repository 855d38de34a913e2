from __future__ import annotations

import pytest

from mlx_diffgemma.config.quantization import Quantization
from mlx_diffgemma.convert.recipe import choose
from mlx_diffgemma.errors import ConfigError

EXPERTS = "model.decoder.layers.0.experts.gate_up_proj"
ROUTER = "model.decoder.layers.0.router.proj"


def setting(recipe, path: str) -> Quantization | None:
    return recipe.rule(path).setting


def defaults(name: str, **given):
    return choose(name, **{"bits": None, "group_size": None, "mode": None} | given)


def test_mixed_is_4_bits_for_experts_and_8_for_everything_else():
    recipe = defaults("mixed")
    assert setting(recipe, EXPERTS) == Quantization(64, 4, "affine")
    for path in (ROUTER, "model.decoder.embed_tokens", "model.decoder.self_conditioning.up_proj"):
        assert setting(recipe, path) == Quantization(64, 8, "affine")


def test_bits_and_group_size_set_the_experts_under_mixed_and_everything_under_uniform():
    mixed, uniform = (defaults(name, bits=6, group_size=32) for name in ("mixed", "uniform"))
    assert setting(mixed, EXPERTS) == setting(uniform, EXPERTS) == Quantization(32, 6, "affine")
    assert setting(mixed, ROUTER) == Quantization(64, 8, "affine")
    assert setting(uniform, ROUTER) == Quantization(32, 6, "affine")


@pytest.mark.parametrize(
    ("mode", "expected"), [("mxfp4", (32, 4)), ("mxfp8", (32, 8)), ("nvfp4", (16, 4))]
)
def test_a_mode_brings_its_own_bits_and_group_size(mode, expected):
    assert setting(defaults("mixed", mode=mode), EXPERTS) == Quantization(*expected, mode)


@pytest.mark.parametrize("given", [{"bits": 0}, {"bits": 7}, {"group_size": 0}, {"group_size": 48}])
def test_bits_and_groups_that_mlx_lacks_are_refused(given):
    with pytest.raises(ConfigError, match=r"cannot pack|whole number"):
        defaults("mixed", **given)


def test_bits_that_a_mode_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="mxfp4 cannot pack 8 bits in groups of 32"):
        defaults("uniform", mode="mxfp4", bits=8)
    with pytest.raises(ConfigError, match="'int4' is not one of affine, mxfp4"):
        defaults("uniform", mode="int4")


TOML = """
[[rule]]
pattern = "*.experts.down_proj"
bits = 6
group_size = 32
[[rule]]
pattern = "*.router.proj"
quantize = false
[[rule]]
pattern = "*"
bits = 4
group_size = 32
mode = "mxfp4"
"""


def test_in_a_toml_file_the_first_rule_that_matches_decides(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    recipe = defaults(str(path))
    assert setting(recipe, EXPERTS.replace("gate_up", "down")) == Quantization(32, 6, "affine")
    assert setting(recipe, ROUTER) is None
    assert setting(recipe, EXPERTS) == Quantization(32, 4, "mxfp4")
    assert all(rule.named for rule in recipe.rules if rule.setting)
    assert recipe.as_object() == {
        "name": "mine",
        "rules": [
            {"pattern": "*.experts.down_proj", "bits": 6, "group_size": 32, "mode": "affine"},
            {"pattern": "*.router.proj", "quantize": False},
            {"pattern": "*", "bits": 4, "group_size": 32, "mode": "mxfp4"},
        ],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = 3", "tables and nothing else"),
        ("[[rule]]\npattern = '*'\nbits = 4\ngroup_size = 64\n[other]", "and nothing else"),
        ("", "tables and nothing else"),
        ("[[rule]]\nbits = 4", "rule 1: pattern is missing"),
        ("[[rule]]\npattern = '*'\nbit = 4", r"unknown keys \['bit'\]"),
        ("[[rule]]\npattern = '*'\nbits = 4", "group_size is missing"),
        ("[[rule]]\npattern = '*'\nbits = 5\ngroup_size = 5", "cannot pack"),
        ("[[rule]]\npattern = '*'\nquantize = 'no'", "must be true or false, got 'no'"),
        ("[[rule]]\npattern = '*'\nquantize = false\nbits = 4", r"\['bits'\] have no effect"),
        ("[[rule", "cannot be read"),
    ],
)
def test_a_toml_file_is_checked(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        defaults(str(path))


def test_a_recipe_that_is_neither_a_name_nor_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither mixed nor uniform nor a file"):
        defaults("mixd")
    with pytest.raises(ConfigError, match="cannot be read: "):
        defaults(str(tmp_path))


def test_a_toml_file_and_bits_exclude_each_other():
    with pytest.raises(ConfigError, match="sets bits, group size and mode itself"):
        defaults("mine.toml", bits=4)
