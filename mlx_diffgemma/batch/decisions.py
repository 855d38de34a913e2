"""A line of a file of decisions: an input, questions of its own or those of the command, and the
answers as an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.engine import Engine
from ..errors import DataError, DiffGemmaError, EngineError
from ..language.prompt import PromptOptions
from ..write.decide import WIDTH, Decisions, DecisionTask
from ..write.questions import Question
from .lines import Line
from .run import Answered


@dataclass(frozen=True)
class DecisionLines:
    """Answers lines of decisions with an engine."""

    engine: Engine
    questions: tuple[Question, ...] = ()  # of lines without their own
    prompt_options: PromptOptions = PromptOptions()
    canvas_length: int = WIDTH

    async def answer(self, line: Line) -> Answered:
        """Return the answer to a line: {"id", "answers"}, or {"id", "error"} for one that cannot be
        answered."""
        name: Any = line.number
        try:
            raw = line.object()
            name = raw.get("id", line.number)
            found = None
            async for event in self.engine.submit(self._task(raw, line)):
                if isinstance(event, Decisions):
                    found = event
            if found is None:
                raise EngineError("the run was ended")
        except DiffGemmaError as error:
            return Answered({"id": name, "error": str(error)}, is_error=True)
        return Answered({"id": name, **decisions_object(found)})

    def _task(self, raw: Mapping[str, Any], line: Line) -> DecisionTask:
        given = raw.get("input")
        if not isinstance(given, (str, list)):
            raise DataError(f"line {line.number} needs `input`, a text or messages")
        asked = raw.get("questions")
        if asked is not None and not isinstance(asked, list):
            raise DataError(f"line {line.number}: questions must be a list")
        questions = tuple(map(Question.from_object, asked)) if asked else self.questions
        if not questions:
            raise DataError(f"line {line.number} has no questions, and --question gives none")
        return DecisionTask(
            prompt=given,
            questions=questions,
            prompt_options=self.prompt_options,
            canvas_length=self.canvas_length,
        )


def decisions_object(found: Decisions) -> dict[str, Any]:
    """Return answers as an object: those of OpenAI's form, and what they took."""
    return {
        "answers": [
            answer.as_object() | {"confidence": answer.confidence, "share": answer.share}
            for answer in found.answers
        ],
        "prompt_tokens": found.prompt_tokens,
        "cached_tokens": found.cached_tokens,
        "steps": found.steps,
    }
