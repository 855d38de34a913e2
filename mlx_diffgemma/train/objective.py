"""The objective: denoise one canvas given the text before it, and predict every next token of the
clean text.

Source: MODEL 5.1; google-deepmind/gemma, hackable_diffusion_adapter/hd/sft_model.py @050b1a7.
  Without self-conditioning its signal is zeros, as in transformers, and not the mean embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..config.training import TrainSettings
from ..model import DiffusionGemma
from ..model.backend import training
from ..model.context import Context, LayerContext
from ..model.layers import softcap
from ..model.products import head
from .pictures import Sight

# Of float32 logits at a time; more of them are computed in slices, and twice.
_LOGITS_BYTES = 128 << 20


def losses(
    model: DiffusionGemma,
    batch: Mapping[str, mx.array],
    settings: TrainSettings,
    sight: Sight | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the objective on a batch; gradients can be taken of it.

    Args:
      model: with or without adapters; not fused if weights are trained.
      batch: the arrays of a `Batch`, by name.
      settings: the weights of the two losses, whether gradients pass through the context, and
        whether they go on into the vision tower.
      sight: its images.

    Returns:
      The weighted sum, the mean cross-entropy over the canvases, and that of the causal pass, the
      mean over examples of their means; float32, nats.
    """
    with training():
        start = Context((), 0, batch["context"].shape[0], batch["padding"])
        seen = None if sight is None else sight.seen(model)
        if seen is not None and not settings.train_vision:
            seen = replace(seen, features=mx.stop_gradient(seen.features))
        states, (context,) = model.encode([batch["context"]], [start], [seen])
        causal = mx.zeros(())
        if "rest" in batch:
            more, _ = model.encode([batch["rest"]], [context])
            places = mx.concatenate([states, more], axis=1)
            causal = _cross_entropy(model, places, batch["targets"], batch["weights"])
        if not settings.gradients_through_context:
            context = _detached(context)
        soft = _thought(model, batch, context) if "rows" in batch else None
        opened = [model.open(context, batch["noisy"].shape[1])]
        states, _ = model.canvas_states([batch["noisy"]], opened, self_conditioning=soft)
        clean = batch["clean"]
        canvas = _cross_entropy(model, states, clean, mx.full(clean.shape, 1 / clean.size))
        return canvas + settings.causal_weight * causal, canvas, causal


@contextmanager
def layers_twice(model: DiffusionGemma, *, seed: int = 0) -> Iterator[None]:
    """Use gradient checkpointing: layers' inner arrays are not kept but computed again. Every layer
    draws its dropout from its own seed, so that it is the same both times."""
    before, seeds = model.run_layer, count(seed)
    tower = model.model.encoder.vision_tower if model.has_vision else None
    model.run_layer = lambda *arguments: _run_twice(next(seeds), *arguments)
    if tower is not None:
        seen_before = tower.run_layer
        tower.run_layer = lambda *arguments: _see_twice(next(seeds), *arguments)
    try:
        yield
    finally:
        model.run_layer = before
        if tower is not None:
            tower.run_layer = seen_before


def _thought(model: DiffusionGemma, batch: Mapping[str, mx.array], context: Context) -> mx.array:
    """Return the soft embedding [B, C, M] of a first forward pass over the canvas, without
    gradients; zeros for rows that are not conditioned."""
    rows, place = batch["rows"], batch["place"]
    known = _detached(context)
    seen = replace(
        known,
        layers=tuple(LayerContext(x.keys[rows], x.values[rows]) for x in known.layers),
        batch=rows.shape[0],
        padding=None if known.padding is None else known.padding[rows],
    )
    noisy = batch["noisy"][rows]
    states, _ = model.canvas_states([noisy], [model.open(seen, noisy.shape[1])])
    states = mx.stop_gradient(states)

    def embedded(piece: mx.array, places: slice) -> mx.array:
        # Only the product with the table has gradients, since it belongs to the second pass.
        return model.soft_embedding(mx.stop_gradient(_logits(model, piece)))

    pieces = _in_slices(model, embedded, states)
    soft = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
    return mx.where((place >= 0)[:, None, None], soft[mx.maximum(place, 0)], 0).astype(soft.dtype)


def _detached(context: Context) -> Context:
    return replace(
        context,
        layers=tuple(
            LayerContext(mx.stop_gradient(x.keys), mx.stop_gradient(x.values))
            for x in context.layers
        ),
    )


def _logits(model: DiffusionGemma, states: mx.array) -> mx.array:
    decoder = model.model.decoder
    return softcap(
        head(decoder.embed_tokens, decoder.norm(states)), model.config.text.final_logit_softcapping
    )


def _cross_entropy(
    model: DiffusionGemma, states: mx.array, targets: mx.array, weights: mx.array
) -> mx.array:
    """Map states [B, S, M], targets int32 and weights float32 [B, S] to the weighted sum."""

    def summed(states: mx.array, places: slice) -> mx.array:
        each = nn.losses.cross_entropy(_logits(model, states), targets[:, places])
        return (each * weights[:, places]).sum()

    return sum(_in_slices(model, summed, states), start=mx.zeros(()))


def _in_slices(
    model: DiffusionGemma, function: Callable[..., mx.array], states: mx.array
) -> list[mx.array]:
    """Return `function(states, places)` on slices of states [B, S, M], each computed again for its
    gradients if there are several."""
    B, S = states.shape[:2]
    step = max(1, _LOGITS_BYTES // (4 * B * model.config.text.vocab_size))
    if step >= S:
        return [function(states, places=slice(None))]
    decoder, out = model.model.decoder, []
    for start in range(0, S, step):
        places = slice(start, min(start + step, S))
        # Integers are not arguments, which need a gradient.
        again = computed_twice(
            (decoder.embed_tokens, decoder.norm), partial(function, places=places)
        )
        out.append(again(states[:, places]))
    return out


def _run_twice(seed: int, layer: nn.Module, *arguments: Any) -> tuple[mx.array, list[LayerContext]]:
    x, (segment,), scalar = arguments
    past = segment.past

    def run(x: mx.array, scalar: mx.array, *past: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        mx.random.seed(seed)
        before = LayerContext(*past) if past else None
        out, (kept,) = layer(x, [replace(segment, past=before)], scalar)
        return out, kept.keys, kept.values

    arrays = () if past is None else (past.keys, past.values)
    out, keys, values = computed_twice((layer,), run)(x, scalar, *arrays)
    return out, [LayerContext(keys, values)]


def _see_twice(seed: int, layer: nn.Module, *arguments: mx.array) -> mx.array:
    def run(*arguments: mx.array) -> mx.array:
        mx.random.seed(seed)
        return layer(*arguments)

    out: mx.array = computed_twice((layer,), run)(*arguments)
    return out


def computed_twice(
    modules: tuple[nn.Module, ...], function: Callable[..., Any]
) -> Callable[..., Any]:
    """Apply `mx.checkpoint` to a function of arrays that also uses the weights of modules.

    Weights must be arguments, or their gradients would be lost. The modules get their own back,
    since several passes use one set of weights. (MLX 0.32 passes a checkpoint's arguments on
    unchanged, so there it makes no difference.)
    """

    def with_weights(weights: list[Any], *arrays: mx.array) -> Any:
        before = [module.trainable_parameters() for module in modules]
        for module, given in zip(modules, weights, strict=True):
            module.update(given)
        try:
            with training():  # the second time is for the gradients, long after `losses`
                return function(*arrays)
        finally:
            for module, own in zip(modules, before, strict=True):
                module.update(own)

    again = mx.checkpoint(with_weights)

    def call(*arrays: mx.array) -> Any:
        # Copies of the tree, so that updates do not change the trace's arrays.
        weights = [tree_map(lambda a: a, module.trainable_parameters()) for module in modules]
        return again(weights, *arrays)

    return call
