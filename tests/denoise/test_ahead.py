"""Standing text that is read: kept while the model would write it, against the model's own text
written token by token."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import Chat, GenerationSettings, Store, bundled_model, generate, load
from mlx_diffgemma.denoise import loop
from mlx_diffgemma.denoise.ahead import CONFIDENCE, Predictions, ReadAhead, Verdict, place_behind
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.denoise.standing import StandingAnswer
from mlx_diffgemma.events import CanvasCommitted, Finished, PrefillDone, StepDone, Text
from mlx_diffgemma.model import Context, DiffusionGemma
from mlx_diffgemma.model.layers import softcap
from tests.checkpoints import load_drawn
from tests.denoise.mixtures import doubles

PROMPT = np.array([5, 9, 12, 7, 3], np.int32)
END, PAD, COUNT = 1, 0, 40
SURE = 1e-9  # of a drawn model, whose predictions are nearly even


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return load_drawn(1, canvas_length=8, sliding_window=8)  # its text goes round in no circle


def predicted(model, tokens) -> np.ndarray:
    """What the model predicts behind each token of a text, [S, V], without a context."""
    states, _ = model.encode([mx.array(np.array(tokens)[None])], [Context((), 0, 1)])
    cap = model.config.text.final_logit_softcapping
    return np.array(mx.softmax(softcap(model.outputs(states), cap), axis=-1))[0]


@pytest.fixture(scope="module")
def own(model) -> list[int]:
    """The text that the model writes token by token, each the likeliest, but for end tokens."""
    tokens = PROMPT.tolist()
    for _ in range(COUNT):
        likely = predicted(model, tokens)[-1]
        likely[list(model.config.eos_token_ids)] = 0
        tokens.append(int(likely.argmax()))
    return tokens[len(PROMPT) :]


def row_of(
    model,
    standing,
    *,
    tokens=PROMPT,
    number=0,
    least=0.999,
    confidence=CONFIDENCE,
    begin=None,
    **values,
) -> Row:
    chosen = {"seed": 3, "warm_start": 0.1, "warm_read": least, "max_new_tokens": COUNT}
    settings = GenerationSettings(**(chosen | values))
    text = np.array(standing, np.int32)
    reading = ReadAhead(np.append(text, np.int32(END)), least, confidence)
    stands = StandingAnswer(text, (END, PAD), reading=reading)
    resolved = settings.resolve(model.config)
    return Row(model, resolved, tokens, number=number, stands=stands, begin=begin)


def sure_row(model, standing, **values) -> Row:
    """A row that takes the likeliest token wherever one that stands is not."""
    row = row_of(model, standing, confidence=SURE, **values)
    row._stands.reading._reads = True  # else it must have kept some first
    return row


def run(model, *rows, store=None) -> list:
    together = Rows(model, store)
    for row in rows:
        together.add(row)
    return list(together.run())


def ids(events, row=0) -> list[int]:
    found: list[int] = []
    for event in events:
        if isinstance(event, CanvasCommitted) and event.row == row:
            found += event.tokens[0].tolist()
    return found


def steps(events) -> int:
    return sum(isinstance(event, StepDone) for event in events)


def test_a_text_that_the_model_would_write_is_read_and_nothing_is_denoised(model, own):
    events = run(model, row_of(model, own))
    assert ids(events) == own and steps(events) == 0
    (end,) = [event for event in events if isinstance(event, Finished)]
    assert (end.steps, end.new_tokens, end.reason) == (0, COUNT, "length")


@pytest.mark.parametrize("places", [[0], [5], [17, 30], [6, 7], [COUNT - 1]], ids=str)
def test_changed_tokens_are_replaced_by_the_likeliest(model, own, places):
    """The contexts behind what is kept must be right for that, in sliding layers too."""
    changed = list(own)
    for place in places:
        changed[place] = 20 + (own[place] == 20)
    events = run(model, sure_row(model, changed))
    assert ids(events) == own and steps(events) == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda own: own[:9] + own[11:],
        lambda own: own[2:],
        lambda own: [*own[:9], 21, 22, *own[9:]],
        lambda own: [21] * 5,
    ],
    ids=["left out", "left out at once", "put in", "nothing alike"],
)
def test_text_that_moves_is_followed(model, own, edit):
    row = sure_row(model, edit(own), max_denoising_steps=1)
    events = run(model, row)
    first = next((i for i, event in enumerate(events) if isinstance(event, StepDone)), len(events))
    read = ids(events[:first])
    assert read == own[: len(read)]
    assert len(read) == (4 if edit(own) == [21] * 5 else COUNT), "a token for each pass in vain"


def test_where_the_model_is_not_sure_a_canvas_is_denoised(model, own):
    changed = [*own[:11], 20, *own[12:]]
    events = run(model, row_of(model, changed, max_denoising_steps=2))
    before = [event for event in events[:4] if isinstance(event, CanvasCommitted)]
    assert ids(before) == own[:11] and steps(events) > 0
    (end,) = [event for event in events if isinstance(event, Finished)]
    assert end.steps == steps(events)


def test_the_context_behind_what_is_kept_is_that_of_these_tokens(model, own, monkeypatch):
    seen = []
    open_context = DiffusionGemma.open
    monkeypatch.setattr(
        DiffusionGemma,
        "open",
        lambda self, context, *rest, **more: (
            seen.append(context) or open_context(self, context, *rest, **more)
        ),
    )
    run(model, row_of(model, [*own[:11], 20, *own[12:]], max_denoising_steps=1))
    text = np.concatenate([PROMPT, np.array(own[:11], np.int32)])
    right = model.prefill(mx.array(text[None]))
    assert seen[0].length == len(text)
    for a, b in zip(seen[0].arrays, right.arrays, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


def test_tokens_read_for_nothing_count_as_work(model, own):
    changed = [*own[:11], 20, *own[12:]]
    events = run(model, sure_row(model, changed))
    (end,) = [event for event in events if isinstance(event, Finished)]
    assert end.positions == 8 - 7  # behind a pass of 4, one reads 8 ahead and keeps 7


def test_a_pass_reads_twice_as_far_behind_one_that_kept_all(model, own, monkeypatch):
    counts = []
    real = loop.predict

    def predict(outputs, ahead, cap):
        counts.append(len(ahead))
        return real(outputs, ahead, cap)

    monkeypatch.setattr(loop, "predict", predict)
    run(model, sure_row(model, own))
    assert counts == [4, *[8] * 4, 4], "never more than a canvas"
    counts.clear()
    wide = load_drawn(1, canvas_length=64, sliding_window=8)
    assert ids(run(wide, sure_row(wide, own))) == own
    assert counts == [4, 8, 16, 12]  # 32, but for the end of the budget


def test_the_end_of_the_text_ends_the_answer(model):
    """Where the model finds it likely: here any token is."""
    events = run(model, row_of(model, [30, 31, 32], least=1e-9))
    assert ids(events) == [30, 31, 32, END]
    assert events[-1].reason == "stop"


def test_a_store_keeps_the_prompt(model, own):
    store = Store(1 << 20)
    run(model, row_of(model, own), store=store)
    found = store.find(np.append(PROMPT, np.int32(own[0])), model.config.text)
    right = model.prefill(mx.array(PROMPT[None]))
    assert found.length == len(PROMPT)
    for a, b in zip(found.arrays, right.arrays, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


def test_rows_that_read_ahead_beside_others_write_what_each_writes_alone(own):
    with doubles():
        model = load_drawn(1, canvas_length=8, sliding_window=8)
        model.set_dtype(mx.float32)
        changed = [*own[:11], 20, *own[12:]]
        plain = GenerationSettings(seed=5, max_new_tokens=24).resolve(model.config)

        def rows():
            cold = Row(model, plain, PROMPT[:3], number=1)
            first = row_of(model, changed, max_denoising_steps=2)
            return [first, cold, sure_row(model, own, number=2)]

        together = run(model, *rows())
        for row in rows():
            assert ids(together, row.number) == ids(run(model, row), row.number)


def test_a_long_prompt_is_read_in_pieces_first(model, own):
    long = np.concatenate([np.arange(2, 40, dtype=np.int32), PROMPT])
    told = []
    row = row_of(model, own, tokens=long, prefill_step_size=16, max_denoising_steps=1)
    row._progress = lambda read, count: told.append((read, count))
    events = run(model, row)
    assert told == [(16, 43), (32, 43), (43, 43)]
    assert sum(isinstance(event, PrefillDone) for event in events) == 1


def test_passes_that_keep_little_end_in_a_canvas_until_one_fits_again():
    read = ReadAhead(np.arange(100, dtype=np.int32), 0.5, 0.9)

    def seen(kept: int, confidence: float) -> Verdict:
        ahead = read.ahead(100)
        ratios = np.where(np.arange(len(ahead)) < kept, 1.0, 0.1).astype(np.float32)
        n = len(ahead) + 1
        sure = np.full(n, confidence, np.float32)
        return read.judge(Predictions(ratios, np.full(n, 7, np.int32), sure))

    assert seen(4, 0.95) == (4, None, True)
    read.committed(np.arange(4, dtype=np.int32), is_read=True)
    for kept in (0, 3, 1):
        assert seen(kept, 0.95) == (kept, 7, False)
        assert len(read.ahead(100)) == 4
    assert seen(2, 0.95) == (2, 7, False)
    assert len(read.ahead(100)) == 0  # the fourth
    read.committed(np.arange(4, 20, dtype=np.int32), is_read=False)
    assert read.at == 20 and len(read.ahead(100)) == 4
    assert seen(2, 0.5) == (2, None, False)  # nothing to go on with
    assert len(read.ahead(100)) == 0
    read.committed(np.arange(20, 30, dtype=np.int32), is_read=False)
    assert seen(4, 0.5) == (4, None, True)
    assert len(read.ahead(100)) == 8
    read.pause()
    assert len(read.ahead(100)) == 0


@pytest.mark.parametrize(
    ("fits", "instead"),
    [([0, 0, 1, 0], None), ([0, 1, 1, 0], 7), ([1, 1, 0, 0], 7), ([1, 0, 0, 0], None)],
    ids=str,
)
def test_a_model_that_finds_little_likely_puts_nothing_in(fits, instead):
    """One that was not trained to read is sure of spaces, say."""
    read = ReadAhead(np.arange(100, dtype=np.int32), 0.5)
    n = len(fits) + 1
    ratios, sure = np.array(fits, np.float32), np.ones(n, np.float32)
    verdict = read.judge(Predictions(ratios, np.full(n, 7, np.int32), sure))
    assert (verdict.kept, verdict.instead) == (fits.index(0), instead)


@pytest.mark.parametrize("prompt", ["Count from 12 to 17.", "Count from 13 to 18."])
def test_the_bundled_model_which_cannot_read_stays_right(prompt):
    model, tokenizer = load(bundled_model())
    settings = GenerationSettings(seed=1, warm_start=0.1, warm_read=0.5)
    text = generate(model, tokenizer, prompt, standing="12 13 14 15 16", settings=settings)
    first, last = map(int, prompt.removeprefix("Count from ").rstrip(".").split(" to "))
    assert text == " ".join(map(str, range(first, last + 1)))


def test_text_that_nothing_fits_does_not_move_the_place():
    """Such as a thought before the answer."""
    read = ReadAhead(np.arange(100, dtype=np.int32), 0.5)
    read.committed(np.arange(500, 700, dtype=np.int32), is_read=False)
    assert read.at == 0
    read.committed(np.arange(5, dtype=np.int32), is_read=False)
    assert read.at == 5


def test_what_is_left_of_a_canvas_goes_on_before_anything_is_read(model, own):
    """Behind a part that was committed: its rest keeps its drafts."""
    row = row_of(model, own)
    assert len(row.ahead) == 4
    row._rest = object()
    assert len(row.ahead) == 0


def test_nothing_is_read_before_a_canvas_that_has_tokens_to_begin_with(model, own):
    events = run(model, row_of(model, own, begin=lambda: [33], max_denoising_steps=1))
    assert steps(events) > 0
    assert [e.tokens[0, 0].item() for e in events if isinstance(e, CanvasCommitted)] == [33] * 5


def test_an_empty_answer_is_drawn_again_and_not_read(model):
    drawn = []
    for rerolls in (0, 1):
        row = row_of(model, [], least=1e-9, empty_rerolls=rerolls, max_denoising_steps=1)
        drawn.append(steps(run(model, row)))
    assert drawn[0] == 0 and drawn[1] > 0


def test_text_that_was_read_does_not_bring_the_end_of_the_positions_nearer(own):
    """A canvas ends where they end, as behind a part."""
    model = load_drawn(1, canvas_length=8, sliding_window=8, max_position_embeddings=32)
    events = run(model, row_of(model, own[:3], max_denoising_steps=1))
    assert len(ids(events)) in range(24, 28)  # three canvases, of 27 positions behind the prompt
    assert events[-1].reason == "length" or END in ids(events)


def test_snapshots_inside_the_prompt_are_kept(model, own):
    store = Store(1 << 20)
    text = np.array([5, 9, END, 7, 3, 8], np.int32)
    run(model, row_of(model, own, tokens=text), store=store)
    found = store.find(np.array([5, 9, END, 50, 51], np.int32), model.config.text)
    assert found is not None and found.length == 3


@pytest.mark.parametrize("least", [1e-9, 0.0], ids=["read", "not read"])
def test_generate_passes_the_setting_on(least):
    """The bundled model finds any token likely enough, if hardly any likelihood is asked for."""
    model, tokenizer = load(bundled_model())
    settings = GenerationSettings(seed=1, warm_start=0.1, warm_read=least)
    text = generate(model, tokenizer, "Sort: 3 1 2", standing="zebra", settings=settings)
    assert (text == "zebra") == bool(least)


def test_a_chats_changed_message_passes_the_setting_on():
    model, tokenizer = load(bundled_model())
    chat = Chat(
        model, tokenizer, settings=GenerationSettings(seed=1, warm_start=0.1, warm_read=1e-9)
    )
    first = "".join(e.piece for e in chat.send("Sort: 3 1 2") if isinstance(e, Text))
    again = "".join(e.piece for e in chat.edit(1, "Sort: 9 8") if isinstance(e, Text))
    assert first == again != ""


def slow_edits(written, text) -> int:
    return min(slow_table(written, text)[-1])


def slow_place(written, text) -> set[int]:
    """The places with the smallest edit distance."""
    last = slow_table(written, text)[-1]
    return {j for j, cost in enumerate(last) if cost == min(last)}


def slow_table(written, text) -> list[list[int]]:
    """Edit distances by the textbook."""
    table = [list(range(len(text) + 1))]
    for i, token in enumerate(written):
        row = [i + 1]
        for j, other in enumerate(text):
            row.append(min(table[i][j] + (token != other), table[i][j + 1] + 1, row[j] + 1))
        table.append(row)
    return table


@pytest.mark.parametrize("seed", range(40))
def test_the_place_behind_has_the_smallest_edit_distance(seed):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 4, rng.integers(0, 30)).astype(np.int32)
    written = rng.integers(0, 4, rng.integers(0, 20)).astype(np.int32)
    likely = slow_place(written.tolist(), text.tolist())
    found, edits = place_behind(written, text)
    assert found in likely
    assert edits == slow_edits(written.tolist(), text.tolist())
    assert abs(found - len(written)) == min(abs(j - len(written)) for j in likely)
