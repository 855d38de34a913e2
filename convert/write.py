"""Convert a checkpoint: crash-safe, resumable to the same bytes, and renamed once at the end."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.files import resolve
from mlx_diffgemma.errors import ConfigError, SourceError

from .journal import Journal, clear, fingerprint, is_journal_of_ours
from .plan import Plan, make_plan
from .recipe import MIXED, choose
from .record import is_finished, is_result_of, sync_folder, write_side_files
from .shards import write_shards
from .sources import open_checkpoint


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

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
    """Converts a checkpoint; run again after any interruption, it goes on where it stopped.

    Args:
      hf_path: folder or Hub repo id of the source.
      mlx_path: folder of the result; it appears only when it is whole.
      quantize: pack the weights.
      q_bits: bits of the experts (`mixed`) or of everything (`uniform`).
      q_group_size: weights that share a scale, likewise.
      q_mode: affine, mxfp4, mxfp8 or nvfp4, likewise.
      recipe: `mixed`, `uniform`, or a TOML file.
      dtype: type of what is not packed, and of affine scales; bfloat16 by default.
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
    source = origin(plan, hf_path, revision)
    return carry_out(plan, Path(mlx_path), source=source, force=force, progress=progress)


def origin(plan: Plan, hf_path: str | os.PathLike[str], revision: str | None) -> dict[str, Any]:
    """Where a plan's source is, for the record: a full path, or a repository at a commit."""
    folder = plan.checkpoint.folder
    is_cached = folder.parent.name == "snapshots"  # of the Hub: the folder is named by its commit
    return {
        "path": os.fspath(hf_path) if is_cached else str(folder.absolute()),
        "revision": folder.name if is_cached else revision,
        "layout": plan.checkpoint.layout,
    }


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
    """The plan of `convert`, from headers alone; arguments and errors are the same.

    A plan made for a dry run downloads no weights, and cannot be carried out.
    """
    given = (q_bits, q_group_size, q_mode)
    if not quantize and (any(value is not None for value in given) or recipe != MIXED):
        raise ConfigError("bits, group size, mode and recipe only have a meaning with -q")
    chosen = choose(recipe, bits=q_bits, group_size=q_group_size, mode=q_mode) if quantize else None
    checkpoint = open_checkpoint(
        resolve(hf_path, revision, for_conversion=True, headers_only=dry_run)
    )
    return make_plan(checkpoint, recipe=chosen, dtype=dtype, dequantize=dequantize)


def carry_out(
    plan: Plan,
    target: Path,
    *,
    source: dict[str, Any],
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Summary:
    """Does what the plan says, once."""
    started = time.perf_counter()
    try:
        target = target.expanduser().absolute()
        if not target.name:
            raise SourceError(f"{target} cannot be the folder of a result")
        partial = target.with_name(target.name + ".partial")
        is_source = plan.checkpoint.folder.resolve() in (target.resolve(), partial.resolve())
    except RuntimeError as error:  # nobody's home, or links in a circle
        raise SourceError(f"{target}: {error}") from error
    if is_source:
        raise ConfigError(f"{target} is the source itself; choose another folder for the result")
    try:
        if is_finished(target):
            if not force and is_result_of(target, plan, source):
                if not (partial / "out").exists():  # renamed, and then interrupted
                    clear(partial)
                return Summary(target, plan, 0.0, len(plan.moves), {}, was_there=True)
            if not force:
                raise SourceError(
                    f"{target} is there already, from another source or by other settings; "
                    "--force moves it aside"
                )
        elif target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SourceError(
                f"{target} is there and is no result of a conversion; it is not touched"
            )
        if partial.is_dir() and not is_journal_of_ours(partial) and any(partial.iterdir()):
            raise SourceError(
                f"{partial} is there and is no unfinished conversion; move it out of the way"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        with Journal(partial, plan, force=force) as journal:
            resumed = len(journal.done)
            write_shards(plan, partial, journal, progress)
            write_side_files(plan, partial / "out", journal, source)
            if fingerprint(plan) != journal.source:
                raise SourceError(
                    f"{plan.checkpoint.folder} has changed while it was converted; "
                    f"delete {partial} or give --force to start over"
                )
            if is_finished(target):
                target.rename(_free_name(target))
            elif target.exists():
                target.rmdir()
            (partial / "out").rename(target)
            sync_folder(target.parent)
            errors = journal.errors()
            clear(partial)  # while nobody else can take it up
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SourceError(
                f"the disk of {target.parent} is full; free some space and run the same again, "
                f"it goes on from {partial.name}"
            ) from error
        place = error.filename or partial
        raise SourceError(f"{place}: {error.strerror}; {partial.name} is kept") from error
    return Summary(target, plan, time.perf_counter() - started, resumed, errors)


def _free_name(target: Path) -> Path:
    number = 1
    while (name := target.with_name(f"{target.name}.old-{number}")).exists():
        number += 1
    return name
