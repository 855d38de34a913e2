"""mlx_diffgemma.fuse: fuse adapters into a checkpoint's weights."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.choice import MODEL_VARIABLE
from .options import REVISION_HELP, command, run
from .program import model_names


@command
def fuse(
    model: Annotated[
        str,
        typer.Option(
            help="Local folder, Hub repo id or short name of the model that was trained.",
            envvar=MODEL_VARIABLE,
            autocompletion=model_names,
        ),
    ],
    adapter_path: Annotated[
        str, typer.Option(help="Folder of adapters, or of weights trained in full.")
    ] = "adapters",
    save_path: Annotated[str, typer.Option(help="Folder of the result.")] = "fused_model",
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Unpack all weights; by default packed ones stay packed."
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
) -> None:
    """Write a checkpoint with the adapters fused into its weights."""
    from ..train.fuse import fuse_checkpoint
    from .render_train import show_fused

    fused = fuse_checkpoint(
        model, adapter_path, Path(save_path), dequantize=dequantize, revision=revision
    )
    show_fused(fused)


def main() -> None:
    run(fuse)


if __name__ == "__main__":
    main()
