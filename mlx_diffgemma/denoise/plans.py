"""How many columns a row's steps compute, from the numbers that the host has read. Reads nothing
from the device."""

from __future__ import annotations

from ..config.generation import ResolvedSettings
from .canvas import Plan, Readout
from .pinned import Pinned
from .standing import Stands
from .stopping import width_ahead, width_for


class Plans:
    """Makes the plans of one row."""

    def __init__(
        self,
        settings: ResolvedSettings,
        stands: Stands | None,
        readout: Readout | None,
        pinned: Pinned | None,
    ) -> None:
        """Prepare for a row, which needs all columns whatever is accepted if text stands there, is
        read out or is pinned."""
        self._settings = settings
        self._is_whole = any(given is not None for given in (stands, readout, pinned))
        # Whether canvases begin and end at any position, not at multiples of their length.
        is_read = stands is not None and stands.reading is not None
        self.ends_anywhere = settings.prefix_commit != "off" or is_read

    def first(self, left: int, places: int, stands: Stands | None) -> Plan:
        """Return the plan of a canvas's first step.

        Args:
          left: tokens that the answer may still have.
          places: positions that the model has for more tokens.
          stands: what stands there, if it counts.
        """
        settings = self._settings
        widest = width = settings.canvas_length
        if settings.canvas_width == "answer":  # columns past the budget are never written
            widest = width_for(min(left, widest), widest)
            if stands is not None:
                width = width_for(stands.columns(widest), settings.canvas_length)
        if self.ends_anywhere:
            widest = min(widest, places)
        width = min(width, widest, self._ahead_of(0))
        return Plan(width, width, widest)

    def behind(self, before: Plan, part: int, most: int) -> Plan:
        """Return the plan for what is left of a canvas behind its committed part, at most so many
        columns."""
        widest = min(most, before.widest - part)
        width = widest if before.width == before.widest else min(widest, before.width - part)
        return Plan(width, min(width, before.dense), widest)

    def next(self, before: Plan, check: list[int]) -> Plan:
        """Return the plan behind a step, from the numbers of its `Taken.check`."""
        settings, width, numbers = self._settings, before.widest, iter(check[1:])
        if settings.canvas_width == "answer":
            width = min(width, width_for(next(numbers), settings.canvas_length))
            if settings.lookahead < 1:
                front = max(next(numbers), check[-1] if settings.prefix_commit != "off" else 0)
                # What is known of more columns is not thrown away.
                width = min(width, max(before.width, self._ahead_of(front)))
        dense = width
        if settings.self_conditioning == "sparse":
            quarter = -(-width // 4)
            dense = min(width, -(-next(numbers) // quarter) * quarter)
        return Plan(width, dense, before.widest)

    def _ahead_of(self, accepted: int) -> int:
        """Return the columns to compute where so many on the left are accepted."""
        settings = self._settings
        if settings.canvas_width == "fixed" or self._is_whole:
            return settings.canvas_length
        return width_ahead(accepted, settings.lookahead, settings.canvas_length)
