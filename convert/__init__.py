"""The converter of published checkpoints to MLX arrays: planned from headers, in little memory,
never left half done.

`convert` is imported on first use: `python -m mlx_diffgemma.convert` imports this package before it
can say that it is loading MLX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .write import convert as convert

__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    if name == "convert":
        from .write import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
