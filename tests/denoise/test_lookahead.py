"""Lookahead: a step computes some columns behind what is accepted on the left, not all of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import GenerationSettings, bundled_model, generate, load
from mlx_diffgemma.denoise import stopping
from mlx_diffgemma.denoise.canvas import Readout
from mlx_diffgemma.denoise.pinned import FREE, Pinned
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.denoise.standing import StandingAnswer
from mlx_diffgemma.denoise.stopping import leading_columns, width_ahead
from tests.denoise.test_loop import (
    EOS,
    PAD,
    SURE,
    UNSURE,
    WORDS,
    L,
    Oracle,
    committed,
    run,
    sure,
    widths_of,
)
from tests.denoise.test_loop import ahead as ahead  # every test here runs both ways

HALF = {"canvas_width": "answer", "stop_on": "answer", "acceptance": "confidence"}
HALF |= {"temperature": 0, "lookahead": 0.5}


@pytest.fixture(autouse=True)
def short_canvas(monkeypatch):
    """Canvases of these tests have 8 columns."""
    monkeypatch.setattr(stopping, "_LEAST_AHEAD", 1)


@pytest.mark.parametrize(
    ("accepted", "columns"),
    [
        ([1, 1, 1, 1], 4),
        ([1, 1, 0, 1], 2),
        ([0, 1, 1, 1], 0),
    ],
)
def test_leading_columns_are_counted_from_the_left(accepted, columns):
    assert leading_columns(mx.array([accepted], dtype=mx.bool_)).tolist() == [columns]


@pytest.mark.parametrize(
    ("accepted", "share", "canvas", "width"),
    [
        (0, 0.25, 256, 64),
        (1, 0.25, 256, 80),
        (200, 0.25, 256, 256),
        (0, 0.25, 128, 32),
        (0, 0.25, 64, 32),
        (0, 0.25, 32, 32),
        (0, 1.0, 256, 256),
        (0, 0.5, 70, 35),
    ],
    ids=[
        "a quarter",
        "up to sixteenths",
        "no more than the canvas",
        "a quarter of 128",
        "no fewer than 32",
        "a short canvas is whole",
        "all of it",
        "sixteenths are rounded up",
    ],
)
def test_the_width_by_hand(monkeypatch, accepted, share, canvas, width):
    monkeypatch.setattr(stopping, "_LEAST_AHEAD", 32)
    assert width_ahead(accepted, share, canvas) == width


def test_columns_come_as_those_before_them_are_accepted():
    events = run(Oracle(lambda canvas, look: sure(WORDS)), **HALF)
    assert widths_of(events) == [4, 8]
    assert committed(events)[0].tokens.tolist() == [WORDS]
    assert events[-1].positions == 12
    whole = run(Oracle(lambda canvas, look: sure(WORDS)), **{**HALF, "lookahead": 1.0})
    assert widths_of(whole) == [8]


def test_the_first_column_that_is_open_holds_the_width_back(ahead):
    def script(canvas, look):
        opened = [SURE] * L
        if look < 2 + ahead:
            opened[1] = UNSURE
        return WORDS, opened

    events = run(Oracle(script), **HALF)
    assert set(widths_of(events)) == {4, 5, 8} and widths_of(events)[:2] == [4, 5]
    assert committed(events)[0].tokens.tolist() == [WORDS]


def test_an_answer_that_ends_within_the_window_is_done():
    events = run(Oracle(lambda canvas, look: sure([30, 31, EOS, *[33] * 5])), **HALF)
    assert widths_of(events) == [4]
    assert committed(events)[0].tokens.tolist() == [[30, 31, EOS, PAD]]
    assert events[-1].reason == "stop" and events[-1].new_tokens == 3


def test_steps_that_run_out_leave_what_the_window_shows():
    def script(canvas, look):
        return WORDS, [UNSURE] * L

    events = run(Oracle(script), **{**HALF, "acceptance": "entropy"}, max_denoising_steps=2)
    first = committed(events)[0].tokens.tolist()[0]
    assert first == WORDS[: len(first)] and 4 <= len(first) < L
    assert sum(canvas.tokens.shape[1] for canvas in committed(events)) == L, "no token is lost"


@pytest.mark.parametrize(
    "more",
    [
        {"pinned": Pinned(np.array([3, FREE], np.int32))},
        {"readout": Readout(1, (3,))},
        {"stands": StandingAnswer(np.array(WORDS, np.int32), (EOS, EOS))},
    ],
    ids=["pinned", "read out", "standing"],
)
def test_what_is_given_is_seen_whole(more):
    """A server has one lookahead for chats and for fills."""
    oracle = Oracle(lambda canvas, look: sure(WORDS))
    settings = GenerationSettings(seed=1, max_new_tokens=L, **HALF).resolve(oracle.config)
    assert Row(oracle, settings, np.array([10], np.int32), **more)._first_plan().width == L


PARTS = {"prefix_commit": "shrink", "prefix_steps": 1}


def test_parts_and_lookahead_together():
    """Each look shows four columns more; what has been seen twice is committed."""
    oracle = Oracle(lambda canvas, look: sure(WORDS if canvas == 0 else [*WORDS[4:], *[0] * 4]))
    events = run(oracle, **HALF, **PARTS)
    assert widths_of(events) == [4, 8]
    assert [c.tokens[0].tolist() for c in committed(events)] == [WORDS]
    slow = run(
        Oracle(lambda canvas, look: (WORDS[4 * canvas :] + [0] * 4 * canvas, LATE[canvas])),
        **HALF,
        **PARTS,
    )
    assert [c.tokens[0].tolist() for c in committed(slow)] == [WORDS[:4], WORDS[4:]]
    assert min(widths_of(slow)) > 0


LATE = [SURE] * 4 + [UNSURE] * 4, [SURE] * 8


@pytest.mark.parametrize("acceptance", ["entropy", "confidence"])
@pytest.mark.parametrize("seed", range(12))
def test_no_plan_is_empty_whatever_settles_first(acceptance, seed):
    """Columns that settle, but are not accepted, hold no window back."""
    rng = np.random.default_rng(seed)
    heights = rng.choice([2.0, 4.5, 8.0, SURE], (40, L))

    def script(canvas, look):
        return WORDS, heights[(7 * canvas + look) % 40].tolist()

    settings = HALF | PARTS | {"acceptance": acceptance, "prefix_entropy": 0.5}
    events = run(Oracle(script), **settings, max_denoising_steps=9, max_new_tokens=3 * L)
    assert all(width > 0 for width in widths_of(events))
    assert sum(canvas.tokens.shape[1] for canvas in committed(events)) == 3 * L


def test_a_fixed_canvas_has_no_lookahead():
    oracle = Oracle(lambda canvas, look: sure(WORDS))
    events = run(oracle, policy="fast", canvas_width="fixed")
    assert set(widths_of(events)) == {L}


def test_a_window_that_has_settled_grows_though_little_is_accepted():
    """Five columns are sure enough to stop, and only the first of them is within the bound."""
    low = [7.5] * L
    settings = HALF | {"acceptance": "entropy", "entropy_bound": 0.002, "t_min": 0.6, "t_max": 0.6}
    events = run(Oracle(lambda canvas, look: (WORDS, low)), **settings)
    assert widths_of(events) == [4, 5, 5, 8, 8]


def test_the_width_is_kept_where_an_accepted_column_opens_again(ahead):
    def script(canvas, look):
        opened = [SURE] * L
        if 0 < look < 3 + ahead:
            opened[0] = UNSURE
        return [WORDS[0] + look, *WORDS[1:]] if look < 3 + ahead else WORDS, opened

    widths = widths_of(run(Oracle(script), **HALF))
    assert widths == sorted(widths) and widths[0] == 4


def test_the_bundled_models_answers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(stopping, "_LEAST_AHEAD", 32)
    model, tokenizer = load(bundled_model())
    for prompt in ("Sort: 5 2 4 1", "Reverse: kaa", "Count from 38 to 63."):
        texts = {
            share: generate(
                *(model, tokenizer, prompt),
                settings=GenerationSettings(seed=3, policy="fast", lookahead=share),
            )
            for share in (0.5, 1.0)
        }
        assert texts[0.5] == texts[1.0]
