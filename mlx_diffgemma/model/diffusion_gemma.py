"""Prefill, denoise and commit on the stack of layers. One set of weights runs causally over text
and bidirectionally over the canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config.generation import default_of
from ..config.model import ModelConfig
from ..errors import PromptError
from .backend import begin, compiled
from .columns import CanvasColumns, TextColumns
from .context import Context, LayerContext, OpenContext
from .images import Seen, piece_ends, seen_at
from .layers import softcap
from .products import head, weighted_rows
from .stack import Layer, Stack
from .vision import Vision, VisionSource, VisionTower, by_soft_token

RunLayer = Callable[..., tuple[mx.array, list[LayerContext]]]  # a layer, then its arguments


class DiffusionGemma(nn.Module):
    """DiffusionGemma. Weights are those of the checkpoint, under the checkpoint's names.

    Those of vision are not there before `see` needs them; `vision_source` brings them then.

    Source: transformers 5.23, models/diffusion_gemma/modeling_diffusion_gemma.py.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Stack(config.text)
        self.vision_source: VisionSource = _NoVision()
        self.vision_is_own = False
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

    @property
    def has_vision(self) -> bool:
        """Whether the weights that read images are loaded."""
        return "vision_tower" in self.model.encoder

    @property
    def vision_parts(self) -> tuple[nn.Module, nn.Module]:
        """The vision tower and what goes from its width to the text's, which must be loaded."""
        return self.model.encoder.vision_tower, self.model.encoder.embed_vision

    def take_vision(self, vision: Vision, *, is_own: bool = True) -> None:
        """Read images with this from now on.

        Args:
          vision: what `load` made; it takes the model's type.
          is_own: whether it may differ from what `vision_source` brings, as one that is trained.
        """
        self.vision_is_own = is_own
        if vision.vision_tower.dtype != self.dtype:
            vision.set_dtype(self.dtype)
        self.model.encoder.vision_tower = vision.vision_tower
        self.model.encoder.embed_vision = vision.embed_vision

    def check_vision(self) -> None:
        """Raise DiffGemmaError, which says why, if the model can read no images."""
        if not self.has_vision:
            self.vision_source.check()

    def see(self, patches: mx.array, positions: mx.array) -> mx.array:
        """Return the features of one image, which stand at the places of its tokens: [n, M] in the
        model's type. The first image loads the vision tower, where `load` was not told otherwise.

        Args:
          patches: float32 [P, 3 p p] from 0 to 1: rows, columns and colours of each.
          positions: int32 [P, 2], column and row of each patch, in any order.

        Raises:
          ValueError: if shapes disagree, or the patches are no whole picture.
          DiffGemmaError: if the model has no vision tower, or it cannot be loaded.
        """
        if not self.has_vision:
            self.take_vision(self.vision_source.bring(), is_own=False)
        tower: VisionTower = self.model.encoder.vision_tower
        wanted = (positions.shape[0], tower.config.patch_width)
        if patches.shape != wanted:
            raise ValueError(f"patches must be {wanted}, got {patches.shape}")
        places = np.array(positions)
        order = by_soft_token(places, tower.config)
        return self.features(
            patches[mx.array(order.astype(np.int32))][None],
            mx.array(places[order].astype(np.int32))[None],
        )[0]

    def features(self, patches: mx.array, positions: mx.array) -> mx.array:
        """Return the features of images of one size whose patches `by_soft_token` has put in order:
        [I, P, 3 p p] and int32 [I, P, 2] -> [I, n, M]. Nothing is checked or read by the host, so
        that it can be traced; the vision tower must be loaded."""
        soft = self.model.encoder.vision_tower(patches, positions)
        features: mx.array = self.model.encoder.embed_vision(soft)
        return features.astype(self.dtype)

    def prefill(
        self,
        tokens: mx.array,
        context: Context | None = None,
        *,
        images: Sequence[mx.array] | None = None,
        step_size: int = default_of("prefill_step_size"),
    ) -> Context:
        """Read tokens causally, after `context` if there is one, as one call on the whole text
        would.

        Args:
          tokens: int32 [B, S], S >= 1; rows of equal length.
          context: the text before; it is not changed.
          images: features [n, M] of each image, from `see`, for the image tokens in `tokens`, in
            their order. Without it, image tokens are tokens like others.
          step_size: places read at a time; bounds the memory of masks and scores, not the result.
            An image is read as a whole.

        Raises:
          ValueError: if shapes disagree, or there are more or fewer image tokens than features.
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
        seen = None
        if images is not None:
            places = np.array(tokens == self.config.image_token_id)
            seen = seen_at(places, images) if places.any() or images else None
        start = 0
        for stop in piece_ends(seen.places if seen else np.zeros((1, S), bool), step_size):
            piece = seen.within(start, stop) if seen else None
            _, (context,) = self.encode([tokens[:, start:stop]], [context], [piece], states=False)
            if stop < S:  # each piece is computed and its scratch memory given back before the next
                mx.eval(context.arrays)
                mx.clear_cache()
            start = stop
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

    def open(
        self, context: Context, canvas_length: int, *, unread: mx.array | None = None
    ) -> OpenContext:
        """Return the context with room for a canvas, for that canvas's steps.

        Args:
          context: the text before the canvas.
          canvas_length: the most columns of a step.
          unread: text behind the context, int32 [1, S], which the next pass over the canvas reads
            before it: the same as `prefill` and then the pass, up to rounding, and the weights are
            read once for both.
        """
        return OpenContext.of(context, canvas_length, unread)

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
        decoder, config = self.model.decoder, self.config.text
        rows = [
            CanvasColumns(config, canvas.shape[1], each)
            for canvas, each in zip(canvases, opened, strict=True)
        ]
        unread = [each.unread for each in opened if each.unread is not None]
        opened.clear()
        x = decoder.self_conditioning(self.embed(_beside_each_other(canvases)), self_conditioning)
        texts, read = [row.text for row in rows if row.text is not None], 0
        if unread:
            before = self.embed(_beside_each_other(unread))
            x, read = mx.concatenate([before, x], axis=1), before.shape[1]
        for depth, layer in enumerate(decoder.layers):
            begin(x)
            scalar = layer.layer_scalar
            if read and depth == len(decoder.layers) - 1:
                # The last layer computes keys and values of the text alone, as in `encode`.
                layer.self_attn(
                    layer.input_layernorm(x[:, :read]), [text.segment(depth) for text in texts]
                )
                x, texts = x[:, read:], []
            elif read:
                scalar = self._scalars(depth, read, x.shape[1])
            # No name for the segments: it would hold arrays while the next layer begins.
            x, kept = self.run_layer(
                layer,
                x,
                [*(text.segment(depth) for text in texts), *(row.segment(depth) for row in rows)],
                scalar,
            )
            for row, written in zip(rows, kept[len(texts) :], strict=True):
                row.take(written)
        return x, [row.opened for row in rows]

    def _scalars(self, depth: int, read: int, columns: int) -> mx.array:
        """Return a layer's scalars where the first columns are text: [1, T, 1]."""
        of_text = self.model.encoder.language_model.layers[depth].layer_scalar
        own = self.model.decoder.layers[depth].layer_scalar
        return mx.where(mx.arange(columns)[None, :, None] < read, of_text, own)

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
        self,
        pieces: Sequence[mx.array],
        contexts: Sequence[Context],
        images: Sequence[Seen | None] | None = None,
        *,
        states: bool = True,
    ) -> tuple[mx.array, list[Context]]:
        """Read a piece of text for each of several rows in one pass: without self-conditioning and
        its norm, with the encoder's layer scalars.

        Args:
          pieces: int32 [1, S] each; or one [B, S], in training.
          contexts: the text before each piece; empty if there is none.
          images: those of each piece; all of an image is in one piece.
          states: False: the last layer computes keys and values alone, and its input is returned.

        Returns:
          The last layer's output (or input) for each token, [1, T, M], one piece behind another,
          before the norm and the head; and the longer contexts.
        """
        x, rows = self._read(pieces, contexts, images, states=states)
        return x, [row.longer for row in rows]

    def read_ahead(
        self, pieces: Sequence[mx.array], contexts: Sequence[Context]
    ) -> tuple[mx.array, list[TextColumns]]:
        """Read as `encode` does, text that may not be kept to its end.

        Returns:
          The last layer's output, as there, and each row's columns, whose `until` is the context up
          to any of them.
        """
        return self._read(pieces, contexts, keeps_all=True)

    def _read(
        self,
        pieces: Sequence[mx.array],
        contexts: Sequence[Context],
        images: Sequence[Seen | None] | None = None,
        *,
        states: bool = True,
        keeps_all: bool = False,
    ) -> tuple[mx.array, list[TextColumns]]:
        pictures = images or [None] * len(pieces)
        x = self._embed_all(pieces, pictures)
        scalars = self.model.encoder.language_model.layers
        rows = [
            TextColumns(self.config.text, piece.shape[1], context, picture, keeps_all=keeps_all)
            for piece, context, picture in zip(pieces, contexts, pictures, strict=True)
        ]
        for depth, layer in enumerate(self.model.decoder.layers):
            segments = [row.segment(depth) for row in rows]
            begin(x)
            if states or depth < len(scalars) - 1:
                x, seen = self.run_layer(layer, x, segments, scalars[depth].layer_scalar)
            else:
                _, seen = layer.self_attn(layer.input_layernorm(x), segments)
            for row, placed in zip(rows, seen, strict=True):
                row.take(depth, placed)
        return x, rows

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the embeddings of tokens: int32 [B, S] -> [B, S, M] in the model's type."""
        # Quantized tables give their scales' type; everything after follows the model's.
        return self._scale_embedding(self.model.decoder.embed_tokens(tokens))

    def _embed_all(self, pieces: Sequence[mx.array], images: Sequence[Seen | None]) -> mx.array:
        """Return the embeddings of pieces of text, one behind another, [1, T, M], with the features
        of images at their places."""
        if not any(images):
            return self.embed(_beside_each_other(pieces))
        return _beside_each_other(
            [
                self.embed(piece) if seen is None else seen.embedded(self.embed(piece))
                for piece, seen in zip(pieces, images, strict=True)
            ]
        )

    def _scale_embedding(self, x: mx.array) -> mx.array:
        # A Python float takes the array's type: 53.0 in bfloat16 where sqrt(2816) is 53.066, as in
        # the reference.
        return x.astype(self.dtype) * self.config.text.hidden_size**0.5


_softcap = compiled(softcap)


class _NoVision:
    nbytes = 0

    def check(self) -> None:
        raise PromptError("this model has no vision tower, so that it reads no images")

    def bring(self) -> Vision:
        self.check()
        raise AssertionError

    def fingerprint(self) -> bytes:
        return b""


def _as_it_is(layer: Layer, *arguments: Any) -> tuple[mx.array, list[LayerContext]]:
    return layer(*arguments)


def _beside_each_other(arrays: Sequence[mx.array]) -> mx.array:
    """Return the columns of arrays [B, T, ...], one behind another."""
    return arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays), axis=1)
