"""mlx_diffgemma.batch: answer the requests of a file."""

import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.generation import GenerationSettings
from ..config.serving import Limits
from .lines_of_file import answer_file
from .options import ContextOptions, ModelOptions, VerboseOption, boolean, command, run


@command
def batch(
    source: Annotated[
        Path,
        typer.Option(
            "--input",
            metavar="FILE.jsonl",
            help="Requests, a JSON object in each line: OpenAI's batch form (custom_id, method, "
            "url, body), or a plain one (prompt or messages, and perhaps id and settings).",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help="Where the answers go, in the order of the requests. The same command goes on "
            "where it was interrupted.",
        ),
    ],
    max_rows: Annotated[int, typer.Option(help="Answers that are written together.", min=1)] = 8,
    thinking: Annotated[
        bool,
        typer.Option(
            "--thinking/--no-thinking", help="Let the model think where a request says nothing."
        ),
    ] = False,
    verbose: VerboseOption = "True",
    *,
    model: ModelOptions,
    contexts: ContextOptions,
    settings: GenerationSettings,
) -> None:
    """Answer the requests of a file together, and write the answers in their order. A request that
    cannot be answered gets an error in its line, and the others go on; the exit code is then 1."""
    from ..batch.requests import is_openai

    is_verbose = boolean(verbose)
    if settings.seed is None:  # so that an interrupted run gives what a whole one gives
        settings = replace(settings, seed=0)
    has_openai_form, store = is_openai(source), contexts.store()
    made_with = {
        "model": str(model.source),
        "adapter": model.adapter_path,
        "revision": model.revision,
        "thinking": thinking,
        **asdict(settings),
    }
    if is_verbose:
        for note in model.notes():
            print(note, file=sys.stderr)

    def begin(passed: Any) -> tuple[Any, Any]:
        from ..batch.requests import PromptLines, RequestLines
        from ..engine.engine import Engine
        from ..serve.state import Served, State
        from ..write.chat import chat_store

        loaded, tokenizer = model.load()
        engine = Engine(
            loaded,
            tokenizer,
            max_rows=max_rows,
            max_queue=_queue(max_rows),
            store=store or chat_store(),
        )
        name = "bundled" if model.is_bundled else str(model.source)
        state = State(
            limits=Limits(max_answer_tokens=settings.max_new_tokens or 1024),
            settings=settings,
            thinking=thinking,
            models={name: Served(name, engine)},
        )
        if has_openai_form:
            requests = RequestLines(state, _report)
            requests.pass_by(passed)
            return engine, requests.answer
        return engine, PromptLines(state).answer

    answer_file(
        source, output, begin, made_with=made_with, at_once=2 * max_rows, verbose=is_verbose
    )


def _queue(max_rows: int) -> int:
    """Return the requests that may wait: those of all lines under way, of eight answers each."""
    return 2 * 8 * max_rows


def _report(error: Exception) -> None:
    print("".join(traceback.format_exception(error)), file=sys.stderr)


def main() -> None:
    run(batch)


if __name__ == "__main__":
    main()
