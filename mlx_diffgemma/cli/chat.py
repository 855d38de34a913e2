"""mlx_diffgemma.chat: talk with a model."""

from typing import Annotated

import typer

from ..config.generation import GenerationSettings
from ..config.images import ImageSettings
from ..errors import PromptError
from .constraints import ConstraintOptions
from .options import (
    ContextOptions,
    SeeingModelOptions,
    SystemPromptOption,
    command,
    refuse_idle_limit,
    run,
    seeded,
    unescape,
)

_PUZZLES = "it knows single questions, no conversations; /reset makes the next one its first"


@command
def chat(
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The first message; \\n and \\t are read as line break and tab.",
        ),
    ] = None,
    system_prompt: SystemPromptOption = None,
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Let the model think first, on stderr.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown/--no-markdown", help="Show answers as Markdown.")
    ] = True,
    *,
    model: SeeingModelOptions,
    contexts: ContextOptions,
    bound: ConstraintOptions,
    settings: GenerationSettings,
    images: ImageSettings,
) -> None:
    """Talk with a model, with commands such as /undo, /retry and /save; /help lists them. Without a
    terminal, each line of stdin is a message or a command, and stdout gets the answers."""
    from .lines import lines_of
    from .render_chat import ChatView
    from .session import COMMANDS, Session

    if bound.reads_stdin:
        raise PromptError("stdin has the messages; give --json-schema a file, or the schema itself")
    constraint = bound.constraint()
    if not thinking:
        refuse_idle_limit(settings)
    view, is_drawn = ChatView(markdown=markdown), settings.seed is None
    settings, store = seeded(settings), contexts.store()
    lines = lines_of(list(COMMANDS))
    with view.loading():
        loaded, tokenizer = model.load()
    from ..write.chat import Chat

    def reading(done: int, total: int) -> None:
        session.reading(done, total)

    talk = Chat(
        loaded,
        tokenizer,
        system_prompt=system_prompt,
        thinking=thinking,
        settings=settings,
        image_settings=images,
        store=store,
        prompt_progress_callback=reading,
    )
    session = Session(talk, view, lines, loaded, tokenizer)
    session.hold(bound, constraint)
    for line in [*model.notes(), *([_PUZZLES] if model.is_bundled else [])]:
        view.note(line)
    if is_drawn:
        view.note(f"seed {settings.seed}")
    if lines.is_terminal:
        view.note("/help lists the commands; Ctrl-D leaves")
    try:
        session.run(None if prompt is None else unescape(prompt))
    finally:
        view.close()
    if session.has_failed and not lines.is_terminal:
        raise typer.Exit(2)


def main() -> None:
    run(chat)


if __name__ == "__main__":
    main()
