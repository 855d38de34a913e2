"""Batches of examples: their order, noise and padding. All of it follows from the seed and the
batch's number, on the host, so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import mlx.core as mx
import numpy as np

from ..config.training import TrainSettings
from ..config.vision import VisionConfig
from .data import Example
from .pictures import Sight, sight

# Contexts are padded to multiples of this, and conditioned rows to a power of two: every new shape
# of a batch costs a trace.
_PLACES = 8
# Second seed of each generator, beside the run's.
_ORDER, _NOISE, _VALIDATION = 1, 2, 3


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """All random draws of a batch."""

    start: np.ndarray  # int [B], where in each answer the canvas starts that is denoised
    level: np.ndarray  # float [B], the probability that a token is replaced
    replaced: np.ndarray  # bool [B, C]
    noise: np.ndarray  # int [B, C], uniform tokens
    conditioned: np.ndarray  # bool [B]

    def rows(self, start: int, end: int) -> Draw:
        """Return the draws of some examples."""
        return Draw(*(getattr(self, field.name)[start:end] for field in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch on the device. Rows end their contexts at the same place, as in generation."""

    context: mx.array  # int32 [B, S], prompts and earlier canvases, padded on the left
    padding: mx.array  # int32 [B], places on the left without a token
    rest: mx.array | None  # int32 [B, R], the canvas and those after it, clean; for a causal loss
    targets: mx.array | None  # int32 [B, S + R], the next token at each place
    weights: mx.array | None  # float32 [B, S + R], sum 1: the mean over examples of their means
    noisy: mx.array  # int32 [B, C]
    clean: mx.array  # int32 [B, C]
    rows: mx.array | None  # int32 [n], rows that are conditioned, the first repeated; None: none
    place: mx.array | None  # int32 [B], where each row is among `rows`, -1 where it is not
    sight: Sight | None  # the images of the contexts
    tokens: int  # tokens read: contexts, clean text and canvases, without padding

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays by name, without those that are None."""
        names = ("context", "padding", "rest", "targets", "weights", "noisy", "clean")
        found = {name: getattr(self, name) for name in (*names, "rows", "place")}
        return {name: array for name, array in found.items() if array is not None}


class Order:
    """The examples of each batch, by its number from 0: every example once per epoch, with similar
    lengths from one pool of batches. The last few that fill no batch are left out; they differ in
    every epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, pool: int):
        self._lengths, self._batch_size, self._seed = np.asarray(lengths), batch_size, seed
        self._pool = pool * batch_size
        self._epoch, self._batches = -1, np.empty((0, batch_size), np.int64)

    def __getitem__(self, number: int) -> list[int]:
        epoch, place = divmod(number, len(self._lengths) // self._batch_size)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._of(epoch)
        return [int(i) for i in self._batches[place]]

    def _of(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, _ORDER, epoch])
        count = len(self._lengths) // self._batch_size
        shuffled = rng.permutation(len(self._lengths))[: count * self._batch_size]
        starts = range(0, len(shuffled), self._pool)
        parts = (shuffled[start : start + self._pool] for start in starts)
        by_length = [part[np.argsort(self._lengths[part], kind="stable")] for part in parts]
        return rng.permutation(np.concatenate(by_length).reshape(count, self._batch_size))


def draw(
    examples: Sequence[Example],
    settings: TrainSettings,
    canvas_length: int,
    vocab_size: int,
    iteration: int,
    *,
    validation: bool = False,
) -> Draw:
    """Return the noise of a batch: a uniform level for each example, which is the probability that
    a token of its canvas becomes a uniform one. A canvas starts at a multiple of its length, or
    anywhere in the answer where `max_seq_length` has room for it.

    Source: MODEL 5.1; google-deepmind/gemma, hackable_diffusion_adapter/configs/sft_sudoku.py and
    hd/sft_model.py @050b1a7.
    """
    rng = np.random.default_rng([settings.seed, _VALIDATION if validation else _NOISE, iteration])
    B, shape = len(examples), (len(examples), canvas_length)
    level = rng.uniform(settings.noise_min, settings.noise_max, B)
    drawn = Draw(
        start=rng.integers([e.canvases(canvas_length) for e in examples]) * canvas_length,
        level=level,
        replaced=rng.random(shape) < level[:, None],
        noise=rng.integers(0, vocab_size, shape),
        conditioned=rng.random(B) < settings.self_conditioning_probability,
    )
    if not settings.free_start_probability:
        return drawn
    is_free = rng.random(B) < settings.free_start_probability
    room = settings.max_seq_length - canvas_length
    anywhere = rng.integers([min(len(e.answer), room - len(e.prompt) + 1) for e in examples])
    return replace(drawn, start=np.where(is_free, anywhere, drawn.start))


def make_batch(
    examples: Sequence[Example],
    drawn: Draw,
    settings: TrainSettings,
    canvas_length: int,
    *,
    eos_token_id: int,
    pad_token_id: int,
    image_token_id: int | None = None,
    vision: VisionConfig | None = None,
) -> Batch:
    """Return a batch in which the end token fills every answer to the end of its last canvas, and
    of the one that is denoised.
    Images are read from their files; the causal loss leaves out their tokens.

    Raises:
      DataError: if an image cannot be read.
    """
    B, C = len(examples), canvas_length
    starts, texts = [], []  # where each canvas starts in its text
    for example, start in zip(examples, drawn.start.tolist(), strict=True):
        fill = max(example.canvases(C) * C, start + C) - len(example.answer)
        texts.append(
            np.concatenate([example.prompt, example.answer, np.full(fill, eos_token_id, np.int32)])
        )
        starts.append(len(example.prompt) + start)
    S = -(-max(starts) // _PLACES) * _PLACES
    R = max(len(text) - start for text, start in zip(texts, starts, strict=True))
    if settings.free_start_probability:
        R = -(-R // _PLACES) * _PLACES
    both = np.full((B, S + R), pad_token_id, np.int32)
    weights = np.zeros((B, S + R), np.float32)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        first = S - start
        both[row, first : first + len(text)] = text
        # Places whose next token is predicted: all but the last.
        prompt, canvases = len(examples[row].prompt), examples[row].canvases(C)
        begin = first + (prompt - 1 if settings.mask_prompt else 0)
        weights[row, begin : first + prompt + canvases * C - 1] = 1
    has_images = np.array([bool(example.pictures) for example in examples])
    images = (both == image_token_id) & has_images[:, None]
    weights[:, :-1][images[:, 1:]] = 0
    weights /= B * weights.sum(axis=1, keepdims=True)
    clean = both[:, S : S + C]
    rows = place = None
    if drawn.conditioned.any():
        chosen = np.flatnonzero(drawn.conditioned)
        count = min(B, 1 << int(len(chosen) - 1).bit_length())
        rows = np.concatenate([chosen, np.full(count - len(chosen), chosen[0])])
        place = np.full(B, -1)
        place[chosen] = np.arange(len(chosen))
    has_causal = settings.causal_weight > 0
    read = sum(map(len, texts)) if has_causal else sum(starts)
    return Batch(
        context=_array(both[:, :S]),
        padding=_array(np.array([S - start for start in starts])),
        rest=_array(both[:, S:]) if has_causal else None,
        targets=_array(np.roll(both, -1, axis=1)) if has_causal else None,
        weights=mx.array(weights) if has_causal else None,
        noisy=_array(np.where(drawn.replaced, drawn.noise, clean)),
        clean=_array(clean),
        rows=None if rows is None else _array(rows),
        place=None if place is None else _array(place),
        sight=sight(
            [picture for example in examples for picture in example.pictures], images[:, :S], vision
        ),
        tokens=read + B * C,
    )


def _array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.int32))
