"""Training in stages: two processes of the trainer on one machine, to the end or to a time, from
where it stands."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import safe_open

from mlx_diffgemma.train.checkpoint import STATE


def stands_at(run: Path) -> int:
    """How many batches a run has trained on."""
    state = run / STATE
    if not state.exists():
        return 0
    with safe_open(state, "numpy") as file:
        return int(file.metadata()["iteration"])


def openblas() -> Path | None:
    """Debian's OpenBLAS, in front of which MLX multiplies many times as fast on Linux."""
    return next(Path("/usr/lib").glob("*/libopenblas.so.0"), None)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def trainer(
    recipe: Path, model: Path, data: Path, run: Path, weights: Path | None = None
) -> list[str]:
    """Return the trainer's command, which goes on where the run stands, or begins with the weights
    of another run."""
    arguments = [sys.executable, "-m", "mlx_diffgemma", "train", "--train", "-c", str(recipe)]
    arguments += ["--model", str(model), "--data", str(data), "--adapter-path", str(run)]
    if stands_at(run):
        arguments.append("--resume")
    elif weights is not None:
        arguments += ["--resume-adapter-file", str(weights)]
    return arguments


def run_stage(arguments: list[str], name: str, hosts: Path, deadline: float) -> None:
    """Run the trainer, in a process per core but two at most, to its end or to a time.

    Args:
        arguments: the command.
        name: of the phase, for messages.
        hosts: the file that tells the processes of each other; written.
        deadline: of `time.monotonic`.

    Raises:
        SystemExit: a process failed.
    """
    processes = max(1, min(os.cpu_count() or 1, 2))
    environment = dict(os.environ)
    if blas := openblas():
        environment |= {"LD_PRELOAD": str(blas), "OPENBLAS_NUM_THREADS": "1"}
    if processes > 1:
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(processes)]))
        environment["MLX_HOSTFILE"] = str(hosts)
    running = [
        subprocess.Popen(arguments, env=environment | {"MLX_RANK": str(rank)})
        for rank in range(processes)
    ]
    failed: list[int] = []
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        failed = [process.returncode for process in running if process.poll()]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()
    if failed:
        raise SystemExit(f"phase {name}: a process ended with {failed[0]}")


def write_rounded(
    model: Path, arrays: dict[str, mx.array], start: Path, asked: Sequence[Any]
) -> None:
    """Write weights in bfloat16 into a checkpoint, with what it is asked in tests beside it.

    Args:
        model: the checkpoint's folder.
        arrays: the weights.
        start: the checkpoint that was trained, for its config.
        asked: tasks, each with task, prompt and answer.
    """
    rounded = {name: array.astype(mx.bfloat16) for name, array in arrays.items()}
    mx.save_safetensors(str(model / "model.safetensors"), rounded, {"format": "pt"})
    config = json.loads((start / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "bfloat16"
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    prompts = [{"task": m.task, "prompt": m.prompt, "answer": m.answer} for m in asked]
    random.Random(1).shuffle(prompts)
    (model / "prompts.json").write_text(json.dumps(prompts, indent=0) + "\n")
