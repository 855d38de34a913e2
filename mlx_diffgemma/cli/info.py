"""mlx_diffgemma.info: show the facts about a checkpoint."""

import json
from typing import Annotated

import typer

from .options import REVISION_HELP, ModelOption, command, run


@command
def info(
    model: ModelOption = None,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show a checkpoint's size, layout and memory needs, from the headers of its files.

    Of a Hub repository that is not cached, only headers are fetched.
    """
    from ..checkpoint.files import bundled_model, resolve
    from ..checkpoint.info import as_object, describe
    from .render import show_info

    source = bundled_model() if model is None else model
    found = describe(resolve(source, revision, headers_only=True))
    if as_json:
        typer.echo(json.dumps(as_object(found)))
    else:
        show_info(found)


def main() -> None:
    run(info)


if __name__ == "__main__":
    main()
