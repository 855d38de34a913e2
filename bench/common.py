"""What every benchmark here shares: machine facts, resident memory, and the line a run ends with.

Run a benchmark from anywhere as `python bench/NAME.py`, with this package installed or on
PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    *("mlx", "mlx-lm", "mlx-vlm", "transformers", "torch", "numpy", "pillow"),
    *("llguidance", "outlines_core"),
)


def machine() -> dict[str, Any]:
    """Where a number was measured. MLX's device counts: a Linux machine here has no Apple GPU."""
    import mlx.core as mx

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": mx.device_info().get("device_name", platform.processor()),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "mlx_device": mx.default_device().type.name,
        # MLX's Linux wheels bring the reference BLAS; a preloaded one changes every time measured.
        **({"preloaded": Path(preload).name} if (preload := os.environ.get("LD_PRELOAD")) else {}),
        **({"blas_threads": count} if (count := os.environ.get("OPENBLAS_NUM_THREADS")) else {}),
    }


def versions() -> dict[str, str]:
    """Python, and those of the packages that matter here which are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit this runs from; "-dirty" where the package differs from it. Where a machine has a
    copy without git, BENCH_COMMIT says it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        dirty = "-dirty" if git("status", "--porcelain", "--", "mlx_diffgemma", "convert") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown")


def peak_rss_bytes() -> int:
    """The most memory this process has had resident (`ru_maxrss`)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def current_rss_bytes() -> int:
    """Resident memory now; where there is no /proc, the peak stands in, which only overstates
    growth."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except FileNotFoundError:
        return peak_rss_bytes()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def model_name(folder: Path | None) -> str:
    """What a record calls a checkpoint: by its folder, or that around one called "model"."""
    if folder is None:
        return "bundled"
    whole = folder.resolve()
    return whole.parent.name if whole.name == "model" else whole.name


def record(bench: str, **facts: Any) -> str:
    """One JSON line: what was measured, on what, from which commit."""
    return json.dumps(
        {
            "bench": bench,
            **facts,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        },
        ensure_ascii=False,
    )


def finish(line: str, *, save: bool) -> None:
    """Prints the record as the last line, and appends it to `results/` where asked."""
    if save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{json.loads(line)['bench']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line, flush=True)
