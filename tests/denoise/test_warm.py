"""Warm starts, driven by an oracle model: what stands is not seen in the first step, shown in the
second where the model agrees, and never frozen."""

from __future__ import annotations

from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import GenerationSettings, SeededNoise
from mlx_diffgemma.denoise import step as step_module
from mlx_diffgemma.denoise.canvas import Canvas, Plan
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.pinned import FREE, Pinned
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.denoise.schedule import temperature
from mlx_diffgemma.denoise.standing import NONE, StandingAnswer
from mlx_diffgemma.denoise.warm import going_on
from mlx_diffgemma.events import CanvasCommitted, Finished
from tests.denoise.test_loop import EOS, PAD, WORDS, L, Oracle, V, sure, unsure

OTHER = [40, 41, 42, 43, 44, 45, 46, 47]
LEANING = 2.4  # a token is 20 times as likely as any other, and entropy stays too high to accept it


def row_of(model, standing=None, *, number=0, **values):
    settings = GenerationSettings(seed=3 + number, warm_start=0.1, **values).resolve(model.config)
    stands = None if standing is None else StandingAnswer(np.array(standing), (EOS, PAD))
    tokens = np.array([10 + number, 11, 12], np.int32)
    return Row(model, settings, tokens, number=number, stands=stands)


def run(model, *rows):
    all_rows = Rows(model)
    for row in rows:
        all_rows.add(row)
    return list(all_rows.run())


def committed(events):
    return [event.tokens[0].tolist() for event in events if isinstance(event, CanvasCommitted)]


@pytest.mark.parametrize("policy", ["reference", "fast"])
def test_a_standing_text_is_shown_behind_the_first_look(policy):
    answers = [unsure(WORDS), sure(OTHER)]
    model = Oracle(lambda canvas, look: answers[min(look, 1)])
    events = run(model, row_of(model, OTHER, max_new_tokens=L, policy=policy))
    first, second = (tokens[0].tolist() for tokens, _ in model.looks[0][:2])
    assert first != OTHER and second == OTHER
    # The text itself is the draft that a canvas may not change to have settled.
    assert committed(events) == [OTHER] and events[-1].steps == 2


def test_the_first_look_is_that_of_a_cold_start():
    def looks(standing):
        model = Oracle(lambda canvas, look: unsure(WORDS))
        run(model, row_of(model, standing, max_new_tokens=L, max_denoising_steps=3))
        return [tokens.tolist() for tokens, _ in model.looks[0]]

    warm, cold = looks(OTHER), looks(None)
    assert warm[0] == cold[0] and warm[1] != cold[1]


def test_what_the_model_is_sure_of_wins_against_the_text():
    model = Oracle(lambda canvas, look: sure(WORDS) if look else (WORDS, [1e6] * 4 + [0.1] * 4))
    run(model, row_of(model, OTHER, max_new_tokens=L))
    assert model.looks[0][1][0][0].tolist() == [*WORDS[:4], *OTHER[4:]]


def test_nothing_is_frozen():
    model = Oracle(lambda canvas, look: sure(WORDS) if look else unsure(WORDS))
    assert committed(run(model, row_of(model, OTHER, max_new_tokens=L))) == [WORDS]


def test_text_behind_an_insertion_moves():
    wanted = [*OTHER[:2], 30, 31, *OTHER[2:6]]
    model = Oracle(lambda canvas, look: sure(wanted) if look else (wanted, [LEANING] * L))
    run(model, row_of(model, OTHER, max_new_tokens=L))
    second = model.looks[0][1][0][0].tolist()
    assert second[:2] == OTHER[:2] and second[4:] == OTHER[2:6]


def test_the_next_canvas_begins_where_the_text_has_been_written_up_to():
    text = [*OTHER, *WORDS[:5]]
    written = [[*OTHER[:3], *OTHER[4:], WORDS[0]], [*WORDS[1:5], EOS, PAD, PAD, PAD]]

    def script(canvas, look):
        return sure(written[canvas]) if look else (written[canvas], [LEANING] * L)

    model = Oracle(script)
    events = run(model, row_of(model, text, max_new_tokens=2 * L))
    assert [looks[1][0][0].tolist() for looks in model.looks[:2]] == written
    assert events[-1].steps == 4 and events[-1].reason == "stop"


def test_a_long_text_is_followed_canvas_by_canvas():
    text = [20 + i for i in range(4 * L)]  # a canvas sees the text up to two canvases ahead
    written = [text[i * L : (i + 1) * L] for i in range(4)]
    model = Oracle(
        lambda canvas, look: (
            (written[canvas], [LEANING] * L) if look == 0 else sure(written[canvas])
        )
    )
    events = run(model, row_of(model, text, max_new_tokens=4 * L))
    assert [looks[1][0][0].tolist() for looks in model.looks[:4]] == written
    assert committed(events) == written


def test_the_schedule_goes_on_where_as_much_is_noise():
    steps = []

    def noted(step, settings):
        steps.append(step)
        return temperature(step, settings)

    model = Oracle(lambda canvas, look: sure(WORDS) if look else (WORDS, [1e6] * 2 + [0.1] * 6))
    with patch.object(step_module, "temperature", noted):
        run(model, row_of(model, OTHER, max_new_tokens=L, max_denoising_steps=48))
    assert steps == [0, 36, 37]  # six of eight tokens stood: a quarter of the schedule is left


def test_a_warm_row_and_a_cold_one_write_what_each_writes_alone():
    def script(canvas, look):
        return sure(OTHER) if look else unsure(WORDS)

    def rows(model):
        texts = enumerate((OTHER, None, WORDS))
        return [row_of(model, text, number=i, max_new_tokens=L) for i, text in texts]

    model = Oracle(script, script, script)
    together = run(model, *rows(model))
    for number in range(3):
        alone = Oracle(script)
        events = run(alone, rows(alone)[number])
        (own,) = (e for e in together if isinstance(e, Finished) and e.row == number)
        assert repr(own) == repr(events[-1])
        seen = [tokens.tolist() for tokens, _ in model.rows[number].looks[0]]
        assert seen == [tokens.tolist() for tokens, _ in alone.looks[0]]


def test_a_canvas_whose_width_follows_the_answer_begins_as_wide_as_the_text():
    answer = [40, 41, EOS, PAD, PAD, PAD, PAD, PAD]
    model = Oracle(lambda canvas, look: sure(answer))
    run(model, row_of(model, [40, 41], max_new_tokens=L, policy="fast"))
    assert model.looks[0][0][0].shape[1] == 4
    model = Oracle(lambda canvas, look: sure(WORDS))  # longer than the text
    assert committed(run(model, row_of(model, [40], max_new_tokens=L, policy="fast"))) == [WORDS]


def canvas_of(model, given=None, **values):
    settings = GenerationSettings(seed=1, **values).resolve(model.config)
    pinned = None if given is None else Pinned(np.array(given)).canvas(0, L, V)
    plan = Plan(L, L, L)
    return Canvas(0, settings, SeededNoise(1), pinned, 0, plan, mx.array([WORDS]))


def test_pinned_places_keep_what_is_given():
    canvas = canvas_of(Oracle(), [FREE, 33, FREE], schedule_steps=48)
    kept = np.array([[40, 41, NONE, 43]])
    begun = going_on(canvas, kept)
    assert begun.tokens[0].tolist() == [40, WORDS[1], WORDS[2], 43, *WORDS[4:]]
    assert begun.drafts[0][0].tolist() == [40, NONE, NONE, 43, *[NONE] * 4]
    assert begun.skipped == 48 * 2 // 7


def test_a_canvas_that_begins_with_all_of_its_tokens_may_settle_at_once():
    model = Oracle(lambda canvas, look: sure(OTHER))
    settings = GenerationSettings(seed=3, max_new_tokens=L).resolve(model.config)
    row = Row(model, settings, np.array([10], np.int32), start=np.array(OTHER))
    events = run(model, row)
    assert model.looks[0][0][0][0].tolist() == OTHER and events[-1].steps == 1
