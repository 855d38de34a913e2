"""Plans, progress and results of a conversion -> terminal."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from mlx_diffgemma.convert.plan import Plan
    from mlx_diffgemma.convert.verify import Verified
    from mlx_diffgemma.convert.write import Summary


class Progress:
    """A bar with bytes and time left, on stderr, for a terminal only."""

    def __init__(self) -> None:
        self._bar = Bar(
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, name: str) -> None:
        """`done` of `total` bytes; `name` is what they belong to."""
        if self._task is None:
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done, description=name.removeprefix("model."))


def show_plan(plan: Plan) -> None:
    """Every tensor and its move, then totals by part."""
    for name, moves in zip(plan.shard_names, plan.shards, strict=True):
        print(name)
        for move in moves:
            nbytes = sum(output.nbytes for output in move.outputs)
            shape = "x".join(map(str, move.source.shape))
            print(f"  {move.target:<64} {shape:>16} {move.describe():<18}{nbytes:>15,}")
    for name, reason in sorted(plan.checkpoint.ignored.items()):
        print(f"  left out: {name} ({reason})")
    print()
    _show_parts(plan, {})


def show_summary(summary: Summary) -> None:
    """What a conversion did."""
    if summary.was_there:
        print(f"{summary.folder} is there already, from the same source by the same recipe")
        return
    _show_parts(summary.plan, summary.errors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    resumed = f", {summary.resumed_moves} tensors from an earlier run" * bool(summary.resumed_moves)
    print(
        f"{summary.folder}: {summary.seconds:.1f} s, "
        f"peak resident memory {peak / 1e9:.2f} GB{resumed}"
    )


def show_verified(found: Verified) -> None:
    """What was seen to hold."""
    print(
        f"{found.folder}: {found.tensors:,} tensors, {found.nbytes:,} bytes: "
        "headers, names, shapes, checksums and sources are right"
    )
    for part, error in found.errors.items():
        print(f"  {part:<20} relative error {error:.5f}")
    for note in found.notes:
        print(f"  {note}")


def _show_parts(plan: Plan, errors: dict[str, float]) -> None:
    nbytes: dict[str, int] = defaultdict(int)
    parameters: dict[str, int] = defaultdict(int)
    kinds: dict[str, set[str]] = defaultdict(set)
    for move in plan.moves:
        nbytes[move.part] += sum(output.nbytes for output in move.outputs)
        parameters[move.part] += move.parameters
        kinds[move.part].add(move.describe())
    print(f"{'part':<20}{'stored as':<22}{'bytes':>18}{'bits/weight':>13}{'error':>10}")
    for part in sorted(nbytes, key=lambda part: -nbytes[part]):
        bits = 8 * nbytes[part] / parameters[part]
        error = f"{errors[part]:.5f}" if part in errors else ""
        kind = ", ".join(sorted(kinds[part]))
        print(f"{part:<20}{kind:<22}{nbytes[part]:>18,}{bits:>13.3f}{error:>10}")
    total, bits = plan.tensor_bytes, 8 * plan.tensor_bytes / sum(parameters.values())
    print(f"{'all':<42}{total:>18,}{bits:>13.3f}")
    if plan.left:
        print(f"left as they are, since their width does not divide: {', '.join(plan.left)}")
