"""One row's canvas as a state between two steps. Built by steps, read by the host; lazy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config.generation import ResolvedSettings
from ..events import StepDone
from .constrained import CanvasConstraint, Span
from .noise import Noise
from .pinned import PinnedCanvas
from .standing import Kept, Standing


@dataclass(frozen=True, slots=True)
class Plan:
    """The host's decisions about a row's next step."""

    width: int  # columns that it computes
    dense: int  # of them, those whose soft embedding is dense
    widest: int  # columns that may be needed: the canvas, or the rest of the budget


@dataclass(frozen=True, slots=True, eq=False)
class Belief:
    """The prediction of a step, for the next one's self-conditioning."""

    weights: mx.array  # [1, W, V], the model's type
    total: mx.array  # [1, W] float32
    entropy: mx.array  # [1, W] float32
    # Ids and probabilities of the likeliest tokens, for a sparse one.
    likeliest: tuple[mx.array, mx.array] | None = None


@dataclass(frozen=True, slots=True)
class Readout:
    """Probabilities that a step's event is to hold: those of some tokens at the first positions of
    a canvas."""

    positions: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """A canvas before a step."""

    row: int  # its number in the run
    settings: ResolvedSettings
    noise: Noise
    pinned: PinnedCanvas | None
    index: int  # of the canvas in the answer, from 0
    plan: Plan
    tokens: mx.array  # [1, L] int32, the step's input
    step: int = 0
    # With `prefix_commit`, of the canvas that this is the rest of: its steps, which count in the
    # schedule, and its columns that have been committed.
    age: int = 0
    committed: int = 0
    drafts: tuple[mx.array, ...] = ()  # [1, W] each, of the steps that the stop rules look back to
    belief: Belief | None = None
    held: mx.array | None = None  # [1, W] int32, see `sampler.hold`
    constraints: Sequence[CanvasConstraint | Span] = ()  # of different columns
    readout: Readout | None = None
    # The texts that stand here, for a step to keep; nothing is asked again once there were some.
    standing: Callable[[], Sequence[Standing]] | None = None
    skipped: int = 0  # steps of the schedule that a warm start leaves out

    @property
    def waits(self) -> bool:
        """Whether the host decides within a step, so that none can be built ahead."""
        return bool(self.constraints) or self.standing is not None

    @property
    def has_steps_left(self) -> bool:
        return self.age + self.step < self.settings.max_denoising_steps


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """The results of a step over one canvas."""

    event: StepDone
    # int32 [1] each, the numbers that the host reads: whether the row has settled; if the width
    # follows the answer, the columns needed, and with a lookahead those accepted on the left; if
    # self-conditioning is sparse, the uncertain ones; if parts are committed, the settled columns
    # on the left.
    check: tuple[mx.array, ...]
    after: Canvas  # before the next step, under the same plan
    kept: Kept | None = None  # of the texts that stand in the canvas
