"""Draw docs/speed.svg from bench/results/: the time of a denoise step, and of an answer, as ratios
to mlx-vlm's from the same run.

    python bench/plot.py --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS
from table import read

FILE = Path(__file__).parent.parent / "docs" / "speed.svg"
BASE = "mlx-vlm"
COLOURS = {
    "ours, fast": "#1b7f5c",
    "ours, reference": "#5bbf95",
    "ours": "#5bbf95",
    "mlx-vlm": "#b0b0b0",
    "mlx-vlm, entropy mode": "#d8a657",
    "transformers": "#8a9fd1",
}
NAMES = {"mlx-vlm-entropy": "mlx-vlm, entropy mode"}
Panel = dict[str, dict[str, float]]  # ratios by runtime, of each group


def panels(results: Path = RESULTS) -> dict[str, Panel]:
    """Return the ratios to mlx-vlm's time by panel, group and runtime."""
    records = read(results)
    steps: Panel = {}
    for case in records["step"]["cases"]:
        ms = {name: row["step_ms"] for name, row in case["runtimes"].items()}
        if case["weights"] == "dense" and BASE in ms:
            shape = f"{case['shape']} shape,\ncanvas {case['canvas']}"
            steps[shape] = {name: round(value / ms[BASE], 3) for name, value in ms.items()}
    answers: Panel = {}
    for model, record in records["answer"]["models"].items():
        rows = record["groups"]["pooled"]
        if not {BASE, "reference"} <= rows.keys():  # a run of some runtimes only
            continue
        per_canvas = rows["reference"]["steps_per_canvas"]
        group = f"{model} model,\n{per_canvas:.1f} steps a canvas"
        answers[group] = {
            f"ours, {name}" if name in record["settings"] else NAMES.get(name, name): round(
                row["seconds_mean"] / rows[BASE]["seconds_mean"], 3
            )
            for name, row in rows.items()
            if name in NAMES or f"ours, {name}" in COLOURS or name in COLOURS
        }
    return {"One denoise step": steps, "One answer": answers}


def draw(shown: dict[str, Panel], file: Path) -> None:
    """Write the picture. Its description holds the numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 9}
    figure = Figure(figsize=(9, 4.2), facecolor="white", layout="constrained")
    for axes, (title, groups) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        top, ticks = 0.0, {}
        for group, ratios in groups.items():
            begin = top
            for name in sorted(ratios, key=list(COLOURS).index):
                axes.barh(top, ratios[name], color=COLOURS[name], height=0.9)
                axes.annotate(
                    f"{name} {ratios[name]:.2f}",
                    (ratios[name], top),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                )
                top += 1
            ticks[group] = (begin + top - 1) / 2
            top += 0.7
        axes.set_yticks(list(ticks.values()), list(ticks))
        axes.set_xlim(0, 1.75 * max(max(ratios.values()) for ratios in groups.values()))
        axes.set_title(f"{title}: time, mlx-vlm = 1")
        axes.invert_yaxis()
        axes.tick_params(left=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, format="svg", metadata={"Date": None, "Description": json.dumps(shown)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}; without, print")
    options = parser.parse_args()
    shown: dict[str, Any] = panels()
    if options.write:
        draw(shown, FILE)
    else:
        print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
