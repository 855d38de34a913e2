"""The stack of layers, and prefill, denoise and commit on it. One set of weights runs causally over
text and bidirectionally over the canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config.generation import default_of
from ..config.model import LayerConfig, ModelConfig, TextConfig
from .attention import Attention, Segment
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


RunLayer = Callable[..., tuple[mx.array, list[LayerContext]]]  # a layer, then its arguments


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
        step_size: int = default_of("prefill_step_size"),
    ) -> Context:
        """Read tokens causally, after `context` if there is one, as one call on the whole text
        would.

        Args:
          tokens: int32 [B, S], S >= 1; rows of equal length.
          context: the text before; it is not changed.
          step_size: places read at a time; bounds the memory of masks and scores, not the result.

        Raises:
          ValueError: if shapes disagree.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be [B, S] with S >= 1, got {tokens.shape}")
        if step_size < 1:
            raise ValueError(f"step_size must be at least 1, got {step_size}")
        B, S = tokens.shape
        if context is None:
            context = Context((), 0, B)
        elif context.batch != B:
            raise ValueError(f"tokens have {B} rows, the context has {context.batch}")
        for start in range(0, S, step_size):
            _, (context,) = self.encode([tokens[:, start : start + step_size]], [context])
            if (
                start + step_size < S
            ):  # each piece is computed and its scratch memory given back before the next
                mx.eval(context.arrays)
                mx.clear_cache()
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
        if canvas.ndim != 2 or canvas.shape[0] != context.batch:
            raise ValueError(f"canvas must be [{context.batch}, L], got {canvas.shape}")
        wanted = (*canvas.shape, self.config.text.hidden_size)
        if self_conditioning is not None and self_conditioning.shape != wanted:
            raise ValueError(f"self_conditioning must be {wanted}, got {self_conditioning.shape}")
        opened = [self.open(context, canvas.shape[-1])]
        states, _ = self.canvas_states([canvas], opened, self_conditioning=self_conditioning)
        return _softcap(self.outputs(states), self.config.text.final_logit_softcapping)

    def open(self, context: Context, canvas_length: int) -> OpenContext:
        """Return the context with room for a canvas, for that canvas's steps."""
        return OpenContext.of(context, canvas_length)

    def canvas_states(
        self,
        canvases: Sequence[mx.array],
        opened: list[OpenContext],
        *,
        self_conditioning: mx.array | None = None,
    ) -> tuple[mx.array, list[OpenContext]]:
        """Run the layers over the canvases of several rows in one pass. Each row attends to its own
        context and itself; everything else sees the columns of all rows, one row behind another.

        Args:
          canvases: int32 [1, W] each, no wider than the room in the row's context; or one [B, L],
            in training.
          opened: a context for each canvas, from `open` or from the step before. The list is
            emptied: arrays without other references are written in place.
          self_conditioning: [1, T, M], T the columns of all rows; None if no row has any, zeros for
            rows without it.

        Returns:
          The last layer's output, [1, T, M], before the norm and the head, and the contexts to pass
          on.
        """
        decoder, widths = self.model.decoder, [canvas.shape[1] for canvas in canvases]
        texts, kept = [o.text for o in opened], [o.kept for o in opened]
        shared = [o.is_shared for o in opened]
        # Arrays without other references are written in place, so that this function must not keep
        # any either.
        layers = [list(reversed(context.layers)) for context in opened]
        opened.clear()
        tokens = canvases[0] if len(canvases) == 1 else mx.concatenate(list(canvases), axis=1)
        x = decoder.self_conditioning(self.embed(tokens), self_conditioning)
        masks: dict[tuple[int, int], mx.array | None] = {}  # by row and places kept
        written: list[list[LayerContext]] = [[] for _ in canvases]

        def segment(row: int, depth: int) -> Segment:
            places, width, text = kept[row][depth], widths[row], texts[row]
            before = self._shared_layer(text, depth, places)
            if (row, places) not in masks:
                masks[row, places] = canvas_mask(
                    places + width, first_key=text.length - places, padding=text.padding
                )
            past, mask = layers[row].pop(), masks[row, places]
            place = _beside if shared[row] else partial(_behind, places, before)
            return Segment(width, past, place, mask, text.position)

        for depth, layer in enumerate(decoder.layers):
            begin(x)
            x, keep = self.run_layer(
                layer, x, [segment(row, depth) for row in range(len(texts))], layer.layer_scalar
            )
            for row, places in enumerate(keep):
                written[row].append(places)
        return x, [
            OpenContext(tuple(w), k, text, is_shared)
            for w, k, text, is_shared in zip(written, kept, texts, shared, strict=True)
        ]

    def outputs(self, states: mx.array) -> mx.array:
        """Return the head's outputs before the softcap, [B, L, V] in the model's type, for
        `canvas_states`'s states [B, L, M]."""
        decoder = self.model.decoder
        return head(decoder.embed_tokens, decoder.norm(states))

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

    def encode(
        self, pieces: Sequence[mx.array], contexts: Sequence[Context]
    ) -> tuple[mx.array, list[Context]]:
        """Read a piece of text for each of several rows in one pass: without self-conditioning and
        its norm, with the encoder's layer scalars.

        Args:
          pieces: int32 [1, S] each; or one [B, S], in training.
          contexts: the text before each piece; empty if there is none.

        Returns:
          The last layer's output for each token, [1, T, M], one piece behind another, before the
          norm and the head; and the longer contexts.
        """
        text = self.config.text
        x = self.embed(pieces[0] if len(pieces) == 1 else mx.concatenate(list(pieces), axis=1))
        scalars = self.model.encoder.language_model.layers
        masks: dict[tuple[int, bool], Mask] = {}  # a row's layers of a kind share one
        layers: list[list[LayerContext]] = [[] for _ in pieces]

        def segment(row: int, depth: int, *, is_sliding: bool) -> Segment:
            context, count = contexts[row], pieces[row].shape[1]
            past = context.layers[depth] if context.layers else None
            kept = past.keys.shape[2] if past is not None else 0
            before = self._shared_layer(context, depth, kept)
            kept += before.keys.shape[2] if before is not None else 0
            if (row, is_sliding) not in masks:
                masks[row, is_sliding] = causal_mask(
                    context.length,
                    count,
                    first_key=context.length - kept,
                    window=text.sliding_window if is_sliding else None,
                    padding=context.padding,
                )
            place = partial(_joined, before)
            return Segment(count, past, place, masks[row, is_sliding], context.position)

        for depth, layer in enumerate(self.model.decoder.layers):
            is_sliding = text.layers[depth].is_sliding
            rows = [segment(row, depth, is_sliding=is_sliding) for row in range(len(pieces))]
            begin(x)  # without the last layer's output: only keys and values are needed
            x, seen = self.run_layer(layer, x, rows, scalars[depth].layer_scalar)
            for row, places in enumerate(seen):
                keep = text.sliding_window - 1 if is_sliding else None
                layers[row].append(places.last(keep))
        return x, [
            Context(tuple(read), old.length + piece.shape[1], old.batch, old.padding, old.shared)
            for read, old, piece in zip(layers, contexts, pieces, strict=True)
        ]

    def _shared_layer(self, context: Context, depth: int, own: int) -> LayerContext | None:
        """Return what a layer keeps of the shared text before so many places of its own."""
        is_sliding = self.config.text.layers[depth].is_sliding
        most = max(0, self.config.text.sliding_window - 1 - own) if is_sliding else None
        return context.before(depth, most)

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the embeddings of tokens: int32 [B, S] -> [B, S, M] in the model's type."""
        # Quantized tables give their scales' type; everything after follows the model's.
        return self._scale_embedding(self.model.decoder.embed_tokens(tokens))

    def _scale_embedding(self, x: mx.array) -> mx.array:
        # A Python float takes the array's type: 53.0 in bfloat16 where sqrt(2816) is 53.066, as in
        # the reference.
        return x.astype(self.dtype) * self.config.text.hidden_size**0.5


_softcap = compiled(softcap)


def _as_it_is(layer: Layer, *arguments: Any) -> tuple[mx.array, list[LayerContext]]:
    return layer(*arguments)


def _joined(
    before: LayerContext | None, past: LayerContext | None, keys: mx.array, values: mx.array
) -> tuple[tuple[LayerContext], LayerContext]:
    """Place committed tokens after the past: they attend to both, and all keys and values are
    kept, but those of a shared text before."""
    own = LayerContext(keys, values) if past is None else past.join(keys, values)
    return (own if before is None else before.join(own.keys, own.values),), own


def _behind(
    kept: int,
    before: LayerContext | None,
    past: LayerContext | None,
    keys: mx.array,
    values: mx.array,
) -> tuple[tuple[LayerContext, ...], LayerContext]:
    """Place a canvas into the room after the text: it attends to both, and to a shared text
    before."""
    assert past is not None
    written = past.written(kept, keys, values)
    own = written.first(kept + keys.shape[2])
    return (own,) if before is None else (before, own), written


def _beside(
    past: LayerContext | None, keys: mx.array, values: mx.array
) -> tuple[tuple[LayerContext, LayerContext], LayerContext]:
    """Place a canvas beside a text that other rows attend to as well."""
    assert past is not None
    return (past, LayerContext(keys, values)), past
