"""The display of a conversion's plan, progress and result in a terminal."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from ..checkpoint.info import contexts_of
from ..errors import counted

if TYPE_CHECKING:
    from mlx_diffgemma.convert.plan import Plan
    from mlx_diffgemma.convert.verify import Verified
    from mlx_diffgemma.convert.write import Summary


_SECONDS_BETWEEN_LINES = 30
_FEW = 3  # most modules that are named


class Progress:
    """The progress of a command on stderr: a changing line in a terminal, and elsewhere a line of
    text now and then."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        console.width -= 2  # room for ^C: a wrapped line would not be removed
        self._stage = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._is_live,
        )
        self._bar = Bar(
            SpinnerColumn(),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not self._is_live,
        )
        self._shown: Bar | None = None
        self._started = self._said = time.monotonic()
        self._from: int | None = None  # bytes done when the bar began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._show(None)

    def stage(self, text: str) -> None:
        """Show work of unknown length."""
        self._show(self._stage)
        self._replace_task(self._stage, None, text)

    def line(self, text: str) -> None:
        """Print what begins, if other code draws the progress."""
        self._show(None)
        if self._is_live:
            print(text, file=sys.stderr, flush=True)

    def begin(self, total: int, text: str) -> None:
        """Show a bar from 0 to `total` bytes."""
        self._show(self._bar)
        self._replace_task(self._bar, total, text)
        self._started, self._from = time.monotonic(), None

    def update(self, done: int, total: int, name: str) -> None:
        """Show `done` of `total` bytes; `name` is the tensor that is done."""
        if self._shown is not self._bar:
            self.begin(total, "")
        text = "finishing" if done == total else name.removeprefix("model.")
        self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        self._say_now_and_then(done, total)

    def _show(self, which: Bar | None) -> None:
        if self._shown is not which and self._shown is not None:
            self._shown.stop()
        if self._shown is not which and which is not None:
            which.start()
        self._shown = which

    def _replace_task(self, bar: Bar, total: int | None, text: str) -> None:
        for task in bar.task_ids:
            bar.remove_task(task)
        bar.add_task(text, total=total)

    def _say_now_and_then(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._from is None:  # without the bytes of an earlier run
            self._started, self._from = now, done
        if self._is_live or now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said, moved = now, done - self._from
        left = (now - self._started) * (total - done) / moved if moved else 0
        time_left = f", about {left / 60:.0f} min left" if left else ""
        print(f"{_size(done)} of {_size(total)}{time_left}", file=sys.stderr, flush=True)


def show_plan(plan: Plan, *, verbose: bool) -> None:
    """Print a line per part, the modules that are not packed, and the totals; `verbose` prints
    every tensor."""
    if verbose:
        _show_moves(plan)
    sizes = f"{'before':>10}{'after':>10}{'bits/weight':>12}"
    print(f"{'part':<17}{'tensors':>8} {'stored as':<22}{sizes}")
    before = sum(move.source_bytes for move in plan.moves)
    for part in sorted({m.part for m in plan.moves}, key=lambda part: -_bytes_of(plan, part)):
        moves = [move for move in plan.moves if move.part == part]
        kinds = ", ".join(sorted({move.describe() for move in moves}))
        source, nbytes = sum(move.source_bytes for move in moves), _bytes_of(plan, part)
        bits = 8 * nbytes / sum(move.parameters for move in moves)
        sizes = f"{_size(source):>10}{_size(nbytes):>10}{bits:>12.3f}"
        print(f"{part:<17}{len(moves):>8} {kinds:<22}{sizes}")
    bits = 8 * plan.tensor_bytes / sum(move.parameters for move in plan.moves)
    sizes = f"{_size(before):>10}{_size(plan.tensor_bytes):>10}{bits:>12.3f}"
    print(f"{'all':<17}{len(plan.moves):>8} {'':<22}{sizes}")
    print(f"result: {plan.tensor_bytes:,} bytes of tensors in {counted(len(plan.shards), 'file')}")
    _show_left(plan, verbose=verbose)
    for reason, count in Counter(plan.checkpoint.ignored.values()).items():
        print(f"left out: {counted(count, 'tensor')} ({reason})")
    tokens = contexts_of(plan.model.text)[0]
    print(
        f"memory to run the result with {tokens:,} tokens of context: "
        f"about {_size(plan.running_bytes(tokens))}"
    )


def _show_moves(plan: Plan) -> None:
    for name, moves in zip(plan.shard_names, plan.shards, strict=True):
        print(name)
        for move in moves:
            nbytes = sum(output.nbytes for output in move.outputs)
            shape = "x".join(map(str, move.source.shape))
            print(f"  {move.target:<64} {shape:>16} {move.describe():<18}{nbytes:>15,}")
    for name, reason in sorted(plan.checkpoint.ignored.items()):
        print(f"  left out: {name} ({reason})")
    print()


def _show_left(plan: Plan, *, verbose: bool) -> None:
    """Print the modules that a recipe's groups do not divide, or a few of many."""
    if plan.left:
        shown = plan.left if verbose else plan.left[:_FEW]
        more = len(plan.left) - len(shown)
        rest = f" and {more} more (--dry-run --verbose lists them)" if more else ""
        print(
            f"not packed, since groups do not divide their width: "
            f"{counted(len(plan.left), 'module')}: {', '.join(shown)}{rest}"
        )


def _bytes_of(plan: Plan, part: str) -> int:
    return sum(o.nbytes for move in plan.moves if move.part == part for o in move.outputs)


def _size(nbytes: int) -> str:
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:.2f} {unit}"
    return f"{nbytes} B"


def show_summary(summary: Summary) -> None:
    """Print the result of a conversion."""
    if summary.was_there:
        print(f"{summary.folder} exists already, from the same source with the same settings")
        return
    _show_parts(summary.plan, summary.errors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    resumed = ""
    if summary.resumed_moves:
        resumed = f", {counted(summary.resumed_moves, 'tensor')} from an earlier run"
    print(
        f"{summary.folder}: {summary.seconds:.1f} s, "
        f"peak resident memory {peak / 1e9:.2f} GB{resumed}"
    )


def show_verified(found: Verified) -> None:
    """Print the result of a check."""
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
    last = f"{'relative error':>16}" if errors else ""
    print(f"{'part':<20}{'stored as':<22}{'bytes':>18}{'bits/weight':>13}{last}")
    for part in sorted(nbytes, key=lambda part: -nbytes[part]):
        bits = 8 * nbytes[part] / parameters[part]
        error = f"{errors[part]:>16.5f}" if part in errors else ""
        kind = ", ".join(sorted(kinds[part]))
        print(f"{part:<20}{kind:<22}{nbytes[part]:>18,}{bits:>13.3f}{error}")
    total, bits = plan.tensor_bytes, 8 * plan.tensor_bytes / sum(parameters.values())
    print(f"{'all':<42}{total:>18,}{bits:>13.3f}")
    _show_left(plan, verbose=False)
