"""Temperatures, by hand."""

from __future__ import annotations

import pytest

from mlx_diffgemma import GenerationSettings
from mlx_diffgemma.config.generation import ResolvedSettings
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.denoise.schedule import noise_proportion, temperature
from tests.checkpoints import draw_config


def resolved(**values) -> ResolvedSettings:
    return GenerationSettings(**values).resolve(ModelConfig.from_dict(draw_config(0), {}))


def test_noise_falls_from_all_of_it_and_never_to_none():
    assert [noise_proportion(step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.8), (12, 0.7), (24, 0.6), (36, 0.5), (47, 0.4 + 0.4 / 48)],
)
def test_temperature_falls_linearly_from_t_max_to_just_above_t_min(step, expected):
    assert temperature(step, resolved()) == pytest.approx(expected, abs=1e-12)


def test_a_single_step_is_as_hot_as_it_gets():
    assert temperature(0, resolved(max_denoising_steps=1)) == pytest.approx(0.8)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.6), (0.5, 0.3), (2.0, 1.2)])
def test_the_users_temperature_multiplies_the_schedule(factor, expected):
    assert temperature(24, resolved(temperature=factor)) == pytest.approx(expected)


def test_temperature_zero_keeps_the_schedule_and_divides_by_nothing_else():
    assert temperature(24, resolved(temperature=0)) == pytest.approx(0.6)
