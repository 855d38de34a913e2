"""mlx_diffgemma.models: list, fetch and remove models in the Hub's local cache."""

import json
import os
import sys
from typing import Annotated

import typer

from ..errors import SourceError
from .options import REVISION_HELP, friendly_errors, run
from .program import model_names
from .usage import Command

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="List the DiffusionGemma models in the Hub's local cache, fetch one, or remove one.",
)
_NAME_HELP = (
    "Repo id, or a short name: 4bit, 5bit, 6bit, 8bit, mxfp4, mxfp8, nvfp4 or bf16, as published "
    "by mlx-community."
)
NameArgument = Annotated[str, typer.Argument(help=_NAME_HELP, autocompletion=model_names)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")]


@app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    if context.invoked_subcommand is None:
        show(as_json=as_json)


@app.command("list", cls=Command)
def show(as_json: JsonOption = False) -> None:
    """List the cached models with sizes. This is the default subcommand."""
    with friendly_errors():
        from ..checkpoint.cache import cached_models
        from ..checkpoint.choice import short_name
        from .render import show_models

        found = cached_models()
        if as_json:
            objects = [
                {
                    "repo": model.repo,
                    "short_name": short_name(model.repo),
                    "bytes": model.nbytes,
                    "whole": model.is_whole,
                    "folder": str(model.folder),
                }
                for model in found
            ]
            typer.echo(json.dumps(objects))
        elif found:
            show_models(found)
        else:
            typer.echo("no models are cached; mlx_diffgemma.models pull 4bit fetches one", err=True)


@app.command(cls=Command)
def pull(
    name: NameArgument,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
) -> None:
    """Fetch a model, or its missing files, and print its folder on stdout."""
    with friendly_errors():
        from ..checkpoint.files import resolve

        if os.path.exists(name):
            raise SourceError(f"{name} is a folder or a file here; there is nothing to fetch")
        typer.echo(str(resolve(name, revision)))


@app.command(cls=Command)
def rm(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
) -> None:
    """Remove all revisions of a model from the cache."""
    with friendly_errors():
        from ..checkpoint.cache import cached_models, remove
        from ..checkpoint.choice import SHORT_NAMES

        # Folders are not in the cache, so the name never means one.
        repo = SHORT_NAMES.get(name, name)
        held = {model.repo: model for model in cached_models()}
        if repo not in held:
            others = f"; it has {', '.join(held)}" if held else ", which has no models"
            raise SourceError(f"there is no {repo} in the cache{others}")
        if not yes:
            if not is_terminal():
                raise SourceError(
                    f"stdin is no terminal to confirm that {repo} is removed; give --yes"
                )
            size = f"{held[repo].nbytes / 1e9:.2f} GB"
            if not typer.confirm(f"Remove {repo} ({size}) from the cache?", err=True):
                raise typer.Exit(1)
        freed = remove(repo)
        typer.echo(f"removed {repo}: {freed / 1e9:.2f} GB are free again", err=True)


def is_terminal() -> bool:
    """Return whether a question can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
