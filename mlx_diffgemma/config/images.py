"""How pictures and videos become tokens: the settings, and what a checkpoint says of them. Imports
no mlx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .entry import Entry, check, setting
from .reading import read_json

BUDGETS = (70, 140, 280, 560, 1120)  # most tokens of an image that the model was trained on
DEFAULT_BUDGET = 280
VIDEO_BUDGET = 70  # of a frame, in every published processor
# From here Pillow refuses by itself.
MOST_PIXELS = 178_956_970
_COMMANDS = ("generate", "chat")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How pictures and videos become tokens."""

    image_tokens: int | None = setting(
        Entry(
            help="Most tokens of an image: 70, 140, 280, 560 or 1120; more show finer detail.",
            commands=_COMMANDS,
            shown_default=f"the checkpoint's, else {DEFAULT_BUDGET}",
        ),
        is_open=True,
    )
    max_image_pixels: int = setting(
        Entry(
            help="Pixels of an image or of a frame; larger ones are refused before they are "
            "decoded.",
            default=50_000_000,
            at_least=1,
            at_most=MOST_PIXELS,
            commands=_COMMANDS,
        )
    )
    video_frames: int = setting(
        Entry(
            help="Frames of a video that the model sees, at even distances.",
            default=32,
            at_least=1,
            at_most=1024,
            commands=_COMMANDS,
        )
    )

    def __post_init__(self) -> None:
        check(self)
        if self.image_tokens is not None:
            check_budget(self.image_tokens, "image_tokens")


def check_budget(value: Any, what: str) -> None:
    """Raise ConfigError if a number of image tokens is none of BUDGETS."""
    if value not in BUDGETS or not isinstance(value, int):
        raise ConfigError(f"{what} must be one of {', '.join(map(str, BUDGETS))}, got {value!r}")


def budget_of(folder: Path) -> int:
    """Return the image tokens that a checkpoint's processor files ask for, or the default.

    Raises:
      ConfigError: if a file cannot be read, or its value is none of BUDGETS.
    """
    for name, within in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
        ("processor_config.json", None),
    ):
        if not (path := folder / name).is_file():
            continue
        block: Any = read_json(path)
        block = block if within is None else block.get(within)
        if not isinstance(block, Mapping):
            continue
        for key in ("max_soft_tokens", "image_seq_length"):
            if block.get(key) is not None:
                check_budget(block[key], f"{path}: {key}")
                return int(block[key])
    return DEFAULT_BUDGET
