"""The writer of slots: windows of a template's tokens, lengths tried as rows over one context, and
their score. Knows ids, not text."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx
import numpy as np

from ..config.generation import ResolvedSettings
from ..constraint.automaton import Automaton
from ..denoise.noise import SeededNoise
from ..denoise.pinned import ANY, FREE, Pinned, Span, TokenSets
from ..denoise.row import Row
from ..denoise.sampler import probability_of
from ..denoise.step import look_once
from ..events import Event, Finished, LoopEvent, StepDone, TrialStarted
from ..model import Context, DiffusionGemma, OpenContext
from .job import Ask, Job

# Lengths are tried in batches of at most ROWS rows, fewer if their logits would exceed MOST_LOGITS
# numbers: all possible lengths, or ALL_OF spread over them and then the best one's neighbours.
# Several slots of unknown length take turns, ROUNDS times. A trial takes TRIAL_STEPS denoise steps,
# and its score LOOKS more. The certainty of a settled text is no score, since the model agrees with
# any text that has settled. So half of the written tokens are made noise again, and the score is
# the probability of the pinned text around them: next to a slot of the wrong length it is
# improbable.
ROWS = 8
MOST_LOGITS = 1 << 28  # 1 GiB in float32
ALL_OF = 24
ROUNDS = 2
TRIAL_STEPS = 2
LOOKS = 2
NOISE_LEVEL = 0.5
_LEAST_CERTAIN = 1e-12
_GROWTH = 8  # tokens


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The possible contents of a slot, in tokens."""

    name: str
    lengths: list[int]  # ascending
    asked: int | None  # the longest length that the template or the user asks for
    automaton: Automaton | None  # None for free text
    text_tokens: np.ndarray  # ids of all tokens that are text, sorted
    _sets: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def sets(self, length: int) -> list[np.ndarray]:
        """Return the tokens that each position may hold."""
        if self.automaton is None:
            return [self.text_tokens] * length
        if length not in self._sets:
            self._sets[length] = self.automaton.allowed(length)
        return self._sets[length]


Piece = list[int] | Choice


@dataclass(slots=True, eq=False)
class Written:
    """The result of a slot."""

    tokens: tuple[int, ...]
    certainty: float
    lengths: dict[int, float]


@dataclass(slots=True, eq=False)
class _Trial:
    """One denoised row and its result."""

    texts: list[np.ndarray]  # tokens of each open slot of the window
    certainties: list[np.ndarray]
    canvas: np.ndarray  # [L], the whole row
    written: np.ndarray  # bool [L], the positions that were not given
    judged: np.ndarray  # float64 [L], the weight of each position in the score


@dataclass(slots=True, eq=False)
class Writer:
    """Writes the pieces window by window. A window is the part that one canvas holds, from the
    first open slot on, or the whole rest if that fits."""

    model: DiffusionGemma
    settings: ResolvedSettings
    ends: tuple[int, int]  # the end of the turn, and the token that fills a canvas after it
    text_tokens: np.ndarray  # ids of all tokens that are text
    rest: list[Piece]
    context: Context | None = None
    done: list[Written] = field(default_factory=list)
    canvases: int = 0
    steps: int = 0
    positions: int = 0
    batches: int = 0
    notes: list[str] = field(default_factory=list)

    def read(self, tokens: np.ndarray) -> Job[Event]:
        """Read tokens, int32 [S], behind the context so far."""
        row = Row(self.model, self.settings, tokens, context=self.context, only_reads=True)
        yield Ask([row])
        event = yield None
        if self.context is None and event is not None:
            yield event  # of the prompt
        self.context = row.context

    def write(self) -> Job[Event]:
        """Fill every slot, in order."""
        while any(isinstance(piece, Choice) for piece in self.rest):
            yield from self._advance()
            inside = _fitting(self.rest, self.settings.canvas_length)
            choices = [p for p in self.rest[:inside] if isinstance(p, Choice)]
            best, scores = yield from self._search(choices)
            self.canvases += 1
            for choice, tokens, certainty, tried in zip(
                choices, best.texts, best.certainties, scores, strict=True
            ):
                self.rest[self.rest.index(choice)] = tokens.tolist()
                mean = float(np.exp(np.log(np.maximum(certainty, _LEAST_CERTAIN)).mean()))
                self.done.append(Written(tuple(tokens.tolist()), mean, tried))

    def _advance(self) -> Job[Event]:
        """Commit the text before the next slot, unless one canvas holds the whole rest: so a window
        shows as much of the text after it as possible."""
        if least_tokens(self.rest) <= self.settings.canvas_length:
            return
        first = next(i for i, piece in enumerate(self.rest) if isinstance(piece, Choice))
        lead = [token for piece in self.rest[:first] for token in cast(list[int], piece)]
        self.rest = self.rest[first:]
        if lead:
            yield from self.read(np.array(lead, np.int32))

    def _search(
        self, choices: list[Choice]
    ) -> Generator[Event | Ask | None, LoopEvent | None, tuple[_Trial, list[dict[int, float]]]]:
        """Return the best lengths found for the slots of a window, and every score by slot and
        length."""
        room = self._room()
        logits = self.settings.canvas_length * self.model.config.text.vocab_size
        most = max(1, min(ROWS, MOST_LOGITS // logits))
        lengths = _start(choices, room)
        scores: list[dict[int, float]] = [{} for _ in choices]
        unknown = [i for i, choice in enumerate(choices) if len(choice.lengths) > 1]
        for _ in range(ROUNDS if len(unknown) > 1 else 1):
            before = lengths
            for i in unknown:
                others = sum(lengths) - lengths[i]
                possible = [n for n in choices[i].lengths if n + others <= room]
                self._note_bounds(choices[i], possible)
                tried: dict[int, float] = {}
                while len(possible) > 1 and (batch := _next_lengths(possible, tried, most)):
                    rows = [(*lengths[:i], n, *lengths[i + 1 :]) for n in batch]
                    trials = yield from self._denoise(choices, rows, TRIAL_STEPS)
                    tried.update(zip(batch, self._scores(trials), strict=True))
                scores[i] = tried  # with the other slots' current lengths
                n = max(tried, key=lambda n: tried[n]) if tried else possible[0]
                lengths = (*lengths[:i], n, *lengths[i + 1 :])
            if lengths == before:
                break
        (best,) = yield from self._denoise(choices, [lengths], None)
        return best, scores

    def _note_bounds(self, choice: Choice, possible: list[int]) -> None:
        """Note where fewer tokens are tried than were asked for."""
        if choice.asked is not None and possible[-1] < choice.asked:
            note = (
                f"slot {choice.name}: at most {possible[-1]} of {choice.asked} tokens were tried, "
                "so that the canvas shows the text after it"
            )
            if note not in self.notes:
                self.notes.append(note)

    def _scores(self, trials: Sequence[_Trial]) -> list[float]:
        """Return the log-probability of each trial's pinned text, nats per token, while half of the
        rest is noise; plus that of options and expressions, since their length decides their
        content. Without either, return that of the rest."""
        written = np.stack([trial.written for trial in trials])
        noise = np.random.default_rng([self.settings.seed, self.batches])
        total = np.zeros(len(trials))
        for _ in range(LOOKS):
            is_noise = written & (noise.random(written.shape[1]) < NOISE_LEVEL)
            tokens = noise.choice(self.text_tokens, written.shape[1])
            noisy = [
                mx.array(np.where(where, tokens, trial.canvas)[None])
                for where, trial in zip(is_noise, trials, strict=True)
            ]
            assert self.context is not None
            opened = [OpenContext.beside(self.context) for _ in trials]
            for row, seen in enumerate(look_once(self.model, noisy, opened)):
                truth = mx.array(trials[row].canvas[None])
                probability = np.array(probability_of(truth, seen), np.float64)[0]
                logs = np.log(np.maximum(probability, _LEAST_CERTAIN))
                total[row] += (logs * trials[row].judged).sum()
        self.positions += LOOKS * written.size
        return (total / LOOKS).tolist()

    def _room(self) -> int:
        """Return the tokens that the slots of the window may have together. Up to half a canvas of
        the text after them must be visible: a slot that fills the window would suit any text."""
        L = self.settings.canvas_length
        slots = [
            i
            for i, piece in enumerate(self.rest[: _fitting(self.rest, L)])
            if isinstance(piece, Choice)
        ]
        before = sum(len(p) for p in self.rest[: slots[-1]] if isinstance(p, list))
        behind = least_tokens(self.rest[slots[-1] + 1 :])
        least = sum(cast(Choice, self.rest[i]).lengths[0] for i in slots)
        return max(least, L - before - min(behind, L // 2))

    def _denoise(
        self, choices: list[Choice], rows: list[tuple[int, ...]], trial_steps: int | None
    ) -> Generator[Event | Ask | None, LoopEvent | None, list[_Trial]]:
        """Denoise one canvas per row of lengths, all after the same context; without `trial_steps`,
        to its end."""
        L = self.settings.canvas_length
        most = self.settings.max_denoising_steps
        pinned, places, needed = self._pin(choices, rows)
        self.batches += 1
        settings = replace(
            self.settings,
            max_new_tokens=min(L, needed),
            max_denoising_steps=most if trial_steps is None else min(trial_steps, most),
            empty_rerolls=0,
            eos_token_ids=self.ends[:1],  # extra end tokens, such as a line break, do not count
        )
        yield TrialStarted(
            self.canvases,
            tuple(choice.name for choice in choices),
            tuple(rows),
            tuple(mx.array(row.tokens[None] >= 0) for row in pinned),
            is_final=trial_steps is None,
        )
        noises = [
            SeededNoise(self.settings.seed + number, attempt=self.batches - 1)
            for number in range(len(rows))
        ]
        yield Ask(
            [
                Row(
                    self.model,
                    settings,
                    number=number,
                    context=self.context,
                    is_shared=len(rows) > 1,
                    noise=noise,
                    pinned=given,
                )
                for number, (given, noise) in enumerate(zip(pinned, noises, strict=True))
            ]
        )
        last: dict[int, StepDone] = {}
        under_way = len(rows)
        while under_way:
            event = yield None
            if isinstance(event, StepDone):
                last[event.row] = event
                yield replace(event, canvas_index=self.canvases)
            elif isinstance(event, Finished):
                self.positions += event.positions
                under_way -= 1
        self.steps += 1 + max(event.step for event in last.values())
        return [
            self._trial(choices, given, slots, last[row])
            for row, (given, slots) in enumerate(zip(pinned, places, strict=True))
        ]

    def _trial(
        self, choices: list[Choice], pinned: Pinned, slots: list[tuple[int, int]], last: StepDone
    ) -> _Trial:
        """Return a row's result, from its last step."""
        draft, certainty = np.array(last.draft)[0], np.array(last.certainty)[0]
        canvas = pinned.tokens.copy()
        canvas[: len(draft)] = draft
        written = pinned.tokens == FREE
        constrained = np.zeros(len(canvas), bool)
        for choice, (start, stop) in zip(choices, slots, strict=True):
            constrained[start:stop] |= choice.automaton is not None
        parts = [part for part in (~written, constrained) if part.any()] or [written]
        return _Trial(
            [draft[start:stop] for start, stop in slots],
            [certainty[start:stop] for start, stop in slots],
            np.maximum(canvas, 0),  # columns that were not computed are pinned
            written,
            sum((part / part.sum() for part in parts), np.zeros(len(canvas))),
        )

    def _pin(
        self, choices: list[Choice], rows: list[tuple[int, ...]]
    ) -> tuple[list[Pinned], list[list[tuple[int, int]]], int]:
        """Return the window of each row, the places of its slots, and the columns that the widest
        needs."""
        L = self.settings.canvas_length
        ids: list[np.ndarray] = []
        known: dict[int, int] = {}  # id of a set -> its index
        sets = TokenSets(ids)
        pinned: list[Pinned] = []
        places: list[list[tuple[int, int]]] = []
        needed = 0
        for lengths in rows:
            tokens, chosen, spans = np.full(L, FREE, np.int32), np.full(L, ANY), []
            at, slots, given = 0, [], dict(zip(map(id, choices), lengths, strict=True))
            for piece in self.rest:
                if isinstance(piece, list):
                    stop = min(L, at + len(piece))
                    tokens[at:stop] = piece[: stop - at]
                else:
                    length = given.get(id(piece), piece.lengths[0])
                    stop = min(L, at + length)
                    for place, members in zip(range(at, stop), piece.sets(length), strict=False):
                        if id(members) not in known:
                            known[id(members)] = len(ids)
                            ids.append(members)
                        chosen[place] = known[id(members)]
                    if id(piece) in given:
                        slots.append((at, stop))
                        if piece.automaton is not None:
                            spans.append(Span(at, length, piece.automaton))
                at = stop
                if at == L:
                    break
            else:
                tokens[at : at + 1], tokens[at + 1 :] = self.ends
                at = min(L, at + 1)
            needed = max(needed, at)
            pinned.append(Pinned(tokens, sets, chosen, spans))
            places.append(slots)
        return pinned, places, needed


def least_tokens(pieces: Sequence[Piece]) -> int:
    """Return the least number of tokens, with the end of the turn."""
    return 1 + sum(len(p) if isinstance(p, list) else p.lengths[0] for p in pieces)


def may_be_cut(pieces: Sequence[Piece], canvas_length: int) -> bool:
    """Return whether some possible length pushes text out of the canvas."""
    literal = sum(len(piece) for piece in pieces if isinstance(piece, list))
    last = max(i for i, piece in enumerate(pieces) if not isinstance(piece, list))
    is_long = least_tokens(pieces) > canvas_length
    return is_long or (least_tokens(pieces[last + 1 :]) > canvas_length // 2 and literal > 0)


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


def _start(choices: Sequence[Choice], room: int) -> tuple[int, ...]:
    """Return the first lengths to try: each slot's share of the room, or the nearest possible
    length."""
    least = sum(choice.lengths[0] for choice in choices)
    share = (room - least) // (2 * len(choices))
    return tuple(
        max(n for n in choice.lengths if n <= choice.lengths[0] + share) for choice in choices
    )


def _next_lengths(possible: list[int], tried: Mapping[int, float], most: int) -> list[int]:
    """Return up to `most` lengths to try next: first all possible ones, or some spread over them
    with growing steps; then the best one's neighbours."""
    first = _spread(possible)
    if left := [n for n in first if n not in tried]:
        return left[:most]
    best = max(tried, key=lambda n: tried[n])
    below = max((n for n in tried if n < best), default=best)
    above = min((n for n in tried if n > best), default=best)
    between = [n for n in possible if below < n < above and n not in tried]
    return between[:: -(-len(between) // most)] if between else []


def _spread(lengths: list[int]) -> list[int]:
    if len(lengths) <= ALL_OF:
        return lengths
    ratio = len(lengths) ** (1 / (ALL_OF - 1))
    picked = {round(ratio**i) for i in range(ALL_OF)} | set(range(1, ALL_OF // 2))
    return [lengths[i - 1] for i in sorted(picked)]
