"""Prefix commit: the settled left part of a canvas, and the rest of it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import (
    Constraint,
    GenerationSettings,
    SeededNoise,
    Store,
    bundled_model,
    denoise_tokens,
    generate,
    load,
)
from mlx_diffgemma.denoise import row as row_module
from mlx_diffgemma.denoise.canvas import Belief, Canvas, Plan, Readout
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.pinned import FREE, Pinned
from mlx_diffgemma.denoise.prefix import least_part, rest_of, settled_columns
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.events import CanvasCommitted, StepDone
from tests.checkpoints import load_drawn
from tests.denoise import mixtures
from tests.denoise.mixtures import Tally, compare
from tests.denoise.test_loop import (
    EOS,
    PAD,
    SURE,
    UNSURE,
    WORDS,
    L,
    Oracle,
    V,
    committed,
    run,
    steps_of,
    sure,
    unsure,
    widths_of,
)
from tests.denoise.test_loop import ahead as ahead  # every test here runs both ways

SHRINK = {"prefix_commit": "shrink"}
HALF = [SURE] * 4 + [UNSURE] * 4


class Embedding(Oracle):
    """One that given tokens can be embedded by."""

    def embed(self, tokens):
        return mx.zeros((*tokens.shape, V))


def half_then(rest):
    """A first canvas whose left half is sure at once, and what stands behind that half."""
    return lambda canvas, look: (WORDS, HALF) if canvas == 0 else rest


# The arithmetic, by hand


@pytest.mark.parametrize(
    ("previous", "entropy", "steps", "columns"),
    [
        ([[1, 2, 3, 4]], [0, 0, 0, 0], 1, 4),
        ([[1, 2, 9, 4]], [0, 0, 0, 0], 1, 2),
        ([[1, 2, 3, 4]], [0, 0.2, 0, 0], 1, 1),
        ([[1, 2, 3, 4]], [0, 0.1, 0, 0], 1, 4),
        ([[9, 2, 3, 4]], [0, 0, 0, 0], 1, 0),
        ([[1, 2, 3, 4]], [0, 0, 0, 0], 2, 0),
        ([[1, 2, 9, 4], [1, 2, 3, 4]], [0, 0, 0, 0], 2, 2),
        ([[9, 9, 9, 9], [1, 2, 3, 4]], [0, 0, 0, 0], 1, 4),
    ],
    ids=[
        "all",
        "up to the first that moved",
        "up to the first that is unsure",
        "the bound itself is sure",
        "none on the left",
        "not for long enough",
        "moved a step before",
        "older steps do not matter",
    ],
)
def test_settled_columns_are_counted_from_the_left(previous, entropy, steps, columns):
    found = settled_columns(
        mx.array([[1, 2, 3, 4]]),
        [mx.array([draft]) for draft in previous],
        mx.array([entropy], dtype=mx.float32),
        steps=steps,
        most_entropy=0.1,
    )
    assert found.tolist() == [columns]


def test_the_least_part_is_an_eighth_or_16_or_a_quarter():
    lengths = (256, 128, 96, 64, 32, 8, 5, 1)
    assert [least_part(length) for length in lengths] == [32, 16, 16, 16, 8, 2, 2, 1]


def test_the_rest_of_a_canvas_keeps_what_is_known_of_its_columns():
    settings = GenerationSettings(seed=1, **SHRINK).resolve(load_drawn(5).config)
    settings = replace(settings, canvas_length=8)
    columns = mx.arange(8)[None]
    weights, total = mx.broadcast_to(columns[..., None], (1, 8, 3)), columns + 0.5
    canvas = Canvas(
        *(0, settings, SeededNoise(1), None, 0, Plan(8, 8, 8), columns),
        step=10,
        age=2,
        committed=1,
        drafts=(columns, columns + 10),
        belief=Belief(weights, total, total, (weights, weights)),
        held=columns,
    )
    plan = Plan(4, 4, 4)
    rest = rest_of(canvas, 4, 1, plan, SeededNoise(7))
    assert (rest.index, rest.step, rest.age, rest.committed, rest.plan) == (1, 0, 12, 5, plan)
    assert rest.tokens.tolist() == [[4, 5, 6, 7]]
    assert [d.tolist() for d in rest.drafts] == [[[4, 5, 6, 7]], [[14, 15, 16, 17]]]
    assert rest.belief.weights[0, :, 0].tolist() == rest.held[0].tolist() == [4, 5, 6, 7]
    assert rest.belief.total.tolist() == rest.belief.entropy.tolist() == [[4.5, 5.5, 6.5, 7.5]]
    assert rest.belief.likeliest[1][0, :, 2].tolist() == [4, 5, 6, 7]
    narrow = replace(canvas, belief=Belief(weights[:, :4], total[:, :4], total[:, :4]))
    assert rest_of(narrow, 4, 1, plan, SeededNoise(7)).belief is None


# The loop


def test_a_canvas_goes_on_without_its_settled_left_part():
    oracle = Oracle(half_then(sure([*WORDS[4:], 0, 0, 0, 0])))
    events = run(oracle, **SHRINK)
    assert widths_of(events) == [8, 8, 8, 4]
    assert steps_of(events) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [canvas.tokens.tolist() for canvas in committed(events)] == [[WORDS[:4]], [WORDS[4:]]]
    assert [canvas.steps for canvas in committed(events)] == [3, 1]
    assert oracle.commits == [WORDS[:4]], "the rest is the last of the budget"
    done = events[-1]
    assert (done.reason, done.new_tokens, done.steps, done.canvases) == ("length", L, 4, 2)
    assert done.positions == 28
    _, soft = oracle.looks[1][0]
    assert np.array(soft)[0].argmax(-1).tolist() == WORDS[4:], "it knows its last prediction"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**SHRINK, "prefix_steps": 5},
        {**SHRINK, "prefix_entropy": 0.0},
    ],
    ids=["off by default", "not stable for long enough", "not sure enough"],
)
def test_a_left_part_that_has_not_settled_stays(settings):
    low = [8.0] * 4 + [UNSURE] * 4  # sure, but for a thousandth of a nat
    events = run(Oracle(lambda canvas, look: (WORDS, low)), **settings, max_denoising_steps=5)
    assert widths_of(events) == [8] * 5 and len(committed(events)) == 1


def test_a_part_of_less_than_a_quarter_waits():
    model = load_drawn(5, canvas_length=24)
    row = Row(
        model,
        GenerationSettings(seed=1, prefix_commit="shrink").resolve(model.config),
        np.array([5], np.int32),
    )
    rows = Rows(model)
    rows.add(row)
    list(rows.advance())
    assert row.canvas is not None
    assert [row.goes_on([0, part]) for part in (0, 5, 6)] == [True, True, False]


def test_an_end_in_the_settled_part_ends_the_answer_whatever_moves_behind_it():
    def script(canvas, look):
        return [30, EOS, *[40 + look] * 6], [SURE, SURE, *[UNSURE] * 6]

    assert len(steps_of(run(Oracle(script), max_denoising_steps=7))) == 7
    events = run(Oracle(script), **SHRINK, max_denoising_steps=7)
    assert len(steps_of(events)) == 3
    assert committed(events)[0].tokens.tolist() == [[30, EOS, *[PAD] * 6]]


def test_the_steps_of_a_canvas_and_of_its_rest_count_together():
    oracle = Oracle(half_then(unsure([*WORDS[4:], 0, 0, 0, 0])))
    events = run(oracle, **SHRINK, max_denoising_steps=6)
    assert len(steps_of(events)) == 6


def test_what_is_committed_counts_in_the_mean_entropy_of_the_rest():
    """0.007 nats in half of the columns are a mean of 0.0037 over the canvas."""
    height = 7.05
    rest = [*WORDS[4:], 0, 0, 0, 0], [height] * 8

    def entropies(events):
        return [float(e.entropy.mean()) for e in events if isinstance(e, StepDone)]

    settings = {"t_min": 0.6, "t_max": 0.6, "max_denoising_steps": 9, "prefix_entropy": 0.001}
    events = run(Oracle(half_then(rest)), **SHRINK, **settings)
    assert 0.005 < entropies(events)[3] < 0.01
    assert widths_of(events) == [8, 8, 8, 4], "one step more, as over the whole canvas"


def test_a_run_by_parts_ends_where_the_positions_end():
    oracle = Oracle(
        lambda canvas, look: (WORDS, HALF) if canvas % 2 == 0 else sure(WORDS),
        max_position_embeddings=3 + 2 * L + 1,
    )
    events = run(oracle, **SHRINK, max_new_tokens=100)
    assert events[-1].reason == "length" and events[-1].new_tokens == 2 * L
    assert sum(canvas.tokens.shape[1] for canvas in committed(events)) == 2 * L
    written = 3
    for event in events:
        if isinstance(event, StepDone):
            assert written + event.draft.shape[1] <= 3 + 2 * L + 1, "no position behind the last"
        elif isinstance(event, CanvasCommitted):
            written += event.tokens.shape[1]


def test_a_canvas_that_has_to_begin_with_given_tokens_is_not_the_rest_of_another():
    oracle = Embedding(half_then(sure([40, 41, 42, 43, 44, 45, 46, 47])))
    begins = iter([[], [40]])
    settings = GenerationSettings(seed=1, max_new_tokens=12, **SHRINK).resolve(oracle.config)
    rows = Rows(oracle)
    rows.add(Row(oracle, settings, np.array([10, 11, 12]), begin=lambda: next(begins, [])))
    events = list(rows.run())
    assert committed(events)[0].tokens.tolist() == [WORDS[:4]]
    assert committed(events)[1].tokens[0, 0].item() == 40
    tokens, soft = oracle.looks[1][0]
    assert soft is None and tokens[0, 0].item() == 40


def test_a_canvas_that_begins_with_given_tokens_is_committed_whole():
    oracle = Embedding(lambda canvas, look: (WORDS, HALF))
    settings = GenerationSettings(seed=1, max_denoising_steps=5, max_new_tokens=L, **SHRINK)
    rows = Rows(oracle)
    row = Row(oracle, settings.resolve(oracle.config), np.array([10]), begin=iter([[40]]).__next__)
    rows.add(row)
    (canvas,) = committed(list(rows.run()))
    assert canvas.tokens[0].tolist() == [40, *WORDS[1:]], "else its rest would begin so too"


def test_a_narrow_canvas_stays_narrow_behind_its_part():
    """The end is accepted, so that four columns are computed; two of them are committed."""
    left = [30, 31, 32, EOS, *[33] * 4], [SURE, SURE, UNSURE, UNSURE, *[UNSURE] * 4]
    rest = sure([32, EOS, *[33] * 6])
    oracle = Oracle(lambda canvas, look: left if canvas == 0 else rest)
    narrow = {"canvas_width": "answer", "stop_on": "answer", "entropy_bound": 1000}
    events = run(oracle, **SHRINK, **narrow, temperature=0)
    assert widths_of(events) == [8, 5, 5, 3]
    assert [c.tokens[0].tolist()[:2] for c in committed(events)] == [[30, 31], [32, EOS]]


class _Replay:
    """Another framework's draws."""


GIVEN = {"pinned": Pinned(np.array([3], np.int32))}


@pytest.mark.parametrize(
    ("settings", "more", "said"),
    [
        (SHRINK, {"noise": _Replay()}, "prefix_commit need seeded noise"),
        (SHRINK, GIVEN, "prefix_commit 'shrink' is not possible where text is pinned"),
        (SHRINK, {"readout": Readout(1, (3,))}, "prefix_commit 'shrink' is not possible"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(settings, more, said):
    oracle = Oracle(lambda canvas, look: sure(WORDS))
    settings = GenerationSettings(seed=1, **settings).resolve(oracle.config)
    with pytest.raises(ConfigError, match=said):
        Row(oracle, settings, np.array([10], np.int32), **more)


def test_fast_takes_pinned_text_whole():
    oracle = Embedding(lambda canvas, look: (WORDS, HALF))
    settings = GenerationSettings(seed=1, policy="fast", max_new_tokens=L, max_denoising_steps=5)
    pinned = [Pinned(np.array([9, FREE, FREE, FREE, FREE, FREE, FREE, FREE], np.int32))]
    (canvas,) = committed(list(denoise_tokens(oracle, mx.array([[10]]), settings, pinned=pinned)))
    assert canvas.tokens[0].tolist() == [9, *WORDS[1:]]


# Whole models


@pytest.fixture(scope="module")
def loaded():
    return load(bundled_model())


EAGER = {"prefix_steps": 1, "prefix_entropy": 1e9, "max_denoising_steps": 6}


def test_an_answer_by_parts_fits_its_constraint(loaded):
    settings = GenerationSettings(seed=3, max_new_tokens=90, **SHRINK, **EAGER)
    constraint = Constraint.regex("([0-9]+ ){20}end")
    text = generate(*loaded, "Count from 10 to 40.", settings=settings, constraint=constraint)
    assert constraint.accepts(text)


def test_parts_are_kept_in_a_store_and_found_again():
    model = load_drawn(5, canvas_length=8)
    prompt = np.array([10, 11, 12], np.int32)

    def ids(store: Store | None, tokens: np.ndarray, seed: int) -> tuple[list[list[int]], int]:
        settings = GenerationSettings(
            seed=seed, max_new_tokens=40, temperature=0, **SHRINK, **EAGER
        )
        rows = Rows(model, store)
        rows.add(Row(model, settings.resolve(model.config), tokens))
        events = list(rows.run())
        parts = [e.tokens[0].tolist() for e in events if isinstance(e, CanvasCommitted)]
        return parts, events[0].cached_tokens

    runs = ((seed, ids(None, prompt, seed)[0]) for seed in range(20))
    seed, alone = next((seed, parts) for seed, parts in runs if len(parts) > 5)
    store = Store(1 << 28)
    assert ids(store, prompt, seed)[0] == alone
    said = [token for part in alone[:2] for token in part]
    follow = np.array([*prompt.tolist(), *said, 20], np.int32)
    parts, cached = ids(store, follow, seed)
    assert cached == len(prompt) + len(said), "two parts of the answer before are read no more"
    assert parts == ids(None, follow, seed)[0]


def test_rows_by_parts_write_what_they_write_alone(monkeypatch, ahead):
    if ahead:
        pytest.skip("mixtures run on the CPU backend's own path")
    parts = [
        {**SHRINK, "prefix_steps": 1, "prefix_entropy": 1e9, **more}
        for more in ({"temperature": 0}, {"policy": "fast"}, {"t_min": 0.1, "t_max": 0.1})
    ]
    rests: list[int] = []

    def counted(canvas, part, *rest):
        rests.append(part)
        return rest_of(canvas, part, *rest)

    monkeypatch.setattr(mixtures, "STYLES", parts)
    monkeypatch.setattr(mixtures, "Pinned", lambda *_: None)
    monkeypatch.setattr(row_module, "rest_of", counted)
    tally = Tally()
    with mixtures.doubles():
        for seed in range(6):
            compare(seed, tally)
    assert tally.ties == tally.drifts == tally.findings == []
    assert len(rests) >= 3, "there are parts"
