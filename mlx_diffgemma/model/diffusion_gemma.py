"""The stack of layers and its verbs. One set of weights runs causally over text and
bidirectionally over the canvas."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import LayerConfig, ModelConfig, TextConfig
from ..settings import default_of
from .attention import Attention
from .context import Context, LayerContext
from .experts import Experts, Router
from .layers import MLP, RMSNorm
from .masks import Mask, canvas_mask, causal_mask
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
        past: LayerContext | None,
        mask: Mask,
        position: int | mx.array,
        scalar: mx.array,
    ) -> tuple[mx.array, LayerContext]:
        attended, seen = self.self_attn(self.input_layernorm(x), past, mask, position)
        h = x + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        flat = h.reshape(-1, h.shape[-1])  # [T, M]
        # The router reads the residual, the experts a normed copy of it.
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat)).reshape(
            h.shape
        )
        return (
            h + self.post_feedforward_layernorm(dense + self.post_feedforward_layernorm_2(mixed))
        ) * scalar, seen


class Decoder(nn.Module):
    """All weights but the encoder's layer scalars; named as on disk."""

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
    """The causal run has its own layer scalars; every other weight is the decoder's."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.language_model = EncoderText(config)


class Stack(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)


class DiffusionGemma(nn.Module):
    """DiffusionGemma's text path. Weights are those of the checkpoint, under the checkpoint's
    names.

    Source: transformers 5.23, models/diffusion_gemma/modeling_diffusion_gemma.py.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Stack(config.text)

    @property
    def dtype(self) -> mx.Dtype:
        """What is computed in, outside the parts that are always float32."""
        return self.model.decoder.norm.weight.dtype

    def prefill(
        self,
        tokens: mx.array,
        context: Context | None = None,
        *,
        lengths: mx.array | None = None,
        step_size: int = default_of("prefill_step_size"),
        progress: Callable[[int, int], None] | None = None,
    ) -> Context:
        """Reads tokens causally; with a context, continues it, which equals one call on the whole.

        Args:
          tokens: int32 [B, S], S >= 1; rows of different lengths are padded on the left, with any
            token.
          context: what was read before; it stays as it is.
          lengths: int32 [B], tokens of each row without padding; only for a new context.
          step_size: places read at a time; bounds the memory of masks and scores, not the result.
          progress: called with (places read, places in all) after each piece.

        Raises:
          ValueError: if shapes disagree.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be [B, S] with S >= 1, got {tokens.shape}")
        if step_size < 1:
            raise ValueError(f"step_size must be at least 1, got {step_size}")
        B, S = tokens.shape
        if context is None:
            context = Context((), 0, B, None if lengths is None else _padding(lengths, B, S))
        elif lengths is not None:
            raise ValueError(
                "lengths belong to a new context; one that is continued keeps its padding"
            )
        elif context.batch != B:
            raise ValueError(f"tokens have {B} rows, the context has {context.batch}")
        for start in range(0, S, step_size):
            piece = tokens[:, start : start + step_size]
            context = self._encode(piece, context)
            if (
                start + step_size < S
            ):  # each piece is computed and its scratch memory given back before the next
                mx.eval(context.arrays)
                mx.clear_cache()
            if progress is not None:
                mx.eval(context.arrays)
                progress(min(start + step_size, S), S)
        return context

    def commit(self, canvas: mx.array, context: Context) -> Context:
        """Reads a finished canvas, int32 [B, L], behind the context."""
        return self.prefill(canvas, context)

    def denoise(
        self, canvas: mx.array, context: Context, *, self_conditioning: mx.array | None = None
    ) -> mx.array:
        """One look at the canvas with everything in sight; the context is read and not written.

        Args:
          canvas: int32 [B, L].
          context: at least one token.
          self_conditioning: [B, L, M] from `soft_embedding`; None in the first step.

        Returns:
          Softcapped logits, float32 [B, L, V].

        Raises:
          ValueError: if shapes disagree.
        """
        if canvas.ndim != 2 or canvas.shape[0] != context.batch:
            raise ValueError(f"canvas must be [{context.batch}, L], got {canvas.shape}")
        wanted = (*canvas.shape, self.config.text.hidden_size)
        if self_conditioning is not None and self_conditioning.shape != wanted:
            raise ValueError(f"self_conditioning must be {wanted}, got {self_conditioning.shape}")
        decoder, L = self.model.decoder, canvas.shape[1]
        x = decoder.self_conditioning(self._embed(canvas), self_conditioning)
        for layer, past in zip(decoder.layers, context.layers, strict=True):
            kept = past.keys.shape[2]
            mask = canvas_mask(kept + L, first_key=context.length - kept, padding=context.padding)
            x, _ = layer(x, past, mask, context.position, layer.layer_scalar)
        cap = self.config.text.final_logit_softcapping
        logits = decoder.embed_tokens.as_linear(decoder.norm(x)).astype(mx.float32)
        return mx.tanh(logits / cap) * cap  # [B, L, V]

    def soft_embedding(self, processed_logits: mx.array) -> mx.array:
        """The mean embedding under softmax(processed_logits): float32 [B, L, V] -> [B, L, M] in
        the model's type.

        The logits are rounded to the model's type first, since the reference stores them so
        between steps.
        """
        probabilities = mx.softmax(processed_logits.astype(self.dtype), axis=-1, precise=True)
        table = self.model.decoder.embed_tokens
        if isinstance(table, nn.QuantizedEmbedding):
            soft = mx.quantized_matmul(
                probabilities,
                table.weight,
                table.scales,
                table.get("biases"),
                transpose=False,
                group_size=table.group_size,
                bits=table.bits,
                mode=table.mode,  # a table read in another mode than its own is silently wrong
            )
        else:
            soft = probabilities @ table.weight
        return self._scale_embedding(soft)

    def _encode(self, tokens: mx.array, context: Context) -> Context:
        """One piece of `prefill`: no self-conditioning and none of its norm, and the encoder's
        layer scalars."""
        text, count = self.config.text, tokens.shape[1]
        x, layers = self._embed(tokens), []
        scalars = self.model.encoder.language_model.layers
        masks: dict[bool, Mask] = {}  # one for all sliding layers, one for all full ones
        for i, layer in enumerate(self.model.decoder.layers):
            past = context.layers[i] if context.layers else None
            kept = past.keys.shape[2] if past is not None else 0
            is_sliding = text.layers[i].is_sliding
            if is_sliding not in masks:
                masks[is_sliding] = causal_mask(
                    context.length,
                    count,
                    first_key=context.length - kept,
                    window=text.sliding_window if is_sliding else None,
                    padding=context.padding,
                )
            mask = masks[is_sliding]
            x, seen = layer(x, past, mask, context.position, scalars[i].layer_scalar)
            if is_sliding:
                drop = max(0, seen.keys.shape[2] - (text.sliding_window - 1))
                if drop:  # a copy: a view would keep the whole piece in memory
                    seen = LayerContext(
                        mx.contiguous(seen.keys[:, :, drop:]),
                        mx.contiguous(seen.values[:, :, drop:]),
                    )
            layers.append(seen)
        return Context(tuple(layers), context.length + count, context.batch, context.padding)

    def _embed(self, tokens: mx.array) -> mx.array:
        # Quantized tables give their scales' type; everything after follows the model's.
        return self._scale_embedding(self.model.decoder.embed_tokens(tokens))

    def _scale_embedding(self, x: mx.array) -> mx.array:
        # A Python float takes the array's type: 53.0 in bfloat16 where sqrt(2816) is 53.066, as in
        # the reference.
        return x.astype(self.dtype) * self.config.text.hidden_size**0.5


def _padding(lengths: mx.array, batch: int, places: int) -> mx.array | None:
    """int32 [B] of places without a token, or None where every row is full."""
    host = np.array(lengths)
    if host.shape != (batch,) or host.min() < 1 or host.max() > places:
        raise ValueError(
            f"lengths must be [{batch}] numbers from 1 to {places}, got {host.tolist()}"
        )
    return None if (host == places).all() else mx.array((places - host).astype(np.int32))
