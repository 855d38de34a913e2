"""A hint on Linux if MLX's CPU backend uses the slow reference BLAS that its wheels bring."""

from __future__ import annotations

import platform
import re
from pathlib import Path

# Smaller models, such as the bundled one, answer within a few seconds in any case.
_MATTERS_ABOVE = 50_000_000
_FAST = re.compile(r"lib(openblas|mkl_rt|blis|flexiblas)")  # numpy's own is libscipy_openblas
_MAPS = Path("/proc/self/maps")  # the files that this process has loaded


def slow_blas(weight_bytes: int) -> str | None:
    """Return one line on how to make the CPU backend faster, or None if it would not help.

    Args:
      weight_bytes: what the model takes in memory.
    """
    if platform.system() != "Linux" or weight_bytes < _MATTERS_ABOVE:
        return None
    try:
        loaded = _MAPS.read_text(errors="replace").split()
    except OSError:
        return None
    if any(_FAST.match(word.rpartition("/")[2]) for word in loaded):
        return None
    installed = sorted(Path("/usr/lib").glob("*/libopenblas.so.0"))
    library = installed[0] if installed else _debians()
    install = "" if installed else "`apt install libopenblas0-pthread`, then "
    return (
        "MLX multiplies with the reference BLAS on this CPU; steps and training are about 4 times "
        f"faster with OpenBLAS: {install}start the command with LD_PRELOAD={library}"
    )


def _debians() -> Path:
    """Return the path at which Debian and Ubuntu install the library."""
    return Path(f"/usr/lib/{platform.machine()}-linux-gnu/libopenblas.so.0")
