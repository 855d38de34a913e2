"""What do templates cost on the host with a vocabulary of the published size, and are their texts
spelled as whole texts are?

Six templates with the answers that belong in them. Processor time of: the slots' automata over
tokens (the first time, without caches), the automaton of the whole window, the likeliest string of
a canvas of 256, and the lengths from the exact distribution of strings. No model runs: the
distributions are sure of the answer.

Bounds: the tokens of each answer, as the tokenizer splits it whole, are a string of its window;
the lengths are found; a look for lengths takes at most 0.15 s.

    python bench/regions.py --tokenizer FOLDER
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import finish, record

from mlx_diffgemma import Template, load_tokenizer
from mlx_diffgemma.constraint.decode import best
from mlx_diffgemma.constraint.marginals import Strings
from mlx_diffgemma.denoise.pinned import TokenSet
from mlx_diffgemma.language.prompt import encode_text, special_tokens
from mlx_diffgemma.write.lengths import Search
from mlx_diffgemma.write.regions import Regions
from mlx_diffgemma.write.writer import Writer

CANVAS = 256
CASES = (
    ('{"vip": {{one of: true | false}}}', '{"vip": true}'),
    (
        '{"vip": {{one of: true | false}}, "price": {{match: [0-9]+(\\.[0-9]+)?}}, '
        '"note": {{json: {"type": "string", "maxLength": 40}}}}',
        '{"vip": true, "price": 1.5, "note": "a nice one."}',
    ),
    (
        "Dear {{gap}},\n\nthank you for the {{gap:1..6}}.\n",
        "Dear Mr. Smith,\n\nthank you for the beautiful roses.\n",
    ),
    ('He said "{{gap}}" and left.', 'He said "No way!" and left.'),
    (
        'x = {{json: {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": '
        '"array", "items": {"type": "string"}}}, "required": ["a", "b"], '
        '"additionalProperties": false}}}\ny',
        'x = {"a": 12, "b": ["one", "two words"]}\ny',
    ),
    ("{{one of: 鬱 | 你好 | naïve}} and {{match: \\w+}}", "鬱 and café"),
)
MOST_SECONDS = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    rows = [measure(tokenizer, template, answer) for template, answer in CASES]
    for row in rows:
        print(row, flush=True)
    passed = all(
        row["fits"] and row["found"] and row["search_seconds"] <= MOST_SECONDS for row in rows
    )
    print("within the bounds" if passed else "NOT within the bounds")
    finish(
        record(
            "regions",
            what="templates over a tokenizer's vocabulary, on the host",
            shape={"vocabulary": len(tokenizer), "canvas": CANVAS},
            dtype="float64",
            units={"seconds": "processor time"},
            cases=rows,
            passed=passed,
        ),
        save=options.save,
    )
    sys.exit(not passed)


def measure(tokenizer: Any, template: str, answer: str) -> dict[str, Any]:
    """Times of one template, and whether its answer fits."""
    model: Any = SimpleNamespace(
        config=SimpleNamespace(text=SimpleNamespace(vocab_size=len(tokenizer)))
    )
    settings: Any = SimpleNamespace(canvas_length=CANVAS, seed=0, canvas_width="fixed")
    ends = special_tokens(tokenizer)["<turn|>"], tokenizer.eos_token_id
    started = time.process_time()
    regions = Regions(model, tokenizer, settings, ends)
    pieces = regions.pieces(Template.parse(template), None)
    pieces_seconds = time.process_time() - started
    started = time.process_time()
    writer = Writer(model, settings, ends, TokenSet(regions.text_tokens), pieces)
    window = writer._window(len(pieces))
    window_seconds = time.process_time() - started
    ids = [*encode_text(tokenizer, answer), ends[0]]
    ids += [ends[1]] * (CANVAS - len(ids))
    automaton = window.constraint.automaton
    at = np.arange(CANVAS), automaton.classes[ids]
    maxima = np.full((CANVAS, len(automaton.sizes)), -20.0)
    maxima[at] = np.log(0.99)
    started = time.process_time()
    path = best(automaton, maxima, window.ends)
    best_seconds = time.process_time() - started
    masses = np.full(maxima.shape, 1e-6)
    masses[at] = 0.99
    started = time.process_time()
    found = Search(window, 1)(Strings.of(automaton, masses, window.ends))
    search_seconds = time.process_time() - started
    return {
        "template": template,
        "states": len(automaton.distance),
        "classes": len(automaton.sizes),
        "fits": bool((path.classes == at[1]).all()),
        "found": found,
        "pieces_seconds": round(pieces_seconds, 3),
        "window_seconds": round(window_seconds, 3),
        "best_seconds": round(best_seconds, 4),
        "search_seconds": round(search_seconds, 4),
    }


if __name__ == "__main__":
    main()
