"""The loop, driven by an oracle model whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import GenerationSettings, SeededNoise, denoise_tokens
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.denoise import step as step_module
from mlx_diffgemma.denoise.canvas import Belief, Canvas, Plan
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.pinned import FREE, Pinned
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.denoise.sampler import shortlist, statistics
from mlx_diffgemma.errors import ConfigError, PromptError, TemplateError
from mlx_diffgemma.events import CanvasCommitted, Finished, PrefillDone, StepDone
from mlx_diffgemma.model.backend import as_on_gpu
from tests.checkpoints import GENERATION, draw_config, load_drawn

L, V = 8, 64
PAD, EOS = 0, 5
IMAGE = 61
PROMPT = mx.array([[10, 11, 12]], dtype=mx.int32)
WORDS = [20, 21, 22, 23, 24, 25, 26, 27]  # a canvas without an end
ENDED = [30, 31, EOS, 33, 34, 35, EOS, 37]


@pytest.fixture(autouse=True, params=[0, 1], ids=["looked at first", "built ahead"])
def ahead(request):
    """Steps that are built before the last one is looked at: none on the CPU backend."""
    with as_on_gpu() if request.param else nullcontext():
        yield request.param


# What the oracle thinks of a row: its tokens, and how sure it is of each.
Answer = tuple[Sequence[int], list[float]]
Script = Callable[[int, int], Answer]

SURE, UNSURE = 1e6, 0.1


def sure(row: Sequence[int]) -> Answer:
    return row, [SURE] * len(row)


def unsure(row: Sequence[int]) -> Answer:
    return row, [UNSURE] * len(row)


@dataclass(frozen=True)
class Known:
    """What the oracle remembers of a row's text."""

    row: int
    length: int
    arrays: tuple[mx.array, ...] = ()
    unread: None = None

    def closed(self) -> Known:
        return self


class Asked:
    """What the oracle was asked about a row."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []  # pieces of the prompt
        self.commits: list[list[int]] = []
        # Per canvas: the tokens and the self-conditioning of each look.
        self.looks: list[list[tuple[mx.array, mx.array | None]]] = [[]]
        self.is_writing = False


class Oracle:
    """A model that answers from a script for each row: canvas index and look at that canvas ->
    answer, cut to the columns that are asked for.

    Sure answers have an entropy of 0 under any cap, unsure ones of nearly ln 64. It writes down
    what it was asked; graphs are lazy, so a look that was built need not have been computed.
    """

    dtype = mx.float32

    def __init__(self, *scripts: Script, **text: int):
        raw = draw_config(0, vocab_size=V, hidden_size=V, canvas_length=L, **text)
        self.config = ModelConfig.from_dict(raw, GENERATION)
        self.scripts = scripts
        self.rows = [Asked() for _ in scripts]
        self.passes: list[list[int]] = []  # the rows of each forward pass over canvases
        self.reads: list[list[int]] = []  # and of each over text

    def encode(self, pieces, contexts, images=None, *, states=True):
        assert not states  # nothing in the loop needs the last layer's output
        known = self._read(pieces, contexts)
        self.reads.append([each.row for each in known])
        return None, known

    def _read(self, pieces, contexts):
        known = []
        for piece, context in zip(pieces, contexts, strict=True):
            (ids,) = piece.tolist()
            if not context.length:
                context = Known(sum(bool(asked.read) for asked in self.rows), 0)
            asked = self.rows[context.row]
            if asked.is_writing:
                asked.commits.append(ids)
                asked.looks.append([])
            else:
                asked.read.append(ids)
            known.append(Known(context.row, context.length + len(ids)))
        return known

    def open(self, context, canvas_length, *, unread=None):
        assert canvas_length <= L
        self.rows[context.row].is_writing = True
        return context if unread is None else self._read([unread], [context])[0]

    def canvas_states(self, canvases, opened, *, self_conditioning=None):
        known, parts, start = list(opened), [], 0
        opened.clear()
        for canvas, context in zip(canvases, known, strict=True):
            asked, width = self.rows[context.row], canvas.shape[1]
            looks = asked.looks[-1]
            tokens, heights = self.scripts[context.row](len(asked.commits), len(looks))
            soft = self_conditioning
            looks.append((canvas, None if soft is None else soft[:, start : start + width]))
            outputs = np.eye(V, dtype=np.float32)[np.array(tokens)] * np.array(heights)[:, None]
            parts.append(outputs[:width].astype(np.float32))
            start += width
        assert self_conditioning is None or self_conditioning.shape == (1, start, V)
        self.passes.append([each.row for each in known])
        return mx.array(np.concatenate(parts)[None]), known

    def outputs(self, states):
        return states

    def mean_embedding(self, weights, total):
        return weights  # so that a test can see what came back

    @property
    def looks(self) -> list[list[tuple[mx.array, mx.array | None]]]:
        (asked,) = self.rows
        return asked.looks

    @property
    def commits(self) -> list[list[int]]:
        (asked,) = self.rows
        return asked.commits

    @property
    def asked(self) -> list[tuple[mx.array, mx.array | None]]:
        return [look for looks in self.looks for look in looks]

    @property
    def built(self) -> int:
        return len(self.passes)


def run(oracle: Oracle, tokens: mx.array = PROMPT, **settings) -> list:
    lengths, noise = settings.pop("lengths", None), settings.pop("noise", None)
    return list(
        denoise_tokens(
            oracle,
            tokens,
            GenerationSettings(**{"seed": 1, "max_new_tokens": L} | settings),
            lengths=lengths,
            noise=noise,
        )
    )


def of_row(events: list, row: int) -> list:
    return [event for event in events if event.row == row]


def committed(events: list) -> list[CanvasCommitted]:
    return [event for event in events if isinstance(event, CanvasCommitted)]


def steps_of(events: list) -> list[tuple[int, int]]:
    return [(e.canvas_index, e.step) for e in events if isinstance(e, StepDone)]


def widths_of(events: list) -> list[int]:
    return [event.draft.shape[1] for event in events if isinstance(event, StepDone)]


# When a canvas ends


def test_a_canvas_that_is_sure_at_once_takes_two_steps():
    events = run(Oracle(lambda canvas, look: sure(WORDS)))
    assert steps_of(events) == [(0, 0), (0, 1)]
    (canvas,) = committed(events)
    assert canvas.steps == 2
    assert canvas.tokens.tolist() == [WORDS]


def test_a_canvas_that_is_never_sure_takes_all_steps_and_its_last_draft():
    oracle = Oracle(lambda canvas, look: unsure([40 + look] * L))
    events = run(oracle, max_denoising_steps=6)
    assert steps_of(events) == [(0, step) for step in range(6)]
    assert committed(events)[0].tokens.tolist() == [[45] * L]
    assert oracle.built == 6


def test_a_canvas_that_is_sure_but_moves_does_not_settle():
    tokens = [WORDS, WORDS[::-1], WORDS, WORDS]
    events = run(Oracle(lambda canvas, look: sure(tokens[min(look, 3)])))
    assert len(steps_of(events)) == 4


@pytest.mark.parametrize(("stability", "steps"), [(0, 1), (1, 2), (2, 3), (4, 5)])
def test_stability_is_the_number_of_steps_that_must_not_move(stability, steps):
    events = run(Oracle(lambda canvas, look: sure(WORDS)), stability_threshold=stability)
    assert committed(events)[0].steps == steps


def test_stability_does_not_look_back_into_the_canvas_before():
    events = run(Oracle(lambda canvas, look: sure(WORDS)), max_new_tokens=3 * L)
    assert [canvas.steps for canvas in committed(events)] == [2, 2, 2]


def test_one_step_at_most_is_one_step():
    events = run(Oracle(lambda canvas, look: sure(WORDS)), max_denoising_steps=1)
    assert steps_of(events) == [(0, 0)]


# Events


def test_events_come_in_order_of_happening_and_count_their_own_canvas():
    def script(canvas, look):
        return sure(WORDS) if look >= 2 * canvas else unsure(WORDS)

    events = run(Oracle(script), max_new_tokens=2 * L)
    kinds = [type(event) for event in events]
    assert kinds == [
        PrefillDone,
        *[StepDone] * 2,
        CanvasCommitted,
        *[StepDone] * 3,
        CanvasCommitted,
        Finished,
    ]
    assert steps_of(events) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert [(c.canvas_index, c.steps) for c in committed(events)] == [(0, 2), (1, 3)]
    finished = events[-1]
    assert (finished.steps, finished.canvases, finished.positions) == (5, 2, 5 * L)
    assert finished.tokens_per_forward == 16 / 5
    assert {event.row for event in events} == {0}


def test_step_events_carry_shapes_and_kinds_that_a_listener_can_read():
    events = run(Oracle(lambda canvas, look: sure(WORDS)), top_candidates=3)
    step = next(event for event in events if isinstance(event, StepDone))
    assert step.draft.tolist() == [WORDS] and step.draft.dtype == mx.int32
    assert step.accepted.tolist() == [[True] * L]
    assert step.entropy.dtype == mx.float32 and float(step.entropy.max()) < 1e-3
    ids, probabilities = step.candidates
    assert ids.shape == probabilities.shape == (1, L, 3)
    assert ids[0, :, 0].tolist() == WORDS
    assert float(probabilities[..., 0].min()) > 0.999


def test_candidates_are_left_out_unless_asked_for():
    events = run(Oracle(lambda canvas, look: sure(WORDS)))
    assert all(event.candidates is None for event in events if isinstance(event, StepDone))


def test_prefill_counts_tokens_without_padding_and_reports_its_progress():
    seen = []
    tokens = mx.array([[9, 9, 10], [10, 11, 12]], dtype=mx.int32)
    oracle = Oracle(*[lambda canvas, look: sure(WORDS)] * 2)
    events = denoise_tokens(
        oracle,
        tokens,
        GenerationSettings(seed=1, max_new_tokens=L, prefill_step_size=2),
        lengths=mx.array([1, 3]),
        prompt_progress_callback=lambda *places: seen.append(places),
    )
    read = [event for event in events if isinstance(event, PrefillDone)]
    assert [(event.row, event.prompt_tokens, event.cached_tokens) for event in read] == [
        (0, 1, 0),
        (1, 3, 0),
    ]
    assert all(event.seconds >= 0 for event in read)
    assert seen == [(1, 1), (2, 3), (3, 3)]
    assert [asked.read for asked in oracle.rows] == [[[10]], [[10, 11], [12]]]


@pytest.mark.parametrize(
    ("size", "pieces"), [(1, [[10], [11], [12]]), (2, [[10, 11], [12]]), (3, [[10, 11, 12]])]
)
def test_prefill_reads_in_pieces_of_the_settings_size(size, pieces):
    oracle = Oracle(lambda canvas, look: sure(WORDS))
    events = run(oracle, prefill_step_size=size)
    assert oracle.rows[0].read == pieces
    assert [type(event) for event in events].count(PrefillDone) == 1


# How long a run is


@pytest.mark.parametrize(
    ("limit", "widths"), [(1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (21, [8, 8, 5])]
)
def test_max_new_tokens_cuts_exactly(limit, widths):
    events = run(Oracle(lambda canvas, look: sure(WORDS)), max_new_tokens=limit)
    assert [c.tokens.shape[1] for c in committed(events)] == widths
    written = [token for canvas in committed(events) for token in canvas.tokens[0].tolist()]
    assert written == (WORDS * 3)[:limit]
    assert events[-1].reason == "length" and events[-1].new_tokens == limit


def test_an_end_token_ends_the_run_and_pads_what_follows_it():
    oracle = Oracle(lambda canvas, look: sure(ENDED))
    events = run(oracle, max_new_tokens=5 * L)
    assert [c.tokens.tolist() for c in committed(events)] == [[[30, 31, EOS, *[PAD] * 5]]]
    assert events[-1].reason == "stop" and events[-1].new_tokens == 3
    assert oracle.commits == []


@pytest.mark.parametrize(("limit", "reason"), [(2, "length"), (3, "stop")])
def test_an_end_token_behind_the_cut_does_not_count(limit, reason):
    events = run(Oracle(lambda canvas, look: sure(ENDED)), max_new_tokens=limit)
    assert events[-1].reason == reason and events[-1].new_tokens == limit


def test_extra_end_tokens_end_a_run_too():
    events = run(Oracle(lambda canvas, look: sure(WORDS)), extra_eos_token_ids=(23,))
    assert committed(events)[0].tokens.tolist() == [[20, 21, 22, 23, *[PAD] * 4]]
    assert events[-1].reason == "stop"


def test_a_pad_token_in_an_answer_is_a_token_like_any_other():
    answer = [20, PAD, 21, PAD, PAD, 22, EOS, 9]
    events = run(Oracle(lambda canvas, look: sure(answer)))
    assert committed(events)[0].tokens.tolist() == [[*answer[:7], PAD]]
    assert events[-1].new_tokens == 7


def test_a_run_commits_one_canvas_fewer_than_it_writes():
    oracle = Oracle(lambda canvas, look: sure(WORDS if canvas < 2 else ENDED))
    events = run(oracle, max_new_tokens=9 * L)
    assert len(committed(events)) == 3
    assert oracle.commits == [WORDS, WORDS]


def test_a_narrower_canvas_is_as_wide_as_asked():
    oracle = Oracle(lambda canvas, look: sure(WORDS[:3]))
    events = run(oracle, canvas_length=3, max_new_tokens=7)
    assert [c.tokens.shape[1] for c in committed(events)] == [3, 3, 1]


def test_a_run_ends_where_the_positions_end():
    oracle = Oracle(lambda canvas, look: sure(WORDS), max_position_embeddings=3 + 2 * L + 1)
    events = run(oracle, max_new_tokens=100)
    assert len(committed(events)) == 2
    assert events[-1].reason == "length" and events[-1].new_tokens == 2 * L


def test_a_closed_run_computes_no_further_step(ahead):
    oracle = Oracle(lambda canvas, look: unsure(WORDS))
    events = denoise_tokens(oracle, PROMPT, GenerationSettings(seed=1, max_denoising_steps=40))
    next(events)
    for _ in range(3):
        assert isinstance(next(events), StepDone)
    events.close()
    assert oracle.built == 3 + ahead
    assert next(events, None) is None


# What goes into a step


def test_the_last_processed_logits_come_back_in_the_next_step_of_the_same_canvas():
    oracle = Oracle(lambda canvas, look: unsure([20 + look] * L))
    run(oracle, max_denoising_steps=4, t_min=0.5, t_max=1.0, max_new_tokens=2 * L)
    logit = 30 * np.tanh(0.1 / 30)  # under the cap
    for looks in oracle.looks:
        soft = [soft for _, soft in looks]
        assert soft[0] is None
        # temperatures 1, 0.875, 0.75 of the steps before
        for i, heat in enumerate((1, 0.875, 0.75)):
            weights = np.log(np.array(soft[i + 1]))  # over that of the likeliest token
            assert weights[0, :, 20 + i] == pytest.approx(0, abs=1e-7)
            others = np.delete(weights, 20 + i, axis=-1)
            np.testing.assert_allclose(others, -logit / heat, rtol=1e-5)


def test_sure_positions_keep_their_proposal_and_the_others_are_refilled():
    class Draws:
        def start(self, canvas_index, shape, vocab_size):
            return mx.full(shape, 40, dtype=mx.int32)

        def sample(self, canvas_index, step, logits):
            assert logits.shape == (1, L, V)
            return mx.full(logits.shape[:2], 41 + step, dtype=mx.int32)

        def renoise(self, canvas_index, step, shape, vocab_size):
            assert (shape, vocab_size) == ((1, L), V)
            return mx.full(shape, 51 + step, dtype=mx.int32)

    oracle = Oracle(lambda canvas, look: unsure(WORDS))
    run(oracle, max_denoising_steps=3, noise=Draws())
    canvases = [canvas.tolist()[0] for canvas, _ in oracle.looks[0]]
    assert canvases[0] == [40] * L
    # All are equally unsure: exactly one is kept.
    for step, canvas in enumerate(canvases[1:]):
        assert sorted(canvas) == [41 + step] + [51 + step] * (L - 1)


def test_every_draw_of_a_run_is_asked_for_once():
    asked = []

    class Listening(SeededNoise):
        def start(self, canvas_index, shape, vocab_size):
            asked.append(("start", canvas_index, 0))
            return super().start(canvas_index, shape, vocab_size)

        def sample(self, canvas_index, step, logits):
            asked.append(("sample", canvas_index, step))
            return super().sample(canvas_index, step, logits)

        def renoise(self, canvas_index, step, shape, vocab_size):
            asked.append(("renoise", canvas_index, step))
            return super().renoise(canvas_index, step, shape, vocab_size)

    oracle = Oracle(lambda canvas, look: unsure(WORDS))
    run(oracle, max_denoising_steps=3, max_new_tokens=2 * L, noise=Listening(4))
    assert len(asked) == len(set(asked))
    assert {("sample", c, s) for c in (0, 1) for s in (0, 1)} <= set(asked)
    assert {("start", 0, 0), ("start", 1, 0)} <= set(asked)


def test_temperature_zero_proposes_the_likeliest_tokens_and_draws_none():
    class NoSamples(SeededNoise):
        def sample(self, canvas_index, step, logits):
            raise AssertionError("a proposal was drawn")

    oracle = Oracle(lambda canvas, look: unsure(WORDS))
    run(oracle, temperature=0, entropy_bound=1000, max_denoising_steps=3, noise=NoSamples(1))
    assert [canvas.tolist() for canvas, _ in oracle.looks[0][1:]] == [[WORDS], [WORDS]]


def test_the_same_seed_gives_the_same_canvases_and_another_seed_others():
    def first_canvas(seed):
        oracle = Oracle(lambda canvas, look: sure(WORDS))
        run(oracle, seed=seed)
        return oracle.looks[0][0][0].tolist()

    assert first_canvas(3) == first_canvas(3) != first_canvas(4)


# Several rows

BOTH = mx.array([[10, 11, 12], [13, 14, 15]], dtype=mx.int32)


def test_a_row_leaves_when_it_is_done_and_nothing_more_is_computed_for_it(ahead):
    oracle = Oracle(lambda canvas, look: sure(WORDS), lambda canvas, look: unsure([40 + look] * L))
    events = run(oracle, BOTH, max_denoising_steps=5)
    first, second = of_row(events, 0), of_row(events, 1)
    assert steps_of(first) == [(0, 0), (0, 1)]
    assert steps_of(second) == [(0, step) for step in range(5)]
    assert events.index(first[-1]) < events.index(second[-3]), "it ends before the other does"
    assert committed(first)[0].tokens.tolist() == [WORDS]
    # Where steps are built ahead, one was built for both rows, and dropped.
    dropped = [[0, 1]] * ahead
    assert oracle.passes == [[0, 1], [0, 1], *dropped, [1], [1], [1]]
    assert committed(second)[0].tokens.tolist() == [[44 + ahead] * L]
    assert (first[-1].positions, second[-1].positions) == (2 * L, 5 * L)


def test_rows_write_answers_of_different_numbers_of_canvases():
    def longer(canvas, look):
        return sure(ENDED if canvas == 2 else WORDS)

    oracle = Oracle(lambda canvas, look: sure(ENDED), longer)
    events = run(oracle, BOTH, max_new_tokens=9 * L)
    first, second = of_row(events, 0), of_row(events, 1)
    assert [c.tokens.tolist() for c in committed(first)] == [[[30, 31, EOS, *[PAD] * 5]]]
    assert [c.canvas_index for c in committed(second)] == [0, 1, 2]
    assert [asked.commits for asked in oracle.rows] == [[], [WORDS, WORDS]]
    assert [(e.reason, e.new_tokens, e.steps, e.canvases) for e in (first[-1], second[-1])] == [
        ("stop", 3, 2, 1),
        ("stop", 2 * L + 3, 6, 3),
    ]


def test_a_row_begins_its_next_canvas_while_another_is_in_the_midst_of_its_own(ahead):
    def slow(canvas, look):
        return sure(WORDS) if look >= 5 + ahead else unsure(WORDS)

    oracle = Oracle(lambda canvas, look: sure(WORDS), slow)
    events = run(oracle, BOTH, max_new_tokens=3 * L)
    first, second = of_row(events, 0), of_row(events, 1)
    assert steps_of(first) == [(canvas, step) for canvas in range(3) for step in range(2)]
    assert [look.steps for look in committed(first)] == [2, 2, 2]
    starts = [SeededNoise(1).start(canvas, (1, L), V).tolist() for canvas in range(3)]
    assert [looks[0][0].tolist() for looks in oracle.rows[0].looks] == starts
    long = committed(second)[0]
    assert long.steps >= 5
    assert events.index(committed(first)[1]) < events.index(long) < events.index(second[-1])
    assert oracle.reads[0] == [0, 1] and oracle.reads[1] == [0], "a commit waits for nobody"


def test_a_row_that_commits_does_not_move_the_others_back():
    oracle = Oracle(lambda canvas, look: sure(WORDS), lambda canvas, look: unsure([40 + look] * L))
    both = run(oracle, BOTH, max_new_tokens=2 * L, max_denoising_steps=7)
    alone = Oracle(lambda canvas, look: unsure([40 + look] * L))
    second = run(alone, BOTH[1:], max_new_tokens=2 * L, max_denoising_steps=7, seed=2)
    assert steps_of(of_row(both, 1)) == steps_of(second)
    (own,), (others,) = oracle.rows[1].looks[0][:1], alone.looks[0][:1]
    assert own[0].tolist() == others[0].tolist(), "row 1 of seed 1 is row 0 of seed 2"


def test_one_noise_for_several_rows_is_refused():
    oracle = Oracle(*[lambda canvas, look: sure(WORDS)] * 2)
    with pytest.raises(ConfigError, match="a noise draws for one row, and the run has 2"):
        run(oracle, BOTH, noise=SeededNoise(1))
    assert oracle.reads == []


def test_as_many_rows_are_pinned_as_there_are():
    given = [Pinned(np.full(1, FREE, np.int32))]
    oracle = Oracle(*[lambda canvas, look: sure(WORDS)] * 2)
    with pytest.raises(TemplateError, match="1 rows are pinned, and the run has 2"):
        list(denoise_tokens(oracle, BOTH, GenerationSettings(seed=1), pinned=given))
    assert oracle.reads == []


def test_rows_read_their_prompts_together_as_far_as_a_piece_goes():
    tokens = mx.array([[10, 11, 12, 13], [9, 9, 14, 15], [9, 9, 9, 16]], dtype=mx.int32)
    oracle = Oracle(*[lambda canvas, look: sure(WORDS)] * 3)
    run(oracle, tokens, lengths=mx.array([4, 2, 1]), prefill_step_size=3)
    assert [asked.read for asked in oracle.rows] == [[[10, 11, 12], [13]], [[14, 15]], [[16]]]
    # The first piece is full. Then a short prompt's row need not wait for a long one's end.
    assert oracle.reads == [[0], [1, 2], [0]]
    assert oracle.passes[0] == [1, 2]


# Rows that come and go


def row_of(oracle: Oracle, tokens: Sequence[int], number: int, **settings) -> Row:
    resolved = GenerationSettings(**{"seed": 1, "max_new_tokens": L} | settings).resolve(
        oracle.config
    )
    return Row(oracle, resolved, np.array(tokens, np.int32), number=number)


def test_a_row_that_joins_later_writes_what_it_writes_alone(ahead):
    def script(canvas, look):
        return unsure([40 + look] * L)

    oracle = Oracle(script, script)
    rows = Rows(oracle)
    rows.add(row_of(oracle, [10, 11], 0, max_denoising_steps=6))
    events = [event for _ in range(3) for _, event in rows.advance()]
    rows.add(row_of(oracle, [12], 1, max_denoising_steps=2, temperature=0, entropy_bound=1000))
    events += rows.run()
    assert steps_of(of_row(events, 0)) == [(0, step) for step in range(6)]
    assert steps_of(of_row(events, 1)) == [(0, 0), (0, 1)]
    canvases = [canvas.tolist()[0] for canvas, _ in oracle.rows[1].looks[0]]
    assert canvases[1] == [40] * L, "its own settings hold for it"
    assert oracle.rows[0].looks[0][-1][0].tolist()[0] != [44] * L, "and for it alone"
    assert rows.rows == []


def test_a_row_that_is_removed_is_not_computed_again(ahead):
    def script(canvas, look):
        return unsure([40 + look] * L)

    oracle = Oracle(script, script)
    rows = Rows(oracle)
    going, staying = (row_of(oracle, [10 + i], i, max_denoising_steps=5) for i in range(2))
    rows.add(going)
    rows.add(staying)
    for _ in range(2):
        list(rows.advance())
    rows.remove(going)
    before = oracle.built
    events = list(rows.run())
    assert {event.row for event in events} == {1}
    assert steps_of(events) == [(0, 2), (0, 3), (0, 4)]
    assert all(passed == [1] for passed in oracle.passes[before:])


def test_a_row_that_joins_is_conditioned_on_nothing_and_the_others_on_their_own_steps(ahead):
    oracle = Oracle(
        lambda canvas, look: sure([20 + look] * L), lambda canvas, look: sure([50 + look] * L)
    )
    rows = Rows(oracle)
    rows.add(row_of(oracle, [10], 0, max_denoising_steps=4, stability_threshold=3))
    list(rows.advance())
    rows.add(row_of(oracle, [11], 1, max_denoising_steps=4, stability_threshold=3))
    list(rows.run())
    first, second = (asked.looks[0] for asked in oracle.rows)
    assert not np.array(second[0][1]).any()
    # A step was built ahead for the first row alone, and dropped: its script went on by one.
    thoughts = [20, *range(21 + ahead, 24)], [50, 51, 52]
    for looks, tokens in zip((first[1 + ahead :], second[1:]), thoughts, strict=True):
        for (_, soft), token in zip(looks, tokens, strict=False):
            assert soft.shape == (1, L, V)
            assert (np.array(soft).argmax(-1) == token).all()


def test_a_step_built_for_a_canvas_that_has_ended_is_not_taken_for_the_next(ahead):
    """Its plan may be the same: same rows, same widths."""
    oracle = Oracle(lambda canvas, look: sure([20 + 10 * canvas] * L))
    events = run(oracle, max_new_tokens=3 * L)
    drafts = [e.draft.tolist()[0][0] for e in events if isinstance(e, StepDone)]
    assert drafts == [20, 20, 30, 30, 40, 40]
    assert oracle.built == 6 + 3 * ahead


# Empty answers

EMPTY = [EOS, *WORDS[:7]]


def test_an_empty_answer_is_drawn_again_when_asked(ahead):
    oracle = Oracle(lambda canvas, look: sure(EMPTY if look < 2 + ahead else WORDS))
    events = run(oracle, empty_rerolls=2)
    (canvas,) = committed(events)
    assert canvas.tokens.tolist() == [WORDS]
    assert canvas.steps == 4
    first, again = oracle.looks[0][0][0], oracle.looks[0][2 + ahead][0]
    assert first.tolist() != again.tolist(), "the second try starts from other noise"
    assert oracle.looks[0][2 + ahead][1] is None, "and remembers nothing of the first"


def test_an_empty_answer_stands_when_nobody_asked_or_all_tries_are_spent():
    for rerolls, looks in ((0, 2), (2, 6)):
        events = run(Oracle(lambda canvas, look: sure(EMPTY)), empty_rerolls=rerolls)
        assert committed(events)[0].tokens.tolist() == [[EOS, *[PAD] * 7]]
        assert len(steps_of(events)) == looks
        assert events[-1].reason == "stop" and events[-1].new_tokens == 1


def test_only_empty_rows_are_drawn_again(ahead):
    def again(canvas, look):
        return sure(EMPTY if look < 2 + ahead else WORDS)

    oracle = Oracle(lambda canvas, look: sure(WORDS), again)
    events = run(oracle, BOTH, empty_rerolls=1)
    assert [c.tokens.tolist() for c in committed(events)] == [[WORDS], [WORDS]]
    assert [c.steps for c in committed(events)] == [2, 4]
    retried = oracle.rows[1].looks[0][2 + ahead][0]
    assert retried.tolist() == SeededNoise(2).reroll(1).start(0, (1, L), V).tolist()


def test_a_later_canvas_may_begin_with_an_end():
    oracle = Oracle(lambda canvas, look: sure(WORDS if canvas == 0 else EMPTY))
    events = run(oracle, empty_rerolls=3, max_new_tokens=4 * L)
    assert [canvas.steps for canvas in committed(events)] == [2, 2]


def test_a_replay_cannot_be_drawn_again():
    class Replay:
        pass

    with pytest.raises(ConfigError, match="empty_rerolls needs seeded noise"):
        run(Oracle(lambda canvas, look: sure(WORDS)), empty_rerolls=1, noise=Replay())


# What a prompt may not be


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[10, V]], None, f"token {V} is outside the vocabulary of {V}"),
        ([[-1, 10]], None, f"token -1 is outside the vocabulary of {V}"),
        ([[10, IMAGE]], None, "1 place for images, of 1 image tokens, and 0 images of 0"),
        ([[]], None, "the prompt is empty"),
        ([10, 11], None, r"\[B, S\] with at least one token, got \(2,\)"),
        ([[10, 11]], [3], r"1 numbers from 1 to 2, got \[3\]"),
        ([[10, 11]], [0], r"1 numbers from 1 to 2, got \[0\]"),
        ([[10, 11]], [1, 1], r"1 numbers from 1 to 2, got \[1, 1\]"),
        ([[10] * 1017], None, "1017 tokens; with a canvas of 8, at most 1016 of the 1024"),
    ],
    ids=[
        "too large",
        "negative",
        "image",
        "empty",
        "no batch",
        "long",
        "zero",
        "two for one",
        "full",
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_before_any_work(tokens, lengths, message):
    oracle = Oracle(lambda canvas, look: sure(WORDS))
    with pytest.raises(PromptError, match=message):
        run(
            oracle,
            mx.array(tokens, dtype=mx.int32),
            lengths=None if lengths is None else mx.array(lengths),
        )
    assert oracle.reads == [] and oracle.built == 0


def test_the_longest_prompt_that_leaves_room_for_a_canvas_is_read():
    events = run(Oracle(lambda canvas, look: sure(WORDS)), mx.array([[10] * 1016]))
    assert events[-1].new_tokens == L


def test_padding_may_be_any_token_even_an_image():
    tokens = mx.array([[IMAGE, 10], [11, 12]], dtype=mx.int32)
    oracle = Oracle(*[lambda canvas, look: sure(WORDS)] * 2)
    events = run(oracle, tokens, lengths=mx.array([1, 2]))
    assert len(committed(events)) == 2
    assert [asked.read for asked in oracle.rows] == [[[10]], [[11, 12]]]


def test_settings_that_contradict_the_checkpoint_are_refused_before_any_work():
    oracle = Oracle(lambda canvas, look: sure(WORDS))
    with pytest.raises(ConfigError, match="canvas_length 9 is longer than the checkpoint's 8"):
        run(oracle, canvas_length=9)
    assert oracle.reads == []


# Less work

FAST = {"policy": "fast", "prefix_commit": "off"}  # whole canvases


def test_a_fast_canvas_that_is_sure_at_once_takes_one_step():
    events = run(Oracle(lambda canvas, look: sure(WORDS)), **FAST)
    assert steps_of(events) == [(0, 0)]
    assert committed(events)[0].tokens.tolist() == [WORDS]
    assert events[-1].positions == L


def test_a_fast_canvas_that_is_never_sure_holds_one_more_position_in_every_step():
    oracle = Oracle(lambda canvas, look: unsure(WORDS))
    events = run(oracle, **FAST)
    held = [int(event.accepted.sum()) for event in events if isinstance(event, StepDone)]
    assert held == list(range(1, L + 1))
    assert committed(events)[0].tokens.tolist() == [WORDS]


def test_a_fast_canvas_goes_back_on_what_it_held():
    def script(canvas, look):
        return unsure(WORDS if look < 3 else [40, *WORDS[1:]])

    events = run(Oracle(script), **FAST)
    held = [int(event.accepted.sum()) for event in events if isinstance(event, StepDone)]
    assert len(held) > L, "the place that moved had to be held again"
    assert committed(events)[0].tokens.tolist() == [[40, *WORDS[1:]]]


@pytest.mark.parametrize("rule", [{}, {"acceptance": "confidence", "temperature": 0}])
def test_what_moves_behind_the_end_holds_up_the_canvas_but_not_the_answer(rule):
    def script(canvas, look):
        return sure([30, 31, EOS, 33 + look, 34 + look, 35, 36, 37 + look])

    whole = run(Oracle(script), **rule, max_denoising_steps=6)
    answer = run(Oracle(script), **rule, max_denoising_steps=6, stop_on="answer")
    assert len(steps_of(answer)) == (1 if rule else 2)
    assert len(steps_of(whole)) == (1 if rule else 6)
    assert committed(answer)[0].tokens.tolist() == [[30, 31, EOS, *[PAD] * 5]]


NARROW = {
    "canvas_width": "answer",
    "stop_on": "answer",
    "entropy_bound": 1000,
    "temperature": 0,
}


def test_columns_behind_an_accepted_end_are_dropped_and_the_text_is_the_same(ahead):
    def script(canvas, look):
        return (sure if look > 2 else unsure)([30, 31 + look, EOS, *[33] * 5])

    oracle = Oracle(script)
    events = run(oracle, **NARROW, max_denoising_steps=4)
    widths = widths_of(events)
    assert widths == [8, 4, 4, 4]
    asked = [canvas.shape[1] for canvas, _ in oracle.asked]
    assert asked == ([8, 8, 4, 4, 4] if ahead else widths)  # one was built for too many
    assert events[-1].positions == sum(widths)
    assert committed(events)[0].tokens[0].tolist()[:3] == [30, 34 + ahead, EOS]
    assert events[-1].reason == "stop"


def test_a_lost_end_gives_all_columns_back_with_their_own_noise(ahead):
    def script(canvas, look):
        return unsure([30, 31, EOS, *[33] * 5] if look == 0 else [34 + look] * L)

    oracle = Oracle(script)
    events = run(oracle, **NARROW, max_denoising_steps=4)
    assert widths_of(events) == [8, 4, 8, 8]
    wide = oracle.asked[4 if ahead else 2]  # two were built ahead and dropped
    assert wide[1].shape[1] == L, "the self-conditioning is as wide as the canvas"
    fresh = SeededNoise(1).renoise(0, 1, (1, L), V)
    assert wide[0][0, 4:].tolist() == fresh[0, 4:].tolist()
    assert not np.array(wide[1])[0, 4:].any(), "nothing is known of columns that were not looked at"


def test_each_row_has_its_own_width(ahead):
    longer = [30, 31, 32, 33, 34, EOS, 36, 37]
    oracle = Oracle(lambda canvas, look: unsure(ENDED), lambda canvas, look: unsure(longer))
    events = run(oracle, BOTH, **NARROW, max_denoising_steps=3)
    assert widths_of(of_row(events, 0)) == [8, 4, 4]
    assert widths_of(of_row(events, 1)) == [8, 7, 7]
    assert [e.positions for e in events if isinstance(e, Finished)] == [16, 22]
    asked = [
        [canvas.shape[1] for canvas, _ in rows.looks[0]] for rows in oracle.rows
    ]  # with the look that was built too wide
    assert asked == ([[8, 8, 4, 4], [8, 8, 7, 7]] if ahead else [[8, 4, 4], [8, 7, 7]])


def test_a_row_with_another_width_brings_its_own_columns_back():
    """Row 0 becomes narrow, row 1 does not: each is conditioned on its own columns."""
    oracle = Oracle(
        lambda canvas, look: unsure([30, 31, EOS, *[33] * 5]), lambda canvas, look: unsure(WORDS)
    )
    run(oracle, BOTH, **NARROW, max_denoising_steps=4)
    for asked, tokens in zip(oracle.rows, ([30, 31, EOS, *[33] * 5], WORDS), strict=True):
        for canvas, soft in asked.looks[0][1:]:
            width = canvas.shape[1]
            assert np.array(soft)[0].argmax(-1).tolist() == tokens[:width]


def test_draws_without_the_logits_are_those_of_the_contract():
    class Contract(SeededNoise):  # any other class is asked for samples of the logits
        pass

    def ids(noise):
        model = load_drawn(5)
        settings = GenerationSettings(max_new_tokens=24, max_denoising_steps=5)
        events = denoise_tokens(model, PROMPT, settings, noise=noise)
        return [event.tokens.tolist() for event in events if isinstance(event, CanvasCommitted)]

    assert ids(SeededNoise(3)) == ids(Contract(3)) != ids(SeededNoise(4))


@pytest.mark.parametrize("bound", [0.0, 2.0, 100.0], ids=["all dense", "some", "none"])
def test_sparse_self_conditioning_with_every_token_in_its_list_is_dense(bound):
    model = load_drawn(5)
    vocab_size = model.config.text.vocab_size

    def drafts(**settings):
        events = denoise_tokens(
            model, PROMPT, GenerationSettings(seed=2, max_denoising_steps=4, **settings)
        )
        return [event.draft.tolist() for event in events if isinstance(event, StepDone)]

    sparse = {"sparse_tokens": vocab_size, "sparse_entropy": bound}
    assert drafts(self_conditioning="sparse", **sparse) == drafts()


def test_a_narrow_look_that_has_lost_its_end_does_not_settle(ahead):
    # It shows an end, loses it while narrow, and is sure of all it sees then.
    first, lost = [30, 31, EOS, *[33] * 5], [30, 31, 32, 33, 34, 35, 36, EOS]

    def script(canvas, look):
        if look < 1 + ahead:
            return first, [SURE, UNSURE, SURE, *[UNSURE] * 5]
        return sure(lost)

    oracle = Oracle(script)
    events = run(oracle, **FAST)
    (canvas,) = committed(events)
    assert canvas.tokens[0].tolist() == lost, "no padding, and all of the text"
    assert 4 in widths_of(events), "it was narrow"
    assert events[-1].reason == "stop" and events[-1].new_tokens == L


def test_a_canvas_starts_as_narrow_as_what_is_left_to_write():
    oracle = Oracle(lambda canvas, look: sure(WORDS))
    events = run(oracle, policy="fast", max_new_tokens=L + 2)
    assert widths_of(events) == [8, 3]  # two tokens, and an eighth to spare
    assert [canvas.tokens.tolist() for canvas in committed(events)] == [[WORDS], [WORDS[:2]]]
    reference = Oracle(lambda canvas, look: sure(WORDS))
    run(reference, max_new_tokens=L + 2)
    assert {canvas.shape[1] for canvas, _ in reference.asked} == {L}


def test_an_empty_row_is_drawn_again_with_all_its_columns_beside_a_narrow_one(ahead):
    def again(canvas, look):
        return unsure(EMPTY) if look < 2 + ahead else sure(WORDS)

    oracle = Oracle(lambda canvas, look: unsure([30, 31, EOS, *[33] * 5]), again)
    events = run(oracle, BOTH, **NARROW, max_denoising_steps=2, empty_rerolls=2)
    first, second = (of_row(events, row) for row in range(2))
    assert committed(first)[0].tokens.tolist()[0][:3] == [30, 31, EOS]
    assert committed(second)[0].tokens.tolist() == [WORDS]
    assert widths_of(second)[2] == L


LIKELY = [30, 31, *[EOS] * 6], [SURE, SURE, *[4.5] * 6]  # an end of 0.81 is not accepted at once


@pytest.mark.parametrize(
    ("mass", "widths"),
    [({"width_mass": 0.0}, [8, 8]), ({}, [8, 4]), ({"width_mass": 0.9}, [8, 8])],
)
def test_columns_behind_a_likely_end_are_dropped_before_it_is_accepted(mass, widths):
    events = run(Oracle(lambda canvas, look: LIKELY), **FAST, **mass)
    assert widths_of(events) == widths
    assert committed(events)[0].tokens[0].tolist()[:3] == [30, 31, EOS]


def test_a_likely_end_that_is_lost_gives_all_columns_back(ahead):
    def script(canvas, look):
        return LIKELY if look < 1 + ahead else sure(WORDS)

    events = run(Oracle(script), **FAST, width_mass=0.7)
    assert widths_of(events) == [8, 4, 8]
    assert committed(events)[0].tokens.tolist() == [WORDS]


def test_a_width_that_follows_the_answer_needs_seeded_noise():
    class Replay:
        pass

    with pytest.raises(ConfigError, match="canvas_width 'answer' need seeded noise"):
        run(Oracle(lambda canvas, look: sure(WORDS)), **FAST, noise=Replay())


def test_the_most_uncertain_positions_are_conditioned_densely_and_the_others_sparsely():
    model = load_drawn(5)
    vocab_size, settings = model.config.text.vocab_size, GenerationSettings(seed=0)
    sparse = replace(settings, self_conditioning="sparse", sparse_tokens=2).resolve(model.config)
    rng = np.random.default_rng(0)
    sharp = np.array([9, 0.2, 8, 0.1])[:, None]  # positions 1 and 3 are the unsure ones
    seen = statistics(mx.array((rng.normal(size=(1, 4, vocab_size)) * sharp).astype(np.float32)))
    ids, p = shortlist(seen.weights, seen.total, 2)
    belief = Belief(seen.weights, seen.total, seen.entropy, (ids, p))
    tokens = mx.zeros((1, 4), mx.int32)
    canvas = Canvas(0, sparse, SeededNoise(0), None, 0, Plan(4, 2, 4), tokens, belief=belief)
    soft = step_module.self_conditioning(model, [canvas], model.mean_row())
    mixed = np.array(soft)[0]
    dense = np.array(model.mean_embedding(seen.weights, seen.total))[0]
    short = np.array(model.sparse_embedding(ids, p, model.mean_row()))[0]
    for i, expected in enumerate((short, dense, short, dense)):
        np.testing.assert_allclose(mixed[i], expected[i], atol=1e-5)
    assert np.abs(short - dense)[[1, 3]].max() > 0.01
