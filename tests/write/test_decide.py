"""Decisions: probabilities are those of the model's logits, questions share one context, and what
cannot be asked is refused."""

from __future__ import annotations

import functools
import itertools
import json
import string
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import (
    DecisionTask,
    DiffGemmaError,
    Engine,
    PromptOptions,
    Question,
    Store,
    bundled_model,
    decide,
    encode_prompt,
    load,
)
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.errors import PromptError, QuestionError
from mlx_diffgemma.events import PrefillDone
from mlx_diffgemma.language.prompt import encode_text
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.write import decide as decided
from mlx_diffgemma.write.decide import Decisions, empty_thought, labels_of
from mlx_diffgemma.write.job import run_jobs
from tests.checkpoints import load_drawn

TEXT = "Sort: 6 3 1 7 0 6"
QUESTIONS = (
    Question.predicate("Is the list sorted?", name="sorted"),
    Question.choice("Which number is the least?", ["6", "3", "1", "7", "0"]),
    Question.choice("Is it empty?", [True, False, "true"]),
    Question.score("How long is it?", {"short": None, "mid": "about five", "long": "ten or more"}),
    Question.choice("Which of many?", [f"n{n}" for n in range(27)]),
    Question.score("How many steps?", [f"{n}" for n in range(11)]),
)
FILL = 1  # the bundled tokenizer's <eos>


@functools.cache
def bundled():
    return load(bundled_model())


@functools.cache
def drawn():
    """A random model with the bundled tokenizer's vocabulary."""
    return load_drawn(2, vocab_size=384, canvas_length=32, sliding_window=13), bundled()[1]


def labels(question: Question) -> list[str]:
    """How the options are to be labelled where no word and no pair of letters is one token."""
    count = len(question.options)
    if question.kind == "score" and count <= 10:
        return list(string.digits[:count])
    if question.kind != "score" and count <= 26:
        return list(string.ascii_uppercase[:count])
    pairs = itertools.product(string.ascii_uppercase, repeat=2)
    return ["".join(pair) for pair in itertools.islice(pairs, count)]


def by_hand(model, tokenizer, text: str, question: Question, canvas: np.ndarray) -> np.ndarray:
    """The log-probability of each label, from the model's verbs alone."""
    asked = question.shown(labels(question), ask_of(question))
    ids = encode_prompt(tokenizer, f"{text}\n\n{asked}")
    logits = model.denoise(mx.array(canvas), model.prefill(mx.array([ids])))
    logs = np.array(logits, np.float64)[0]
    logs -= np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    vocabulary = tokenizer.get_vocab()
    return np.array(
        [
            sum(logs[place, vocabulary[letter]] for place, letter in enumerate(label))
            for label in labels(question)
        ]
    )


def ask_of(question: Question) -> str:
    longest = max(map(len, labels(question)))
    if longest == 2:
        return "code"
    return "digit" if question.kind == "score" else "letter"


@pytest.fixture
def canvases(monkeypatch) -> list[np.ndarray]:
    """The canvases that are denoised, in their order."""
    seen: list[np.ndarray] = []
    start = decided._Start.start

    def kept(self, *arguments):
        canvas = start(self, *arguments)
        seen.append(np.array(canvas))
        return canvas

    monkeypatch.setattr(decided._Start, "start", kept)
    return seen


@pytest.mark.parametrize("make", [bundled, drawn])
@pytest.mark.parametrize("together", [True, False])
def test_probabilities_are_those_of_the_models_logits(make, together, canvases):
    model, tokenizer = make()
    if together:
        answers = decide(model, tokenizer, TEXT, QUESTIONS).answers
    else:
        answers = [decide(model, tokenizer, TEXT, q).answer for q in QUESTIONS]
    assert len(canvases) == len(QUESTIONS)
    for question, answer, canvas in zip(QUESTIONS, answers, canvases, strict=True):
        logs = by_hand(model, tokenizer, TEXT, question, canvas)
        expected = np.exp(logs) / np.exp(logs).sum()
        np.testing.assert_allclose(answer.probabilities, expected, atol=2e-5)
        np.testing.assert_allclose(answer.share, np.exp(logs).sum(), rtol=1e-3)
        best = int(expected.argmax())
        assert answer.value == question.options[best].value
        assert answer.confidence == pytest.approx(expected[best] * np.exp(logs).sum(), rel=1e-3)
        if question.kind == "score":
            assert answer.score == pytest.approx(expected @ np.arange(len(expected)), abs=1e-4)
        else:
            assert answer.score is None
    true = by_hand(model, tokenizer, TEXT, QUESTIONS[0], canvases[0])
    assert answers[0].probability == pytest.approx(np.exp(true[0]) / np.exp(true).sum(), abs=1e-5)


@pytest.mark.parametrize(("question", "slot"), [(QUESTIONS[0], 1), (QUESTIONS[4], 2)])
def test_the_canvas_is_noise_then_the_end_of_the_turn_then_fill(question, slot, canvases):
    model, tokenizer = bundled()
    decide(model, tokenizer, TEXT, question)
    decide(model, tokenizer, TEXT, question, canvas_length=32)
    decide(model, tokenizer, TEXT + " 1", question)
    for canvas, width in zip(canvases, (16, 32, 16), strict=True):
        assert canvas.shape == (1, width)
        vocabulary = tokenizer.get_vocab()
        assert canvas[0, slot] == vocabulary["<turn|>"] and (canvas[0, slot + 1 :] == FILL).all()
        assert not {*canvas[0, :slot].tolist()} & {vocabulary[c] for c in "".join(labels(question))}
    first, wider, other = (canvas[0, :slot].tolist() for canvas in canvases)
    assert first == wider, "the prompt alone is the noise's seed"
    assert first != other


def test_no_label_is_drawn_as_noise():
    _, tokenizer = bundled()
    labels = labels_of(tokenizer, QUESTIONS[4])  # all letters
    for n in range(100):
        asked = decided._Asked(QUESTIONS[4], labels, np.array([n], np.int32), (), n)
        drawn = asked.canvas(16, (2, 1), 384)[0, :2].tolist()
        assert not {*drawn} & {*labels.readout.tokens, 1, 2}


def test_a_repeated_question_has_a_repeated_answer_whatever_else_is_asked():
    model, tokenizer = bundled()
    asked = decide(model, tokenizer, TEXT, QUESTIONS[1])
    assert decide(model, tokenizer, TEXT, QUESTIONS[1]) == asked
    beside = decide(model, tokenizer, TEXT, [*QUESTIONS, QUESTIONS[1]]).answers
    np.testing.assert_allclose(beside[1].probabilities, asked.answer.probabilities, atol=1e-5)
    np.testing.assert_allclose(beside[-1].probabilities, beside[1].probabilities, atol=1e-5)


def test_what_the_prompts_begin_with_is_read_once_and_kept_once(monkeypatch):
    model, tokenizer = bundled()
    text, questions = "7 " * 300, [Question.predicate(f"Is it {n}?") for n in "abcdefghij"]
    read, contexts = [], []
    encode, began = DiffusionGemma.encode, Row.begin_canvas

    def reads(self, pieces, contexts, images, **more):
        read.append(sum(piece.shape[1] for piece in pieces))
        return encode(self, pieces, contexts, images, **more)

    def begins(row):
        contexts.append(row.context)
        return began(row)

    monkeypatch.setattr(DiffusionGemma, "encode", reads)
    monkeypatch.setattr(Row, "begin_canvas", begins)
    found = decide(model, tokenizer, text, questions)
    alone = len(encode_prompt(tokenizer, f"{text}\n\n{questions[0].shown(['A', 'B'], 'letter')}"))
    assert found.steps == len(questions) == len(contexts)
    assert sum(read) == found.prompt_tokens < alone + 100 * len(questions)
    assert len({id(context.shared) for context in contexts}) == 1
    shared = contexts[0].shared
    assert shared is not None and shared.length > 600
    for context in contexts:
        assert context.length > shared.length
        assert context.nbytes < shared.nbytes / 3, "the shared text was copied"


@pytest.mark.parametrize("as_messages", [True, False])
def test_what_the_prompts_begin_with_is_encoded_once(monkeypatch, as_messages):
    model, tokenizer = bundled()
    text, questions = "7 " * 300, [Question.predicate(f"Is it {n}?") for n in "abcdefghij"]
    encoded, encode = [], type(tokenizer).encode

    def counted(self, text, **options):
        encoded.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", counted)
    prompt = [{"role": "user", "content": text}] if as_messages else text
    task = DecisionTask(prompt=prompt, questions=tuple(questions))
    task.job(model, tokenizer)
    assert len(text) < sum(encoded) < len(text) + 2000


def test_a_shared_context_gives_what_a_context_of_its_own_gives_on_long_texts():
    """Longer than the window of sliding layers, and questions longer than it too."""
    for make in (bundled, drawn):
        model, tokenizer = make()
        questions = [
            Question.choice(f"{'why ' * n}which?", [f"{'so ' * n}{c}" for c in "abc"])
            for n in (1, 3, 12)
        ]
        together = decide(model, tokenizer, "7 3 " * 60, questions).answers
        for question, answer in zip(questions, together, strict=True):
            alone = decide(model, tokenizer, "7 3 " * 60, question).answer
            np.testing.assert_allclose(answer.probabilities, alone.probabilities, atol=5e-5)
            assert answer.share == pytest.approx(alone.share, rel=2e-3)


def test_an_engine_answers_as_decide_does():
    model, tokenizer = bundled()
    expected = decide(model, tokenizer, TEXT, QUESTIONS)
    task = DecisionTask(prompt=TEXT, questions=QUESTIONS)
    with Engine(model, tokenizer, max_rows=3) as engine:
        runs = [engine.submit(task) for _ in range(3)]
        results = [list(run) for run in runs]
    for events in results:
        found = events[-1]
        assert isinstance(found, Decisions)
        assert all(isinstance(event, PrefillDone) for event in events[:-1])
        for answer, other in zip(found.answers, expected.answers, strict=True):
            np.testing.assert_allclose(answer.probabilities, other.probabilities, atol=5e-5)


def test_a_store_keeps_what_questions_share():
    model, tokenizer = bundled()
    store = Store(1 << 28)
    first = decide(model, tokenizer, TEXT, QUESTIONS[:2], store=store)
    again = decide(model, tokenizer, TEXT, QUESTIONS[:2], store=store)
    assert first.cached_tokens == 0 < again.cached_tokens < again.prompt_tokens
    for a, b in zip(first.answers, again.answers, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)


def test_messages_are_an_input_and_the_question_is_a_further_turn(canvases):
    model, tokenizer = bundled()
    messages = [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "0 1 3 6 6 7"},
    ]
    question = QUESTIONS[1]
    found = decide(model, tokenizer, messages, question)
    asked = question.shown(labels(question), "letter")
    ids = encode_prompt(tokenizer, [*messages, {"role": "user", "content": asked}])
    assert found.prompt_tokens == len(ids)
    logits = model.denoise(mx.array(canvases[0]), model.prefill(mx.array([ids])))
    expected = np.array(mx.softmax(logits[0, 0])[mx.array(letters(tokenizer, "ABCDE"))])
    np.testing.assert_allclose(found.answer.probabilities, expected / expected.sum(), atol=1e-5)


def letters(tokenizer, text: str) -> list[int]:
    return [tokenizer.get_vocab()[c] for c in text]


# Labels and the empty thought, on tokenizers with other words.


class Words:
    """A tokenizer whose tokens are the given texts, and single characters."""

    unk_token_id = 0
    added_tokens_decoder: ClassVar[dict] = {}

    def __init__(self, *words: str) -> None:
        characters = [chr(c) for c in range(32, 127)] + ["\n"]
        self.texts = ["<unk>", *dict.fromkeys([*words, *characters])]

    def encode(self, text, add_special_tokens=False, split_special_tokens=False):
        ids = []
        while text:
            best = max((t for t in self.texts if t and text.startswith(t)), key=len)
            ids.append(self.texts.index(best))
            text = text[len(best) :]
        return ids


def spelled(tokenizer: Words, tokens) -> list[list[list[str]]]:
    return [[[tokenizer.texts[t] for t in place] for place in option] for option in tokens]


def test_labels_are_read_with_and_without_a_leading_space():
    tokenizer = Words(" A", " B", "true", " true", "false", " 0")
    found = labels_of(tokenizer, Question.choice("?", ["x", "y", "z"]))
    assert spelled(tokenizer, found.tokens) == [[["A", " A"]], [["B", " B"]], [["C"]]]
    assert (found.ask, found.positions) == ("letter", 1)
    found = labels_of(tokenizer, Question.predicate("?"))
    assert spelled(tokenizer, found.tokens) == [[["true", " true"]], [["false"]]]
    assert found.ask == "word"
    found = labels_of(tokenizer, Question.score("?", ["x", "y"]))
    assert spelled(tokenizer, found.tokens) == [[["0", " 0"]], [["1"]]]


def test_words_that_are_no_tokens_become_letters():
    found = labels_of(Words("true"), Question.predicate("?"))
    assert (found.texts, found.ask) == (("A", "B"), "letter")


def test_codes_are_single_tokens_where_there_are_enough_else_two_letters():
    many = Question.choice("?", [f"n{i}" for i in range(255)])
    pairs = ["".join(p) for p in itertools.product(string.ascii_uppercase, repeat=2)]
    tokenizer = Words(*pairs[1:256], " AB")
    found = labels_of(tokenizer, many)
    assert found.positions == 1 and found.texts == tuple(pairs[1:256])
    assert spelled(tokenizer, found.tokens[:1]) == [[["AB", " AB"]]]
    tokenizer = Words(*pairs[1:255], " A", " B")  # one too few
    found = labels_of(tokenizer, many)
    assert found.positions == 2 and found.texts == tuple(pairs[:255])
    assert spelled(tokenizer, found.tokens[:1]) == [[["A", " A"], ["A"]]]
    assert spelled(tokenizer, found.tokens[-1:]) == [[["J"], ["U"]]]
    eleven = Question.score("?", [f"n{i}" for i in range(11)])
    assert labels_of(tokenizer, eleven).ask == "code"


def test_codes_of_two_positions_are_read_jointly():
    labels = decided.Labels(
        ("AA", "AB", "BA"), "code", (((3, 4), (3,)), ((3, 4), (5,)), ((5,), (3,)))
    )
    question = Question.choice("?", ["x", "y", "z"])
    asked = decided._Asked(question, labels, np.array([1], np.int32), (), 1)
    read = np.log([[0.2, 0.1, 0.5], [0.6, 0.05, 0.3]])  # tokens 3, 4, 5 at two positions
    answer = asked.answer(read)
    joint = np.array([0.3 * 0.6, 0.3 * 0.3, 0.5 * 0.6])
    np.testing.assert_allclose(answer.probabilities, joint / joint.sum())
    assert answer.share == pytest.approx(joint.sum())
    assert answer.value == "z" and answer.confidence == pytest.approx(0.3)


def test_the_empty_thought_stands_in_the_prompt_once(monkeypatch):
    model, tokenizer = bundled()
    assert empty_thought(tokenizer) == []  # its template knows no thoughts
    plain = decide(model, tokenizer, TEXT, QUESTIONS[1]).prompt_tokens
    vocabulary = tokenizer.get_vocab()
    thought = [
        vocabulary["<|channel>"],
        *encode_text(tokenizer, "thought\n"),
        vocabulary["<channel|>"],
    ]
    knows = tokenizer.chat_template + "{# <|channel> #}"
    adds = tokenizer.chat_template + (
        "{% if add_generation_prompt %}{{ '<|channel>thought\n<channel|>' }}{% endif %}"
    )
    prompts = []
    checked = decided._decided

    def seen(model, settings, lead, asked, ends):
        prompts.append([*lead.tolist(), *asked[0].tokens.tolist()])
        return checked(model, settings, lead, asked, ends)

    monkeypatch.setattr(decided, "_decided", seen)
    for template in (knows, adds):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        assert empty_thought(tokenizer) == thought
        found = decide(model, tokenizer, TEXT, QUESTIONS[1])
        assert found.prompt_tokens == plain + len(thought)
        assert prompts[-1][-len(thought) :] == thought
    assert prompts[0] == prompts[1]


# What cannot be asked.


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Question.predicate(""), "a question must be a text, got ''"),
        (lambda: Question.predicate(" \n"), "a question must be a text"),
        (lambda: Question.predicate(3), "a question must be a text, got 3"),
        (lambda: Question.predicate("?", name=3), "name of a question must be text"),
        (lambda: Question.choice("?", ["one"]), "2 to 255 in number, there are 1"),
        (lambda: Question.choice("?", []), "there are 0"),
        (lambda: Question.choice("?", [str(n) for n in range(256)]), "there are 256"),
        (lambda: Question.choice("?", ["a", "b", "a"]), "'a' is there twice"),
        (lambda: Question.choice("?", [True, False, True]), "True is there twice"),
        (lambda: Question.choice("?", ["a", ""]), "must be texts or booleans, got ''"),
        (lambda: Question.choice("?", [1, 2]), "must be texts or booleans, got 1"),
        (lambda: Question.choice("?", "ab"), "must be a list, got 'ab'"),
        (lambda: Question.choice("?", {"a": 3, "b": None}), "description of 'a' must be text"),
        (lambda: Question.score("?", ["a", True]), "must be texts, got True"),
        (lambda: Question.score("?", ["a"]), "levels of '?' must be 2 to 255"),
        (lambda: Question.from_object([]), "must be an object"),
        (
            lambda: Question.from_object({"type": "guess"}),
            "predicate, choice or score, got 'guess'",
        ),
        (lambda: Question.from_object({"type": "predicate"}), "instructions must be text"),
        (
            lambda: Question.from_object({"type": "choice", "instructions": "?"}),
            "choices must be a list of objects",
        ),
        (
            lambda: Question.from_object(
                {"type": "predicate", "instructions": [{"type": "input_image", "image_url": "x"}]}
            ),
            "instructions holds an image, and can hold text only",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_in_one_line(make, expected):
    with pytest.raises(QuestionError) as raised:
        make()
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_texts_and_booleans_of_the_same_spelling_are_different_choices():
    question = Question.choice("?", [True, "True", "true", False])
    assert [type(o.value) for o in question.options] == [bool, str, str, bool]


@pytest.mark.parametrize(
    ("prompt", "questions", "more", "expected"),
    [
        (TEXT, [], {}, "1 to 400 questions, got 0"),
        (TEXT, [QUESTIONS[0]] * 401, {}, "1 to 400 questions, got 401"),
        (TEXT, QUESTIONS[0], {"canvas_length": 24}, "multiple of 16, got 24"),
        (TEXT, QUESTIONS[0], {"canvas_length": 0}, "multiple of 16, got 0"),
        (TEXT, QUESTIONS[0], {"canvas_length": 128}, "longer than the checkpoint's 64"),
        ([5, 6, 7], QUESTIONS[0], {}, "needs a text or messages"),
        ("7 " * 2000, QUESTIONS[0], {}, "positions are free for it"),
        (TEXT, QUESTIONS[0], {"prompt_options": PromptOptions(thinking=True)}, "not possible"),
    ],
)
def test_a_decision_that_cannot_be_made_is_refused_in_one_line(prompt, questions, more, expected):
    model, tokenizer = bundled()
    with pytest.raises(DiffGemmaError) as raised:
        decide(model, tokenizer, prompt, questions, **more)
    assert isinstance(raised.value, DiffGemmaError | PromptError)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_a_text_is_a_predicate_and_an_empty_input_leaves_the_question():
    model, tokenizer = bundled()
    found = decide(model, tokenizer, "", "Is one less than two?").answer
    assert found.question == Question.predicate("Is one less than two?")
    assert 0 < found.probability < 1


# The forms of OpenAI.


def test_questions_of_openais_form_are_read_and_answers_written_in_it():
    model, tokenizer = bundled()
    raw = [
        {"type": "predicate", "instructions": "Sorted?", "name": "s", "more": 1},
        {
            "type": "choice",
            "instructions": [
                {"type": "input_text", "text": "Which?"},
                {"type": "input_json", "data": {"é": [1]}},
            ],
            "choices": [{"value": True}, {"value": "no", "description": "not at all"}],
        },
        {
            "type": "score",
            "instructions": "How much?",
            "levels": [{"label": "little"}, {"label": "much", "description": "a lot"}],
        },
    ]
    questions = [Question.from_object(each) for each in raw]
    assert questions[1].instructions == 'Which?\n{"é": [1]}'
    assert questions[1].shown(["A", "B"], "letter").splitlines()[-3:] == [
        "A: true",
        "B: no (not at all)",
        "Answer with one letter.",
    ]
    answers = [a.as_object() for a in decide(model, tokenizer, TEXT, questions).answers]
    predicate, choice, score = json.loads(json.dumps(answers))
    assert set(predicate) == {"type", "name", "probability"} and predicate["name"] == "s"
    assert set(choice) == {"type", "name", "choice", "confidence", "probabilities"}
    assert [p["value"] for p in choice["probabilities"]] == [True, "no"]
    assert choice["choice"] in (True, "no")
    assert set(score) == {"type", "name", "score", "confidence", "probabilities"}
    assert [(p["label"], p["value"]) for p in score["probabilities"]] == [
        ("little", 0),
        ("much", 1),
    ]
    assert score["score"] == pytest.approx(score["probabilities"][1]["probability"])


@pytest.mark.long
def test_four_hundred_questions_are_answered_in_order():
    model, tokenizer = drawn()
    questions = [Question.choice(f"q{n}", ["x", "y"], name=str(n)) for n in range(400)]
    task = DecisionTask(prompt="1", questions=tuple(questions))
    events = [event for _, event in run_jobs(model, [task.job(model, tokenizer)])]
    assert [a.question.name for a in events[-1].answers] == [str(n) for n in range(400)]
