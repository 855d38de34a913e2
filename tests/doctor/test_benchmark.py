"""The benchmark that prints the cost model's predictions, from a checkout of the project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_agrees_with_every_cell_worked_out_by_hand():
    finished = subprocess.run(
        [sys.executable, "bench/floors.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("[self-check] 74 cells worked out by hand")
    assert "\n[prediction] M3 Ultra " in finished.stdout
