"""The stack of layers and all other weights, as modules under their names on disk."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..config.model import LayerConfig, TextConfig
from .attention import Attention, Segment
from .context import LayerContext
from .experts import Experts, Router
from .layers import MLP, RMSNorm
from .self_conditioning import SelfConditioning


class Layer(nn.Module):
    """Attention, then a dense block and experts side by side."""

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm_1 = (
            norm(),
            norm(),
        )  # dense block
        self.pre_feedforward_layernorm_2, self.post_feedforward_layernorm_2 = (
            norm(),
            norm(),
        )  # experts
        self.post_feedforward_layernorm = norm()
        self.layer_scalar = mx.ones((1,))

    def __call__(
        self,
        x: mx.array,
        segments: Sequence[Segment],
        scalar: mx.array,
    ) -> tuple[mx.array, list[LayerContext]]:
        attended, kept = self.self_attn(self.input_layernorm(x), segments)
        h = self.post_attention_layernorm.added_to(x, attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        flat = h.reshape(-1, h.shape[-1])  # [T, M]
        # The router reads the residual, the experts a normed copy of it.
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat)).reshape(
            h.shape
        )
        both = self.post_feedforward_layernorm_2.added_to(dense, mixed)
        return self.post_feedforward_layernorm.added_to(h, both) * scalar, kept


class Decoder(nn.Module):
    """All weights except the encoder's layer scalars, under their names on disk."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class LayerScalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class EncoderText(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = [LayerScalar() for _ in config.layers]


class Encoder(nn.Module):
    """The layer scalars of the causal pass, whose other weights are the decoder's, and what reads
    images, where it is loaded."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.language_model = EncoderText(config)


class Stack(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)
