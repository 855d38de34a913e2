"""Kills the batch command with SIGKILL at random moments and runs it again, until its answers are
whole: `python -m tests.batch.kills`. Not a test.

The moments are uniform over the time from shortly before the first answer to the end of an
uninterrupted run, whose answers are what every killed run must end with: no half line, no doubled
one, none missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
LINES = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, kills, at = random.Random(options.seed), 0, []
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines(rng)))
        whole = Path(scratch) / "whole.jsonl"
        first, seconds = durations(source, whole)
        expected = whole.read_bytes()
        while kills < options.kills:
            output = Path(scratch) / f"answers{len(at)}.jsonl"
            while kills < options.kills:
                if finished(run(source, output, rng.uniform(0.9 * first, seconds))) is not None:
                    break
                kills += 1
                at.append(output.read_bytes().count(b"\n") if output.exists() else 0)
            found = finished(run(source, output, None))
            if found is None:  # it was whole already: the command says so and changes nothing
                found = output.read_bytes()
            if found != expected:
                sys.exit(f"{output.name} differs from the whole run after {kills} kills")
    if not any(0 < count < LINES for count in at):
        sys.exit(f"no kill fell into the work: {at}")
    print(
        f"{kills} kills, with {sorted(at)} of {LINES} answers written; all ended as the whole run"
    )


def durations(source: Path, output: Path) -> tuple[float, float]:
    """Run the command to its end; the seconds to its first answer, and to its end."""
    began, process = time.monotonic(), begin(source, output)
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.005)
    first = time.monotonic() - began
    process.wait()
    assert finished((process.returncode, output)) is not None
    return first, time.monotonic() - began


def lines(rng: random.Random) -> list[dict]:
    """Prompts of different lengths, and some that fail."""
    made: list[dict] = []
    for n in range(LINES):
        start = rng.randint(10, 60)
        made.append({"prompt": f"Count from {start} to {start + rng.randint(2, 35)}.", "id": n})
        if n % 9 == 4:
            made[-1]["settings"] = {"sed": 1}
    return made


def begin(source: Path, output: Path) -> subprocess.Popen[bytes]:
    words = ["--input", str(source), "--output", str(output), "--verbose", "False"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma.batch", *words, "--max-denoising-steps", "8"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )


def run(source: Path, output: Path, delay: float | None) -> tuple[int, Path]:
    """Run the command, or kill it after a while."""
    process = begin(source, output)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode, output


def finished(ended: tuple[int, Path]) -> bytes | None:
    """The answers of a run that has ended by itself; 1 says that some lines failed."""
    code, output = ended
    if code not in (1, 2, -9):
        sys.exit(f"the command ended with {code}")
    return output.read_bytes() if code == 1 else None


if __name__ == "__main__":
    main()
