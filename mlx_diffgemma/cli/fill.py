"""mlx_diffgemma.fill: fill the slots of a template."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.generation import GenerationSettings
from ..errors import TemplateError
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
from .output import Follower, OutputOptions, follower, kept, result_fields

GAP_HELP = "Least and most tokens of slots without their own, such as 8..40."


@command
def fill(
    template: Annotated[
        str | None,
        typer.Argument(
            help="Text with slots such as {{gap}}, byte for byte; '-' reads it from stdin."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file with the template, instead of the argument.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to do; here, unlike in the template, \\n and \\t are read as line break and "
            "tab.",
            show_default="a request that shows the template with blanks",
        ),
    ] = None,
    gap_tokens: Annotated[
        str | None,
        typer.Option(help=GAP_HELP, metavar="M..N", show_default="1 to what a canvas holds"),
    ] = None,
    *,
    model: ModelOptions,
    system_prompt: SystemPromptOption = None,
    settings: GenerationSettings,
    output: OutputOptions,
) -> None:
    """Fill the slots of a template; everything else in it stays byte for byte."""
    view = output.view()
    try:
        page, notes = output.page(), model.notes()
        if settings.seed is None:
            settings = seeded(settings)
            notes.append(f"seed {settings.seed}")
        from ..constraint.constraint import slot_dfa
        from ..language.template import Template

        bounds = gap_bounds(gap_tokens)
        parsed = Template.parse(_template_text(template, file))
        for slot in parsed.slots:
            if slot.kind in ("match", "json"):
                slot_dfa(slot)  # refused here, before the model is loaded
        request = None if prompt is None else unescape(prompt)
        with view.loading():
            loaded, tokenizer = model.load()
        from ..language.prompt import PromptOptions
        from ..write.fill import stream_fill

        asked = parsed.shown() if request is None else request
        follows, settings = follower(
            output, view, loaded, tokenizer, settings, name=model.source, prompt=asked
        )
        events = stream_fill(
            loaded,
            tokenizer,
            parsed,
            prompt=request,
            gap_tokens=bounds,
            settings=settings,
            prompt_options=PromptOptions(system_prompt=system_prompt),
        )
        with closing(events), kept(follows.trace, page, view):
            filled = _followed(events, follows)
            for line in notes:
                view.note(line)
            if output.is_json:
                from ..view.report import filled_object

                view.object(filled_object(filled) | result_fields(output, settings))
            else:
                view.about(filled)
                view.result(filled.text)
    finally:
        view.close()


def _followed(events: Any, follows: Follower) -> Any:
    """Return the filled template, the last of a stream of events."""
    from ..write.fill import Filled

    filled = None
    for event in events:
        if isinstance(event, Filled):
            filled = event
        else:
            follows.trial(event)
    assert filled is not None
    follows.conclude(filled)
    return filled


def _template_text(template: str | None, file: Path | None) -> str:
    if (template is None) == (file is None):
        raise TemplateError("give a template, or a file with --file: one of the two")
    if template == "-":
        return read_stdin()
    if template is not None:
        return template
    assert file is not None
    return decoded(file, read_file(file))


def main() -> None:
    run(fill)


if __name__ == "__main__":
    main()
