"""The stack of layers, and prefill, denoise and commit on it. One set of weights runs causally over
text and bidirectionally over the canvas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config.generation import default_of
from ..config.model import LayerConfig, ModelConfig, TextConfig
from .attention import Attention, Place
from .backend import begin, compiled
from .context import Context, LayerContext, OpenContext
from .experts import Experts, Router
from .layers import MLP, RMSNorm, softcap
from .masks import Mask, canvas_mask, causal_mask
from .products import head, weighted_rows
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
        place: Place,
        mask: Mask,
        position: int | mx.array,
        scalar: mx.array,
    ) -> tuple[mx.array, LayerContext]:
        attended, kept = self.self_attn(self.input_layernorm(x), past, place, mask, position)
        h = self.post_attention_layernorm.added_to(x, attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        flat = h.reshape(-1, h.shape[-1])  # [T, M]
        # The router reads the residual, the experts a normed copy of it.
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat)).reshape(
            h.shape
        )
        both = self.post_feedforward_layernorm_2.added_to(dense, mixed)
        return self.post_feedforward_layernorm.added_to(h, both) * scalar, kept


RunLayer = Callable[..., tuple[mx.array, LayerContext]]  # a layer, then its arguments


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
    """The layer scalars of the causal pass; all its other weights are the decoder's."""

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
        # How a layer is run: directly, or, for gradient checkpointing, without keeping its inner
        # arrays.
        self.run_layer: RunLayer = _as_it_is

    @property
    def layers(self) -> list[Layer]:
        """The layers, as mlx-lm's tools for adapters look for them."""
        return self.model.decoder.layers

    @property
    def dtype(self) -> mx.Dtype:
        """The type of computation, outside the parts that are always float32."""
        return self.model.decoder.layers[-1].layer_scalar.dtype

    def prefill(
        self,
        tokens: mx.array,
        context: Context | None = None,
        *,
        lengths: mx.array | None = None,
        step_size: int = default_of("prefill_step_size"),
        progress: Callable[[int, int], None] | None = None,
    ) -> Context:
        """Read tokens causally, after `context` if there is one, as one call on the whole text
        would.

        Args:
          tokens: int32 [B, S], S >= 1; rows of different lengths are padded on the left, with any
            token.
          context: the text before; it is not changed.
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
                "lengths are only for a new context; a continued one keeps its padding"
            )
        elif context.batch != B:
            raise ValueError(f"tokens have {B} rows, the context has {context.batch}")
        for start in range(0, S, step_size):
            piece = tokens[:, start : start + step_size]
            _, context = self.encode(piece, context)
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
        """Read a finished canvas, int32 [B, L], after the context."""
        return self.prefill(canvas, context)

    def denoise(
        self, canvas: mx.array, context: Context, *, self_conditioning: mx.array | None = None
    ) -> mx.array:
        """Run one bidirectional forward pass over the canvas; the context is read and not changed.

        Args:
          canvas: int32 [B, L].
          context: at least one token.
          self_conditioning: [B, L, M] from `soft_embedding`; None in the first step.

        Returns:
          Softcapped logits, float32 [B, L, V].

        Raises:
          ValueError: if shapes disagree.
        """
        outputs, _ = self.look(
            canvas, self.open(context, canvas.shape[-1]), self_conditioning=self_conditioning
        )
        return _softcap(outputs, self.config.text.final_logit_softcapping)

    def open(self, context: Context, canvas_length: int) -> OpenContext:
        """Return the context with room for a canvas, for that canvas's steps."""
        return OpenContext.of(context, canvas_length)

    def look(
        self, canvas: mx.array, context: OpenContext, *, self_conditioning: mx.array | None = None
    ) -> tuple[mx.array, OpenContext]:
        """Run `denoise` in a loop: the canvas's keys and values overwrite those of the last step.

        Args:
          canvas: int32 [B, L], no wider than the room in the context.
          context: from `open`, or from the step before.
          self_conditioning: as for `denoise`.

        Returns:
          The head's outputs before the softcap, [B, L, V] in the model's type, and the context to
          pass on.

        Raises:
          ValueError: if shapes disagree.
        """
        text = context.text
        if canvas.ndim != 2 or canvas.shape[0] != text.batch:
            raise ValueError(f"canvas must be [{text.batch}, L], got {canvas.shape}")
        wanted = (*canvas.shape, self.config.text.hidden_size)
        if self_conditioning is not None and self_conditioning.shape != wanted:
            raise ValueError(f"self_conditioning must be {wanted}, got {self_conditioning.shape}")
        opened = [context]
        del context  # arrays without other references are written in place
        x, context = self.canvas_states(canvas, opened.pop(), self_conditioning=self_conditioning)
        decoder = self.model.decoder
        return head(decoder.embed_tokens, decoder.norm(x)), context

    def canvas_states(
        self, canvas: mx.array, context: OpenContext, *, self_conditioning: mx.array | None = None
    ) -> tuple[mx.array, OpenContext]:
        """Return the last layer's output for a canvas, [B, L, M], before the norm and the head;
        else as `look`."""
        decoder, L = self.model.decoder, canvas.shape[1]
        text, kept_places = context.text, context.kept
        # Arrays without other references are written in place, so this function must not keep any
        # either.
        layers = list(reversed(context.layers))
        context = replace(context, layers=())
        x = decoder.self_conditioning(self.embed(canvas), self_conditioning)
        masks: dict[int, mx.array | None] = {}  # shared by layers that keep as many places
        written = []
        for layer, kept in zip(decoder.layers, kept_places, strict=True):
            if kept not in masks:
                first_key = text.length - kept
                masks[kept] = canvas_mask(kept + L, first_key=first_key, padding=text.padding)
            begin(x)
            x, keep = self.run_layer(
                layer,
                x,
                layers.pop(),
                partial(_behind, kept),
                masks[kept],
                text.position,
                layer.layer_scalar,
            )
            written.append(keep)
        return x, replace(context, layers=tuple(written))

    def soft_embedding(self, processed_logits: mx.array) -> mx.array:
        """Return the mean embedding under softmax(processed_logits): float32 [B, L, V] -> [B, L, M]
        in the model's type.

        The logits are rounded to the model's type first, since the reference stores them so
        between steps.
        """
        return self.mean_embedding(
            mx.softmax(processed_logits.astype(self.dtype), axis=-1, precise=True)
        )

    def mean_embedding(self, weights: mx.array, total: mx.array | None = None) -> mx.array:
        """Return the embeddings' mean under weights [B, L, V] in the model's type -> [B, L, M].

        Args:
          weights: of every token; probabilities, or values proportional to them.
          total: float32 [B, L], the sums of the weights; None where they are 1.
        """
        soft = weighted_rows(self.model.decoder.embed_tokens, weights)
        if total is not None:
            soft = (soft.astype(mx.float32) / total[..., None]).astype(self.dtype)
        return self._scale_embedding(soft)

    def sparse_embedding(
        self, ids: mx.array, probabilities: mx.array, mean_row: mx.array
    ) -> mx.array:
        """Return `soft_embedding` from the likeliest tokens alone; the remaining probability weighs
        the mean of all embeddings.

        Args:
          ids: int32 [B, L, k].
          probabilities: float32 [B, L, k].
          mean_row: from `mean_row`.
        """
        rows = self.model.decoder.embed_tokens(ids).astype(self.dtype)  # [B, L, k, M]
        weights = probabilities[..., None, :].astype(self.dtype)
        # With rounded weights the rest may be slightly negative.
        rest = mx.maximum(1 - probabilities.sum(axis=-1, keepdims=True), 0).astype(self.dtype)
        return self._scale_embedding((weights @ rows)[..., 0, :] + rest * mean_row)

    def mean_row(self) -> mx.array:
        """Return the mean of all embeddings, before their scale: [M]. It costs one pass over the
        table."""
        vocab_size = self.config.text.vocab_size
        even = mx.full((1, 1, vocab_size), 1 / vocab_size, self.dtype)
        return weighted_rows(self.model.decoder.embed_tokens, even)[0, 0]

    def encode(self, tokens: mx.array, context: Context) -> tuple[mx.array, Context]:
        """Read one piece of `prefill`: without self-conditioning and its norm, with the encoder's
        layer scalars.

        Args:
          tokens: int32 [B, S].
          context: the text before; empty if there is none.

        Returns:
          The last layer's output for each token, [B, S, M], before the norm and the head, and the
          longer context.
        """
        text, count = self.config.text, tokens.shape[1]
        x, layers = self.embed(tokens), []
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
            begin(x)  # without the last layer's output: only keys and values are needed
            x, seen = self.run_layer(
                layer, x, past, _joined, mask, context.position, scalars[i].layer_scalar
            )
            if is_sliding:
                drop = max(0, seen.keys.shape[2] - (text.sliding_window - 1))
                if drop:  # a copy: a view would keep the whole piece in memory
                    seen = LayerContext(
                        mx.contiguous(seen.keys[:, :, drop:]),
                        mx.contiguous(seen.values[:, :, drop:]),
                    )
            layers.append(seen)
        return x, Context(tuple(layers), context.length + count, context.batch, context.padding)

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the embeddings of tokens: int32 [B, S] -> [B, S, M] in the model's type."""
        # Quantized tables give their scales' type; everything after follows the model's.
        return self._scale_embedding(self.model.decoder.embed_tokens(tokens))

    def _scale_embedding(self, x: mx.array) -> mx.array:
        # A Python float takes the array's type: 53.0 in bfloat16 where sqrt(2816) is 53.066, as in
        # the reference.
        return x.astype(self.dtype) * self.config.text.hidden_size**0.5


_softcap = compiled(softcap)


def _as_it_is(layer: Layer, *arguments: Any) -> tuple[mx.array, LayerContext]:
    return layer(*arguments)


def _joined(
    past: LayerContext | None, keys: mx.array, values: mx.array
) -> tuple[LayerContext, LayerContext]:
    """Place committed tokens after the past: they attend to both, and all keys and values are
    kept."""
    seen = LayerContext(keys, values) if past is None else past.join(keys, values)
    return seen, seen


def _behind(
    kept: int, past: LayerContext | None, keys: mx.array, values: mx.array
) -> tuple[LayerContext, LayerContext]:
    """Place a canvas into the room after the text: it attends to both."""
    assert past is not None
    written = past.written(kept, keys, values)
    return written.first(kept + keys.shape[2]), written


def _padding(lengths: mx.array, batch: int, places: int) -> mx.array | None:
    """Return each row's places without a token, int32 [B], or None if every row is full."""
    host = np.array(lengths)
    if host.shape != (batch,) or host.min() < 1 or host.max() > places:
        raise ValueError(
            f"lengths must be [{batch}] numbers from 1 to {places}, got {host.tolist()}"
        )
    return None if (host == places).all() else mx.array((places - host).astype(np.int32))
