"""Questions of a decision, how they are asked, and their answers as plain objects. The forms are
those of OpenAI's `/v1/decisions`."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import QuestionError

Kind = Literal["predicate", "choice", "score"]
Value = str | bool

MOST_QUESTIONS = 400
MOST_OPTIONS = 255
LETTERS, DIGITS = string.ascii_uppercase, string.digits
# What stands behind the question and its options.
_ASKS = {
    "word": "Answer with one word: true or false.",
    "letter": "Answer with one letter.",
    "digit": "Answer with one digit.",
    "code": "Answer with one code of two letters.",
}


@dataclass(frozen=True, slots=True)
class Option:
    """One of the possible answers."""

    value: Value
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an input. `predicate`, `choice` and `score` make one."""

    kind: Kind
    instructions: str
    options: tuple[Option, ...]  # of a score in their order
    name: str | None = None

    @classmethod
    def predicate(cls, instructions: str, *, name: str | None = None) -> Question:
        """Return a question whose answer is true or false.

        Raises:
          QuestionError: if it is empty.
        """
        return cls._checked("predicate", instructions, (True, False), name)

    @classmethod
    def choice(
        cls,
        instructions: str,
        choices: Sequence[Value] | Mapping[Value, str | None],
        *,
        name: str | None = None,
    ) -> Question:
        """Return a question whose answer is one of some choices.

        Args:
          instructions: the question.
          choices: 2 to 255 different texts or booleans; a mapping gives their descriptions.
          name: comes back with the answer.

        Raises:
          QuestionError: if the question or the choices cannot be used.
        """
        return cls._checked("choice", instructions, choices, name)

    @classmethod
    def score(
        cls,
        instructions: str,
        levels: Sequence[str] | Mapping[str, str | None],
        *,
        name: str | None = None,
    ) -> Question:
        """Return a question whose answer is a number on a scale.

        Args:
          instructions: the question.
          levels: 2 to 255 labels in their order, the first of value 0; a mapping gives their
            descriptions.
          name: comes back with the answer.

        Raises:
          QuestionError: if the question or the levels cannot be used.
        """
        return cls._checked("score", instructions, levels, name)

    @classmethod
    def _checked(cls, kind: Kind, instructions: str, given: Any, name: str | None) -> Question:
        if not isinstance(instructions, str) or not instructions.strip():
            raise QuestionError(f"a question must be a text, got {instructions!r}")
        if name is not None and not isinstance(name, str):
            raise QuestionError(f"the name of a question must be text, got {name!r}")
        if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
            raise QuestionError(f"the answers to {instructions!r} must be a list, got {given!r}")
        pairs = list(given.items()) if isinstance(given, Mapping) else [(v, None) for v in given]
        return cls.of(kind, instructions, [Option(*pair) for pair in pairs], name)

    @classmethod
    def of(
        cls, kind: Kind, instructions: str, options: Sequence[Option], name: str | None
    ) -> Question:
        """Return a question with checked options.

        Raises:
          QuestionError: if there are too few or too many, one is empty, or two are the same.
        """
        what = "levels" if kind == "score" else "choices"
        about = f"the {what} of {_short(instructions)!r}"
        if not 2 <= len(options) <= MOST_OPTIONS:
            raise QuestionError(
                f"{about} must be 2 to {MOST_OPTIONS} in number, there are {len(options)}"
            )
        seen = set()
        for option in options:
            value = option.value
            is_text = isinstance(value, str) and bool(value.strip())
            if not (is_text or (isinstance(value, bool) and kind != "score")):
                may_be = "texts" if kind == "score" else "texts or booleans"
                raise QuestionError(f"{about} must be {may_be}, got {value!r}")
            if not isinstance(option.description, str | None):
                raise QuestionError(
                    f"the description of {value!r} must be text, got {option.description!r}"
                )
            if (key := (type(value), value)) in seen:
                raise QuestionError(f"{about} must differ, and {value!r} is there twice")
            seen.add(key)
        return cls(kind, instructions, tuple(options), name)

    @classmethod
    def from_object(cls, raw: Any) -> Question:
        """Return a question of OpenAI's form: an object with `type` and `instructions`, of a choice
        with `choices`, of a score with `levels`.

        Raises:
          QuestionError: names what is missing or wrong.
        """
        if not isinstance(raw, Mapping):
            raise QuestionError(f"a question must be an object, got {_short(raw)!r}")
        kind, name = raw.get("type"), raw.get("name")
        if kind not in ("predicate", "choice", "score"):
            raise QuestionError(
                f"the type of a question must be predicate, choice or score, got {_short(kind)!r}"
            )
        instructions = text_of(raw.get("instructions"), "instructions")
        if kind == "predicate":
            return cls.predicate(instructions, name=name)
        field, key = ("choices", "value") if kind == "choice" else ("levels", "label")
        items = raw.get(field)
        if not isinstance(items, list) or not all(isinstance(i, Mapping) for i in items):
            raise QuestionError(f"{field} must be a list of objects, got {_short(items)!r}")
        cls._checked(kind, instructions, ["a", "b"], name)  # the question itself comes first
        options = [Option(item.get(key), item.get("description")) for item in items]
        return cls.of(kind, instructions, options, name)

    def shown(self, labels: Sequence[str], ask: str) -> str:
        """Return the question as the model reads it.

        Args:
          labels: of the options, in their order.
          ask: which kind of label the model is to answer with: word, letter, digit or code.
        """
        lines = [self.instructions]
        if ask != "word":
            lines += [
                f"{label}: {spelled(option.value)}"
                + (f" ({option.description})" if option.description else "")
                for label, option in zip(labels, self.options, strict=True)
            ]
        return "\n".join([*lines, _ASKS[ask]])


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question."""

    question: Question
    probabilities: tuple[float, ...]  # of the options, in their order; their sum is 1
    share: float  # the probability that the model gives to all labels together

    @property
    def value(self) -> Value:
        """The likeliest option; of several the first."""
        return self.question.options[self._best].value

    @property
    def probability(self) -> float:
        """Of a predicate the probability that it is true, else that of the likeliest option."""
        at = 0 if self.question.kind == "predicate" else self._best
        return self.probabilities[at]

    @property
    def confidence(self) -> float:
        """The likeliest option's probability times the labels' share of all: it is low too where
        the model would rather write something else."""
        return self.probabilities[self._best] * self.share

    @property
    def score(self) -> float | None:
        """The expected value of a score, whose levels count from 0; None for other questions."""
        if self.question.kind != "score":
            return None
        return sum(level * p for level, p in enumerate(self.probabilities))

    @property
    def _best(self) -> int:
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    def as_object(self) -> dict[str, Any]:
        """Return the answer in OpenAI's form."""
        question = self.question
        said: dict[str, Any] = {"type": question.kind, "name": question.name}
        if question.kind == "predicate":
            return said | {"probability": self.probability}
        pairs = list(zip(question.options, self.probabilities, strict=True))
        if question.kind == "choice":
            return said | {
                "choice": self.value,
                "confidence": self.confidence,
                "probabilities": [{"value": o.value, "probability": p} for o, p in pairs],
            }
        return said | {
            "score": self.score,
            "confidence": self.confidence,
            "probabilities": [
                {"label": option.value, "value": level, "probability": p}
                for level, (option, p) in enumerate(pairs)
            ],
        }


def spelled(value: Value) -> str:
    """Return a value as the model reads it."""
    return str(value).lower() if isinstance(value, bool) else value


def text_of(given: Any, what: str) -> str:
    """Return the text of a string, or of a list of OpenAI's parts: text and JSON.

    Raises:
      QuestionError: if a part is an image, or unknown.
    """
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise QuestionError(f"{what} must be text or a list of parts, got {_short(given)!r}")
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("input_text", "output_text", "text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "input_json" and isinstance(part.get("data"), (Mapping, list)):
            texts.append(json.dumps(part["data"], ensure_ascii=False))
        elif kind == "input_image":
            raise QuestionError(f"{what} holds an image, and can hold text only")
        else:
            raise QuestionError(
                f"a part of {what} must be input_text or input_json, got {_short(part)!r}"
            )
    return "\n".join(texts)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
