"""From a published checkpoint to MLX arrays: planned from headers, in little memory, never half
done."""

from .write import convert

__all__ = ["convert"]
