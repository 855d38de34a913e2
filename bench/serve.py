"""What does the server cost, and what do several clients gain?

Prompts of the bundled model, asked by 1, 2, 4 and 8 clients at a time over HTTP: requests per
second, time to the first settled text of a stream, time per denoise step. Beside it the same
requests through an `Engine` in this process, one at a time: the difference of one client's time,
per step, is the overhead of HTTP. mlx_vlm.server answers the same prompts with the same weights;
both read the same tokens and write the same number at most, which is checked.
Both servers run for the whole benchmark and take turns, with each number of clients; a ratio is the
median of the rounds' ratios. Ratios and overhead are of the processor time of all of a server's
threads, so that other work on the machine counts less; the seconds of the clock stand beside it.
Linux only: processor time of another process is read from /proc.

Bounds: one client's overhead per step at most 5% of a step of the scaled shape (bench/rows.py),
canvas 64, measured here too; 8 clients at least 1.4 times the answers per second of one; at least
1.3 times mlx_vlm.server's.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 OPENBLAS_NUM_THREADS=1 \\
        python bench/serve.py [--rounds 5] [--requests 32] [--save]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from common import finish, record

CLIENTS = (1, 2, 4, 8)
PATIENCE = 300.0  # seconds for a server to load
PORTS = {"ours": 8941, "mlx_vlm": 8942}
BOUNDS = {"overhead": 0.05, "eight over one": 1.4, "over mlx_vlm": 1.3}
STEPS = 12  # of the scaled shape


def prompts(count: int) -> list[str]:
    """Prompts of the bundled model's tasks, in turn."""
    from mlx_diffgemma import bundled_model

    known = json.loads((bundled_model() / "prompts.json").read_text())
    tasks: dict[str, list[str]] = {}
    for each in known:
        tasks.setdefault(each["task"], []).append(each["prompt"])
    turns = (prompt for row in zip(*tasks.values(), strict=False) for prompt in row)
    return list(islice(cycle(list(turns)), count))


@dataclass(frozen=True)
class Served:
    """A server, and what it calls the model."""

    port: int
    pid: int
    model: str

    @property
    def processor_seconds(self) -> float:
        """Of all its threads, so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(name: str, model: str) -> Iterator[Served]:
    """Run a server of its own process; yield it once it answers."""
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
        yield Served(port, process.pid, Path(model).name if name == "ours" else model)
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    with suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def ask(served: Served, prompt: str, *, stream: bool) -> dict[str, float]:
    """Ask once; return seconds, seconds to the first text of a stream, and what a whole answer
    tells of tokens and steps."""
    body = {
        "model": served.model,
        "messages": [{"role": "user", "content": prompt}],
        "seed": 1,
        "max_tokens": 128,
        "stream": stream,
    }
    start, first = time.perf_counter(), 0.0
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
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
        read = usage.get("prompt_tokens", usage.get("input_tokens", 0))
        seconds = time.perf_counter() - start
        told = {"steps": steps, "tokens": tokens, "read": read}
        return {"seconds": seconds, "first": 0.0, **told}
    for line in answer:
        if line.startswith(b"data: {") and not first:
            choices = json.loads(line[6:]).get("choices")
            if choices and (choices[0].get("delta") or {}).get("content"):
                first = time.perf_counter() - start
    return {"seconds": time.perf_counter() - start, "first": first}


def measure(served: Served, asked: list[str], clients: int, *, stream: bool) -> dict[str, float]:
    """Ask all prompts by so many clients at a time."""
    waiting, results, lock = list(asked), [], threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                prompt = waiting.pop()
            found = ask(served, prompt, stream=stream)
            with lock:
                results.append(found)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start, used = time.perf_counter(), served.processor_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, used = time.perf_counter() - start, served.processor_seconds - used
    if stream:
        return {"first_ms": 1e3 * median(each["first"] for each in results)}
    steps = sum(each["steps"] for each in results)
    return {
        "requests_per_second": len(results) / seconds,
        "requests_per_processor_second": len(results) / used,
        "processor_ms": 1e3 * used / len(results),
        "mean_ms": 1e3 * sum(each["seconds"] for each in results) / len(results),
        "steps": steps,
        "processor_ms_per_step": 1e3 * used / steps if steps else 0.0,
        "mean_tokens": sum(each["tokens"] for each in results) / len(results),
        "read_tokens": sum(each["read"] for each in results),
    }


def measure_engine(engine: Any, asked: list[str]) -> dict[str, float]:
    """Ask an engine in this process, one request at a time."""
    from mlx_diffgemma import GenerationSettings, Request

    settings = GenerationSettings(seed=1, max_new_tokens=128)
    start, used, steps = time.perf_counter(), time.process_time(), 0
    for prompt in asked:
        steps += list(engine.submit(Request(prompt, settings)))[-1].steps
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return {
        "mean_ms": 1e3 * seconds / len(asked),
        "processor_ms": 1e3 * used / len(asked),
        "steps": steps,
    }


def measure_scaled(model: Any) -> float:
    """Return the processor milliseconds of a step of the scaled shape."""
    import mlx.core as mx

    from mlx_diffgemma import GenerationSettings, denoise_tokens

    def seconds(steps: int) -> float:
        # Made-up weights settle nowhere: the steps are as many as allowed.
        settings = GenerationSettings(
            seed=1, max_new_tokens=64, max_denoising_steps=steps, confidence_threshold=0
        )
        start = time.process_time()
        events = list(denoise_tokens(model, mx.array([[5] * 64]), settings))
        assert events[-1].steps == steps, events[-1]
        return time.process_time() - start

    return 1e3 * (seconds(STEPS + 2) - seconds(2)) / STEPS


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
    from runtimes import checkpoint

    from mlx_diffgemma import Engine, load, load_model
    from mlx_diffgemma.write.chat import chat_store

    asked = prompts(options.requests)
    names = ("ours",) if options.only_ours else ("ours", "mlx_vlm")
    scaled = load_model(checkpoint(folder.parent / "scaled", "scaled", "dense", canvas=64))
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(*load(folder), store=chat_store()))
        servers = {name: stack.enter_context(server(name, str(folder))) for name in names}
        for served in servers.values():
            for clients in CLIENTS:
                measure(served, asked[:8], clients, stream=False)  # warm
        measure_engine(engine, asked)
        for number in range(options.rounds):
            row: dict[str, Any] = {"engine": measure_engine(engine, asked)}
            row["scaled_step_ms"] = measure_scaled(scaled)
            for clients in CLIENTS:
                for name, served in servers.items():
                    row[f"{name} {clients}"] = measure(served, asked, clients, stream=False)
                    row[f"{name} {clients}"] |= measure(served, asked, clients, stream=True)
            rounds.append(row)
            print(f"round {number + 1}: {json.dumps(row)}", file=sys.stderr, flush=True)
    read = {row[f"{name} {n}"]["read_tokens"] for row in rounds for name in names for n in CLIENTS}
    assert len(read) == 1, f"the servers read different prompts: {read} tokens"
    finish(record("serve", **facts_of(rounds, len(asked), names)), save=options.save)


def facts_of(rounds: list[dict[str, Any]], count: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what the rounds say."""

    def ratio(one: str, other: str, what: str) -> float:
        return round(median(row[one][what] / row[other][what] for row in rounds), 3)

    per_step = [
        (row["ours 1"]["processor_ms"] - row["engine"]["processor_ms"])
        / (row["ours 1"]["steps"] / count)
        for row in rounds
    ]
    shares = [each / row["scaled_step_ms"] for each, row in zip(per_step, rounds, strict=True)]
    what = "requests_per_processor_second"
    facts: dict[str, Any] = {
        "rounds": len(rounds),
        "requests": count,
        "overhead_ms_per_step": round(median(per_step), 3),
        "scaled_step_ms": round(median(row["scaled_step_ms"] for row in rounds), 2),
        "overhead": round(median(shares), 4),
        "eight over one": ratio("ours 8", "ours 1", what),
        "eight over one by the clock": ratio("ours 8", "ours 1", "requests_per_second"),
    }
    if "mlx_vlm" in names:
        facts["over mlx_vlm"] = ratio("ours 8", "mlx_vlm 8", what)
        facts["over mlx_vlm by the clock"] = ratio("ours 8", "mlx_vlm 8", "requests_per_second")
    cases = [name for name in rounds[0] if name != "scaled_step_ms"]
    facts["cases"] = {
        name: {key: round(median(row[name][key] for row in rounds), 2) for key in rounds[0][name]}
        for name in cases
    }
    facts["bounds"] = BOUNDS
    facts["passed"] = {
        name: facts[name] <= bound if name == "overhead" else facts[name] >= bound
        for name, bound in BOUNDS.items()
        if name in facts
    }
    return facts


if __name__ == "__main__":
    main()
