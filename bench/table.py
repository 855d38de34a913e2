"""The tables of docs/speed.md and docs/constraints.md, from the last lines of bench/results/.

No figure is typed by hand: what was not measured has no row. The last lines name machine, versions
and commit.

    python bench/table.py            # prints
    python bench/table.py --write    # replaces the tables in the pages
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import RESULTS

BENCHES = ("step", "prefill", "answer", "twin", "growth", "growth_peak", "counts", "cache")
BEGIN, END = "<!-- bench table -->", "<!-- /bench table -->"
NOT_APPLE = "No figure here was measured on Apple hardware."
MISSING = "-"
DOCS = Path(__file__).parent.parent / "docs"

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into the page")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name, text in pages(options.results).items():
        if options.write:
            replace_between_marks(options.docs / name, text)
        print(text)


def pages(results: Path) -> dict[str, str]:
    """What stands between the marks of each page."""
    records = read(results)
    if not records:
        raise SystemExit(f"{results} has none of {', '.join(BENCHES)}: nothing to show")
    return {
        "speed.md": "\n\n".join(tables(records)),
        "constraints.md": "\n\n".join(constraints(results)),
    }


def read(results: Path) -> dict[str, Record]:
    """The last record of each benchmark that has one, with the last of each of its cases and the
    commits of those."""
    records = {}
    for name in BENCHES:
        path = results / f"{name}.jsonl"
        if path.is_file() and (lines := path.read_text(encoding="utf-8").split("\n")[:-1]):
            records[name] = json.loads(lines[-1])
            if name == "answer":  # of several models
                models = {r.get("model", "bundled"): r for r in map(json.loads, lines)}
                commits = dict.fromkeys(r["commit"] for r in models.values())
                records[name] |= {
                    "models": models,
                    "passed": all(r["passed"] for r in models.values()),
                    "bounds": [bound for r in models.values() for bound in r["bounds"]],
                    "commit": ", ".join(commits),
                }
            if "cases" in records[name]:  # a run may measure some shapes only
                latest = {
                    (case["shape"], case["weights"]): (case, record["commit"])
                    for record in map(json.loads, lines)
                    for case in record["cases"]
                }
                cases, commits = zip(*latest.values(), strict=True)
                records[name] |= {
                    "cases": cases,
                    "passed": all(case["passed"] for case in cases),
                    "commit": ", ".join(dict.fromkeys(commits)),
                }
    return records


def replace_between_marks(page: Path, text: str) -> None:
    page.write_text(between_marks(page, text), encoding="utf-8")


def between_marks(page: Path, text: str) -> str:
    """Return the page with `text` in place of its tables."""
    whole = page.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise SystemExit(f"{page} must hold {BEGIN} and, behind it, {END}, once each")
    head, rest = whole.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def tables(records: dict[str, Record]) -> list[str]:
    """Paragraphs and tables, in order."""
    blocks = []
    if "step" in records:
        blocks += steps(records["step"])
    if "answer" in records:
        blocks += answers(records["answer"])
    return [*blocks, bounds(records), provenance(records)]


def steps(record: Record) -> list[str]:
    rows = []
    for case in record["cases"]:
        ms = {name: row["step_ms"] for name, row in case["runtimes"].items()}
        rows.append(
            [
                f"{case['shape']}, {case['weights']}",
                str(case["canvas"]),
                *(number(ms.get(name)) for name in ("ours", "mlx-vlm", "transformers")),
                *(ratio(case["ratio"].get(name)) for name in ("mlx-vlm", "transformers")),
            ]
        )
    heads = "shape, weights|canvas|ours, ms|mlx-vlm|transformers|ours / mlx-vlm|ours / transformers"
    title = "One denoise step with its sampler, median milliseconds, batch 1:"
    return [title, markdown(heads.split("|"), rows)]


def answers(record: Record) -> list[str]:
    rows = []
    for model, found in record["models"].items():
        for name, row in found["groups"]["pooled"].items():
            low, high = row["exact_interval"]
            first = row.get("first_seconds_mean") if name != "transformers" else None
            rows.append(
                [
                    f"{model} ({found['shape']['prompts']:,} prompts)",
                    f"ours, {name}" if name in found["settings"] else name,
                    f"{row['exact_rate']:.1%} ({low:.1%} to {high:.1%})",
                    f"{row['steps']:.1f}",
                    f"{row['positions']:.0f}",
                    f"{1e3 * row['seconds_mean']:.0f}",
                    MISSING if first is None else f"{1e3 * first:.0f}",
                    f"{row['tokens_per_second']:.0f}",
                ]
            )
    heads = "model|runtime|exact (95%)|steps|rows x steps|ms|ms to the first text|tokens/s"
    title = "One answer, batch 1, mean over the prompts of small models, whose tasks are toys:"
    return [title, markdown(heads.split("|"), rows)]


def constraints(results: Path) -> list[str]:
    """What schemas cost to compile, and what a step costs the host."""
    blocks, used = [], {}
    by_limit = {
        record["shape"]["states"]: record
        for record in lines_of(results, "constraint")
        if not record["shape"]["as_given"]
    }
    rows = []
    for states, record in sorted(by_limit.items(), reverse=True):
        used[f"constraint_states {states}"] = record
        rows.append(compiled(f"{states:,} states", record["rows"]["ours"]))
    others = by_limit[max(by_limit)]["rows"] if by_limit else {}
    rows += [compiled(name, row) for name, row in others.items() if name != "ours"]
    if rows:
        count = by_limit[max(by_limit)]["shape"]["cases"]
        heads = "limit, or library|compiled|clean|invalid accepted|median states"
        heads += "|processor time, median|95%"
        blocks += [f"Of {count} schemas:", markdown(heads.split("|"), rows)]
    for record in lines_of(results, "constraint_step")[-1:]:
        used["constraint_step"] = record
        rows = [
            [
                name,
                f"{row['states']:,}",
                f"{row['classes']:,}",
                f"{row['edges']:,}",
                number(row["lift_ms"]),
                *(number(max(row[key].values())) for key in ("draft_ms", "marginals_ms")),
            ]
            for name, row in record["automata"].items()
        ]
        heads = "automaton|states|classes of tokens|edges|lift, ms|draft, ms|marginals, ms"
        title = (
            f"On the host, for a canvas of {record['shape']['positions']} positions over "
            f"{record['shape']['vocabulary']:,} tokens, milliseconds of processor time:"
        )
        blocks += [title, markdown(heads.split("|"), rows)]
    if found := lines_of(results, "structured"):
        used["structured"] = found[-1]
        answered = {name: row for record in found for name, row in record["rows"].items()}
        rows = [
            [name, *(str(row[key]) for key in ("valid", "exact", "steps", "seconds"))]
            for name, row in answered.items()
        ]
        heads = "model, policy, constraint|valid|exact|steps|s of processor time"
        prompts = found[-1]["shape"]["prompts"]
        blocks += [f"{prompts} records asked for in JSON:", markdown(heads.split("|"), rows)]
    return [*blocks, provenance(used)] if used else []


def compiled(name: str, row: Record) -> list[str]:
    return [
        name,
        str(row["compiled"]),
        str(row["clean"]),
        str(row["invalid_accepted"]),
        number(row["median_states"]) if row["median_states"] else MISSING,
        f"{row['median_seconds']:.3f} s",
        f"{row['p95_seconds']:.2f} s",
    ]


def lines_of(results: Path, name: str) -> list[Record]:
    """All records of a benchmark."""
    path = results / f"{name}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bounds(records: dict[str, Record]) -> str:
    """What each benchmark asks, and whether all of its bounds hold."""
    rows = [
        [f"`{script_of(name)}`", str(record.get("what", MISSING)), verdict(held(record))]
        for name, record in records.items()
    ]
    return markdown(["script", "what", "bounds"], rows, align="---")


def held(record: Record) -> bool | None:
    """Whether the bounds hold: one by one where they are listed so."""
    listed = record.get("bounds")
    if isinstance(listed, list):
        return all(bound["passed"] for bound in listed)
    return record.get("passed")


def script_of(name: str) -> str:
    if (Path(__file__).parent / f"{name}.py").is_file():
        script, option = name, ""
    else:
        script, _, option = name.partition("_")
    return f"bench/{script}.py" + (f" --{option}" if option else "")


def provenance(records: dict[str, Record]) -> str:
    """Where and with what; once where all agree."""
    places: dict[str, list[str]] = {}
    for name, record in records.items():
        machine, versions = record["machine"], record["versions"]
        place = (
            f"{machine['system']}, {machine['processor']}, {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB, MLX on {machine['mlx_device']}, BLAS: "
            f"{machine.get('preloaded', 'as MLX brings it')}"
            + (f", {count} thread" if (count := machine.get("blas_threads")) else "")
            + "; "
            + ", ".join(f"{package} {version}" for package, version in versions.items())
            + f"; commit {record['commit']}"
        )
        places.setdefault(place, []).append(script_of(name))
    lines = [f"- {', '.join(names)}: {place}." for place, names in places.items()]
    if not any(record["machine"]["system"].startswith("Darwin") for record in records.values()):
        lines.append(f"- {NOT_APPLE}")
    return "\n".join(lines)


def markdown(heads: list[str], rows: Iterable[list[str]], align: str = "---:") -> str:
    """A table; `align` is that of all columns but the first."""
    lines = [heads, ["---"] + [align] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def verdict(passed: bool | None) -> str:
    if passed is None:
        return MISSING
    return "hold" if passed else "missed"


if __name__ == "__main__":
    main()
