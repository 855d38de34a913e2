"""mlx_diffgemma.edit: rewrite a part of a file."""

from pathlib import Path
from typing import Annotated

import typer

from ..config.generation import GenerationSettings
from ..errors import SourceError, TemplateError
from .options import (
    ModelOptions,
    SystemPromptOption,
    VerboseOption,
    boolean,
    command,
    decoded,
    gap_bounds,
    read_file,
    run,
    seeded,
    unescape,
)


@command
def edit(
    file: Annotated[Path, typer.Argument(help="The file to edit, in UTF-8.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to do with the selection.")],
    select: Annotated[
        str | None,
        typer.Option(help="line:column-line:column, from 1; the second is the first one behind."),
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="The selection as its text, which stands once in the file.")
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Print a unified diff instead.")] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", "-i", help="Write the file instead of printing it.")
    ] = False,
    gap_tokens: Annotated[
        str | None,
        typer.Option(
            help="Least and most tokens of the new part, such as 8..40.",
            metavar="M..N",
            show_default="half of the old to twice as much and 8",
        ),
    ] = None,
    *,
    model: ModelOptions,
    system_prompt: SystemPromptOption = None,
    settings: GenerationSettings,
    verbose: VerboseOption = "True",
) -> None:
    """Rewrite a selection of a file; everything around it stays byte for byte."""
    from .render import View

    view = View(verbose=boolean(verbose))
    try:
        is_fresh, settings = settings.seed is None, seeded(settings)
        if diff and in_place:
            raise TemplateError("--diff prints and --in-place writes: choose one of the two")
        if (select is None) == (match is None):
            raise TemplateError("say what to rewrite, with --select or with --match")
        content = read_file(file)
        document = decoded(file, content)
        from ..write.edit import Selection
        from ..write.edit import edit as rewrite

        bounds = gap_bounds(gap_tokens)
        if match is not None:
            selection = Selection.of_match(document, match)
        else:
            assert select is not None
            selection = Selection.of_places(document, select)
        from ..checkpoint.files import write_whole
        from ..language.prompt import PromptOptions

        loaded, tokenizer = model.load()
        edited = rewrite(
            loaded,
            tokenizer,
            document,
            selection,
            unescape(prompt),
            gap_tokens=bounds,
            settings=settings,
            prompt_options=PromptOptions(system_prompt=system_prompt),
            listener=view.trial,
        )
        if is_fresh:
            view.note(f"seed {settings.seed}")
        view.about(edited.filled)
        if diff:
            view.result(edited.diff(file.name))
        elif in_place:
            if read_file(file) != content:
                raise SourceError(
                    f"{file} has changed on disk since it was read; nothing was written"
                )
            write_whole(file, edited.text.encode())
            view.note(f"wrote {file}")
        else:
            view.result(edited.text)
    finally:
        view.close()


def main() -> None:
    run(edit)
