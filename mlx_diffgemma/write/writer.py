"""The writer of slots: windows of a template's tokens, the lengths of slots from one canvas under
the whole window, then the text at these lengths. Knows ids, not text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx
import numpy as np

from ..config.generation import ResolvedSettings
from ..constraint.decode import certain
from ..constraint.line import Line
from ..constraint.marginals import Strings
from ..denoise.constrained import Span, TokenConstraint
from ..denoise.noise import SeededNoise
from ..denoise.pinned import FREE, Pinned, TokenSet
from ..denoise.row import Row
from ..denoise.standing import NONE, Standing
from ..denoise.stopping import width_for
from ..events import Event, Finished, LoopEvent, StepDone, TrialStarted
from ..language.images import ImagePatches
from ..model import Context, DiffusionGemma
from .job import Ask, Job
from .lengths import Search, StandingSlots, Window
from .regions import Piece, Region

_LEAST_CERTAIN = 1e-12
_GROWTH = 8  # tokens


@dataclass(slots=True, eq=False)
class Written:
    """The result of a slot's region."""

    region: Region
    tokens: tuple[int, ...]
    certainties: np.ndarray  # float [n], of the tokens
    lengths: dict[int, float]  # see `FilledSlot`

    def certainty(self, inside: slice) -> float:
        """Return the geometric mean of some tokens' probabilities."""
        part = np.maximum(self.certainties[inside], _LEAST_CERTAIN)
        return float(np.exp(np.log(part).mean()))


@dataclass(slots=True, eq=False)
class Writer:
    """Writes the pieces window by window. A window is the part that one canvas holds, from the
    first open slot on, or the whole rest if that fits."""

    model: DiffusionGemma
    settings: ResolvedSettings
    ends: tuple[int, int]  # the end of the turn, and the token that fills a canvas after it
    texts: TokenSet  # all tokens that are text
    rest: list[Piece]
    # The texts of regions that stand already, as tokens, by the slot's name.
    standing: Mapping[str, np.ndarray] = field(default_factory=dict)
    context: Context | None = None
    done: list[Written] = field(default_factory=list)
    canvases: int = 0
    steps: int = 0
    positions: int = 0
    notes: list[str] = field(default_factory=list)

    def read(self, tokens: np.ndarray, images: Sequence[ImagePatches] = ()) -> Job[Event]:
        """Read tokens, int32 [S], and the images in them behind the context so far."""
        row = Row(
            self.model,
            self.settings,
            tokens,
            images=images,
            context=self.context,
            only_reads=True,
        )
        yield Ask([row])
        event = yield None
        if self.context is None and event is not None:
            yield event  # of the prompt
        self.context = row.context

    def write(self) -> Job[Event]:
        """Fill every slot, in order."""
        while any(isinstance(piece, Region) for piece in self.rest):
            yield from self._advance()
            inside = _fitting(self.rest, self.settings.canvas_length)
            regions = [p for p in self.rest[:inside] if isinstance(p, Region)]
            lengths = [region.lengths[0] for region in regions]
            chances: list[dict[int, float]] = [{} for _ in regions]
            start = None
            if any(len(region.lengths) > 1 for region in regions):
                self._note_bounds(regions)
                search = Search.under(self._window(inside), self.settings)
                start = yield from self._find(regions, search)
                lengths, chances = search.lengths, search.chances
            yield from self._settle(regions, lengths, chances, start)
            self.canvases += 1

    def _advance(self) -> Job[Event]:
        """Commit the text before the next slot, unless one canvas holds the whole rest with as many
        tokens as are asked for: so a window shows as much of the text after it as possible."""
        if _holds(self.rest, self.settings.canvas_length):
            return
        first = _first_region(self.rest)
        lead = [token for piece in self.rest[:first] for token in cast(list[int], piece)]
        self.rest = self.rest[first:]
        if lead:
            yield from self.read(np.array(lead, np.int32))

    def _find(
        self, regions: list[Region], search: Search
    ) -> Generator[Event | Ask | None, LoopEvent | None, np.ndarray | None]:
        """Denoise a canvas under the whole window until the lengths of the regions are decided.
        Return what a warm start begins with, int32 [W]; None for noise."""
        window, width = search.window, self._widest()
        automaton = window.constraint.automaton
        given = Pinned(
            certain(automaton, width, window.ends),
            spans=[Span(window.constraint, 0, width, window.ends, search)],
        )
        if (given.tokens != FREE).all():  # there is one text only, and nothing to denoise
            masses = np.tile(automaton.sizes / automaton.sizes.sum(), (width, 1))
            search(Strings.of(automaton, masses, window.ends))
            return None
        settings = replace(
            self.settings,
            canvas_length=width,
            canvas_width="fixed",
            max_denoising_steps=search.steps,
        )
        stands = self._stands(regions, lambda: search.places() if search.is_over else None)
        last = yield from self._denoise(
            regions, [None] * len(regions), given, settings, width, stands=stands
        )
        if stands is None or last is None:
            return None
        # What this canvas has accepted is as good as noise that a first step accepts.
        start = np.where(np.array(last.accepted)[0], np.array(last.draft)[0], NONE)
        found = stands.found
        return start if found is None else np.where(found != NONE, found, start)

    def _stands(
        self, regions: list[Region], places: Callable[[], list[tuple[int, int]] | None]
    ) -> StandingSlots | None:
        """Return what stands in regions; None if nothing does, or nothing is to be kept.

        Args:
          regions: of the canvas.
          places: returns their columns, once they are known.
        """
        stands = any(region.name in self.standing for region in regions)
        if not (self.settings.warm_start and stands):
            return None

        def texts() -> list[Standing]:
            return [
                Standing(self.standing[region.name], start, stop, is_whole=True)
                for region, (start, stop) in zip(regions, places() or (), strict=False)
                if region.name in self.standing
            ]

        return StandingSlots(texts)

    def _widest(self) -> int:
        """Return the columns that the rest may need, where only such are computed; else all."""
        L = self.settings.canvas_length
        if self.settings.canvas_width == "fixed":
            return L
        longest = [len(p) if isinstance(p, list) else p.lengths[-1] for p in self.rest]
        return width_for(min(1 + sum(longest), L), L)

    def _settle(
        self,
        regions: list[Region],
        lengths: list[int],
        chances: list[dict[int, float]],
        start: np.ndarray | None,
    ) -> Job[Event]:
        """Denoise the window at the lengths of its regions, and take their tokens."""
        given, places, needed = self._pin(regions, lengths)
        stands = self._stands(regions, lambda: places) if start is None else None
        last = yield from self._denoise(
            regions, lengths, given, self.settings, needed, stands=stands, start=start
        )
        draft, certainty = given.tokens, np.ones(len(given.tokens))
        if last is not None:
            draft, certainty = np.array(last.draft)[0], np.array(last.certainty)[0]
        for region, (first, stop), found in zip(regions, places, chances, strict=True):
            tokens = draft[first:stop].tolist()
            self.rest[self.rest.index(region)] = tokens
            likely: dict[int, float] = {}
            for n, chance in found.items():
                likely[region.own(n)] = likely.get(region.own(n), 0.0) + chance
            if len(region.lengths) == 1:
                likely = {}
            self.done.append(Written(region, tuple(tokens), certainty[first:stop], likely))

    def _note_bounds(self, regions: list[Region]) -> None:
        """Note where fewer tokens are possible than were asked for."""
        room = self._room() - sum(region.lengths[0] for region in regions)
        for region in regions:
            most = region.lengths[0] + room - region.borders
            if region.asked is not None and most < region.asked:
                self.notes.append(
                    f"slot {region.name}: at most {most} of {region.asked} tokens were possible, "
                    "so that the canvas shows the text after it"
                )

    def _room(self) -> int:
        """Return the tokens that the slots of the window may have together. Up to half a canvas of
        the text after them must be visible: a slot that fills the window would suit any text."""
        L = self.settings.canvas_length
        inside = _fitting(self.rest, L)
        last = _last_region(self.rest[:inside])
        before = sum(len(p) for p in self.rest[:last] if isinstance(p, list))
        return L - before - self._visible(inside)

    def _visible(self, inside: int) -> int:
        """Return how many tokens behind the last region that is written the canvas must show."""
        L = self.settings.canvas_length
        last = max(i for i in range(inside) if isinstance(self.rest[i], Region))
        used = least_tokens(self.rest[: last + 1]) - 1
        return min(least_tokens(self.rest[last + 1 :]), L // 2, L - used)

    def _window(self, inside: int) -> Window:
        """Return what the canvas may hold."""
        L, line = self.settings.canvas_length, Line(self.model.config.text.vocab_size)
        visible, last = self._visible(inside), _last_region(self.rest[:inside])
        at = gap = behind = 0
        entries: list[int] = []
        exits: list[int] = []
        gaps: list[int] = []
        allowed: list[int] = []
        for i, piece in enumerate(self.rest):
            if isinstance(piece, Region):
                entry, at = at, line.state()
                within = line.put(entry, piece.part, at)
                if i <= last:
                    entries.append(entry)
                    exits.append(at)
                    gaps.append(gap)
                    gap = 0
                else:
                    behind += piece.lengths[0]
                    allowed += [*within, at]  # the canvas may end inside of a later slot
                continue
            for token in piece[: L + 1]:
                line.token(at, token, onward := line.state())
                at, gap = onward, gap + 1
                behind += i > last
                if i > last and behind >= visible:
                    allowed.append(at)
            if behind > L:
                break
        if visible == 0:
            allowed.append(exits[-1])
        end, fill = self.ends
        line.token(at, end, stop := line.state())
        line.token(stop, fill, stop)
        automaton = line.automaton(stop)
        ends = np.zeros(len(automaton.distance), bool)
        ends[[*allowed, automaton.end]] = True
        constraint = TokenConstraint.of(automaton)
        return Window(constraint, entries, exits, gaps, ends)

    def _denoise(
        self,
        regions: list[Region],
        lengths: Sequence[int | None],
        given: Pinned,
        settings: ResolvedSettings,
        needed: int,
        *,
        stands: StandingSlots | None = None,
        start: np.ndarray | None = None,
    ) -> Generator[Event | Ask | None, LoopEvent | None, StepDone | None]:
        """Denoise one canvas after the context; return its last step, None if all is given."""
        settings = replace(
            settings,
            max_new_tokens=min(settings.canvas_length, needed),
            empty_rerolls=0,
            eos_token_ids=self.ends[:1],  # extra end tokens, such as a line break, do not count
        )
        is_final = None not in lengths
        yield TrialStarted(
            self.canvases,
            tuple(region.name for region in regions),
            tuple(
                None if length is None else region.own(length)
                for region, length in zip(regions, lengths, strict=True)
            ),
            mx.array(given.tokens[None] >= 0),
            is_final=is_final,
        )
        noise = SeededNoise(self.settings.seed, attempt=self.canvases)
        row = Row(
            self.model,
            settings,
            context=self.context,
            is_shared=not is_final,  # a few steps are not worth a copy
            noise=noise,
            pinned=given,
            stands=stands,
            start=start,
        )
        yield Ask([row])
        last = event = None
        while not isinstance(event, Finished):
            event = yield None
            if isinstance(event, StepDone):
                last = event
                yield replace(event, canvas_index=self.canvases)
        self.steps += event.steps
        self.positions += event.positions
        return last

    def _pin(
        self, regions: list[Region], lengths: list[int]
    ) -> tuple[Pinned, list[tuple[int, int]], int]:
        """Return the window with its regions at some lengths, their places, and the columns that it
        needs."""
        L = self.settings.canvas_length
        tokens, spans = np.full(L, FREE, np.int32), []
        at, places, given = 0, [], dict(zip(map(id, regions), lengths, strict=True))
        for piece in self.rest:
            if isinstance(piece, list):
                stop = min(L, at + len(piece))
                tokens[at:stop] = piece[: stop - at]
            else:
                stop = min(L, at + given.get(id(piece), piece.lengths[0]))
                if id(piece) in given:
                    places.append((at, stop))
                    if piece.constraint is not None:
                        ends = piece.part.ends
                        automaton = piece.constraint.automaton
                        tokens[at:stop] = certain(automaton, stop - at, ends)
                        if (tokens[at:stop] == FREE).any():
                            spans.append(Span(piece.constraint, at, stop, ends))
            at = stop
            if at == L:
                break
        else:
            tokens[at : at + 1], tokens[at + 1 :] = self.ends
            at = min(L, at + 1)
        return Pinned(tokens, self.texts, spans), places, at


def least_tokens(pieces: Sequence[Piece]) -> int:
    """Return the least number of tokens, with the end of the turn."""
    return 1 + sum(len(p) if isinstance(p, list) else p.lengths[0] for p in pieces)


def least_lead(pieces: Sequence[Piece], canvas_length: int) -> int:
    """Return the tokens that are read before the last canvas, with each slot as short as it may
    be."""
    lead, rest = 0, pieces
    while not _holds(rest, canvas_length):
        first = _first_region(rest)
        lead, rest = lead + least_tokens(rest[:first]) - 1, rest[first:]
        inside = _fitting(rest, canvas_length)
        if all(isinstance(piece, list) for piece in rest[inside:]):
            break
        lead, rest = lead + least_tokens(rest[:inside]) - 1, rest[inside:]
    return lead


def may_be_cut(pieces: Sequence[Piece], canvas_length: int) -> bool:
    """Return whether some possible length pushes text out of the canvas."""
    literal = sum(len(piece) for piece in pieces if isinstance(piece, list))
    last = _last_region(pieces)
    is_long = least_tokens(pieces) > canvas_length
    return is_long or (least_tokens(pieces[last + 1 :]) > canvas_length // 2 and literal > 0)


def _holds(pieces: Sequence[Piece], canvas_length: int) -> bool:
    """Return whether one canvas holds everything with as many tokens as are asked for."""
    asked = (
        max(0, piece.asked + piece.borders - piece.lengths[0])
        for piece in pieces
        if isinstance(piece, Region) and piece.asked is not None
    )
    return least_tokens(pieces) + sum(asked) <= canvas_length


def _first_region(pieces: Sequence[Piece]) -> int:
    return next(i for i, piece in enumerate(pieces) if not isinstance(piece, list))


def _last_region(pieces: Sequence[Piece]) -> int:
    return max(i for i, piece in enumerate(pieces) if not isinstance(piece, list))


def _fitting(pieces: Sequence[Piece], canvas_length: int) -> int:
    """Return how many pieces, up to and including a slot, one canvas holds; all of them if it holds
    the end of the turn too. Slots after the first get some tokens to grow into."""
    if least_tokens(pieces) <= canvas_length:
        return len(pieces)
    at, inside = 0, 0
    for i, piece in enumerate(pieces):
        if isinstance(piece, list):
            at += len(piece)
            continue
        at += max(piece.lengths[0], min(piece.lengths[-1], _GROWTH)) if inside else piece.lengths[0]
        if at > canvas_length:
            break
        inside = i + 1
    return inside
