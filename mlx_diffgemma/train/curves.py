"""The measurements of a training run: a line of JSON per report, and a picture of the curves."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .trainer import Saved, Trained, Validated

METRICS, PICTURE = "metrics.jsonl", "curves.png"


class Metrics:
    """A run's file of metrics. On resume, reports after the checkpoint are removed."""

    def __init__(self, folder: Path, *, iteration: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        kept = (
            [row for row in read(self.path) if row["iteration"] <= iteration] if iteration else []
        )
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")

    def add(self, event: Trained | Validated | Saved) -> None:
        """Append a report; other events are ignored."""
        if isinstance(event, Saved):
            return
        kind = "train" if isinstance(event, Trained) else "valid"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **asdict(event)}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; none if it does not exist. An incomplete last line is left
    out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def draw(folder: Path) -> Path | None:
    """Draw curves.png from a run's metrics; return None if there are none.

    Raises:
      SourceError: if matplotlib is not installed, or the picture cannot be written.
    """
    rows = read(folder / METRICS)
    if not rows:
        return None
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SourceError("that takes matplotlib (pip install matplotlib)") from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    train = [row for row in rows if row["kind"] == "train"]
    valid = [row for row in rows if row["kind"] == "valid"]
    for name, label, colour in (
        ("canvas_loss", "canvas", "tab:blue"),
        ("causal_loss", "causal", "tab:orange"),
    ):
        if train and any(row[name] for row in train):
            x, y = [row["iteration"] for row in train], [row[name] for row in train]
            losses.plot(x, y, color=colour, linewidth=1, label=f"{label}, training")
        if valid and any(row[name] for row in valid):
            x, y = [row["iteration"] for row in valid], [row[name] for row in valid]
            losses.plot(x, y, "o--", color=colour, markersize=4, label=f"{label}, validation")
    losses.set_ylabel("loss (nats per token)")
    losses.set_ylim(bottom=0)
    losses.grid(alpha=0.3)
    losses.legend()
    rates.plot(
        [row["iteration"] for row in train],
        [row["learning_rate"] for row in train],
        color="tab:green",
    )
    rates.set_ylabel("learning rate")
    rates.set_xlabel("iteration")
    rates.set_ylim(bottom=0)
    rates.grid(alpha=0.3)
    path = folder / PICTURE
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise SourceError(f"{path} cannot be written to: {error.strerror}") from error
    return path
