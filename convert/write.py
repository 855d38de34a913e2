"""The conversion of a checkpoint: crash-safe, resumable to the same bytes, and renamed once at the
end."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.files import resolve
from mlx_diffgemma.errors import ConfigError, SourceError

from .journal import Journal, clear, has_work, is_journal_of_ours
from .origin import fingerprint, origin, remember
from .plan import Plan, make_plan
from .recipe import MIXED, choose
from .record import difference, is_finished, sync_folder, write_side_files
from .shards import write_shards
from .sources import open_checkpoint


@dataclass(frozen=True)
class Summary:
    """The result of a conversion."""

    folder: Path
    plan: Plan
    seconds: float
    resumed_moves: int
    errors: dict[str, float]  # part -> relative error of its packed weights, on a sample of rows
    was_there: bool = False


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str],
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    recipe: str = MIXED,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Summary:
    """Convert a checkpoint; after an interruption, the same call resumes the work.

    Args:
      hf_path: folder or Hub repo id of the source.
      mlx_path: folder of the result; it appears only when it is complete.
      quantize: pack the weights.
      q_bits: bits of the experts (`mixed`) or of everything (`uniform`).
      q_group_size: number of weights that share a scale, likewise.
      q_mode: affine, mxfp4, mxfp8 or nvfp4, likewise.
      recipe: `mixed`, `uniform`, or a TOML file.
      dtype: type of weights that are not packed, and of affine scales; bfloat16 by default.
      dequantize: unpack an MLX checkpoint.
      revision: branch, tag or commit of a Hub repository.
      force: move a finished result aside, and start over where partial work does not fit.
      progress: called with (source bytes done, source bytes in all, tensor).

    Raises:
      DiffGemmaError: one line; partial work is kept for the next run.
    """
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
    )
    return carry_out(plan, Path(mlx_path), force=force, progress=progress)


def prepare(
    hf_path: str | os.PathLike[str],
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    recipe: str = MIXED,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Plan:
    """Return the plan of `convert`, from headers alone. Arguments and errors are those of
    `convert`.

    A plan made for a dry run downloads no weights, and cannot be carried out.
    """
    given = (q_bits, q_group_size, q_mode)
    if not quantize and (any(value is not None for value in given) or recipe != MIXED):
        raise ConfigError("bits, group size, mode and recipe need -q (--quantize)")
    chosen = choose(recipe, bits=q_bits, group_size=q_group_size, mode=q_mode) if quantize else None
    checkpoint = open_checkpoint(
        resolve(hf_path, revision, for_conversion=True, headers_only=dry_run),
        compare=not dry_run,
    )
    return make_plan(checkpoint, recipe=chosen, dtype=dtype, dequantize=dequantize)


def carry_out(
    plan: Plan,
    mlx_path: Path,
    *,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Summary:
    """Carry out a plan, once. Arguments and errors are those of `convert`."""
    started = time.perf_counter()
    target = _place(mlx_path, plan.checkpoint.folder)
    partial = partial_of(target)
    try:
        source = origin(plan.checkpoint)
        if _is_there(target, plan, source, force=force):
            if not (partial / "out").exists():  # renamed, and then interrupted
                clear(partial)
            return Summary(target, plan, 0.0, len(plan.moves), {}, was_there=True)
        if partial.is_dir() and not is_journal_of_ours(partial) and any(partial.iterdir()):
            raise SourceError(
                f"{partial} exists and is not an unfinished conversion; move it out of the way"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        with Journal(partial, plan, force=force) as journal:
            resumed = len(journal.done)
            write_shards(plan, partial, journal, progress)
            digest = write_side_files(plan, partial / "out", journal, source)
            if fingerprint(plan.checkpoint) != journal.source:
                raise SourceError(
                    f"{plan.checkpoint.folder} has changed while it was converted; "
                    "start over with --force"
                )
            remember(digest, plan.checkpoint)
            _put_in_place(partial / "out", target)
            errors = journal.errors()
            clear(partial)  # while no other run can resume it
    except OSError as error:
        raise _failure(error, target) from error
    return Summary(target, plan, time.perf_counter() - started, resumed, errors)


def partial_of(target: Path) -> Path:
    """Return the folder beside a result that holds unfinished work."""
    return target.with_name(target.name + ".partial")


def unfinished(mlx_path: Path) -> Path | None:
    """Return the folder that holds unfinished work for a result, or None."""
    try:
        target = Path(os.path.abspath(mlx_path.expanduser()))
        partial = partial_of(target.resolve() if target.is_symlink() else target)
        return partial if has_work(partial) else None
    except (RuntimeError, OSError, ValueError):  # no result can be there
        return None


def _place(mlx_path: Path, source: Path) -> Path:
    """Return the full path of a result, if it can be written without changing the source."""
    try:
        target = Path(os.path.abspath(mlx_path.expanduser()))
        target = target.resolve() if target.is_symlink() else target
        if not target.name or target.is_mount():
            raise SourceError(f"{target} cannot be the folder of a result; name a folder in it")
        source = source.resolve()
        is_source = source == partial_of(target).resolve() or source.is_relative_to(
            target.resolve()
        )
    except (RuntimeError, OSError, ValueError) as error:  # ~NAME unknown, link circle, no name
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{mlx_path} cannot be the folder of a result: {reason}") from error
    if is_source:
        raise ConfigError(
            f"{mlx_path} is the source itself or holds it; choose another folder for the result"
        )
    return target


def _is_there(target: Path, plan: Plan, source: dict[str, Any], *, force: bool) -> bool:
    """Return whether the result is finished.

    Raises:
      SourceError: if the folder holds something else.
    """
    if is_finished(target):
        if not force and (why := difference(target, plan, source)) is not None:
            raise SourceError(f"{target} exists already, and {why}; --force moves it aside")
        return not force
    if target.exists() and not target.is_dir():
        raise SourceError(f"{target} is a file; name a new folder for the result")
    if target.is_dir() and any(target.iterdir()):
        raise SourceError(
            f"{target} is not empty and is not the result of a conversion; name a new folder"
        )
    return False


def _put_in_place(out: Path, target: Path) -> None:
    if is_finished(target):
        target.rename(_free_name(target))
    elif target.exists():
        target.rmdir()
    out.rename(target)
    sync_folder(target.parent)


def _failure(error: OSError, target: Path) -> SourceError:
    """Return the error, with whether there is work to resume."""
    partial = partial_of(target)
    with suppress(OSError):
        partial.rmdir()  # only if it is empty
    goes_on = has_work(partial)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        then = f", which resumes from {partial.name}" if goes_on else ""
        return SourceError(
            f"the disk of {target.parent} is full; free some space and run the same command again"
            f"{then}"
        )
    then = (
        f"{partial.name} keeps the work so far, and the same command resumes it"
        if goes_on
        else "nothing was written"
    )
    return SourceError(f"{error.filename or partial}: {error.strerror}; {then}")


def _free_name(target: Path) -> Path:
    number = 1
    while (name := target.with_name(f"{target.name}.old-{number}")).exists():
        number += 1
    return name
