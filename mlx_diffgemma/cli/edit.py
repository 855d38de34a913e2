"""mlx_diffgemma.edit: rewrite a selection of a file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.generation import GenerationSettings
from ..errors import SourceError, TemplateError
from .options import (
    ModelOptions,
    SystemPromptOption,
    command,
    decoded,
    gap_bounds,
    read_file,
    read_stdin,
    run,
    seeded,
    unescape,
)
from .output import OutputOptions, follower, kept, result_fields

STDIN = Path("-")


@dataclass(frozen=True)
class ResultOptions:
    """The output of the edited document."""

    diff: Annotated[
        bool,
        typer.Option(
            "--diff",
            help="Print a unified diff instead; `git apply` takes it in this folder, for a file "
            "elsewhere at the top of its repository.",
        ),
    ] = False
    in_place: Annotated[
        bool, typer.Option("--in-place", "-i", help="Write the file instead of printing it.")
    ] = False

    def check(self, file: Path, *, is_json: bool) -> None:
        """Refuse options that contradict each other.

        Raises:
          TemplateError: if they do.
        """
        if self.diff and self.in_place:
            raise TemplateError("--diff prints and --in-place writes: choose one of the two")
        if self.diff and is_json:
            raise TemplateError("--diff and --json both print the result: choose one of the two")
        if self.in_place and file == STDIN:
            raise TemplateError("--in-place needs a file; the document comes from stdin")


PROMPT_HELP = (
    "What to do with the selection; '-' reads it from stdin. \\n and \\t are read as line break "
    "and tab."
)


@command
def edit(
    file: Annotated[
        Path, typer.Argument(help="The file to edit, in UTF-8; '-' reads it from stdin.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help=PROMPT_HELP)],
    select: Annotated[
        str | None,
        typer.Option(
            help="Whole lines, such as 12-14, or line:column-line:column, from 1, the second of "
            "which is the first place after the selection."
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(help="The selection's text, which must occur exactly once in the file."),
    ] = None,
    gap_tokens: Annotated[
        str | None,
        typer.Option(
            help="Least and most tokens of the new part, such as 8..40.",
            metavar="M..N",
            show_default="half of the old to twice as much and 8",
        ),
    ] = None,
    window_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of the file that the model sees, around the selection.",
            min=1,
            show_default="all, or what its context holds twice",
        ),
    ] = None,
    *,
    result: ResultOptions,
    model: ModelOptions,
    system_prompt: SystemPromptOption = None,
    settings: GenerationSettings,
    output: OutputOptions,
) -> None:
    """Rewrite a selection of a file; everything around it stays byte for byte."""
    view = output.view()
    try:
        page, notes = output.page(), model.notes()
        result.check(file, is_json=output.is_json)
        if settings.seed is None:
            settings = seeded(settings)
            notes.append(f"seed {settings.seed}")
        bounds, request = gap_bounds(gap_tokens), _request(prompt, file)
        if file == STDIN:
            content, document = None, read_stdin()
        else:
            content = read_file(file)
            document = decoded(file, content)
        selection = _selected(document, select, match)
        with view.loading():
            loaded, tokenizer = model.load()
        from ..language.prompt import PromptOptions
        from ..write.edit import edit as rewrite

        follows, settings = follower(
            output, view, loaded, tokenizer, settings, name=model.source, prompt=request
        )
        with kept(follows.trace, page, view):
            edited = rewrite(
                loaded,
                tokenizer,
                document,
                selection,
                request,
                gap_tokens=bounds,
                window_tokens=window_tokens,
                settings=settings,
                prompt_options=PromptOptions(system_prompt=system_prompt),
                listener=follows.trial,
            )
            follows.conclude(edited.filled)
            _deliver(edited, file, content, result, output, view, settings, notes)
    finally:
        view.close()


def _request(prompt: str, file: Path) -> str:
    """Return the value of --prompt, unescaped, or what stdin holds for "-"."""
    if prompt != "-":
        return unescape(prompt)
    if file == STDIN:
        raise TemplateError("the file and --prompt cannot both be read from stdin")
    return read_stdin()


def _selected(document: str, select: str | None, match: str | None) -> Any:
    from ..write.edit import Selection

    if match is not None and select is None:
        return Selection.of_match(document, match)
    if select is not None and match is None:
        return Selection.of_places(document, select)
    raise TemplateError("say what to rewrite, with --select or with --match: one of the two")


def _deliver(
    edited: Any,
    file: Path,
    content: bytes | None,
    result: ResultOptions,
    output: OutputOptions,
    view: Any,
    settings: GenerationSettings,
    notes: list[str],
) -> None:
    """Write the file, or print the result."""
    for line in notes:
        view.note(line)
    if not output.is_json:
        view.about(edited.filled, "new part")
    if result.in_place:
        from ..checkpoint.files import write_whole

        if read_file(file) != content:
            raise SourceError(f"{file} has changed on disk since it was read; nothing was written")
        write_whole(file, edited.text.encode())
        view.note(f"wrote {file}")
    if output.is_json:
        from ..view.report import edited_object

        view.object(edited_object(edited) | result_fields(output, settings))
    elif result.diff:
        view.result(edited.diff(_name_in_diff(file)))
    elif not result.in_place:
        view.result(edited.text)


def _name_in_diff(file: Path) -> str:
    """Return the file's path for `git apply` and `patch -p1`: relative to this folder; if it is
    outside, to the top of its repository, or its bare name."""
    if file == STDIN:
        return "stdin"
    place, here = file.resolve(), Path(os.getcwd()).resolve()
    top = next((folder for folder in place.parents if (folder / ".git").exists()), place.parent)
    return place.relative_to(here if place.is_relative_to(here) else top).as_posix()


def main() -> None:
    run(edit)


if __name__ == "__main__":
    main()
