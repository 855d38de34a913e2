"""Acceptance, stop rule and temperatures against transformers on random inputs."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed")

from transformers.models.diffusion_gemma.generation_diffusion_gemma import (  # noqa: E402
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from mlx_diffgemma import GenerationSettings  # noqa: E402
from mlx_diffgemma.config.generation import default_of  # noqa: E402
from mlx_diffgemma.config.model import ModelConfig  # noqa: E402
from mlx_diffgemma.denoise.sampler import decide, statistics  # noqa: E402
from mlx_diffgemma.denoise.schedule import temperature  # noqa: E402
from mlx_diffgemma.denoise.stopping import is_settled  # noqa: E402
from tests.checkpoints import draw_config  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("error::FutureWarning")]

B, L, V = 3, 24, 40


def draw_logits(rng: np.random.Generator) -> np.ndarray:
    """Positions from nearly certain to nearly uniform, as a canvas has them."""
    sharpness = rng.uniform(0.1, 12, (B, L, 1))
    return (rng.normal(size=(B, L, V)) * sharpness).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_statistics_are_the_argmax_and_entropy_of_transformers(seed):
    logits = draw_logits(np.random.default_rng(seed))
    theirs = torch.distributions.Categorical(logits=torch.tensor(logits)).entropy().numpy()
    ours = statistics(mx.array(logits))
    np.testing.assert_array_equal(np.array(ours.draft), logits.argmax(-1))
    # Sums of 40 float32 terms of at most 0.4 nats each.
    np.testing.assert_allclose(np.array(ours.entropy), theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("bound", [0.01, 0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_accepts_and_refills_the_same_positions_as_transformers(bound, seed):
    rng = np.random.default_rng(seed)
    logits = draw_logits(rng)
    canvas, proposal, noise = (rng.integers(0, V, (B, L)).astype(np.int32) for _ in range(3))
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), L, V, 48)
    sampler.initialize_canvas = lambda batch, device: torch.tensor(noise)
    kept = sampler.accept_canvas(
        torch.tensor(canvas), torch.tensor(proposal), torch.tensor(logits), 1
    )
    theirs = sampler.renoise_canvas(kept, 1)

    entropy = statistics(mx.array(logits)).entropy
    ours = decide(entropy, mx.array(proposal), mx.array(noise), entropy_bound=bound)
    np.testing.assert_array_equal(np.array(ours.accepted), sampler.accepted_token_mask.numpy())
    np.testing.assert_array_equal(np.array(ours.canvas), theirs.numpy())


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_settles_in_the_same_steps_as_transformers(stability, seed):
    rng = np.random.default_rng(seed)
    rule = StableAndConfidentStoppingCriteria(stability, 0.005)
    drafts: list[mx.array] = []
    answers = []
    logits = draw_logits(rng)
    for _ in range(40):
        changes = rng.random((B, 1, 1)) < 0.3
        sharpness = np.where(rng.random((B, 1, 1)) < 0.7, 60, 1)
        logits = np.where(changes, draw_logits(rng), logits).astype(np.float32)
        scaled = (logits * sharpness).astype(np.float32)
        argmax = scaled.argmax(-1)
        theirs = rule(torch.tensor(argmax), torch.tensor(scaled)).numpy()
        ours = is_settled(
            mx.array(argmax.astype(np.int32)),
            drafts,
            statistics(mx.array(scaled)).entropy,
            stability_threshold=stability,
            confidence_threshold=0.005,
        )
        np.testing.assert_array_equal(np.array(ours), theirs)
        answers += theirs.tolist()
        drafts.append(mx.array(argmax.astype(np.int32)))
    assert {True, False} == set(answers), "the walk must meet both answers"


@pytest.mark.parametrize(("steps", "t_min", "t_max"), [(48, 0.4, 0.8), (7, 0.1, 1.5), (1, 0.3, 2)])
def test_temperatures_are_those_of_transformers(steps, t_min, t_max):
    processor = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
    settings = GenerationSettings(max_denoising_steps=steps, t_min=t_min, t_max=t_max).resolve(
        ModelConfig.from_dict(draw_config(0))
    )
    for step in range(steps):
        scores = processor(None, torch.ones(1), cur_step=torch.tensor(steps - step))
        assert 1 / temperature(step, settings) == pytest.approx(float(scores), rel=1e-6)


def test_defaults_are_those_of_transformers():
    theirs = DiffusionGemmaGenerationConfig._get_default_generation_params()
    theirs["entropy_bound"] = theirs.pop("sampler_config").entropy_bound
    assert {name: default_of(name) for name in theirs} == theirs
