"""mlx_diffgemma.convert: re-pack a checkpoint, or check one."""

from typing import Annotated

import typer

from ..errors import ConfigError
from .options import REVISION_HELP, friendly_errors, run

# The other options where none is given.
_VERIFY_ALONE = (None, None, False, "mixed", False, None, None, None, None, False, None, False)


def convert(
    hf_path: Annotated[
        str | None, typer.Option(help="Source: local folder or Hub repo id.")
    ] = None,
    mlx_path: Annotated[str, typer.Option(help="Folder of the result.")] = "mlx_model",
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Pack the weights into fewer bits.")
    ] = False,
    q_bits: Annotated[int | None, typer.Option(help="Bits per weight.", show_default="4")] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale.", show_default="64")
    ] = None,
    q_mode: Annotated[
        str | None,
        typer.Option(help="affine, mxfp4, mxfp8 or nvfp4.", show_default="affine"),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="mixed (the --q flags set the experts, 8 bits elsewhere), "
            "uniform (they set everything), or a TOML file."
        ),
    ] = "mixed",
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of what is not packed.", show_default="bfloat16"),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Unpack an MLX checkpoint.")
    ] = False,
    upload_repo: Annotated[
        str | None, typer.Option(help="Hub repository to upload the result to.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, from headers alone.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the result at --mlx-path instead.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Move a finished result at --mlx-path aside.")
    ] = False,
) -> None:
    """Convert a checkpoint to MLX arrays, in little memory; run again, it goes on where it
    stopped."""
    with friendly_errors():
        from mlx_diffgemma.convert.verify import verify as check
        from mlx_diffgemma.convert.write import carry_out, origin, prepare

        from ..checkpoint.files import upload
        from .render_convert import Progress, show_plan, show_summary, show_verified

        settings = (quantize, q_bits, q_group_size, q_mode, dtype, dequantize, revision, force)
        if verify and (hf_path, upload_repo, dry_run, recipe, *settings) != _VERIFY_ALONE:
            raise ConfigError("--verify looks at --mlx-path only; no other option goes with it")
        if dry_run and upload_repo is not None:
            raise ConfigError("--dry-run makes nothing that --upload-repo could upload")
        if verify:
            with Progress() as progress:
                found = check(mlx_path, progress=progress.update)
            show_verified(found)
            return
        if hf_path is None:
            raise ConfigError("--hf-path is missing: the folder or Hub repo id to convert")
        plan = prepare(
            hf_path,
            quantize=quantize,
            q_bits=q_bits,
            q_group_size=q_group_size,
            q_mode=q_mode,
            recipe=recipe,
            dtype=dtype,
            dequantize=dequantize,
            revision=revision,
            dry_run=dry_run,
        )
        if dry_run:
            show_plan(plan)
            return
        from pathlib import Path

        source = origin(plan, hf_path, revision)
        with Progress() as progress:
            summary = carry_out(
                plan, Path(mlx_path), source=source, force=force, progress=progress.update
            )
        show_summary(summary)
        if upload_repo is not None:
            upload(summary.folder, upload_repo)


def main() -> None:
    run(convert)
