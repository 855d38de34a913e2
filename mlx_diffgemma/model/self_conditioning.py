"""What the last step thought, added to what the canvas says. Canvas passes only, never committed
tokens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from .layers import RMSNorm, geglu, unit_rms


class SelfConditioning(nn.Module):
    """Mixes a soft embedding into the canvas embeddings. The norm at its end holds in the first
    step too."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.pre_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.eps = config.rms_norm_eps

    def __call__(self, embeddings: mx.array, soft: mx.array | None) -> mx.array:
        """embeddings and soft [B, L, M] -> [B, L, M]. None is a soft embedding of zeros, which
        adds exactly nothing."""
        if soft is not None:
            normed = self.pre_norm(soft)
            embeddings = embeddings + self.down_proj(
                geglu(self.gate_proj(normed), self.up_proj(normed))
            )
        return unit_rms(embeddings, self.eps)
