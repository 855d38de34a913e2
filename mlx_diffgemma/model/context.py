"""Keys and values of committed tokens. A context is immutable: extending returns a new one, so an
old one is a snapshot. An open context has room for a canvas after its text."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True, eq=False)
class LayerContext:
    """Keys and values of one layer, [B, K, kept, H]. Sliding layers keep the last `sliding_window
    - 1` places."""

    keys: mx.array
    values: mx.array

    def join(self, keys: mx.array, values: mx.array) -> LayerContext:
        """Return these and the given ones, joined along the places."""
        return LayerContext(
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )

    def with_room(self, places: int) -> LayerContext:
        """Return a copy with `places` more at its end, whose content does not matter."""
        B, K, _, H = self.keys.shape
        room = mx.zeros((B, K, places, H), self.keys.dtype)
        return self.join(room, room)

    def written(self, start: int, keys: mx.array, values: mx.array) -> LayerContext:
        """Return these with the given keys and values from place `start` on. The memory is reused
        if nothing else refers to these arrays."""
        end = start + keys.shape[2]
        new = LayerContext(copy.copy(self.keys), copy.copy(self.values))
        new.keys[:, :, start:end] = keys
        new.values[:, :, start:end] = values
        return new

    def last(self, places: int | None) -> LayerContext:
        """Return the last places only, all for None: a copy, since a view would keep the rest in
        memory."""
        if places is None or (drop := self.keys.shape[2] - places) <= 0:
            return self
        return LayerContext(
            mx.contiguous(self.keys[:, :, drop:]), mx.contiguous(self.values[:, :, drop:])
        )

    def first(self, places: int) -> LayerContext:
        """Return the first places only."""
        if places == self.keys.shape[2]:
            return self
        return LayerContext(self.keys[:, :, :places], self.values[:, :, :places])


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """The tokens that the model has read. Places count the padding on the left, positions do
    not."""

    layers: tuple[LayerContext, ...]
    length: int  # places so far
    batch: int
    # int32 [B], places on the left without a token. For training alone, whose batches have fixed
    # shapes; rows that are written each have their own context.
    padding: mx.array | None = None
    # The text before that of `layers`, where other contexts go on from it too. It is kept once.
    shared: Context | None = None

    @classmethod
    def behind(cls, shared: Context) -> Context:
        """Return a context that goes on from one that others go on from as well: what is read
        behind it is kept apart from it, and it is not copied."""
        assert shared.padding is None and shared.shared is None
        return cls((), shared.length, shared.batch, shared=shared)

    def before(self, depth: int, most: int | None) -> LayerContext | None:
        """Return a layer of the shared text, at most so many of its last places; None for none."""
        if self.shared is None or most == 0:
            return None
        layer = self.shared.layers[depth]
        drop = 0 if most is None else max(0, layer.keys.shape[2] - most)
        return LayerContext(layer.keys[:, :, drop:], layer.values[:, :, drop:]) if drop else layer

    @property
    def position(self) -> int | mx.array:
        """The position of the next token: one for all rows, or int32 [B]."""
        return self.length if self.padding is None else self.length - self.padding

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, to evaluate them."""
        return [array for layer in self.layers for array in (layer.keys, layer.values)]

    @property
    def nbytes(self) -> int:
        """The bytes of its own arrays, without those of the shared text."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True, slots=True, eq=False)
class OpenContext:
    """A context during the denoise steps of a canvas behind it. It is immutable too.

    Opened alone, its layers have room for the canvas, and each step overwrites the canvas's keys
    and values; that avoids a copy only while nothing else refers to them. Opened `beside`, the
    layers are those of the context, which several rows share without a copy.
    """

    layers: tuple[LayerContext, ...]  # [B, K, kept + room, H]
    kept: tuple[int, ...]  # places of text in each layer
    text: Context  # without its layers: length, batch and padding
    is_shared: bool = False
    room: int = 0  # places for the canvas
    # int32 [1, S], text that the next pass reads before its canvas; the layers have no room yet.
    unread: mx.array | None = None

    @classmethod
    def of(cls, context: Context, room: int, unread: mx.array | None = None) -> OpenContext:
        """Copy the context once, now or as text behind it is read. The original is not needed any
        more."""
        return cls(
            tuple(layer.with_room(room) if unread is None else layer for layer in context.layers),
            tuple(layer.keys.shape[2] for layer in context.layers),
            Context((), context.length, context.batch, context.padding, context.shared),
            room=room,
            unread=unread,
        )

    @classmethod
    def beside(cls, context: Context) -> OpenContext:
        """Open a context that others use too, without copying it."""
        assert context.shared is None
        return cls(
            context.layers,
            tuple(layer.keys.shape[2] for layer in context.layers),
            Context((), context.length, context.batch, context.padding),
            is_shared=True,
        )

    @property
    def nbytes(self) -> int:
        """The bytes of its own arrays."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def closed(self) -> Context:
        """Return the context that was opened, without the canvas and text that is not read."""
        layers = zip(self.layers, self.kept, strict=True)
        return Context(
            tuple(layer.first(kept) for layer, kept in layers),
            self.text.length,
            self.text.batch,
            self.text.padding,
            self.text.shared,
        )
