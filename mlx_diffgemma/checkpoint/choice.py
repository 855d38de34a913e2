"""What a user calls a model -> a folder or a Hub repository."""

from __future__ import annotations

import difflib
import os

from ..errors import SourceError

MODEL_VARIABLE = "MLX_DIFFGEMMA_MODEL"  # names the model of commands that get none
# What mlx-community publishes of the 26B model. The part after the last hyphen is the short name.
_PUBLISHED = "mlx-community/diffusiongemma-26B-A4B-it-"
SHORT_NAMES = {
    name: _PUBLISHED + name
    for name in ("4bit", "5bit", "6bit", "8bit", "mxfp4", "mxfp8", "nvfp4", "bf16")
}


def full_name(name: str) -> str:
    """Return the repo id that a short name stands for, and anything else as it is. A folder of
    that name wins over the repository.

    Raises:
      SourceError: if it is neither a folder nor a repo id, and looks like a misspelt short name.
    """
    if "/" in name or os.path.exists(name):
        return name
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if close := difflib.get_close_matches(name.lower(), SHORT_NAMES, n=1):
        raise SourceError(
            f"no folder and no short name {name}; did you mean {close[0]}? "
            f"The short names are {', '.join(SHORT_NAMES)}"
        )
    return name


def short_name(repo: str) -> str | None:
    """Return the short name of a repository, where it has one."""
    return repo.removeprefix(_PUBLISHED) if repo in SHORT_NAMES.values() else None
