"""How many decisions a second, and how often are they right?

Speed: 1, 8 and 32 questions about one context of about 100 and 1,000 tokens, as rows over the one
context, against the same questions one after the other, each of which reads the context again. The
bundled model on the CPU backend; processor time of all threads, the median of rounds.

Quality: the bundled model has never seen a question. It is asked four kinds that its tasks are near
to: is a list sorted, which number is the least, which comes next, how many sevens are there. With
--train, it is trained on 6,000 other such questions first, with this project's own trainer, to see
whether the way from question to probability is right. 200 questions of each kind, none of them in
training. Shown: exact answers, the mean probability of the right answer, the labels' share of all
probability, and the calibration error (10 bins of equal width of the likeliest answer's
probability).

Bound: 8 questions over one context of 1,000 tokens take at most 0.5 of the time of one after the
other.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 OPENBLAS_NUM_THREADS=1 \\
        python bench/decide.py --train
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from common import finish, record

from mlx_diffgemma import Question, bundled_model, decide, load

ROUNDS, EACH = 7, 200
BOUND = 0.5
TRAINED, ITERS, BATCH = 6000, 1500, 16


@dataclass(frozen=True, slots=True)
class Asked:
    """A question whose answer is known."""

    text: str
    question: Question
    right: int  # the index of the right option


def sorted_list(rng: random.Random) -> Asked:
    digits = sorted(rng.choices(range(10), k=rng.randint(3, 6)))
    is_sorted = rng.random() < 0.5
    while not is_sorted and digits == sorted(digits):
        rng.shuffle(digits)
        if len(set(digits)) == 1:
            digits = rng.choices(range(10), k=4)
    text = f"List: {' '.join(map(str, digits))}"
    return Asked(text, Question.predicate("Is the list sorted?"), 0 if is_sorted else 1)


def least_number(rng: random.Random) -> Asked:
    digits = rng.sample(range(10), 4)
    text = f"List: {' '.join(map(str, digits))}"
    question = Question.choice("Which number is the least?", [str(d) for d in digits])
    return Asked(text, question, digits.index(min(digits)))


def next_number(rng: random.Random) -> Asked:
    start, right = rng.randint(10, 90), rng.randrange(4)
    others = rng.sample([n for n in range(10, 99) if n != start + 3], 4)
    others[right] = start + 3
    text = f"Count: {start} {start + 1} {start + 2}"
    question = Question.choice("Which number comes next?", [str(n) for n in others])
    return Asked(text, question, right)


def sevens(rng: random.Random) -> Asked:
    count = rng.randint(0, 4)
    digits = [7] * count + rng.choices([0, 1, 2, 3, 4, 5, 6, 8, 9], k=6 - count)
    rng.shuffle(digits)
    text = f"List: {' '.join(map(str, digits))}"
    levels = ["none", "one", "two", "three", "four"]
    return Asked(text, Question.score("How many sevens are in the list?", levels), count)


KINDS: dict[str, Callable[[random.Random], Asked]] = {
    "sorted": sorted_list,
    "least": least_number,
    "next": next_number,
    "sevens": sevens,
}


def drawn(kind: str, seed: int, count: int, without: set[str] = frozenset()) -> Iterator[Asked]:
    """Draw questions, none of whose prompts is known."""
    rng = random.Random(f"{kind} {seed}")
    while count:
        asked = KINDS[kind](rng)
        if key(asked) not in without:
            count -= 1
            yield asked


def key(asked: Asked) -> str:
    return f"{asked.text} {[option.value for option in asked.question.options]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="train on such questions first too")
    parser.add_argument("--iters", type=int, default=ITERS, help="batches of that training")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--each", type=int, default=EACH, help="questions of each kind")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    model, tokenizer = load(bundled_model())
    speeds = {
        f"{tokens} tokens, {count} questions": speed(
            model, tokenizer, tokens, count, options.rounds
        )
        for tokens in (100, 1000)
        for count in (1, 8, 32)
    }
    for name, numbers in speeds.items():
        print(name, numbers)
    held = {kind: list(drawn(kind, 1, options.each)) for kind in KINDS}
    quality: dict[str, Any] = {"untrained": qualities(model, tokenizer, held)}
    print("untrained", quality["untrained"])
    if options.train:
        with tempfile.TemporaryDirectory() as scratch:
            adapters = train(Path(scratch), held, tokenizer, options.iters)
            trained = load(bundled_model(), adapter_path=str(adapters))
            quality["trained"] = qualities(*trained, held)
        quality["training"] = {"iters": options.iters, "batch": BATCH, "examples": TRAINED}
        print("trained", quality["trained"])
    ratio = speeds["1000 tokens, 8 questions"]["of_in_turn"]
    passed = ratio <= BOUND
    print(f"8 questions, 1000 tokens, of in turn: {ratio:.3f}; bound {BOUND}: {passed}")
    line = record(
        "decide",
        what="decisions in one step, questions as rows over one context",
        dtype="float32",
        shape={"canvas": 16, "questions_of_each_kind": options.each},
        units={
            "seconds": "processor time of all threads for all questions, median of rounds",
            "per_second": "decisions a second of processor time",
            "of_in_turn": "together / one after the other, median of the rounds' ratios",
            "right": "of the questions of a kind",
            "probability, share": "mean",
            "calibration_error": "expected calibration error over 10 bins",
        },
        rounds=options.rounds,
        speed=speeds,
        quality=quality,
        bound={"what": "8 questions, 1000 tokens", "value": ratio, "bound": BOUND},
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def speed(model: Any, tokenizer: Any, tokens: int, count: int, rounds: int) -> dict[str, float]:
    """Return the time of so many questions about one text, together and in turn."""
    text = ("Sort: 6 3 1 7 0 6 " * (tokens // 18 + 1))[:tokens]
    questions = [
        Question.choice(f"Which number is the {place} one?", ["6", "3", "1", "7"])
        for place in [f"{n}th" for n in range(1, count + 1)]
    ]
    together, in_turn = [], []
    for number in range(rounds + 1):
        began = time.process_time()
        decide(model, tokenizer, text, questions)
        middle = time.process_time()
        for question in questions:
            decide(model, tokenizer, text, question)
        if number:  # the first round warms up
            together.append(middle - began)
            in_turn.append(time.process_time() - middle)
    return {
        "seconds": round(median(together), 4),
        "per_second": round(count / median(together), 2),
        "in_turn_seconds": round(median(in_turn), 4),
        "of_in_turn": round(median(a / b for a, b in zip(together, in_turn, strict=True)), 3),
    }


def qualities(model: Any, tokenizer: Any, held: dict[str, list[Asked]]) -> dict[str, Any]:
    """Return how good the answers of each kind are."""
    found = {}
    for kind, asked in held.items():
        answers = [decide(model, tokenizer, each.text, each.question).answer for each in asked]
        best = [int(np.argmax(a.probabilities)) for a in answers]
        right = [b == each.right for b, each in zip(best, asked, strict=True)]
        pairs = list(zip(answers, asked, strict=True))
        found[kind] = {
            "right": sum(right),
            "of": len(asked),
            "chance": round(mean(1 / len(each.question.options) for each in asked), 3),
            "probability": round(mean(a.probabilities[each.right] for a, each in pairs), 3),
            "share": round(mean(a.share for a in answers), 4),
            "calibration_error": round(
                calibration_error([max(a.probabilities) for a in answers], right), 3
            ),
        }
    return found


def calibration_error(said: list[float], right: list[bool]) -> float:
    """Return the mean distance between what is said and what is true, over 10 bins."""
    bins = np.minimum((np.array(said) * 10).astype(int), 9)
    total = 0.0
    for each in range(10):
        inside = bins == each
        if inside.any():
            total += inside.mean() * abs(
                np.array(said)[inside].mean() - np.array(right)[inside].mean()
            )
    return float(total)


def train(scratch: Path, held: dict[str, list[Asked]], tokenizer: Any, iters: int) -> Path:
    """Train all weights of the bundled model on other questions; return the adapters' folder."""
    from mlx_diffgemma.write.decide import labels_of

    known = {key(asked) for each in held.values() for asked in each}
    rows = []
    for kind in KINDS:
        for asked in drawn(kind, 2, TRAINED // len(KINDS), known):
            labels = labels_of(tokenizer, asked.question)
            shown = asked.question.shown(labels.texts, labels.ask)
            rows.append(
                {"prompt": f"{asked.text}\n\n{shown}", "completion": labels.texts[asked.right]}
            )
    random.Random(0).shuffle(rows)
    data, adapters = scratch / "data", scratch / "adapters"
    data.mkdir()
    for name, part in (("train", rows[64:]), ("valid", rows[:64])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = {
        "fine_tune_type": "full",
        "optimizer": "muon",
        "optimizer_config": {"muon": {"weight_decay": 0.0}},
        "lr_schedule": {
            "name": "cosine_decay",
            "arguments": [4.0e-3, iters, 1.0e-4],
            "warmup": 50,
        },
        "batch_size": BATCH,
        "iters": iters,
        "causal_weight": 0,
        "max_seq_length": 256,
        "steps_per_eval": 500,
        "steps_per_report": 50,
        "save_every": iters,
        "seed": 0,
    }
    (scratch / "train.yaml").write_text(json.dumps(settings))  # JSON is YAML
    arguments = ["--model", str(bundled_model()), "--train", "--data", str(data)]
    arguments += ["--adapter-path", str(adapters), "--config", str(scratch / "train.yaml")]
    subprocess.run([sys.executable, "-m", "mlx_diffgemma", "train", *arguments], check=True)
    return adapters


if __name__ == "__main__":
    main()
