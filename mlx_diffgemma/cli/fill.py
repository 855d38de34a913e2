"""mlx_diffgemma.fill: write what is missing in a template."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import TemplateError
from .options import (
    AdapterOption,
    CanvasLengthOption,
    MaxDenoisingStepsOption,
    ModelOption,
    PolicyOption,
    RevisionOption,
    SeedOption,
    SystemPromptOption,
    TempOption,
    boolean,
    decoded,
    few_settings,
    friendly_errors,
    gap_bounds,
    read_file,
    read_stdin,
    run,
    unescape,
)

GAP_HELP = "Least and most tokens of slots that do not say it themselves, such as 8..40."


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
    model: ModelOption = None,
    adapter_path: AdapterOption = None,
    revision: RevisionOption = None,
    system_prompt: SystemPromptOption = None,
    temp: TempOption = None,
    seed: SeedOption = None,
    max_denoising_steps: MaxDenoisingStepsOption = None,
    canvas_length: CanvasLengthOption = None,
    policy: PolicyOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object with text, slots and scores on stdout.")
    ] = False,
    verbose: Annotated[
        str, typer.Option(metavar="BOOLEAN", help="False prints nothing but the text and errors.")
    ] = "True",
) -> None:
    """Fill the slots of a template; everything else in it stays byte for byte."""
    from .render import View

    view = View(verbose=boolean(verbose))
    with friendly_errors():
        try:
            settings = few_settings(
                temp=temp,
                seed=seed,
                max_denoising_steps=max_denoising_steps,
                canvas_length=canvas_length,
                policy=policy,
            )
            from ..language.template import Template

            bounds = gap_bounds(gap_tokens)
            parsed = Template.parse(_template_text(template, file))
            from ..checkpoint.files import bundled_model
            from ..checkpoint.load import load
            from ..language.prompt import PromptOptions
            from ..view.report import filled_object
            from ..write.fill import Filled, stream_fill

            loaded, tokenizer = load(
                bundled_model() if model is None else model,
                revision=revision,
                adapter_path=adapter_path,
            )
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
                if seed is None:
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
