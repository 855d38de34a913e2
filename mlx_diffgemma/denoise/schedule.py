"""The temperature schedule: a step's temperature as a plain float."""

from __future__ import annotations

from ..config.generation import ResolvedSettings


def noise_proportion(step: int, steps: int) -> float:
    """Return the noise proportion: 1 at the first step, 1/steps at the last, never 0."""
    return (steps - step) / steps


def temperature(step: int, settings: ResolvedSettings) -> float:
    """Return the temperature, which falls from t_max to just above t_min, times the user's factor;
    factor 0 means factor 1.

    A factor of 0 asks for the likeliest tokens as proposal, for which the schedule's own
    temperature does.

    Source: transformers 5.23, generation_diffusion_gemma.py,
    LinearTemperatureScheduleLogitsProcessor.
    """
    steps = settings.schedule_steps
    proportion = noise_proportion(min(step, steps - 1), steps)  # no colder after its end
    scheduled = settings.t_min + (settings.t_max - settings.t_min) * proportion
    return scheduled * (settings.temperature or 1.0)
