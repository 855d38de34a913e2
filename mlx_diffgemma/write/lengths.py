"""The lengths of slots: what one canvas may hold from some piece on, the lengths that its strings
have, and what stands in slots once those are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config.generation import ResolvedSettings
from ..constraint.marginals import Strings
from ..denoise.constrained import TokenConstraint
from ..denoise.standing import Kept, Standing

# Where the length of a slot is open, a canvas is denoised first that may hold any window of the
# template. The lengths are those that are likeliest under the model once they are DECIDED, a
# probability, or after SEARCH_STEPS steps. Text that stands at its place by then helps with the
# rest: the final text is written from noise again, with everything given in its place. A warm start
# begins with what stands there and what the search has accepted.
DECIDED = 0.9
SEARCH_STEPS = 4
LEAST_SHOWN = 1e-3  # probability of a length in a result


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What a canvas may hold from some piece on, as an automaton."""

    constraint: TokenConstraint
    entries: list[int]  # per region that is written: the state before it
    exits: list[int]  # and the one behind it
    gaps: list[int]  # given tokens before it, from the region before on
    ends: np.ndarray  # bool [S], the states that may stand at the canvas's end


@dataclass(slots=True, eq=False)
class Search:
    """The lengths of regions as the strings of a step have them."""

    window: Window
    steps: int  # at most
    is_over: bool = False
    lengths: list[int] = field(default_factory=list)
    chances: list[dict[int, float]] = field(default_factory=list)
    _seen: int = 0  # steps

    @classmethod
    def under(cls, window: Window, settings: ResolvedSettings) -> Search:
        """Return a search that has as many steps as the settings allow."""
        return cls(window, min(SEARCH_STEPS, settings.max_denoising_steps))

    def __call__(self, strings: Strings) -> bool:
        """Take the lengths of a step; return whether they are decided. Each is the likeliest given
        those before it."""
        self.lengths, self.chances = [], []
        at, sure, window = 0, 1.0, self.window
        for entry, leave, gap in zip(window.entries, window.exits, window.gaps, strict=True):
            at += gap
            chances = strings.passages(at, entry, leave)[at:]
            length = int(chances.argmax())
            sure *= chances[length]
            at += length
            self.lengths.append(length)
            self.chances.append(
                {n: float(chances[n]) for n in np.flatnonzero(chances >= LEAST_SHOWN).tolist()}
            )
        self._seen += 1
        is_decided = bool(sure >= DECIDED)
        self.is_over = is_decided or self._seen == self.steps
        return is_decided

    def places(self) -> list[tuple[int, int]]:
        """Return the columns of the regions at the lengths found: the first, and that behind the
        last."""
        places, at = [], 0
        for gap, length in zip(self.window.gaps, self.lengths, strict=True):
            places.append((at + gap, at + gap + length))
            at += gap + length
        return places


@dataclass(slots=True, eq=False)
class StandingSlots:
    """The texts that stand in regions, once their columns are known."""

    find: Callable[[], Sequence[Standing]]
    found: np.ndarray | None = None  # int32 [W], the tokens kept, NONE elsewhere
    reading: None = None  # a region has text behind it too

    def columns(self, width: int) -> int:
        return width  # the budget says how many

    def texts(self, begin: int, width: int) -> Sequence[Standing]:
        return self.find()

    def kept(self, kept: Kept) -> None:
        self.found = kept.tokens[0]

    def committed(self, tokens: np.ndarray, *, is_read: bool = False) -> None:
        pass  # a row of a writer has one canvas
