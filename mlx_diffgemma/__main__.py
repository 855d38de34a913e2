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
from .cli.serve import serve
from .cli.train import train
from .cli.usage import Command


def main() -> None:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="DiffusionGemma on MLX: text that settles out of noise, 256 tokens at a time.",
    )
    app.command(cls=Command)(generate)
    app.command(cls=Command)(chat)
    app.command(cls=Command)(fill)
    app.command(cls=Command)(edit)
    app.command(cls=Command)(decide)
    app.command(cls=Command)(batch)
    app.command(cls=Command)(serve)
    app.command(cls=Command)(info)
    app.command(cls=Command)(doctor)
    app.add_typer(models, name="models")
    app.command(cls=Command)(convert)
    app.command(cls=Command)(train)
    app.command(cls=Command)(fuse)
    run(app, "python -m mlx_diffgemma")


if __name__ == "__main__":
    main()
