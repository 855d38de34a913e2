"""Does the bundled model tell what is in pictures that it never saw, by this runtime and by
transformers, and when it is packed?

200 pictures of each task of recipes/bundled/pictures.py, drawn by a seed that no training used: the
colours of four by four tiles, and the numbers of shapes by colour. An answer counts if it is
exactly right. Ours reads each picture through a message with its file; transformers gets the
pixels of its own image processor (Pillow's). Both float32, and with the checkpoint's own settings.
`--packed` asks a copy in each packing of bench/convert_quality.py too.

Bound: of each task at least 90% exact, by ours and by transformers, and the two rates, over both
tasks together, at most two standard errors of their difference apart.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/pictures.py
    python bench/pictures.py --packed --no-transformers
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from accuracy import Answer, print_table, reference_answer, summarise
from common import finish, record
from convert_quality import PACKINGS

from mlx_diffgemma import GenerationSettings, batch_generate, bundled_model, load
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.convert import convert

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "bundled"))

import pictures

LEAST, BOUND = 0.9, 2.0  # exact answers of a task; standard errors
SEED, BATCH = 1, 8  # the seed of the recipe's tests


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="the bundled one")
    parser.add_argument("--count", type=int, default=200, help="pictures of each task")
    parser.add_argument("--seed", type=int, default=SEED, help="of the pictures")
    parser.add_argument("--packed", action="store_true", help="packed copies too")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    folder = options.model or bundled_model()
    seen = {
        task: [pictures.make(task, i, options.seed) for i in range(options.count)]
        for task in pictures.ASKED
    }
    flat = [one for some in seen.values() for one in some]
    answers, seconds = {}, {}
    runs: dict[str, Any] = {"ours": lambda: ours(folder, flat)}
    if not options.no_transformers:
        runs["transformers"] = lambda: transformers(folder, flat)
    for name in [each for each in PACKINGS if each != "bf16"] if options.packed else ():
        runs[name] = lambda name=name: packed(folder, name, flat)
    for name, run in runs.items():
        started = time.perf_counter()
        answers[name] = run()
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {len(flat)} answers in {seconds[name]:.0f} s", flush=True)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for task in (*seen, "pooled"):
        chosen = [i for i, one in enumerate(flat) if task in (one.task, "pooled")]
        entries = [{"answer": flat[i].answer} for i in chosen]
        table[task] = {
            name: summarise(entries, [given[i] for i in chosen]) for name, given in answers.items()
        }
    print_table(table)
    wrong = [
        {"task": one.task, "picture": i % options.count, "is": one.answer, "said": answer.text}
        for i, (one, answer) in enumerate(zip(flat, answers["ours"], strict=True))
        if one.answer != answer.text
    ]
    for each in wrong[:10]:
        print(each)
    compared = [name for name in ("ours", "transformers") if name in answers]
    passed = all(table[task][name]["exact_rate"] >= LEAST for task in seen for name in compared)
    apart = standard_errors(*(table["pooled"][name]["exact_rate"] for name in compared), len(flat))
    passed = passed and apart <= BOUND
    line = record(
        "pictures",
        what="exact answers about unseen pictures by the bundled model",
        model="bundled" if options.model is None else folder.name,
        shape={"pictures_per_task": options.count, "batch": BATCH},
        dtype="float32",
        units={
            "exact_rate": "answers equal to the expected text / pictures",
            "steps_per_canvas": "denoise steps / canvases, over all rows",
            "seconds": "wall time on a shared machine, loading included; not a benchmark of speed",
        },
        least_exact_rate=LEAST,
        bound_standard_errors=BOUND,
        standard_errors_apart=round(apart, 3),
        tasks=table,
        wrong=wrong,
        seconds=seconds,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def standard_errors(p: float, q: float | None = None, n: int = 1) -> float:
    """How many standard errors of their difference two rates of n answers are apart."""
    if q is None or p == q:
        return 0.0
    return abs(p - q) / math.sqrt((p * (1 - p) + q * (1 - q)) / n)


def ours(folder: Path, seen: list[Any]) -> list[Answer]:
    """Each picture as a file that a message names."""
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory() as made:
        for start in range(0, len(seen), BATCH):
            prompts = []
            for i, one in enumerate(seen[start : start + BATCH]):
                path = Path(made) / f"{i}.png"
                one.image.save(path)
                parts = [
                    {"type": "image", "image": str(path)},
                    {"type": "text", "text": one.prompt},
                ]
                prompts.append([{"role": "user", "content": parts}])
            settings = GenerationSettings(seed=start)
            response = batch_generate(model, tokenizer, prompts, settings=settings)
            for text, done in zip(response.texts, response.finished, strict=True):
                answers.append(Answer(text, done.new_tokens, done.steps, done.canvases))
    return answers


def packed(folder: Path, name: str, seen: list[Any]) -> list[Answer]:
    """The answers of a copy that the converter packed."""
    with tempfile.TemporaryDirectory() as made:
        convert(folder, Path(made) / "packed", **PACKINGS[name])
        return ours(Path(made) / "packed", seen)


def transformers(folder: Path, seen: list[Any]) -> list[Answer]:
    """The reference, one picture at a time, with its own processor of images."""
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = ModelConfig.from_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Gemma4ImageProcessorPil(max_soft_tokens=config.image_tokens)
    begin, token, end = config.image_token_ids
    answers = []
    for one in seen:
        pixels = processor([one.image], return_tensors="pt")
        count = int(pixels["num_soft_tokens_per_image"][0])
        parts = [{"type": "image"}, {"type": "text", "text": one.prompt}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        before, behind = text.split("<|image|>")
        ids = [*tokenizer.encode(before, add_special_tokens=False), begin]
        ids += [token] * count + [end] + tokenizer.encode(behind, add_special_tokens=False)
        given = torch.tensor([ids])
        out = model.generate(
            given,
            pixel_values=pixels["pixel_values"],
            image_position_ids=pixels["image_position_ids"],
            mm_token_type_ids=(given == token).long(),
        )
        sequence, rate = out.sequences[0].tolist(), float(out.tokens_per_forward[0])
        answers.append(reference_answer(sequence[len(ids) :], rate, config, tokenizer))
    return answers


if __name__ == "__main__":
    main()
