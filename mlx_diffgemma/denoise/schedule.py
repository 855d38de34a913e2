"""Step -> temperature. Plain floats."""

from __future__ import annotations

from ..config.generation import ResolvedSettings


def noise_proportion(step: int, steps: int) -> float:
    """1 at the first step, 1/steps at the last: it never reaches 0."""
    return (steps - step) / steps


def temperature(step: int, settings: ResolvedSettings) -> float:
    """Falls from t_max to just above t_min, times the user's factor; with factor 0 the schedule
    itself.

    A factor of 0 asks for the likeliest tokens as proposal, which needs no other temperature than
    the schedule's.

    Source: transformers 5.23, generation_diffusion_gemma.py,
    LinearTemperatureScheduleLogitsProcessor.
    """
    steps = settings.schedule_steps
    proportion = noise_proportion(min(step, steps - 1), steps)  # no colder behind its end
    scheduled = settings.t_min + (settings.t_max - settings.t_min) * proportion
    return scheduled * (settings.temperature or 1.0)
