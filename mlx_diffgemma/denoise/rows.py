"""The state of each row of a batch, and the host's plan for the next step. Uses numbers that the
loop has read already; reads only finished canvases from the device itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config.generation import ResolvedSettings
from ..config.model import ModelConfig
from ..errors import PromptError
from ..events import Finished
from .stopping import width_for


class Rows:
    """The state of each row: how much it has written, and whether it has ended."""

    def __init__(self, config: ModelConfig, settings: ResolvedSettings, longest: int, batch: int):
        room = check_room(config, settings, longest)
        self.settings = settings
        self.left = min(settings.max_new_tokens, room * settings.canvas_length)
        # Free positions: a shortened canvas moves the later ones.
        self.places = config.text.max_position_embeddings - longest
        self.ended = np.zeros(batch, bool)
        self.steps_run = 0  # of the current canvas
        self.new_tokens, self.steps, self.positions, self.row_canvases = (
            np.zeros(batch, int) for _ in range(4)
        )

    def count(self, live: np.ndarray, width: int) -> None:
        """Count one step over `width` columns, for the rows that had not settled."""
        self.steps_run += 1
        self.positions += live * width

    @property
    def are_done(self) -> bool:
        no_room = self.left == 0 or self.places < self.settings.canvas_length
        return bool(self.ended.all()) or no_room

    def take(self, draft: mx.array, row_steps: mx.array) -> tuple[np.ndarray, tuple[int, ...]]:
        """Cut a denoised canvas at `max_new_tokens`, pad it after end tokens, and count its tokens.

        Returns:
          The tokens [B, up to L], and the steps of each row.
        """
        tokens = np.array(draft)[:, : self.left]  # one host read per canvas
        steps = np.where(self.ended, 0, np.array(row_steps))
        self.left -= tokens.shape[1]
        self.places -= tokens.shape[1]
        is_end = np.isin(tokens, self.settings.eos_token_ids)
        ends_before: np.ndarray = np.cumsum(is_end, axis=1) - is_end
        keep = (ends_before == 0) & ~self.ended[:, None]
        tokens = np.where(keep, tokens, self.settings.pad_token_id).astype(np.int32)
        self.new_tokens += keep.sum(axis=1)
        self.steps += steps
        self.row_canvases += ~self.ended
        self.ended |= is_end.any(axis=1)
        return tokens, tuple(steps.tolist())

    def end(self, are_over: Sequence[bool]) -> None:
        """End rows for a reason that their tokens do not show."""
        self.ended |= np.array(are_over, bool)

    def finish(self) -> Finished:
        return Finished(
            tuple("stop" if ended else "length" for ended in self.ended),
            tuple(self.new_tokens.tolist()),
            tuple(self.steps.tolist()),
            tuple(self.row_canvases.tolist()),
            tuple(self.positions.tolist()),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The host's decisions about the next step."""

    width: int  # columns that it computes
    dense: int  # of them, those whose soft embedding is dense
    widest: int  # columns that may be needed: the canvas, or the rest of the budget


class Planner:
    """Plans each step of a canvas from the numbers that the host read of the last one."""

    def __init__(self, settings: ResolvedSettings, rows: Rows):
        self.settings, self.ended = settings, rows.ended
        self.widest = settings.canvas_length
        if settings.canvas_width == "answer":  # columns past the budget are never written
            self.widest = width_for(min(rows.left, self.widest), self.widest)

    def first(self) -> Plan:
        return Plan(self.widest, self.widest, self.widest)

    def next(self, check: np.ndarray) -> Plan:
        width = self.widest
        if self.settings.canvas_width == "answer":
            needed = int(check[:, 1][~self.ended].max())
            width = min(width, width_for(needed, self.settings.canvas_length))
        dense = width
        if self.settings.self_conditioning == "sparse":
            quarter = -(-width // 4)
            unsure = int(check[:, -1][check[:, 0] == 0].max())
            dense = min(width, -(-unsure // quarter) * quarter)
        return Plan(width, dense, self.widest)


def check_room(config: ModelConfig, settings: ResolvedSettings, longest: int) -> int:
    """Return how many whole canvases fit after a prompt."""
    limit, canvas = config.text.max_position_embeddings, settings.canvas_length
    room = (limit - longest) // canvas
    if room < 1:
        raise PromptError(
            f"the prompt has {longest} tokens; with a canvas of {canvas}, "
            f"at most {limit - canvas} of the {limit} positions are free for it"
        )
    return room
