"""What does the server cost, and what do several clients gain?

Prompts of the bundled model, asked by 1, 2, 4 and 8 clients at a time over HTTP: requests per
second, time to the first settled text of a stream, time per denoise step. Beside it the same
requests through an `Engine` in this process, one at a time: the difference of one client's time,
per step, is the overhead of HTTP. mlx_vlm.server answers the same prompts with the same weights.
The servers take turns, round by round; a ratio is the median of the rounds' ratios.

Bounds: one client's overhead per step at most 5% of a step of the scaled shape (bench/rows.py);
8 clients at least 1.4 times the answers per second of one; at least 1.3 times mlx_vlm.server's.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 OPENBLAS_NUM_THREADS=1 \\
        python bench/serve.py [--rounds 5] [--requests 32] [--save]
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from common import finish, record

CLIENTS = (1, 2, 4, 8)
PATIENCE = 300.0  # seconds for a server to load
PORTS = {"ours": 8941, "mlx_vlm": 8942}


def prompts(count: int) -> list[str]:
    """Prompts of the bundled model's tasks, in turn."""
    from mlx_diffgemma import bundled_model

    known = json.loads((bundled_model() / "prompts.json").read_text())
    tasks: dict[str, list[str]] = {}
    for each in known:
        tasks.setdefault(each["task"], []).append(each["prompt"])
    turns = (prompt for row in zip(*tasks.values(), strict=False) for prompt in row)
    return list(islice(cycle(list(turns)), count))


@contextmanager
def server(name: str, model: str) -> Iterator[int]:
    """Run a server of its own process; yield its port once it answers."""
    port = PORTS[name]
    options = ["--model", model, "--port", str(port)]
    module = "mlx_diffgemma.serve" if name == "ours" else "mlx_vlm.server"
    quiet = ["--quiet"] if name == "ours" else []
    process = subprocess.Popen(
        [sys.executable, "-m", module, *options, *quiet],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + PATIENCE
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{module} does not start")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    with suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def ask(port: int, model: str, prompt: str, *, stream: bool) -> dict[str, float]:
    """Ask once; return seconds, seconds to the first text of a stream, and steps where told."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "seed": 1,
        "max_tokens": 128,
        "stream": stream,
    }
    start, first = time.perf_counter(), 0.0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {answer.read()[:300]!r}")
    if not stream:
        whole = json.loads(answer.read())
        usage = whole["usage"]
        steps = usage.get("diffusion", {}).get("steps", 0)
        tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "first": 0.0, "steps": steps, "tokens": tokens}
    for line in answer:
        if line.startswith(b"data: {") and not first:
            choices = json.loads(line[6:]).get("choices")
            if choices and (choices[0].get("delta") or {}).get("content"):
                first = time.perf_counter() - start
    return {"seconds": time.perf_counter() - start, "first": first, "steps": 0, "tokens": 0}


def measure(
    port: int, model: str, asked: list[str], clients: int, *, stream: bool
) -> dict[str, float]:
    """Ask all prompts by so many clients at a time."""
    waiting, results, lock = list(asked), [], threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                prompt = waiting.pop()
            found = ask(port, model, prompt, stream=stream)
            with lock:
                results.append(found)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    steps = sum(each["steps"] for each in results)
    return {
        "requests_per_second": len(results) / seconds,
        "first_ms": 1e3 * median(each["first"] for each in results),
        "step_ms": 1e3 * seconds / steps if steps else 0.0,
        "mean_ms": 1e3 * sum(each["seconds"] for each in results) / len(results),
        "steps": steps,
        "mean_tokens": sum(each["tokens"] for each in results) / len(results),
    }


def measure_engine(folder: Path, asked: list[str]) -> dict[str, float]:
    """Ask an engine in this process, one request at a time."""
    from mlx_diffgemma import Engine, GenerationSettings, Request, load
    from mlx_diffgemma.write.chat import chat_store

    settings = GenerationSettings(seed=1, max_new_tokens=128)
    with Engine(*load(folder), store=chat_store()) as engine:
        for prompt in asked[:4]:
            list(engine.submit(Request(prompt, settings)))
        start, steps = time.perf_counter(), 0
        for prompt in asked:
            steps += list(engine.submit(Request(prompt, settings)))[-1].steps
        seconds = time.perf_counter() - start
    return {"mean_ms": 1e3 * seconds / len(asked), "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--only-ours", action="store_true", help="without mlx_vlm.server")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = float32_copy(Path(temporary) / "bundled32")
        run(options, folder)


def float32_copy(folder: Path) -> Path:
    """Write the bundled model with float32 weights: mlx-vlm needs them on the CPU."""
    import mlx.core as mx

    from mlx_diffgemma import bundled_model

    shutil.copytree(bundled_model(), folder)
    file = folder / "model.safetensors"
    arrays = {name: array.astype(mx.float32) for name, array in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), arrays, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure, and print the record."""
    asked = prompts(options.requests)
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        row: dict[str, Any] = {"engine": measure_engine(folder, asked)}
        for name in ("ours",) if options.only_ours else ("ours", "mlx_vlm"):
            with server(name, str(folder)) as port:
                model = folder.name if name == "ours" else str(folder)
                for prompt in asked[:4]:
                    ask(port, model, prompt, stream=False)
                for clients in CLIENTS:
                    found = measure(port, model, asked, clients, stream=False)
                    told = measure(port, model, asked, clients, stream=True)
                    row[f"{name} {clients}"] = {**found, "first_ms": told["first_ms"]}
        rounds.append(row)
        print(f"round {number + 1}: {json.dumps(row)}", file=sys.stderr)

    def ratio(one: str, other: str, what: str) -> float:
        return round(median(row[one][what] / row[other][what] for row in rounds), 3)

    over = [row["ours 1"]["mean_ms"] - row["engine"]["mean_ms"] for row in rounds]
    steps = rounds[0]["ours 1"]["steps"] / len(asked)
    facts: dict[str, Any] = {
        "rounds": len(rounds),
        "requests": len(asked),
        "overhead_ms_per_request": round(median(over), 2),
        "overhead_ms_per_step": round(median(over) / max(steps, 1), 3),
        "eight_clients_over_one": ratio("ours 8", "ours 1", "requests_per_second"),
        "cases": {
            name: {
                key: round(median(row[name][key] for row in rounds), 2) for key in rounds[0][name]
            }
            for name in rounds[0]
        },
    }
    if not options.only_ours:
        facts["ours_over_mlx_vlm_at_8"] = ratio("ours 8", "mlx_vlm 8", "requests_per_second")
    finish(record("serve", **facts), save=options.save)


if __name__ == "__main__":
    main()
