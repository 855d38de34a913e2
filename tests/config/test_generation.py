"""Settings: ranges, and whose value counts."""

from __future__ import annotations

import dataclasses
import math

import pytest

from mlx_diffgemma import GenerationSettings, bundled_model
from mlx_diffgemma.config.entry import entries
from mlx_diffgemma.config.generation import ResolvedSettings, default_of
from mlx_diffgemma.config.generation_file import read_settings
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.denoise.schedule import temperature
from mlx_diffgemma.errors import ConfigError

CONFIG = ModelConfig.from_folder(bundled_model())
SILENT = dataclasses.replace(CONFIG, generation=GenerationSettings())  # a checkpoint without a file
COUNTS = "max_new_tokens max_denoising_steps canvas_length prefill_step_size".split()
COUNTS_FROM_0 = "stability_threshold empty_rerolls top_candidates seed".split()
NUMBERS_FROM_0 = "entropy_bound confidence_threshold temperature".split()
NUMBERS_ABOVE_0 = "t_min t_max".split()
NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400]


def refusal(call) -> str:
    with pytest.raises(ConfigError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def checkpoint(**generation) -> ModelConfig:
    return dataclasses.replace(CONFIG, generation=GenerationSettings(**generation))


# --- ranges ---


@pytest.mark.parametrize(
    ("names", "values", "said"),
    [
        (COUNTS, [0, -1, 1.0, 1.5, True, "8", [8]], "must be a whole number at least 1"),
        (COUNTS_FROM_0, [-1, 0.5, False, "8"], "must be a whole number at least 0"),
        (NUMBERS_FROM_0, [-0.1, True, "0.1", [0.1], *NOT_FINITE], "must be a number at least 0"),
        (NUMBERS_ABOVE_0, [0, -1, "1", *NOT_FINITE], "must be a number above 0"),
    ],
)
def test_a_value_out_of_range_is_named_and_shown(names, values, said):
    for name in names:
        for value in values:
            message = refusal(lambda name=name, value=value: GenerationSettings(**{name: value}))
            assert message.startswith(f"{name} {said}"), message
            assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (COUNTS, [1, 10**9]),
        (COUNTS_FROM_0, [0, 7]),
        (NUMBERS_FROM_0, [0, 0.0, 1, 1e300]),
        (NUMBERS_ABOVE_0, [1e-9, 1]),
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(names, values):
    for name in names:
        for value in values:
            assert getattr(GenerationSettings(**{name: value}), name) == value


def test_a_seed_fits_in_63_bits():
    assert GenerationSettings(seed=2**63 - 1).seed == 2**63 - 1
    assert "at most 9223372036854775807" in refusal(lambda: GenerationSettings(seed=2**63))


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="steps"):
        GenerationSettings(steps=3)


# --- whose value counts ---

RESOLVED = {
    "max_new_tokens": (11, 12),
    "max_denoising_steps": (11, 12),
    "entropy_bound": (0.11, 0.12),
    "t_min": (0.11, 0.12),
    "t_max": (0.91, 0.92),
    "stability_threshold": (3, 4),
    "confidence_threshold": (0.11, 0.12),
    "temperature": (0.0, 0.12),
    "canvas_length": (11, 12),
    "empty_rerolls": (0, 2),
    "top_candidates": (0, 2),
    "prefill_step_size": (11, 12),
    "seed": (0, 12),
}


@pytest.mark.parametrize("name", RESOLVED)
def test_the_users_value_counts_before_the_checkpoints_and_that_before_the_default(name):
    users, own = RESOLVED[name]
    both = GenerationSettings(**{name: users}).resolve(checkpoint(**{name: own}))
    assert getattr(both, name) == users, "0 is a value too"
    if name != "seed":
        assert getattr(GenerationSettings().resolve(checkpoint(**{name: own})), name) == own
    if name not in ("seed", "canvas_length"):
        assert getattr(GenerationSettings().resolve(SILENT), name) == default_of(name)


@pytest.mark.parametrize(
    ("name", "users", "own"),
    [
        ("acceptance_confidence", 0.0, 0.8),
        ("prefix_steps", 1, 3),
        ("prefix_entropy", 0.0, 0.1),
    ],
)
def test_a_checkpoint_says_what_suits_it_under_fast(name, users, own):
    read = read_settings({name: own}, where="generation_config.json")
    assert getattr(read, name) == own
    its = checkpoint(**{name: own})
    assert getattr(GenerationSettings(policy="fast").resolve(its), name) == own
    mine = GenerationSettings(policy="fast", **{name: users})
    assert getattr(mine.resolve(its), name) == users
    assert GenerationSettings().resolve(its).policy == "reference", "it is not refused there"


def test_the_defaults_are_the_references():
    resolved = GenerationSettings(seed=1).resolve(SILENT)
    assert resolved == ResolvedSettings(
        max_new_tokens=256,
        max_denoising_steps=48,
        entropy_bound=0.1,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        temperature=1.0,
        canvas_length=64,
        empty_rerolls=0,
        top_candidates=0,
        prefill_step_size=2048,
        policy="reference",
        acceptance="entropy",
        acceptance_confidence=0.9,
        acceptance_share=0.0,
        stop_on="canvas",
        canvas_width="fixed",
        width_mass=0.0,
        prefix_commit="off",
        prefix_steps=2,
        prefix_entropy=0.01,
        lookahead=1.0,
        commit_pass="own",
        warm_start=0.0,
        warm_read=0.0,
        self_conditioning="dense",
        sparse_tokens=64,
        sparse_entropy=2.0,
        max_thinking_tokens=-1,
        schedule_steps=48,
        eos_token_ids=(1, 9, 16),
        pad_token_id=0,
        seed=1,
    )
    assert entries(GenerationSettings)["max_new_tokens"].command_default == 1024


def test_every_setting_says_what_it_is_for():
    for entry in entries(GenerationSettings).values():
        assert entry.help.endswith(".")


def test_without_a_seed_each_run_gets_a_fresh_one():
    seeds = {GenerationSettings().resolve(CONFIG).seed for _ in range(4)}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)


def test_further_end_tokens_join_the_checkpoints():
    resolved = GenerationSettings(extra_eos_token_ids=(300, 16)).resolve(CONFIG)
    assert resolved.eos_token_ids == (1, 9, 16, 300)
    assert CONFIG.eos_token_ids == (1, 9, 16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"canvas_length": 65}, "canvas_length 65 is longer than the checkpoint's 64"),
        ({"t_min": 0.9}, "t_min 0.9 is above t_max 0.8"),
        ({"t_max": 0.3}, "t_min 0.4 is above t_max 0.3"),
        ({"top_candidates": 385}, "top_candidates 385 is more than the 384 tokens"),
        ({"extra_eos_token_ids": (384, 5, -1)}, "end tokens [384, -1] are outside the vocabulary"),
        ({"extra_eos_token_ids": ("a",)}, "end tokens ['a'] are outside the vocabulary"),
    ],
)
def test_values_that_contradict_each_other_or_the_checkpoint_are_refused(settings, said):
    assert said in refusal(lambda: GenerationSettings(**settings).resolve(CONFIG))


# --- generation_config.json ---


def read(**raw) -> GenerationSettings:
    return read_settings(raw, where="generation_config.json")


@pytest.mark.parametrize("name", ["OtherSamplerConfig", "", None, 5, ["EntropyBoundSamplerConfig"]])
def test_another_sampler_is_refused(name):
    message = refusal(lambda: read(sampler_config={"_cls_name": name}))
    assert f"sampler {name!r} is not supported" in message


@pytest.mark.parametrize("sampler", [{}, None, {"entropy_bound": None}])
def test_a_checkpoint_that_names_no_sampler_has_the_only_one(sampler):
    assert read(sampler_config=sampler).entropy_bound is None


@pytest.mark.parametrize("sampler", [[1], "x", 5])
def test_a_sampler_config_that_is_no_object_is_refused(sampler):
    assert "sampler_config must be an object" in refusal(lambda: read(sampler_config=sampler))


def test_null_means_that_the_checkpoint_says_nothing():
    assert read(max_new_tokens=None, t_min=None) == GenerationSettings()


def test_a_value_out_of_range_names_the_file():
    message = refusal(lambda: read(max_denoising_steps=0))
    assert message.startswith("generation_config.json: max_denoising_steps must be")
    bound = {"entropy_bound": -1}
    assert "entropy_bound must be" in refusal(lambda: read(sampler_config=bound))


def test_unknown_keys_are_named_in_one_warning_and_have_no_effect():
    with pytest.warns(UserWarning) as caught:
        found = read(do_sample=True, canvas_length=4, max_new_tokens=3)
    assert found == GenerationSettings(max_new_tokens=3)
    said = "generation_config.json: unknown keys are ignored: canvas_length, do_sample"
    assert [str(warning.message) for warning in caught] == [said]


# Policies


def test_a_policy_fills_in_what_the_user_leaves_open():
    fast = GenerationSettings(policy="fast").resolve(SILENT)
    assert (fast.acceptance, fast.temperature) == ("confidence", 0.0)
    assert (fast.stop_on, fast.canvas_width) == ("answer", "answer")
    assert (fast.prefix_commit, fast.width_mass, fast.lookahead) == ("shrink", 0.7, 0.25)
    assert fast.commit_pass == "joint"
    mine = GenerationSettings(policy="fast", canvas_width="fixed", temperature=1.0).resolve(SILENT)
    assert (mine.canvas_width, mine.temperature, mine.stop_on) == ("fixed", 1.0, "answer")


def test_a_policy_commits_no_parts_where_text_is_pinned():
    pinned = GenerationSettings(policy="fast").resolve(SILENT, is_free=False)
    assert (pinned.prefix_commit, pinned.width_mass, pinned.lookahead) == ("off", 0.0, 1.0)
    assert (pinned.acceptance, pinned.canvas_width) == ("confidence", "answer")
    mine = GenerationSettings(policy="fast", prefix_commit="shrink", prefix_steps=3)
    assert mine.resolve(SILENT, is_free=False).prefix_commit == "shrink"  # for the row to refuse
    longer = GenerationSettings(policy="fast", prefix_steps=3)  # of a server, say, that also fills
    assert longer.resolve(SILENT, is_free=False).prefix_commit == "off"
    with pytest.raises(ConfigError, match="prefix_steps has no effect"):
        GenerationSettings(prefix_steps=3).resolve(SILENT, is_free=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "fastest"}, "policy must be 'reference' or 'fast', got 'fastest'"),
        ({"acceptance": 1}, "acceptance must be 'entropy' or 'confidence', got 1"),
        ({"acceptance_confidence": 1.5}, "acceptance_confidence must be .* at most 1, got 1.5"),
        ({"acceptance_share": -0.1}, "acceptance_share must be"),
        ({"sparse_tokens": 0}, "sparse_tokens must be"),
        ({"schedule_steps": 0}, "schedule_steps must be"),
        ({"acceptance_share": 0.5}, "acceptance_share has no effect with acceptance 'entropy'"),
        (
            {"policy": "fast", "entropy_bound": 0.2},
            "'confidence', which policy 'fast' sets, only with 'entropy'",
        ),
        ({"canvas_width": "answer"}, "stop_on must be 'answer' too"),
        (
            {"self_conditioning": "sparse", "sparse_tokens": 10**6},
            "sparse_tokens 1000000 is more than the 384 tokens there are",
        ),
        ({"width_mass": 0.5}, "width_mass has no effect with canvas_width 'fixed'"),
        ({"width_mass": 1.5, "policy": "fast"}, "width_mass must be"),
        ({"lookahead": 0.5}, "lookahead has no effect with canvas_width 'fixed'"),
        ({"warm_read": 0.5}, "warm_read has no effect without warm_start"),
        ({"lookahead": 0.0, "policy": "fast"}, "lookahead must be"),
        ({"prefix_commit": "on"}, "prefix_commit must be 'off' or 'shrink', got 'on'"),
        (
            {"prefix_steps": 1},
            "prefix_steps has no effect with prefix_commit 'off', only with 'shrink'",
        ),
        ({"prefix_entropy": 1.0, "prefix_commit": "off"}, "prefix_entropy has no effect"),
        ({"prefix_commit": "shrink", "prefix_steps": 0}, "prefix_steps must be"),
        ({"sparse_tokens": 8}, "sparse_tokens has no effect with self_conditioning 'dense'"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**settings).resolve(SILENT)


def test_a_cap_on_steps_leaves_the_schedule_alone():
    settings = GenerationSettings(max_denoising_steps=4, schedule_steps=48, t_min=0.4, t_max=0.8)
    resolved, whole = settings.resolve(SILENT), GenerationSettings().resolve(SILENT)
    assert [temperature(step, resolved) for step in range(4)] == [
        temperature(step, whole) for step in range(4)
    ]
    late = GenerationSettings(max_denoising_steps=9, schedule_steps=2).resolve(SILENT)
    assert temperature(8, late) == temperature(1, late) > late.t_min
