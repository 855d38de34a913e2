"""Filling: what is pinned stands, what is constrained holds, and lengths are found."""

from __future__ import annotations

import functools
import re
from contextlib import nullcontext
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import mlx_diffgemma
from mlx_diffgemma import (
    DiffGemmaError,
    GenerationSettings,
    Template,
    denoise_tokens,
    encode_prompt,
    fill,
)
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.constraint.line import Line
from mlx_diffgemma.denoise.constrained import Span, TokenConstraint
from mlx_diffgemma.denoise.pinned import FREE, Pinned, TokenSet
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.errors import TemplateError
from mlx_diffgemma.events import CanvasCommitted, StepDone, TrialStarted
from mlx_diffgemma.language.prompt import encode_text, token_bytes
from mlx_diffgemma.language.template import Slot
from mlx_diffgemma.model import Context, OpenContext
from mlx_diffgemma.model.backend import as_on_gpu
from mlx_diffgemma.write import writer
from mlx_diffgemma.write.fill import Filled, stream_fill
from tests.checkpoints import GENERATION, draw_config, load_drawn

M, V, L = (
    16,
    384,
    16,
)  # the bundled tokenizer's vocabulary, and a canvas that templates do not fit in


@functools.cache
def bundled():
    return mlx_diffgemma.load(mlx_diffgemma.bundled_model())


@functools.cache
def small_model():
    return load_drawn(2, vocab_size=V, canvas_length=L)


class Dice:
    """A model without weights whose outputs are drawn anew at every look."""

    dtype = mx.float32

    def __init__(self):
        raw = draw_config(0, vocab_size=V, hidden_size=M, canvas_length=L)
        self.config = ModelConfig.from_dict(raw, GENERATION)
        self.rng = np.random.default_rng(0)

    def prefill(self, tokens, context=None, *, step_size=2048):
        return Context((), tokens.shape[1] + (context.length if context else 0), tokens.shape[0])

    commit = prefill

    def encode(self, pieces, contexts, images=None, *, states=True):
        return None, [self.prefill(*both) for both in zip(pieces, contexts, strict=True)]

    def open(self, context, canvas_length, *, unread=None):
        read = context if unread is None else self.prefill(unread, context)
        return OpenContext.of(read, canvas_length)

    def canvas_states(self, canvases, opened, *, self_conditioning=None):
        later = list(opened)
        opened.clear()
        shape = (1, sum(canvas.shape[1] for canvas in canvases), V)
        return mx.array(6 * self.rng.standard_normal(shape, np.float32)), later

    def outputs(self, states):
        return states

    def embed(self, tokens):
        return mx.zeros((*tokens.shape, M))

    def mean_embedding(self, weights, total):
        return mx.zeros((*weights.shape[:2], M))


class Watched:
    """Any model, with every canvas that it was asked about, and the trial of each."""

    def __init__(self, model):
        self._model = model
        self.canvases: list[tuple[int, mx.array]] = []  # trial, tokens
        self.given: list[np.ndarray] = []  # per trial, its pinned tokens

    def __getattr__(self, name):
        return getattr(self._model, name)

    def row(self, *arguments, pinned=None, **more):
        """Make a row as `Row` does; those of a trial have pinned tokens."""
        if pinned is not None:
            self.given.append(pinned.tokens)
        return Row(*arguments, pinned=pinned, **more)

    def canvas_states(self, canvases, opened, *, self_conditioning=None):
        (canvas,) = canvases
        self.canvases.append((len(self.given) - 1, canvas))
        return self._model.canvas_states(canvases, opened, self_conditioning=self_conditioning)


TEXTS = st.text(max_size=12)
SLOTS = st.one_of(
    st.just(("gap", None, None)),
    st.tuples(st.just("gap"), st.integers(1, 4), st.integers(0, 3)),
    st.tuples(st.just("one of"), st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3)),
    st.tuples(st.just("match"), st.sampled_from(["[0-9]{1,3}", "a+b?", "(é|ü)x*", "[à-ž]{2}"])),
)


@st.composite
def templates(draw):
    parts = []
    for number in range(draw(st.integers(1, 3))):
        parts.append(draw(TEXTS))
        kind, *rest = draw(SLOTS)
        name = str(number)
        if kind == "gap":
            low, more = rest
            high = None if low is None else low + more
            parts.append(Slot(name, "gap", low, high))
        elif kind == "one of":
            parts.append(Slot(name, "one of", options=tuple(rest[0])))
        else:
            parts.append(Slot(name, "match", pattern=rest[0]))
    parts.append(draw(TEXTS))
    return Template(tuple(part for part in parts if part != ""))


def check(model, template, policy, seed):
    watched = Watched(model)
    with patch.object(writer, "Row", watched.row):
        check_run(watched, bundled()[1], template, policy, seed)


def check_run(watched, tokenizer, template, policy, seed):
    try:
        events = list(
            stream_fill(
                watched,
                tokenizer,
                template,
                prompt="Go.",
                gap_tokens=(1, 5),
                settings=GenerationSettings(seed=seed, max_denoising_steps=2, policy=policy),
            )
        )
    except DiffGemmaError as error:  # an option of no tokens or too many: another is drawn instead
        assert re.search("cannot spell|not Unicode|more than a canvas", str(error)), error
        assume(False)
    filled = events[-1]
    assert isinstance(filled, Filled)
    # The text: literals byte for byte, slots as their tokens decode.
    spelled = token_bytes(tokenizer)
    expected = ""
    for part in template.parts:
        if isinstance(part, str):
            expected += part
            continue
        slot = filled.slots[part.name]
        text = b"".join(spelled[t] for t in slot.tokens).decode("utf-8", "replace")
        assert slot.text in text  # a token may hold text beside the slot too
        text = slot.text
        expected += text
        if part.kind == "one of":
            assert text in part.options
        elif part.kind == "match":
            assert re.fullmatch(part.pattern, text)
        else:
            low, high = part.low or 1, part.high or 5
            assert low <= len(slot.tokens) <= high
    assert filled.text == expected
    # The ids: what surrounds the free positions is the template's in every canvas and draft.
    pieces = [
        encode_text(tokenizer, part) if isinstance(part, str) else part for part in template.parts
    ]
    drafts = [np.array(event.draft) for event in events if isinstance(event, StepDone)]
    trials = [event for event in events if isinstance(event, TrialStarted)]
    assert len(trials) == len(watched.given)
    written = []
    for number, canvas in watched.canvases:
        canvas = np.array(canvas)
        here = watched.given[number][None, : canvas.shape[1]]
        np.testing.assert_array_equal(canvas[here != FREE], here[here != FREE])
        if trials[number].is_final:
            written.append(canvas)
    for canvas in [*written, *drafts]:
        for row in canvas.tolist():
            assert fits(row, pieces), (row, pieces)


def fits(row, pieces):
    """Whether a canvas may be a window of the template: somewhere from a slot, or from the
    beginning, on it holds the literals in order, with something of a possible length in slots."""
    ends = {16}  # the end of the turn, behind which eos fills the canvas
    starts = [0] + [i for i, piece in enumerate(pieces) if isinstance(piece, Slot)]

    def rest_fits(at, i):
        if at >= len(row):
            return True
        if i == len(pieces):
            return row[at] in ends and all(token == 1 for token in row[at + 1 :])
        piece = pieces[i]
        if isinstance(piece, list):
            part = row[at : at + len(piece)]
            return part == piece[: len(part)] and rest_fits(at + len(piece), i + 1)
        return any(rest_fits(at + n, i + 1) for n in range(1, 25))

    return any(rest_fits(0, i) for i in starts)


PROPERTY = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


DRAWN = (templates(), st.sampled_from(["reference", "fast"]), st.integers(0, 9))


def check_dice(template, policy, seed, built_ahead):
    with as_on_gpu() if built_ahead else nullcontext():
        check(Dice(), template, policy, seed)


@pytest.mark.parametrize("count", [60, pytest.param(1700, marks=pytest.mark.long)])
def test_whatever_the_model_says_literals_stand_and_constraints_hold(count):
    settings(PROPERTY, max_examples=count)(given(*DRAWN, st.booleans())(check_dice))()


def test_a_canvas_may_end_inside_of_a_later_slot():
    template = Template.parse("{{gap}}000000000{{one of: 00𐀀}}0")
    check(Dice(), template, "reference", 0)


def test_a_single_possible_text_needs_no_step():
    template = Template((Slot("0", "one of", options=("a", "0\x80\x80\x80𐀀")), "b𐀀"))
    check(Dice(), template, "reference", 0)


def check_random_network(template, policy, seed):
    check(small_model(), template, policy, seed)


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.long)])
def test_a_random_network_is_held_to_it_too(count):
    settings(PROPERTY, max_examples=count)(given(*DRAWN)(check_random_network))()


def fill_bundled(text, prompt, **more):
    model, tokenizer = bundled()
    seed, policy = more.pop("seed", 1), more.pop("policy", None)
    chosen = GenerationSettings(seed=seed, policy=policy)
    return fill(model, tokenizer, Template.parse(text), prompt=prompt, settings=chosen, **more)


def test_a_sudoku_is_solved_around_its_givens():
    text = "2{{gap:1}}13\n{{gap:1}}3{{gap:1}}4\n413{{gap:1}}\n3241"
    filled = fill_bundled(text, "Sudoku:\n2.13\n.3.4\n413.\n3241")
    assert filled.text == "2413\n1324\n4132\n3241"
    assert all(slot.certainty > 0.9 for slot in filled.slots.values())


@pytest.mark.parametrize("policy", ["reference", "fast"])
def test_the_length_of_a_gap_is_found(policy):
    filled = fill_bundled("12 13 14 {{n = gap}} 18 19 20", "Count from 12 to 20.", policy=policy)
    assert filled.slots["n"].text == "15 16 17"
    lengths = filled.slots["n"].lengths
    assert max(lengths, key=lengths.get) == 8 and sum(lengths.values()) <= 1
    known = fill_bundled("12 13 14 {{n = gap:8}} 18 19 20", "Count from 12 to 20.", policy=policy)
    assert known.slots["n"].tokens == filled.slots["n"].tokens  # the same run
    assert known.slots["n"].certainty == filled.slots["n"].certainty
    assert known.positions < filled.positions <= known.positions + 64
    assert not known.slots["n"].lengths
    text = "12 13 14 {{n = gap:2..9}} 18 19 20"
    bounded = fill_bundled(text, "Count from 12 to 20.", policy=policy)
    assert bounded.slots["n"].text == "15 16 17"
    assert (bounded.positions < filled.positions) == (policy == "fast")  # a narrower canvas


def test_a_template_longer_than_a_canvas_is_written_in_several_and_says_so():
    given = " ".join(map(str, range(13, 35)))
    text = f"{{{{gap:2}}}} {given} {{{{gap:2}}}} 36"
    filled = fill_bundled(text, "Count from 12 to 36.")
    form = re.escape(text).replace(r"\{\{gap:2\}\}", "..")
    assert re.fullmatch(form, filled.text, re.DOTALL)
    assert filled.canvases == 2
    assert "longer than a canvas" in filled.notes[0]


def test_the_same_seed_fills_the_same():
    one, other = (fill_bundled("{{gap}} is {{one of: true | false}}", None) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{{gap:70}}",
            "line 1, column 3: slot 1 is to have at least 70 tokens, and a canvas holds 64",
        ),
        ("{{match: [0-9]{65,70}}}", "column 3: slot 1: no text that fits it has at most 64 tokens"),
        ("{{match: (}}", 'column 10: slot 1: match: expression "(", character 1: this ( is not'),
        ("a {{n = match: a(?=b)}}", "line 1, column 17: slot n: match: expression"),
        (
            '{{n = json: {"type": "string", "format": "regex"}}}',
            "column 7: slot n: json: ",
        ),
        ('{{json: {"type": }}', "line 1, column 18: json: Expecting value"),
        ("{{json: 1 2}}", "line 1, column 11: there is more than one JSON text in this slot"),
        ("{{gap:99999999999}}", "at least 99999999999 tokens, and a canvas holds 64"),
        ("{{one of: a▁b | c}}", "cannot spell 'a▁b'"),
        ("x" * 1990 + "{{gap}}", "they do not fit into 2048 positions"),
    ],
)
def test_a_template_that_cannot_be_placed_is_refused(text, message):
    with pytest.raises(DiffGemmaError, match=re.escape(message)):
        fill_bundled(text, "Go.")


@pytest.mark.parametrize("policy", [{}, {"policy": "fast", "lookahead": 1.0}], ids=str)
def test_nothing_pinned_is_plain_generation(policy):
    """But for a lookahead: where text is pinned, all columns are seen."""
    model, tokenizer = bundled()
    tokens = mx.array([encode_text(tokenizer, "Sort: 3 1 2")])
    nothing = [Pinned(np.full(80, FREE, np.int32))]

    def ids(pinned):
        chosen = GenerationSettings(seed=4, max_new_tokens=96, **policy)
        events = denoise_tokens(model, tokens, chosen, pinned=pinned)
        return [event.tokens.tolist() for event in events if isinstance(event, CanvasCommitted)]

    assert ids(None) == ids(nothing)


def test_pinned_positions_condition_themselves_and_are_not_counted():
    class Asked(Dice):
        def __init__(self):
            super().__init__()
            self.soft = []

        def canvas_states(self, canvases, opened, *, self_conditioning=None):
            self.soft.append(self_conditioning)
            return super().canvas_states(canvases, opened)

        def embed(self, tokens):
            return mx.broadcast_to(tokens[..., None], (*tokens.shape, M)).astype(mx.float32)

    given = np.full(L, FREE, np.int32)
    given[::2] = np.arange(100, 100 + L // 2)
    model = Asked()
    chosen = GenerationSettings(seed=0, max_denoising_steps=3, max_new_tokens=L)
    pinned = [Pinned(given)]
    events = list(denoise_tokens(model, mx.array([[5, 6]]), chosen, pinned=pinned))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert model.soft[0] is None
    for soft in model.soft[1:]:
        np.testing.assert_array_equal(np.array(soft)[0, ::2, 0], given[::2])
        assert not np.array(soft)[0, 1::2].any()
    for event in steps:
        np.testing.assert_array_equal(np.array(event.draft)[0, ::2], given[::2])
        assert np.array(event.accepted)[0, ::2].all()
        assert not np.array(event.entropy)[0, ::2].any()
        assert (np.array(event.certainty)[0, ::2] == 1).all()


def test_a_set_leaves_other_tokens_no_mass_and_no_noise():
    class Believed(Dice):
        def __init__(self):
            super().__init__()
            self.weights, self.asked = [], []

        def canvas_states(self, canvases, opened, *, self_conditioning=None):
            self.asked += canvases
            return super().canvas_states(canvases, opened)

        def mean_embedding(self, weights, total):
            self.weights.append(weights)
            return super().mean_embedding(weights, total)

    among = np.array([7, 50, 300])
    model = Believed()
    pinned = [Pinned(np.full(L, FREE, np.int32), TokenSet(among))]
    chosen = GenerationSettings(seed=0, max_denoising_steps=4, max_new_tokens=L, top_candidates=6)
    events = list(denoise_tokens(model, mx.array([[5, 6]]), chosen, pinned=pinned))
    for canvas in [*map(np.array, model.asked), *(np.array(e.draft) for e in events[1:-2])]:
        assert np.isin(canvas[0], among).all()
    assert len(model.weights) == 3
    for weights in map(np.array, model.weights):
        outside = np.ones(V, bool)
        outside[among] = False
        assert not weights[0][:, outside].any()
    ids, probabilities = (np.array(x)[0, 0] for x in events[1].candidates)
    assert set(ids[probabilities > 0]) == set(among)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    starts = np.array(model.asked[0])[0]
    assert set(starts) == set(among)  # all are drawn


def test_as_many_rows_are_pinned_as_are_read():
    model, _ = bundled()
    pinned = [Pinned(np.full(4, FREE, np.int32))] * 2
    with pytest.raises(TemplateError, match="2 rows are pinned, and the run has 1"):
        list(denoise_tokens(model, mx.array([[5, 6]]), GenerationSettings(), pinned=pinned))


def test_a_span_across_two_canvases_is_refused():
    model, _ = bundled()
    line = Line(V)
    line.token(0, 50, at := line.state())
    line.among(at, np.array([51, 52]), end := line.state())
    part = line.part(end)
    span = Span(TokenConstraint.of(part.automaton), 63, 65, part.ends)
    pinned = [Pinned(np.full(80, FREE, np.int32), spans=[span])]
    chosen = GenerationSettings(max_new_tokens=128)
    with pytest.raises(TemplateError, match="crosses the border of two canvases, at position 64"):
        list(denoise_tokens(model, mx.array([[5, 6]]), chosen, pinned=pinned))


def test_a_slot_with_one_possible_text_is_not_denoised():
    filled = fill_bundled("It is {{n = one of: yes}} or {{match: no?}}.", None)
    assert filled.slots["n"].text == "yes" and filled.slots["n"].certainty == 1
    alone = fill_bundled("It is {{one of: yes}}.", None)
    assert (alone.text, alone.steps, alone.canvases) == ("It is yes.", 0, 1)
    spelled = fill_bundled("It is {{match: yes}}.", None)
    assert (spelled.text, spelled.steps) == ("It is yes.", 0)


def test_a_template_may_reach_the_last_position():
    """One canvas of 64 behind the prompt, the end of the text in the last positions."""
    model, tokenizer = bundled()
    prompt = "x" * 1900
    room = model.config.text.max_position_embeddings - 64
    prompt += "x" * (room - len(encode_prompt(tokenizer, prompt)))
    text = "ab {{gap:2}}" + "c" * 20
    assert fill_bundled(text, prompt).text.endswith("c" * 20)
    with pytest.raises(DiffGemmaError, match="they do not fit into 2048 positions"):
        fill_bundled(text, prompt + "x")


def test_options_of_different_lengths_are_judged_by_what_they_say():
    for options, right in (("18 | 0000", "18"), ("18 | 7", "18")):
        text = f"15 16 17 {{{{one of: {options}}}}}"
        filled = fill_bundled(text, "Count from 15 to 18.", policy="fast")
        assert filled.slots["1"].text == right


def test_an_end_token_that_is_text_ends_nothing():
    model, tokenizer = bundled()
    (line_break,) = encode_text(tokenizer, "\n")
    chosen = GenerationSettings(seed=1, policy="fast", extra_eos_token_ids=(line_break,))
    template = Template.parse("a\n{{gap:3}} b {{one of: xy | zw}}")
    filled = fill(model, tokenizer, template, prompt="Go.", settings=chosen)
    assert filled.slots["2"].text in ("xy", "zw") and filled.text.startswith("a\n")


def test_less_than_was_asked_for_is_said():
    filled = fill_bundled("{{gap:30..50}} 13 14 15 16 17 18 19 20", "Count from 11 to 20.")
    assert any("tokens were possible" in note for note in filled.notes)
    with pytest.raises(TemplateError, match="has 70 tokens, more than a canvas of 64 holds"):
        fill_bundled("{{one of: ab | " + "z" * 70 + "}}", "Go.")


def test_a_string_is_a_template_and_what_is_none_is_refused():
    settings = GenerationSettings(seed=1)
    text = "Answer: {{one of: yes | no}}"
    filled, parsed = (
        fill(*bundled(), template, settings=settings) for template in (text, Template.parse(text))
    )
    assert filled == parsed and filled.text in ("Answer: yes", "Answer: no")
    with pytest.raises(TemplateError, match="no slot"):
        fill(*bundled(), "no slots")
    for wrong in (None, b"a {{gap}}", ["a {{gap}}"], Slot("1", "gap")):
        with pytest.raises(TemplateError, match=f"Template.parse, got {type(wrong).__name__}"):
            next(stream_fill(*bundled(), wrong))


def test_a_slot_that_fits_a_canvas_alone_fits_it_between_letters():
    number = "9" * 16
    short = GenerationSettings(seed=1, canvas_length=16, max_denoising_steps=2)
    filled = fill(*bundled(), f"x{{{{one of: {number}}}}}y", prompt="Fill.", settings=short)
    assert filled.text == f"x{number}y"


def test_no_bound_is_noted_where_all_that_is_asked_for_fits():
    short = GenerationSettings(seed=1, max_denoising_steps=1)
    filled = fill(
        *bundled(), "The {{gap:1..28}}cat dog sun sky red ", settings=short, prompt="Fill."
    )
    assert not any("were possible" in note for note in filled.notes)


@pytest.mark.parametrize("bounds", [(5, 2), (0, 0), (0, 3), (-1, 4)])
def test_bounds_of_gaps_that_cannot_be_are_refused(bounds):
    with pytest.raises(TemplateError, match=f"a gap cannot have {bounds[0]} to {bounds[1]} tokens"):
        fill(*bundled(), "a {{gap}} b", prompt="Fill.", gap_tokens=bounds)
