"""Self-conditioning: adds the last step's prediction to the canvas embeddings, never to committed
tokens."""

from __future__ import annotations

import mlx.core as mx

from ..config.model import TextConfig
from .layers import MLP, RMSNorm, unit_rms


class SelfConditioning(MLP):
    """Mixes a soft embedding into the canvas embeddings. Its final norm applies in the first step
    too."""

    def __init__(self, config: TextConfig):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eps = config.rms_norm_eps

    def __call__(self, embeddings: mx.array, soft: mx.array | None = None) -> mx.array:
        """Mix embeddings and soft [B, L, M] -> [B, L, M]. None is a soft embedding of zeros, which
        adds exactly 0."""
        if soft is not None:
            embeddings = embeddings + super().__call__(self.pre_norm(soft))
        return unit_rms(embeddings, self.eps)
