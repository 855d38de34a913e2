"""mlx_diffgemma.convert: convert a checkpoint, or check a converted one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoint.choice import full_name
from ..errors import ConfigError
from .options import REVISION_HELP, friendly_errors, run
from .program import among, model_names

if TYPE_CHECKING:
    from mlx_diffgemma.convert.plan import Plan

    from .render_convert import Progress

QuantizeOption = Annotated[
    bool, typer.Option("--quantize", "-q", help="Pack the weights into fewer bits.")
]
BitsOption = Annotated[
    int | None, typer.Option("--q-bits", help="Bits per weight.", show_default="4")
]
GroupSizeOption = Annotated[
    int | None,
    typer.Option("--q-group-size", help="Weights that share a scale.", show_default="64"),
]
ModeOption = Annotated[
    str | None,
    typer.Option(
        "--q-mode",
        help="affine, mxfp4, mxfp8 or nvfp4.",
        show_default="affine",
        autocompletion=among("affine", "mxfp4", "mxfp8", "nvfp4"),
    ),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        help="mixed (the --q flags set the experts, 8 bits elsewhere), "
        "uniform (they set everything), or a TOML file.",
        autocompletion=among("mixed", "uniform"),
    ),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="Type of weights that are not packed.", show_default="bfloat16")
]
DequantizeOption = Annotated[
    bool, typer.Option("--dequantize", "-d", help="Unpack an MLX checkpoint.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan, from headers alone; write nothing.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="With --dry-run, print every tensor.")
]
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="Check the result at --mlx-path, against --hf-path if given."),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Move a finished result at --mlx-path aside; start over where partial work does "
        "not fit.",
    ),
]
_GO_WITH_VERIFY = {"mlx_path", "verify", "hf_path", "revision"}


def convert(
    context: typer.Context,
    hf_path: Annotated[
        str | None,
        typer.Option(
            help="Source: local folder, Hub repo id or short name.", autocompletion=model_names
        ),
    ] = None,
    mlx_path: Annotated[str, typer.Option(help="Folder of the result.")] = "mlx_model",
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    quantize: QuantizeOption = False,
    q_bits: BitsOption = None,
    q_group_size: GroupSizeOption = None,
    q_mode: ModeOption = None,
    recipe: RecipeOption = "mixed",
    dtype: DtypeOption = None,
    dequantize: DequantizeOption = False,
    upload_repo: Annotated[
        str | None, typer.Option(help="Hub repository to upload the result to.")
    ] = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
    verify: VerifyOption = False,
    force: ForceOption = False,
) -> None:
    """Convert a checkpoint to MLX arrays, in little memory; the same command resumes interrupted
    work."""
    with friendly_errors():
        hf_path = None if hf_path is None else full_name(hf_path)
        if verify:
            _verify(context, mlx_path, hf_path, revision)
            return
        if hf_path is None:
            raise ConfigError("--hf-path is missing: the folder or Hub repo id to convert")
        if dry_run and upload_repo is not None:
            raise ConfigError("--dry-run makes nothing that --upload-repo could upload")
        if verbose and not dry_run:
            raise ConfigError("--verbose prints the plan of --dry-run; give both")
        from .render_convert import Progress, show_plan

        with _telling(_nothing), Progress() as progress:
            progress.stage("loading MLX")
            from mlx_diffgemma.convert.write import prepare

            _reading(progress, hf_path)
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
            show_plan(plan, verbose=verbose)
        else:
            _carry_out(plan, Path(mlx_path), upload_repo, force=force)


def _carry_out(plan: Plan, target: Path, upload_repo: str | None, *, force: bool) -> None:
    from mlx_diffgemma.convert.write import carry_out

    from ..checkpoint.files import upload
    from .render_convert import Progress, show_summary

    with _telling(lambda: _how_to_go_on(target)), Progress() as progress:
        progress.begin(sum(move.source_bytes for move in plan.moves), f"writing {target}")
        summary = carry_out(plan, target, force=force, progress=progress.update)
    show_summary(summary)
    if upload_repo is not None:
        rest = f"{summary.folder} is complete; to upload it, run: {_command(without='--force')}"
        with _telling(lambda: rest), Progress() as progress:
            progress.line(f"uploading {summary.folder} to {upload_repo}")
            upload(summary.folder, upload_repo)
        print(f"uploaded to {upload_repo}")


def _verify(
    context: typer.Context, mlx_path: str, hf_path: str | None, revision: str | None
) -> None:
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _GO_WITH_VERIFY and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with --verify, which checks the result "
                "at --mlx-path"
            )
    from .render_convert import Progress, show_verified

    again = f"the check is not complete; to start it again, run: {_command()}"
    with _telling(lambda: again), Progress() as progress:
        progress.stage("loading MLX")
        from mlx_diffgemma.convert.verify import verify

        found = verify(
            mlx_path, hf_path, revision=revision, progress=progress.update, stage=progress.stage
        )
    show_verified(found)


def _reading(progress: Progress, hf_path: str) -> None:
    """Print what is read; a download draws its own bars, so there is no other beside them."""
    if os.path.isdir(os.path.expanduser(hf_path)):
        progress.stage(f"reading the headers of {hf_path}")
    else:
        progress.line(f"looking for {hf_path} on the Hub")


@contextmanager
def _telling(rest: Callable[[], str]) -> Iterator[None]:
    """Answer Ctrl-C and SIGTERM with one line on how to resume, and exit code 128 + n."""
    caught = [signal.SIGINT]

    def end(number: int, _: object) -> None:
        caught.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"interrupted: {rest()}", file=sys.stderr)
        raise typer.Exit(128 + caught[-1]) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _how_to_go_on(target: Path) -> str:
    from mlx_diffgemma.convert.write import unfinished

    if partial := unfinished(target):
        return f"{partial} keeps the work so far; to resume, run: {_command()}"
    return _nothing()


def _nothing() -> str:
    return f"this run has written nothing; to start again, run: {_command()}"


def _command(without: str = "") -> str:
    """Return the command line of this run, ready to paste into the shell."""
    name, words = Path(sys.argv[0]).name, [word for word in sys.argv[1:] if word != without]
    if name == "__main__.py":  # python -m
        words = [word for word in sys.orig_argv if word != without]
    elif shutil.which(name) == sys.argv[0]:
        words = [name, *words]
    else:
        words = [sys.argv[0], *words]
    return shlex.join(words)


def main() -> None:
    run(convert)


if __name__ == "__main__":
    main()
