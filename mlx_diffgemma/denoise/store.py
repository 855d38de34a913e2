"""Contexts kept across requests, found again by the tokens that they begin with.

Sliding layers keep their last places only, so a context cannot be cut back to any place. The store
holds snapshots: a tree whose nodes are texts, each behind its parent's. A node has the keys and
values of full layers for its own part of the text alone, so that the texts of one conversation
share them, and those of sliding layers as they are at its end. `store_files.py` keeps them in a
folder too, where asked.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config.model import TextConfig
from ..errors import ConfigError
from ..model import Context, DiffusionGemma
from ..model.context import LayerContext
from .images import Features
from .store_files import ContextFiles, checked_folder, vision_fingerprint

FOLDER_BYTES = 10_000_000_000  # by default


class Node:
    """A text whose context is kept."""

    def __init__(self, parent: Node | None, tokens: np.ndarray) -> None:
        self.parent, self.tokens = parent, tokens  # of its own part, int32 [S]
        self.length: int = len(tokens) + (parent.length if parent else 0)
        self.children: list[Node] = []
        self.full: list[LayerContext] = []  # of its own part
        self.sliding: list[LayerContext] | None = None  # at its end; None if dropped
        self.used = 0  # when it, or a text behind it, was last used
        self.read = 0  # when its own end was last used

    @property
    def nbytes(self) -> int:
        layers = [*self.full, *(self.sliding or ())]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def path(self) -> list[Node]:
        """The nodes from the root's first child to this one."""
        node: Node | None = self
        found = []
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


class Store:
    """Keeps contexts of one model, up to a number of bytes; those not used for longest go first.

    With a folder, it writes them there too, and finds those of an earlier process or of one beside.
    It may be used by several threads, its arrays by the thread that runs the model.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        every: int = 2048,
        folder: str | os.PathLike[str] | None = None,
        folder_bytes: int | None = None,
    ) -> None:
        """Make a store.

        Args:
          max_bytes: of keys and values together.
          every: tokens of a long text between two snapshots: at most so many are read again before
            the place where a text differs from one before.
          folder: where contexts are kept on disk as well. Several processes and models may share
            it.
          folder_bytes: what all context files in the folder may take together; by default 10 GB.

        Raises:
          ConfigError: if a number is below 1, or the folder cannot be written to.
        """
        limits = {"max_bytes": max_bytes, "every": every}
        if folder is not None:
            limits["folder_bytes"] = FOLDER_BYTES if folder_bytes is None else folder_bytes
        elif folder_bytes is not None:
            raise ConfigError("folder_bytes of a store has no effect without a folder")
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name} of a store must be at least 1, got {value}")
        self.max_bytes, self.every = max_bytes, every
        self._folder = None if folder is None else checked_folder(folder)
        self._folder_bytes = limits.get("folder_bytes", 0)
        self._files: ContextFiles | None = None  # once it is known for which model
        self._model: weakref.ref[DiffusionGemma] | None = None
        self._root = Node(None, np.zeros(0, np.int32))
        self.features = Features()  # of the images in the texts
        self.salt = b""  # of images, in a folder that other models' texts are in too
        self._clock = 0
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes that are kept."""
        return self._bytes

    def on_disk(self) -> tuple[Path, int, int] | None:
        """Return the folder, the bytes of its context files, and how many they may be; None without
        a folder."""
        if self._folder is None:
            return None
        return self._folder, self._files.nbytes if self._files else 0, self._folder_bytes

    def serve(self, model: DiffusionGemma) -> None:
        """Keep contexts of this model from now on.

        Raises:
          ConfigError: if the store has served another one.
        """
        with self._lock:
            if self._model is None:
                self._model = weakref.ref(model)
            if self._model() is not model:
                raise ConfigError(
                    "a store keeps the contexts of one model, and this one has served another; "
                    "make a store for each model"
                )
            if self._folder is not None and self._files is None:
                self._files = ContextFiles(self._folder, self._folder_bytes, model)
                self.salt = vision_fingerprint(model)

    def flush(self) -> None:
        """Wait until everything kept so far is on disk."""
        with self._lock:
            if self._files is not None:
                self._files.flush()

    def find(self, tokens: np.ndarray, config: TextConfig) -> Context | None:
        """Return the context of the longest text that is kept and that `tokens`, int32 [S], begin
        with; at least one token is left to read. None if there is none."""
        with self._lock:
            nodes = [n for n in self._beginnings(tokens[:-1]) if n.sliding is not None]
            known = max((node.length for node in nodes), default=0)
            if self._files is not None:
                context = self._files.find(tokens[:-1], known)
                if context is not None:
                    self._remember(tokens[: context.length], context, config)
                    return context
            if not nodes:
                return None
            node = max(nodes, key=lambda n: n.length)
            self._use(node)
            return _context(node, config)

    def keep(self, tokens: np.ndarray, context: Context, config: TextConfig) -> None:
        """Keep the context of `tokens`, int32 [S]. One that does not fit into the store alone is
        not kept, and nothing is dropped for it."""
        with self._lock:
            self._remember(tokens, context, config)
            if self._files is not None:
                self._files.save(tokens, context)

    def _remember(self, tokens: np.ndarray, context: Context, config: TextConfig) -> None:
        """Keep a context in memory."""
        if context.nbytes > self.max_bytes:
            return
        node = max(self._beginnings(tokens), key=lambda n: n.length)
        if node.length < len(tokens):
            before, node = node, Node(node, tokens[node.length :].copy())
            node.full = _own_part(context, before.length, config)
            before.children.append(node)
            self._bytes += node.nbytes
        if node.sliding is None:
            self._bytes -= node.nbytes
            node.sliding = _sliding(context, config)
            self._bytes += node.nbytes
        self._use(node)
        self._make_room(node)

    def _beginnings(self, tokens: np.ndarray) -> Iterator[Node]:
        """Yield the kept texts that the tokens begin with, and the root."""
        nodes = [self._root]
        while nodes:
            yield (node := nodes.pop())
            for child in node.children:
                if np.array_equal(child.tokens, tokens[node.length : child.length]):
                    nodes.append(child)

    def _use(self, node: Node) -> None:
        self._clock += 1
        node.read = self._clock
        for each in node.path():
            each.used = self._clock

    def _make_room(self, newest: Node) -> None:
        """Drop what was not used for longest, but the newest text: snapshots inside of texts, and
        ends of texts."""
        while self._bytes > self.max_bytes:
            nodes = [node for node in self._all() if node is not newest]
            inner = [n for n in nodes if n.children and n.sliding is not None]
            ends = [n for n in nodes if not n.children]
            oldest = min([*inner, *ends], key=lambda n: n.read)
            if oldest.children:
                self._bytes -= oldest.nbytes
                oldest.sliding = None
                self._bytes += oldest.nbytes
            else:
                self._cut(oldest)

    def _cut(self, node: Node) -> None:
        """Remove an end, and the texts before it that only served it."""
        while node.parent is not None and not node.children:
            parent = node.parent
            parent.children.remove(node)
            self._bytes -= node.nbytes
            if parent.sliding is not None:
                break
            node = parent

    def _all(self) -> Iterator[Node]:
        nodes = list(self._root.children)
        while nodes:
            yield (node := nodes.pop())
            nodes.extend(node.children)


def _context(node: Node, config: TextConfig) -> Context:
    """Return the context of a node; full layers' parts are joined into new arrays."""
    path, sliding, layers = node.path(), iter(node.sliding or ()), []
    depth = 0
    for layer in config.layers:
        if layer.is_sliding:
            layers.append(next(sliding))
            continue
        parts = [each.full[depth] for each in path]
        depth += 1
        layers.append(
            parts[0]
            if len(parts) == 1
            else LayerContext(
                mx.concatenate([part.keys for part in parts], axis=2),
                mx.concatenate([part.values for part in parts], axis=2),
            )
        )
    return Context(tuple(layers), node.length, 1)


def _own_part(context: Context, start: int, config: TextConfig) -> list[LayerContext]:
    """Return the keys and values of full layers from a place on."""
    return [
        _alone(LayerContext(layer.keys[:, :, start:], layer.values[:, :, start:]))
        for layer, kind in zip(context.layers, config.layers, strict=True)
        if not kind.is_sliding
    ]


def _sliding(context: Context, config: TextConfig) -> list[LayerContext]:
    return [
        _alone(layer)
        for layer, kind in zip(context.layers, config.layers, strict=True)
        if kind.is_sliding
    ]


def _alone(layer: LayerContext) -> LayerContext:
    """Return a copy of a layer. Its arrays may be views, which keep the whole in memory."""
    none = layer.first(0)
    copied = layer.join(none.keys, none.values)  # `mx.contiguous` copies only some views
    mx.eval(copied.keys, copied.values)
    return copied


def snapshots(tokens: Sequence[int] | np.ndarray, every: int, ends: Sequence[int]) -> list[int]:
    """Return the lengths of a text at which it is worth keeping: every so many tokens, behind its
    first and its last turn, and at its end."""
    text = np.asarray(tokens)
    turns = (np.flatnonzero(np.isin(text, ends)) + 1).tolist()
    places = {*range(every, len(text), every), len(text), *turns[:1], *turns[-1:]}
    return sorted(places)
