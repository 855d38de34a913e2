"""mlx_diffgemma.fill: write what is missing in a template."""

from pathlib import Path
from typing import Annotated

import typer

from ..config.generation import GenerationSettings
from ..errors import TemplateError
from .options import (
    ModelOptions,
    SystemPromptOption,
    VerboseOption,
    boolean,
    command,
    decoded,
    gap_bounds,
    read_file,
    read_stdin,
    run,
    seeded,
    unescape,
)

GAP_HELP = "Least and most tokens of slots that do not say it themselves, such as 8..40."


@command
def fill(
    template: Annotated[
        str | None,
        typer.Argument(help="Text with slots such as {{gap}}; '-' reads it from stdin."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the template instead.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to do.",
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
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object with text, slots and scores on stdout.")
    ] = False,
    verbose: VerboseOption = "True",
) -> None:
    """Fill the slots of a template; everything else in it stays byte for byte."""
    from .render import View

    view = View(verbose=boolean(verbose))
    try:
        is_fresh, settings = settings.seed is None, seeded(settings)
        from ..language.template import Template

        bounds = gap_bounds(gap_tokens)
        parsed = Template.parse(_template_text(template, file))
        from ..language.prompt import PromptOptions
        from ..view.report import filled_object
        from ..write.fill import Filled, stream_fill

        loaded, tokenizer = model.load()
        for event in stream_fill(
            loaded,
            tokenizer,
            parsed,
            prompt=None if prompt is None else unescape(prompt),
            gap_tokens=bounds,
            settings=settings,
            prompt_options=PromptOptions(system_prompt=system_prompt),
        ):
            if not isinstance(event, Filled):
                view.trial(event)
                continue
            if is_fresh:
                view.note(f"seed {settings.seed}")
            if as_json:
                view.object(filled_object(event) | {"seed": settings.seed})
            else:
                view.about(event)
                view.result(event.text)
    finally:
        view.close()


def _template_text(template: str | None, file: Path | None) -> str:
    if (template is None) == (file is None):
        raise TemplateError("give a template, or a file with --file: one of the two")
    if template == "-":
        return read_stdin()
    if template is not None:
        return unescape(template)
    assert file is not None
    return decoded(file, read_file(file))


def main() -> None:
    run(fill)
