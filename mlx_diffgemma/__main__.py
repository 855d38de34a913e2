"""Run any command under one name: python -m mlx_diffgemma COMMAND."""

import typer

from .cli.batch import batch
from .cli.chat import chat
from .cli.convert import convert
from .cli.decide import decide
from .cli.doctor import doctor
from .cli.edit import edit
from .cli.fill import fill
from .cli.fuse import fuse
from .cli.generate import generate
from .cli.info import info
from .cli.models import app as models
from .cli.options import run
from .cli.train import train


def main() -> None:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="DiffusionGemma on MLX: text that settles out of noise, 256 tokens at a time.",
    )
    app.command()(generate)
    app.command()(chat)
    app.command()(fill)
    app.command()(edit)
    app.command()(decide)
    app.command()(batch)
    app.command()(info)
    app.command()(doctor)
    app.add_typer(models, name="models")
    app.command()(convert)
    app.command()(train)
    app.command()(fuse)
    run(app, "python -m mlx_diffgemma")


if __name__ == "__main__":
    main()
