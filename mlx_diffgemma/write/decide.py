"""Decisions: the answer to a question in one denoise step, with the probability of each possible
answer. Questions about one input are rows over one context."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..config.generation import GenerationSettings, ResolvedSettings
from ..denoise.canvas import Readout
from ..denoise.checked import check_room, checked_tokens
from ..denoise.noise import SeededNoise
from ..denoise.row import Row
from ..denoise.store import Store
from ..errors import PromptError, QuestionError
from ..events import Event, Finished, PrefillDone, StepDone
from ..language.controls import THOUGHT_BEGIN, THOUGHT_END, turn_ends
from ..language.encoded import EncodedPrompt, ImageForm
from ..language.given import Message, given_ids, given_messages
from ..language.images import ImagePatches
from ..language.media import with_patches
from ..language.prompt import PromptOptions, encode_endings, encode_text, special_tokens
from ..model import Context, DiffusionGemma
from .job import Ask, Job, run_jobs
from .questions import DIGITS, LETTERS, MOST_QUESTIONS, Answer, Question

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

WIDTH = 16  # columns of a canvas; more are a multiple of it
ROWS = 8  # questions that are asked for at once


@dataclass(frozen=True, slots=True)
class Decisions:
    """The answers to questions about one input."""

    answers: tuple[Answer, ...]
    prompt_tokens: int  # that were read or found in a kept context; what is shared counts once
    cached_tokens: int  # of them, those of kept contexts
    steps: int  # denoise steps, one for each question

    @property
    def answer(self) -> Answer:
        """The answer to the only question."""
        (answer,) = self.answers
        return answer


@dataclass(frozen=True, slots=True)
class Labels:
    """How the options of a question are labelled, and with which tokens."""

    texts: tuple[str, ...]
    ask: str  # what the model is asked for: word, letter, digit or code
    # For each option the tokens at each position of the answer's slot that spell its label.
    tokens: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def positions(self) -> int:
        return len(self.tokens[0])

    @property
    def readout(self) -> Readout:
        """All tokens of all labels, at the positions of the slot."""
        ids = {token for places in self.tokens for place in places for token in place}
        return Readout(self.positions, tuple(sorted(ids)))


def decide(
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    prompt: str | Sequence[Message],
    questions: Question | str | Sequence[Question | str],
    *,
    canvas_length: int = WIDTH,
    prompt_options: PromptOptions = PromptOptions(),
    store: Store | None = None,
) -> Decisions:
    """Answer questions about an input, each in one denoise step.

    The same question about the same input has the same answer: nothing is drawn but the noise
    of the answer's slot, from a seed that the prompt gives.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      prompt: the input, a text or a chat's messages.
      questions: 1 to 400; a text is a predicate, whose answer is true or false.
      canvas_length: columns of the canvas, a multiple of 16.
      prompt_options: how the prompt becomes tokens; without thinking.
      store: where contexts are kept for later questions.

    Raises:
      DiffGemmaError: if a question or the prompt cannot be used.
    """
    listed = [questions] if isinstance(questions, (str, Question)) else list(questions)
    task = DecisionTask(
        prompt=prompt,
        questions=tuple(Question.predicate(q) if isinstance(q, str) else q for q in listed),
        canvas_length=canvas_length,
        prompt_options=prompt_options,
    )
    decided = None
    for _, event in run_jobs(model, [task.job(model, tokenizer)], store):
        if isinstance(event, Decisions):
            decided = event
    assert decided is not None
    return decided


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionTask:
    """Questions about one input, as a task for an engine; the fields are `decide`'s arguments."""

    prompt: str | Sequence[Message]
    questions: tuple[Question, ...]
    canvas_length: int = WIDTH
    prompt_options: PromptOptions = PromptOptions()

    def job(self, model: DiffusionGemma, tokenizer: AnyTokenizer) -> Job[Event | Decisions]:
        """Return the job that answers.

        Raises:
          DiffGemmaError: if a question or the prompt cannot be used.
        """
        if not 1 <= len(self.questions) <= MOST_QUESTIONS:
            raise QuestionError(
                f"there must be 1 to {MOST_QUESTIONS} questions, got {len(self.questions)}"
            )
        self._check_prompt()
        width = self._width(model.config.canvas_length)
        settings = GenerationSettings(
            seed=0, temperature=0, max_denoising_steps=1, max_new_tokens=1, canvas_length=width
        ).resolve(model.config)
        labelled, known = [], {}
        for question in self.questions:
            kind = (question.kind, len(question.options))  # labels depend on nothing else
            if kind not in known:
                known[kind] = labels_of(tokenizer, question)
            labels = known[kind]
            if labels.positions > width:
                raise QuestionError(
                    f"the labels of {len(question.options)} options take {labels.positions} "
                    f"positions, and the canvas has {width}"
                )
            labelled.append((question, labels))
        shown = [question.shown(labels.texts, labels.ask) for question, labels in labelled]
        head, tails = self._encoded(model, tokenizer, shown)
        lead = checked_tokens(head.ids, model.config, head.images)
        digest = hashlib.blake2b(_bytes(lead), digest_size=8)
        asked = []
        for (question, labels), tail in zip(labelled, tails, strict=True):
            images = head.images + tail.images
            check_room(model.config, settings, len(head.ids) + len(tail.ids), images)
            tokens = checked_tokens(tail.ids, model.config, tail.images)
            seed = digest.copy()
            for image in images:
                seed.update(image.digest)
            seed.update(_bytes(tokens))
            number = int.from_bytes(seed.digest(), "little")
            asked.append(_Asked(question, labels, tokens, images, number))
        return _decided(model, settings, lead, asked, turn_ends(tokenizer, settings))

    def _check_prompt(self) -> None:
        options = self.prompt_options
        if not isinstance(self.prompt, str) and given_ids(self.prompt) is not None:
            raise PromptError("a decision needs a text or messages, to put a question behind them")
        if options.thinking or options.response_prefix or not options.use_chat_template:
            raise PromptError(
                "a decision is one step in a turn of the chat template: thinking, response_prefix "
                "and use_chat_template=False are not possible"
            )

    def _width(self, longest: int) -> int:
        width = self.canvas_length
        if width < WIDTH or width % WIDTH:
            raise QuestionError(f"canvas_length must be a multiple of {WIDTH}, got {width}")
        return min(width, longest) if width == WIDTH else width

    def _encoded(
        self, model: DiffusionGemma, tokenizer: AnyTokenizer, questions: Sequence[str]
    ) -> tuple[EncodedPrompt, list[EncodedPrompt]]:
        """Return the tokens of the input, and for each question its own and an empty thought."""
        form, messages = ImageForm.of(model.config), self.prompt
        if not isinstance(messages, str):  # its images are read once for all questions
            messages = with_patches(given_messages(messages), form, self.prompt_options.images)

        def told(question: str) -> Any:
            if not isinstance(messages, str):
                return [*messages, {"role": "user", "content": question}]
            return f"{messages}\n\n{question}" if messages.strip() else question

        stripped = [question.strip() for question in questions]
        head, tails = encode_endings(tokenizer, told, stripped, self.prompt_options, form)
        thought = empty_thought(tokenizer)
        return head, [
            tail
            if tail.ids[len(tail.ids) - len(thought) :] == thought
            else EncodedPrompt(tail.ids + thought, tail.images)
            for tail in tails
        ]


def empty_thought(tokenizer: AnyTokenizer) -> list[int]:
    """Return the tokens of a thought without text; none for a checkpoint whose chat template knows
    no thoughts."""
    specials = special_tokens(tokenizer)
    if THOUGHT_BEGIN not in str(tokenizer.chat_template) or THOUGHT_BEGIN not in specials:
        return []
    return [specials[THOUGHT_BEGIN], *encode_text(tokenizer, "thought\n"), specials[THOUGHT_END]]


def labels_of(tokenizer: AnyTokenizer, question: Question) -> Labels:
    """Return the labels of a question's options: the words true and false, a letter, a digit, or a
    code of two letters.

    Words that are no single tokens become letters. Codes are those that are single tokens, which
    one position holds. Where a tokenizer has too few of them, the two letters take a position each.

    Raises:
      QuestionError: if the tokenizer has no tokens for them.
    """
    count, most = len(question.options), DIGITS if question.kind == "score" else LETTERS
    if question.kind == "predicate":
        words = [_spellings(tokenizer, word) for word in ("true", "false")]
        if all(words):
            return Labels(("true", "false"), "word", tuple((word,) for word in words))
    if count <= len(most):
        single = [_spellings(tokenizer, label) for label in most[:count]]
        ask = "digit" if question.kind == "score" else "letter"
        if all(single):
            return Labels(tuple(most[:count]), ask, tuple((ids,) for ids in single))
        raise QuestionError(f"the tokenizer has no token for each of {most[:count]}")
    codes = ("".join(pair) for pair in itertools.product(LETTERS, repeat=2))
    known = ((code, ids) for code in codes if (ids := _spellings(tokenizer, code)))
    found = list(itertools.islice(known, count))
    if len(found) == count:
        return Labels(tuple(code for code, _ in found), "code", tuple((ids,) for _, ids in found))
    letters = {letter: _spellings(tokenizer, letter) for letter in LETTERS}
    bare = {letter: _spellings(tokenizer, letter, " ") for letter in LETTERS}
    if not all(bare.values()):
        raise QuestionError("the tokenizer has no token for each letter")
    pairs = list(itertools.islice(itertools.product(LETTERS, repeat=2), count))
    return Labels(
        tuple("".join(pair) for pair in pairs),
        "code",
        tuple((letters[first], bare[second]) for first, second in pairs),
    )


def _spellings(tokenizer: AnyTokenizer, label: str, without: str = "") -> tuple[int, ...]:
    """Return the single tokens that spell a label, with and without a leading space."""
    texts = [label] if without else [label, f" {label}"]
    encoded = [encode_text(tokenizer, text) for text in texts]
    unknown = tokenizer.unk_token_id
    return tuple(ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A question with its labels."""

    question: Question
    labels: Labels
    tokens: np.ndarray  # int32 [S], of the prompt behind what all questions share
    images: Sequence[ImagePatches]  # of the whole prompt
    seed: int  # of the noise, from the whole prompt

    def canvas(self, width: int, ends: tuple[int, int], vocab_size: int) -> np.ndarray:
        """Return the canvas, int32 [1, W]: noise in the answer's slot, the end of the turn and the
        fill behind it. The prompt is the noise's seed; no label is drawn, so that none is favoured.
        """
        rng = np.random.default_rng(self.seed)
        others = np.setdiff1d(np.arange(vocab_size), (*self.labels.readout.tokens, *ends))
        canvas = np.full((1, width), ends[1], np.int32)
        slot = self.labels.positions
        canvas[0, :slot] = rng.choice(others, slot)
        canvas[0, slot : slot + 1] = ends[0]
        return canvas

    def answer(self, read: np.ndarray) -> Answer:
        """Return the answer, from the log-probabilities [P, N] of its readout."""
        place = {token: i for i, token in enumerate(self.labels.readout.tokens)}
        logs = np.array(
            [
                sum(
                    np.logaddexp.reduce(row[[place[t] for t in ids]])
                    for row, ids in zip(read.astype(np.float64), option, strict=True)
                )
                for option in self.labels.tokens
            ]
        )
        share = np.logaddexp.reduce(logs)
        return Answer(self.question, tuple(np.exp(logs - share).tolist()), float(np.exp(share)))


class _Start(SeededNoise):
    """A canvas to begin with, and nothing to draw."""

    def __init__(self, canvas: np.ndarray) -> None:
        super().__init__(0)
        self._canvas = canvas

    def start(self, canvas_index: int, shape: tuple[int, int], vocab_size: int) -> mx.array:
        return mx.array(self._canvas)


def _decided(
    model: DiffusionGemma,
    settings: ResolvedSettings,
    lead: np.ndarray,
    asked: Sequence[_Asked],
    ends: tuple[int, int],
) -> Job[Event | Decisions]:
    """Read what all prompts begin with once, which is `lead` and perhaps more, then take a step for
    each question behind it. Yield PrefillDone for each text that is read, and Decisions last."""
    width, vocab_size = settings.canvas_length, model.config.text.vocab_size
    shared: Context | None = None
    start = read = cached = 0
    if len(asked) > 1 and len(lead) + (start := _common([each.tokens for each in asked])):
        lead = np.concatenate([lead, asked[0].tokens[:start]])
        reader = Row(model, settings, lead, images=asked[0].images, only_reads=True)
        yield Ask([reader])
        event = yield None
        assert isinstance(event, PrefillDone)
        read, cached = event.prompt_tokens, event.cached_tokens
        yield event
        shared = reader.context
    answers: dict[int, Answer] = {}
    for group in _groups(len(asked)):
        rows = [
            Row(
                model,
                settings,
                asked[i].tokens[start:]
                if shared is not None
                else np.concatenate([lead, asked[i].tokens]),
                images=asked[i].images if shared is None else (),
                number=i,
                context=shared,
                is_shared=shared is not None,
                noise=_Start(asked[i].canvas(width, ends, vocab_size)),
                readout=asked[i].labels.readout,
            )
            for i in group
        ]
        yield Ask(rows)
        left = len(rows)
        while left:
            event = yield None
            if isinstance(event, PrefillDone):
                read, cached = read + event.prompt_tokens, cached + event.cached_tokens
                yield event
            elif isinstance(event, StepDone):
                assert event.readout is not None
                answers[event.row] = asked[event.row].answer(np.array(event.readout))
            elif isinstance(event, Finished):
                left -= 1
    yield Decisions(tuple(answers[i] for i in range(len(asked))), read, cached, len(asked))


def _bytes(tokens: np.ndarray) -> bytes:
    return tokens.astype("<i4").tobytes()


def _groups(count: int) -> Iterator[range]:
    for first in range(0, count, ROWS):
        yield range(first, min(count, first + ROWS))


def _common(texts: Sequence[np.ndarray]) -> int:
    """Return how many tokens all texts begin with; each has at least one more."""
    least = min(map(len, texts)) - 1
    differ = np.zeros(least, bool)
    for text in texts[1:]:
        differ |= text[:least] != texts[0][:least]
    return int(differ.argmax()) if differ.any() else least
