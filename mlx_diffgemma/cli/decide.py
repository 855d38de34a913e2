"""mlx_diffgemma.decide: answer questions about a text in one step each."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import QuestionError
from .constraints import listed
from .options import (
    ModelOptions,
    SystemPromptOption,
    VerboseOption,
    boolean,
    command,
    decoded,
    prompt_text,
    read_file,
    run,
)


@dataclass(frozen=True)
class QuestionOptions:
    """The options for what is asked."""

    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", "-q", help="A question; may be given several times.", show_default=False
        ),
    ] = None
    choices: Annotated[
        list[str] | None,
        typer.Option(
            help="The answer is one of these, as in yes,no,maybe; \\, is a comma in one. Once for "
            "all questions, or once for each.",
            show_default="true or false",
        ),
    ] = None
    levels: Annotated[
        list[str] | None,
        typer.Option(
            help="The answer is a number on this scale, as in poor,fair,good, which count 0, 1, 2. "
            "Once for all questions, or once for each.",
            show_default=False,
        ),
    ] = None
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Questions of any kind: a list in OpenAI's form."),
    ] = None

    def asked(self) -> tuple[Any, ...]:
        """Return the questions.

        Raises:
          DiffGemmaError: if they cannot be used.
        """
        from ..write.questions import Question

        texts, lists = self.question or [], self.choices or self.levels or []
        if self.choices and self.levels:
            raise QuestionError(
                "--choices and --levels are of different questions; give them in a --questions "
                "FILE.json"
            )
        if lists and len(lists) not in (1, len(texts)):
            raise QuestionError(
                f"{len(lists)} lists of answers for {len(texts)} questions; give one for all, or "
                "one for each"
            )
        made = []
        for number, text in enumerate(texts):
            if not lists:
                made.append(Question.predicate(text))
                continue
            answers = listed(lists[number % len(lists)])
            make = Question.choice if self.choices else Question.score
            made.append(make(text, answers))
        return (*made, *self._of_file())

    def _of_file(self) -> list[Any]:
        from ..write.questions import Question

        if self.questions is None:
            return []
        file = self.questions
        try:
            found = json.loads(decoded(file, read_file(file)))
        except (ValueError, RecursionError) as error:
            raise QuestionError(f"{file} is not JSON: {error}") from None
        if not isinstance(found, list):
            raise QuestionError(f"{file} must hold a list of questions")
        return [Question.from_object(each) for each in found]


@command
def decide(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="What the questions are about. '-' reads it from stdin, and so does no text where "
            "stdin is not a terminal.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Answer each line of a file: an object with `input`, perhaps `id`, and "
            "`questions` where they differ from --question.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="With --batch: write the answers there instead of stdout. The same command goes "
            "on where it was interrupted.",
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(help="With --batch: questions that are answered together.", min=1)
    ] = 8,
    canvas_length: Annotated[
        int, typer.Option(help="Columns of a question's canvas, a multiple of 16.", min=16)
    ] = 16,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, with all probabilities.")
    ] = False,
    verbose: VerboseOption = "True",
    *,
    asked: QuestionOptions,
    model: ModelOptions,
    system_prompt: SystemPromptOption = None,
) -> None:
    """Answer questions about a text, each in one step: true or false, one of some choices, or a
    number on a scale. The answers are on stdout, their probabilities on stderr."""
    questions, is_verbose = asked.asked(), boolean(verbose)
    if batch is None and not questions:
        raise QuestionError("a question is missing: give --question, or --questions FILE.json")
    if batch is not None and text is not None:
        raise QuestionError("--batch has its own inputs; leave the text out")
    if output is not None and batch is None:
        raise QuestionError("--output needs --batch; without it, answers are on stdout")
    told = prompt_text(text, None) if batch is None else ""
    from ..language.prompt import PromptOptions

    options = PromptOptions(system_prompt=system_prompt)
    if is_verbose:
        for note in model.notes():
            print(note, file=sys.stderr)
    if batch is not None:
        _batch(batch, output, max_rows, canvas_length, questions, options, model, is_verbose)
        return
    loaded, tokenizer = model.load()
    from ..batch.decisions import decisions_object
    from ..write.decide import decide as decide_now
    from .render_batch import answer_line, answer_value

    found = decide_now(
        loaded,
        tokenizer,
        told,
        questions,
        canvas_length=canvas_length,
        prompt_options=options,
    )
    if as_json:
        typer.echo(json.dumps(decisions_object(found)))
        return
    for answer in found.answers:
        if is_verbose:
            print(answer_line(answer), file=sys.stderr)
        typer.echo(answer_value(answer))


def _batch(
    source: Path,
    output: Path | None,
    max_rows: int,
    canvas_length: int,
    questions: tuple[Any, ...],
    options: Any,
    model: ModelOptions,
    is_verbose: bool,
) -> None:
    """Answer the lines of a file."""
    from ..batch.decisions import DecisionLines
    from ..engine.engine import Engine
    from .lines_of_file import answer_file

    made_with = {
        "model": str(model.source),
        "adapter": model.adapter_path,
        "revision": model.revision,
        "questions": [repr(question) for question in questions],
        "system prompt": options.system_prompt,
        "canvas_length": canvas_length,
    }

    def begin(_: Any) -> tuple[Any, Any]:
        loaded, tokenizer = model.load()
        engine = Engine(loaded, tokenizer, max_rows=max_rows, max_queue=4 * max_rows)
        return engine, DecisionLines(engine, questions, options, canvas_length).answer

    answer_file(
        source, output, begin, made_with=made_with, at_once=2 * max_rows, verbose=is_verbose
    )


def main() -> None:
    run(decide)


if __name__ == "__main__":
    main()
