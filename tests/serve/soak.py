"""Many clients for a while: all routes, streams, disconnects, slow readers, malformed requests. No
answer may be wrong, lost or another client's, and no memory, thread or file may be left.

    python -m tests.serve.soak [--minutes 20] [--clients 20]

It takes a tenth longer, since what is kept of a bounded number is filled first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma import Store
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve.state import _COMPILERS, _ENCODERS, State
from tests.engine.cases import eventually, is_idle
from tests.malloc import malloc_state
from tests.serve.cases import (
    Answered,
    Running,
    ask,
    chat,
    connected,
    get,
    post,
    read,
    serving,
)

STORE_BYTES = 4 << 20  # kept contexts fill it in the first tenth
LENGTHS = 80  # of prompts: more than the traces that `compiled_per_shape` keeps
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EDIT, APPLY = "/v1/edit/completions", "/v1/apply/completions"
PROMPTS = (
    "Sort: 6 3 1 7",
    "Count from 38 to 63.",
    "Reverse: kaa",
    "Fill: Monday _______ Wednesday",
)
MARKED = "a = 1\n<|code_to_edit|>\nb = 2\n<|/code_to_edit|>\n"
UPDATE = (
    "<|original_code|>\na = 1\n<|/original_code|>\n<|update_snippet|>\na = 2\n<|/update_snippet|>"
)
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
SCHEMA |= {"additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
BROKEN = (b"{", b"[]", b'{"messages": 3}', b'{"messages": [], "n": -1}', b"\xff" * 20)
WAYS = ("whole",) * 4 + ("stream",) * 4 + ("gone",) * 3 + ("slow", "broken", "lying", "status")
MOST_SECONDS = 600.0  # of an answer, on a machine that others use too
MOST_WORKERS = _ENCODERS + _COMPILERS  # threads beside the event loop
MOST_GROWTH = 0.02  # of the memory after the first tenth
TENTHS = 10
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_ARRAY_BYTES = 1 << 16


def requests() -> list[tuple[str, dict[str, Any]]]:
    """Requests whose answers are fixed by their seeds."""
    made: list[tuple[str, dict[str, Any]]] = []
    for number, prompt in enumerate(PROMPTS):
        messages = [{"role": "user", "content": prompt}]
        made.append((CHAT, chat(messages, seed=number, max_tokens=100)))
        made.append((CHAT, chat(messages, seed=number, max_tokens=5, n=2)))
    made.append((CHAT, chat(seed=1, response_format=FORM, max_tokens=24)))
    made.append((CHAT, chat(seed=1, constraint={"choices": ["yes", "no"]})))
    gap = {"prompt": "def add(a, b):\n    return a ", "suffix": " b", "max_tokens": 2, "seed": 3}
    made.append((COMPLETIONS, gap))
    made.append(
        ("/infill", {"input_prefix": "a ", "input_suffix": " b", "n_predict": 1, "seed": 1})
    )
    for path, told in ((EDIT, MARKED), (APPLY, UPDATE)):
        made.append((path, chat([{"role": "user", "content": told}], seed=2, max_tokens=8)))
    return made


def texts_of(path: str, answer: Answered, is_stream: bool) -> Any:
    """The texts of an answer, by index."""
    if path == "/infill":
        return answer.json["content"]
    found: dict[int, str] = {}
    if not is_stream:
        for choice in answer.json["choices"]:
            text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
            found[choice["index"]] = text
        return found
    events = answer.events
    assert events[-1] == "[DONE]", events[-1]
    for event in events[:-1]:
        for choice in event["choices"]:
            piece = choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "")
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return found


@dataclass
class Found:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, outcome: str, wrong: str = "") -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if wrong:
                self.wrong.append(wrong)


def one(running: Running, draw: random.Random, expected: list[Any], found: Found) -> None:
    """Make one request in one of the ways, and check what comes."""
    way, number = draw.choice(WAYS), draw.randrange(len(expected))
    path, body = requests()[number]
    is_stream = way in ("stream", "slow") and path != "/infill"
    request = post(path, {**body, "stream": True} if is_stream else body)
    if way == "status":
        answer = get(running, draw.choice(["/health", "/metrics", "/v1/models"]))
        found.say("status", "" if answer.status == 200 else f"{answer}")
    elif way == "broken":
        answer = ask(running, post(path, draw.choice(BROKEN)), MOST_SECONDS)
        found.say("broken", "" if answer.status == 400 else f"{answer}")
    elif way == "lying":
        with connected(running, MOST_SECONDS) as connection:
            connection.sendall(request[: draw.randrange(len(request))])
        found.say("lying")
    elif way == "gone":
        with connected(running, MOST_SECONDS) as connection:
            connection.sendall(request)
            time.sleep(draw.random() / 5)
        found.say("gone")
    else:
        with connected(running, MOST_SECONDS) as connection:
            connection.sendall(request)
            if way == "slow":
                time.sleep(draw.random())
            answer = read(connection)
        if answer.status == 429:
            found.say("queue full", "" if "retry-after" in answer.headers else f"{answer}")
            return
        try:
            right = answer.status == 200 and texts_of(path, answer, is_stream) == expected[number]
        except (AssertionError, ValueError, KeyError) as error:
            found.say(way, f"{path} {body}: {error!r} in {answer}")
            return
        found.say(way, "" if right else f"{path} {body}: {answer}")


def state_of_process() -> dict[str, int]:
    """What may not grow. Freed memory that MLX keeps for the next arrays (3 to 17 MB, as the last
    steps had it) and malloc for its threads is given back first, and told apart, as is what malloc
    has given out; threads that work beside the event loop come and go, and may be so many."""
    held = _resident_kb()
    gc.collect()
    mx.clear_cache()
    ctypes.CDLL(None).malloc_trim(0)
    malloc = malloc_state()
    names = [thread.name for thread in threading.enumerate()]
    workers = sum(name.startswith("AnyIO") for name in names)
    return {
        "kB": _resident_kb(),
        "kB with freed": held,
        "kB of arrays": mx.get_active_memory() // 1024,
        "kB of malloc in use": malloc.in_use // 1024,
        "kB of malloc free": malloc.fordblks // 1024,
        "threads": len(names) - workers,
        "workers": workers,
        "files": len(os.listdir("/proc/self/fd")),
    }


def _resident_kb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def ask_for(
    seconds: float, port: int, seeds: Sequence[int], expected: list[Any]
) -> tuple[Counter[str], list[str]]:
    """Let a client per seed ask the server on a port for a while."""
    found, running = Found(), Running(port, State())
    end = time.monotonic() + seconds

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            try:
                one(running, draw, expected, found)
            except (OSError, IndexError) as error:
                found.say("connection", repr(error))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found.outcomes, found.wrong


def run(minutes: float, clients: int, number: int = 0) -> tuple[Found, list[dict[str, int]]]:
    """Let clients, in a process of their own, ask for a while; return what came, and the server's
    process after each tenth."""
    # Arrays get pages of their own, which go back once they are freed. In malloc's arenas, as by
    # default, 40 MB of free pieces lay between what was in use, and resident memory went up and
    # down by 4%.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _ARRAY_BYTES)
    found, states = Found(), []
    limits = Limits(max_connections=4 * clients)
    store = Store(STORE_BYTES)
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as others,
        serving(limits=limits, max_queue=2 * clients, store=store) as running,
    ):
        expected = [texts_of(p, ask(running, post(p, b)), False) for p, b in requests()]
        for length in range(1, LENGTHS + 1):  # so that what is kept of a bounded number is full
            ask(running, post(COMPLETIONS, {"prompt": "7" * length, "max_tokens": 1, "seed": 1}))
        # A tenth more comes first and does not count: its batches fill the bounded caches.
        for tenth in range(-1, TENTHS):
            seeds = [clients * ((TENTHS + 1) * number + tenth + 1) + i for i in range(clients)]
            seconds = 60 * minutes / TENTHS
            outcomes, wrong = others.submit(
                ask_for, seconds, running.port, seeds, expected
            ).result()
            found.outcomes += outcomes
            found.wrong += wrong
            if not eventually(lambda: is_idle(running.engine)):
                found.say("end", "the engine is not idle")
            time.sleep(0.5)
            running.lines.clear()  # what the test itself has kept of the log
            state = state_of_process()
            print(json.dumps(state), flush=True)
            if tenth >= 0:
                states.append(state)
        if running.bugs:
            found.say("bugs", repr(running.bugs))
    return found, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found, states = run(options.minutes, options.clients, options.seed)
    first, last = states[0], states[-1]
    print(f"{sum(found.outcomes.values())} requests: {dict(found.outcomes)}")
    growth = last["kB"] / first["kB"] - 1
    print(f"memory {growth:+.1%}; {len(found.wrong)} wrong answers")
    for wrong in found.wrong[:10]:
        print(wrong[:1000])
    left = last["threads"] > first["threads"] or last["files"] > first["files"] + 2
    left |= last["workers"] > MOST_WORKERS
    sys.exit(bool(found.wrong) or left or growth > MOST_GROWTH)


if __name__ == "__main__":
    main()
