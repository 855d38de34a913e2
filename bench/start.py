"""How long does `mlx_diffgemma.generate` take from the shell to its first step, and what takes it?
With a vocabulary of 262,144 tokens, and `mlx_lm.generate` beside it, up to its first token.

A tiny model with made-up weights and a real tokenizer, so that what is measured is all else: the
interpreter, imports, the tokenizer, one prompt, one step of a canvas of 16. The twin of the same
shape answers with one token through mlx-lm. Each run is a process of its own, warm files, in turn;
processor time of all threads, and wall time beside it. `--help` is timed too.

Parts, each the processor time of one process less that of the one before: an interpreter that does
nothing, `import mlx_diffgemma`, the tokenizer too, the whole command. Floor: the tokenizers library
alone on the same file, and the interpreter.

Bounds: the command at most 3.0 s, `--help` at most 0.5 s.

    python bench/start.py --tokenizer FOLDER       # with tokenizer.json of 262,144 entries
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import finish, record

HERE = Path(__file__).parent
BOUND, HELP_BOUND = 3.0, 0.5  # seconds of processor time
BARE = "generate, no bytecode"
CANVAS = 16
TINY = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
}
LIBRARY = "import sys; from tokenizers import Tokenizer; Tokenizer.from_file(sys.argv[1])"
TOKENIZER = "import sys; from mlx_diffgemma import load_tokenizer; load_tokenizer(sys.argv[1])"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a real tokenizer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bounds: the command at most {BOUND:g} s, --help at most {HELP_BOUND:g} s")
    with tempfile.TemporaryDirectory() as scratch:
        model, twin = Path(scratch, "model"), Path(scratch, "twin")
        subprocess.run(
            [sys.executable, __file__, "--write", str(options.tokenizer), str(model), str(twin)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
        commands = ways(model, twin)
        compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        compiled |= {"PYTHONPYCACHEPREFIX": str(Path(scratch, "bytecode"))}
        bare = compiled | {"PYTHONPYCACHEPREFIX": str(Path(scratch, "none"))}
        bare |= {"PYTHONDONTWRITEBYTECODE": "1"}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(1 + options.rounds):
            for name, command in commands.items():
                found = seconds(command, bare if name == BARE else compiled)
                if number:  # the first one reads the files from the disk
                    took[name].append(found)
    rows = {
        name: {
            "processor_seconds": round(median(cpu for cpu, _ in each), 3),
            "wall_seconds": round(median(wall for _, wall in each), 3),
        }
        for name, each in took.items()
    }
    for name, row in rows.items():
        print(
            f"{name:34}{row['processor_seconds']:8.2f} s{row['wall_seconds']:8.2f} s of wall time"
        )
    ours, help_ = rows["generate"]["processor_seconds"], rows["--help"]["processor_seconds"]
    passed = ours <= BOUND and help_ <= HELP_BOUND
    line = record(
        "start",
        what="from the shell to the first step of a tiny model with a real vocabulary",
        units={"seconds": "of a whole process, median of rounds; processor time of all threads"},
        rounds=options.rounds,
        rows=rows,
        of_mlx_lm=round(ours / rows["mlx_lm.generate"]["processor_seconds"], 3),
        bounds={"generate": BOUND, "--help": HELP_BOUND},
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


def ways(model: Path, twin: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    python = sys.executable
    generate = [python, "-m", "mlx_diffgemma", "generate"]
    one_step = ["--max-tokens", str(CANVAS), "--max-denoising-steps", "1", "--seed", "0"]
    asked = ["--model", str(model), "--prompt", "Hello", *one_step]
    tokenizer = str(model / "tokenizer.json")
    return {
        "an interpreter": [python, "-c", "pass"],
        "the tokenizers library": [python, "-c", LIBRARY, tokenizer],
        "import mlx_diffgemma": [python, "-c", "import mlx_diffgemma"],
        "load_tokenizer": [python, "-c", TOKENIZER, str(model)],
        "--help": [*generate, "--help"],
        "generate": [*generate, *asked],
        BARE: [*generate, *asked],
        "mlx_lm.generate": [
            *(python, "-m", "mlx_lm", "generate", "--model", str(twin)),
            *("--prompt", "Hello", "--max-tokens", "1"),
        ],
    }


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Processor and wall time of a process that must end well."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said[-500:]}")
    return used.ru_utime + used.ru_stime, wall


def write(tokenizer: Path, model: Path, twin: Path) -> None:
    """Write both checkpoints, in another process: this one must not hold a model while it times."""
    import mlx.core as mx
    from make_checkpoint import write_checkpoint
    from mlx.utils import tree_flatten
    from runtimes import Ours, read_arrays, read_config
    from twin import load_twin

    from mlx_diffgemma import bundled_model, load_tokenizer
    from mlx_diffgemma.doctor.published import config_26b

    config = config_26b()
    for key in ("vision_config", "boi_token_id", "image_token_id", "eoi_token_id"):
        del config[key]
    config["text_config"] |= TINY | {"vocab_size": len(load_tokenizer(tokenizer))}
    config["canvas_length"] = CANVAS
    write_checkpoint(model, layout="official", config=config)
    arrays = read_arrays(model, Ours.load(model).model)
    made = load_twin(read_config(model), arrays)
    twin.mkdir()
    weights = dict(tree_flatten(made.parameters()))
    mx.save_safetensors(str(twin / "model.safetensors"), weights, {"format": "mlx"})
    own: dict[str, Any] = {**vars(made.args), "eos_token_id": 1}
    (twin / "config.json").write_text(json.dumps(own))
    for folder in (model, twin):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder)
        shutil.copy(bundled_model() / "chat_template.jinja", folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(*map(Path, sys.argv[2:5]))
    else:
        main()
