"""The network and its three operations: prefill, denoise, commit. It does not sample, loop, print
or know text.

Legend of shapes, here and in every file of this folder:
B batch, L canvas, S context, V vocabulary, M width, N query heads, K key/value heads, H head size,
E experts,
T tokens of a call (B * L or B * S), k experts chosen per token.
"""

from .context import Context, OpenContext
from .diffusion_gemma import DiffusionGemma

__all__ = ["Context", "DiffusionGemma", "OpenContext"]
