"""Images in a text: the places of their tokens, the features that stand there, and which tokens
attend to each other whatever their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The images of a piece of text."""

    features: mx.array  # [n, M], of all images of all rows, one behind another
    places: np.ndarray  # bool [B, S], where they stand

    def embedded(self, x: mx.array) -> mx.array:
        """Return the embeddings [B, S, M] with the features at their places."""
        places = self.places.reshape(-1)
        order = np.where(places, np.cumsum(places) - 1, 0).astype(np.int32)
        rows = self.features.astype(x.dtype)[mx.array(order)].reshape(x.shape)
        return mx.where(mx.array(self.places)[..., None], rows, x)

    def within(self, start: int, stop: int) -> Seen | None:
        """Return the part between two places, of which none is inside of an image."""
        places = self.places[:, start:stop]
        if not places.any():
            return None
        if places.sum() == self.places.sum():
            return Seen(self.features, places)
        numbers = np.cumsum(self.places).reshape(self.places.shape)[:, start:stop][places] - 1
        return Seen(self.features[mx.array(numbers.astype(np.int32))], places)

    @property
    def blocks(self) -> mx.array:
        """The number of the image that each token belongs to, -1 for text: int32 [B, S]. Tokens
        next to each other belong to one image."""
        edges = np.diff(self.places, axis=1, prepend=False) & self.places
        return mx.array(np.where(self.places, np.cumsum(edges, axis=1), -1).astype(np.int32))


def seen_at(places: np.ndarray, features: Sequence[mx.array]) -> Seen:
    """Return images at the places of their tokens.

    Args:
      places: bool [B, S], where image tokens stand.
      features: [n, M] of each image, in the order of their places, row by row.

    Raises:
      ValueError: if there are more or fewer image tokens than features, or a run of them ends
        inside of an image.
    """
    counts = [each.shape[0] for each in features]
    if sum(counts) != (tokens := int(places.sum())):
        each = " + ".join(map(str, counts)) or "0"
        raise ValueError(
            f"the text has {tokens} image tokens, and {len(counts)} images give {each} of them"
        )
    ends = set(np.cumsum(counts).tolist())
    done = 0
    for start, stop in runs(places):
        done += stop - start
        if done not in ends:
            raise ValueError(
                f"the image tokens end at {done}, inside of an image; the images have "
                f"{', '.join(map(str, counts))} of them"
            )
    joined = features[0] if len(features) == 1 else mx.concatenate(list(features), axis=0)
    return Seen(joined, places)


def runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each run of True in bool [B, S]; no run goes on in the next row."""
    for row in places:
        edges = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
        yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def piece_ends(places: np.ndarray, step_size: int) -> Iterator[int]:
    """Yield where the pieces of a text end that are read one after another: as many places as
    `step_size` says, but for images, which are read as a whole.

    Args:
      places: bool [B, S], where image tokens stand.
      step_size: places of a piece without images.
    """
    length = places.shape[1]
    inside = np.zeros(length + 1, bool)  # no piece may end there
    inside[1:-1] = (places[:, :-1] & places[:, 1:]).any(axis=0)
    end = 0
    while end < length:
        start, end = end, min(end + step_size, length)
        if inside[end]:
            before = end - int(np.argmin(inside[end::-1]))
            # Before the image if anything is before it, else behind it.
            end = before if before > start else end + int(np.argmin(inside[end:]))
        yield end
