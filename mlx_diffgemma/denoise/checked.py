"""Checks of what a row is given: its text, its noise, its settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config.generation import ResolvedSettings
from ..config.model import ModelConfig
from ..errors import ConfigError, PromptError, PromptLengthError, counted
from ..language.images import ImagePatches
from .constrained import TokenConstraint
from .images import place_images
from .noise import Noise, SeededNoise


def check_room(
    config: ModelConfig,
    settings: ResolvedSettings,
    tokens: int,
    images: Sequence[ImagePatches] = (),
) -> int:
    """Return how many whole canvases fit after a text; its images are named where none does."""
    limit, canvas = config.text.max_position_embeddings, settings.canvas_length
    room = (limit - tokens) // canvas
    if room < 1:
        of_images = sum(image.soft_tokens for image in images)
        theirs = f", {of_images} of them of {counted(len(images), 'image')}" if images else ""
        raise PromptLengthError(
            f"the prompt has {tokens} tokens{theirs}; with a canvas of {canvas}, "
            f"at most {limit - canvas} of the {limit} positions are free for it"
        )
    return room


def checked_tokens(
    tokens: Sequence[int] | np.ndarray, config: ModelConfig, images: Sequence[ImagePatches] = ()
) -> np.ndarray:
    """Return a text's tokens as int32 [S]. Each is checked: one outside the table would be read as
    garbage.

    Args:
      tokens: the text.
      config: of the model.
      images: those whose tokens it holds, in order.

    Raises:
      PromptError: if a token is outside the vocabulary, or images and their tokens do not match.
    """
    wide = np.array(tokens, np.int64)  # int32 would wrap a large one into the vocabulary
    vocab_size = config.text.vocab_size
    if (bad := wide[(wide < 0) | (wide >= vocab_size)]).size:
        raise PromptError(f"token {bad[0]} is outside the vocabulary of {vocab_size}")
    checked = wide.astype(np.int32)
    place_images(checked, images, config)
    return checked


def checked_noise(
    noise: Noise | None, settings: ResolvedSettings, constraint: TokenConstraint | None
) -> Noise:
    """Return where draws come from, by default the settings' seed.

    Raises:
      ConfigError: if it does not suit the settings.
    """
    noise = SeededNoise(settings.seed) if noise is None else noise
    if settings.empty_rerolls and not isinstance(noise, SeededNoise):
        raise ConfigError("empty_rerolls needs seeded noise: a replay has no other draws")
    if constraint is not None and not isinstance(noise, SeededNoise):
        raise ConfigError("a constraint needs seeded noise: a replay has no draws for it")
    by_parts, narrow = settings.prefix_commit != "off", settings.canvas_width == "answer"
    if (by_parts or narrow) and not isinstance(noise, SeededNoise):
        named = ["prefix_commit"] * by_parts + ["canvas_width 'answer'"] * narrow
        raise ConfigError(f"{' and '.join(named)} need seeded noise: a replay's canvas is whole")
    return noise


def check_rules(settings: ResolvedSettings, *, is_free: bool) -> None:
    """Check that the settings suit a row whose text is free, or pinned or read out.

    Raises:
      ConfigError: if they do not.
    """
    if settings.prefix_commit != "off" and not is_free:
        raise ConfigError(
            f"prefix_commit {settings.prefix_commit!r} is not possible where text is pinned or "
            "probabilities are read, as fill, edit and decide do; it must be 'off'"
        )
