"""The columns of one row in a forward pass: text, read causally behind the row's context, and a
canvas, which sees all of itself. Both bring what each layer's attention needs of them."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from ..config.model import TextConfig
from .attention import Place, Segment
from .context import Context, LayerContext, OpenContext
from .images import Seen
from .masks import Mask, canvas_mask, causal_mask


class TextColumns:
    """Text that a pass reads for a row."""

    def __init__(
        self,
        config: TextConfig,
        count: int,
        context: Context,
        picture: Seen | None = None,
        *,
        keeps_all: bool = False,
        is_followed: bool = False,
    ) -> None:
        """Prepare for a pass.

        Args:
          config: the model's.
          count: tokens.
          context: the text before; empty if there is none.
          picture: the images in the piece.
          keeps_all: whether `until` is asked for afterwards.
          is_followed: whether a canvas stands behind it, which asks for `last_kept`.
        """
        self._config, self._count, self._context = config, count, context
        self._keeps_all, self._is_followed = keeps_all, is_followed
        self._blocks = None
        if picture is not None and config.are_images_bidirectional:
            self._blocks = picture.blocks
        self._masks: dict[bool, Mask] = {}  # layers of a kind share one
        self._layers: list[LayerContext] = []
        self._placed: LayerContext | None = None  # in the last layer that was computed

    def segment(self, depth: int) -> Segment:
        """Return what a layer's attention needs."""
        context, config = self._context, self._config
        is_sliding = config.layers[depth].is_sliding
        past = context.layers[depth] if context.layers else None
        kept = past.keys.shape[2] if past is not None else 0
        before = _shared_layer(config, context, depth, kept)
        kept += before.keys.shape[2] if before is not None else 0
        if is_sliding not in self._masks:
            self._masks[is_sliding] = causal_mask(
                context.length,
                self._count,
                first_key=context.length - kept,
                window=config.sliding_window if is_sliding else None,
                padding=context.padding,
                blocks=self._blocks,
            )
        place = partial(self._placed_before if self._is_followed else _joined, before)
        return Segment(self._count, past, place, self._masks[is_sliding], context.position)

    def take(self, depth: int, placed: LayerContext) -> None:
        """Keep what a layer has placed: in sliding ones the last places alone."""
        self._layers.append(placed if self._keeps_all else self._kept(depth, placed))

    def last_kept(self, depth: int) -> LayerContext:
        """Return what `take` would keep of the layer that was computed last, once."""
        assert self._placed is not None
        placed, self._placed = self._placed, None
        return self._kept(depth, placed)

    def _kept(self, depth: int, placed: LayerContext) -> LayerContext:
        is_sliding = self._config.layers[depth].is_sliding
        return placed.last(self._config.sliding_window - 1 if is_sliding else None)

    @property
    def longer(self) -> Context:
        """The context with the text in it, after the pass."""
        assert not self._keeps_all
        return self.behind(tuple(self._layers))

    def until(self, count: int) -> Context:
        """Return the context with so many tokens of the text, after a pass that keeps all."""
        assert self._keeps_all
        left = self._count - count
        layers = [layer.first(layer.keys.shape[2] - left) for layer in self._layers]
        return self.behind(tuple(self._kept(i, layer) for i, layer in enumerate(layers)), left)

    def behind(self, layers: tuple[LayerContext, ...], left: int = 0) -> Context:
        """Return the context behind the text, but for so many tokens at its end, with the given
        layers."""
        old = self._context
        length = old.length + self._count - left
        return Context(layers, length, old.batch, old.padding, old.shared)

    def _placed_before(
        self,
        before: LayerContext | None,
        past: LayerContext | None,
        keys: mx.array,
        values: mx.array,
    ) -> tuple[tuple[LayerContext], LayerContext]:
        """Place tokens as `_joined` does, and remember them for the canvas."""
        seen, self._placed = _joined(before, past, keys, values)
        return seen, self._placed


class CanvasColumns:
    """A row's canvas in a pass, behind text that the pass reads before it, if there is some.

    It keeps no array of the open context that a layer has used: those without other references are
    written in place.
    """

    def __init__(self, config: TextConfig, width: int, opened: OpenContext) -> None:
        """Prepare for a pass over some columns, no more than the room in the open context."""
        self._config, self._width, self._room = config, width, opened.room
        self._is_shared = opened.is_shared
        self.text: TextColumns | None = None
        if opened.unread is None:
            self._before, self._kept = opened.text, list(opened.kept)
            self._layers = list(reversed(opened.layers))
        else:
            count = opened.unread.shape[1]
            self.text = TextColumns(config, count, opened.closed(), is_followed=True)
            self._before, self._kept, self._layers = self.text.behind(()), [], []
        self._written: list[LayerContext] = []
        self._masks: dict[int, mx.array | None] = {}  # by places kept

    def segment(self, depth: int) -> Segment:
        """Return what a layer's attention needs. The text's segment comes before it."""
        text = self._before
        if self.text is not None:  # its own keys are not there before this layer is computed
            place: Place = partial(self._behind_text, depth)
            return Segment(self._width, None, place, None, text.position)
        places = self._kept[depth]
        shared = _shared_layer(self._config, text, depth, places)
        if places not in self._masks:
            self._masks[places] = canvas_mask(
                places + self._width, first_key=text.length - places, padding=text.padding
            )
        place = _beside if self._is_shared else partial(_behind, places, shared)
        return Segment(self._width, self._layers.pop(), place, self._masks[places], text.position)

    def take(self, written: LayerContext) -> None:
        """Keep what a layer has written."""
        self._written.append(written)

    @property
    def opened(self) -> OpenContext:
        """The context for the next pass, after this one."""
        return OpenContext(
            tuple(self._written), tuple(self._kept), self._before, self._is_shared, self._room
        )

    def _behind_text(
        self, depth: int, _: LayerContext | None, keys: mx.array, values: mx.array
    ) -> tuple[tuple[LayerContext, ...], LayerContext]:
        """Place the canvas behind the text that this layer has just read."""
        assert self.text is not None
        past = self.text.last_kept(depth)
        places = past.keys.shape[2]
        self._kept.append(places)
        shared = _shared_layer(self._config, self._before, depth, places)
        return _behind(places, shared, past.with_room(self._room), keys, values)


def _shared_layer(
    config: TextConfig, context: Context, depth: int, own: int
) -> LayerContext | None:
    """Return what a layer keeps of the shared text before so many places of its own."""
    is_sliding = config.layers[depth].is_sliding
    most = max(0, config.sliding_window - 1 - own) if is_sliding else None
    return context.before(depth, most)


def _joined(
    before: LayerContext | None, past: LayerContext | None, keys: mx.array, values: mx.array
) -> tuple[tuple[LayerContext], LayerContext]:
    """Place tokens after the past: they attend to both, and all keys and values are kept, but those
    of a shared text before."""
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
