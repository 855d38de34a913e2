"""From how many denoise steps per canvas on would the autoregressive twin be faster?

The twin is Gemma 4 in mlx-lm: the same layers, widths, experts, heads and vocabulary, on the same
made-up weights (less the self-conditioning block, which it has no use for), with a cache of keys
and values, one greedy token at a time, by mlx-lm's own loop. Behind the same 1,024 tokens: its time
for 256 tokens, against ours for one self-conditioned step over a canvas of 256 with its sampler.
Their quotient is the number of steps at which both are equally fast; where another canvas follows,
ours also pays for a commit, which the second figure takes off.

No bound: this tells where the border lies, not on which side of it one should be. Floors: the
twin's weights per token at the bandwidth of a matrix-vector product measured here, a step's
multiplications at the rate of a large product.

The quotient is one of this backend. Here a row of a large product costs a small part of a lone
row's; on an Apple GPU, decode is bound by memory bandwidth and a step by arithmetic, five times
over on M1 to M4, so there the border lies elsewhere.

Checked: the twin has as many weights as ours, and its tokens are the likeliest of one pass over all
of them; ours has exactly its steps.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0 python bench/twin.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from common import RESULTS, finish, record
from mlx.utils import tree_flatten
from runtimes import (
    SETTLING_STEPS,
    Arrays,
    Ours,
    checkpoint,
    compute_dtype,
    read_arrays,
    read_config,
    text_tokens,
)
from step import dtype_name, floor_ms, peak_rates, step_work

PUBLISHED_STEPS = (12, 21)  # per canvas of the real model, as published by others
ALIKE = 0.95  # of the twin's tokens; where two are about equally likely, either may win


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--canvas", type=int, default=256, help="and tokens that the twin writes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed in a round")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    context, canvas = options.context, options.canvas
    print("no bound; ceilings first")
    rates, bandwidth = peak_rates(), matrix_vector_bandwidth()
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(Path(scratch) / "model", "scaled", "dense", canvas=canvas)
        config, dtype = read_config(folder), compute_dtype(folder)
        ours = Ours.load(folder)
        arrays, ids = read_arrays(folder, ours.model), text_tokens(folder, context)
    element_bytes = 4 if dtype == mx.float32 else 2
    step_floor = floor_ms(step_work(config, "dense", context, element_bytes), rates)
    token_bytes = bytes_per_token(config, context, element_bytes)
    token_floor = 1e3 * token_bytes / bandwidth
    print(
        f"a step over {canvas}: floor {step_floor:,.1f} ms at {rates['flops'] / 1e9:,.0f} GFLOP/s; "
        f"a token of the twin: {token_bytes / 1e6:,.0f} MB, floor {token_floor:,.2f} ms at "
        f"{bandwidth / 1e9:,.1f} GB/s",
        flush=True,
    )
    twin = load_twin(config, arrays)
    alike = likeliest(twin, ids, decode(twin, ids, canvas)[1])
    print(f"the twin's tokens: {alike:.1%} are those of one pass", flush=True)
    if alike < ALIKE:
        raise SystemExit("the twin's loop and one pass over its tokens disagree")
    ours.run(ids, 2)

    decodes, steps, commits = [], [], []
    for i in range(options.rounds):
        decodes.append(decode(twin, ids, canvas)[0])
        steps += timed_steps(ours, ids, options.steps)
        commits.append(commit(ours, ids, canvas))
        print(
            f"round {i + 1}: {canvas} tokens {decodes[-1]:.2f} s, "
            f"a step {1e3 * median(steps[-options.steps :]):,.0f} ms, "
            f"a commit {1e3 * commits[-1]:,.0f} ms",
            flush=True,
        )
    found = {
        "twin": {
            "seconds": round(median(decodes), 4),
            "seconds_min": round(min(decodes), 4),
            "ms_per_token": round(1e3 * median(decodes) / canvas, 3),
            "tokens_per_second": round(canvas / median(decodes), 2),
            "floor_ms_per_token": round(token_floor, 3),
        },
        "ours": {
            "step_ms": round(1e3 * median(steps), 2),
            "step_ms_min": round(1e3 * min(steps), 2),
            "commit_ms": round(1e3 * median(commits), 2),
            "floor_step_ms": round(step_floor, 2),
        },
    }
    border = median(decodes) / median(steps)
    with_commit = (median(decodes) - median(commits)) / median(steps)
    measured = measured_steps()
    print_table(found, border, with_commit, measured, canvas)
    line = record(
        "twin",
        what="denoise steps per canvas at which ours and its autoregressive twin are equally fast",
        shape={
            "layers": config["text_config"]["num_hidden_layers"],
            "hidden": config["text_config"]["hidden_size"],
            "vocabulary": config["text_config"]["vocab_size"],
            "context": context,
            "canvas": canvas,
            "batch": 1,
        },
        dtype=dtype_name(dtype),
        units={
            "seconds": f"{canvas} tokens of the twin, prefill not counted",
            "step_ms, commit_ms": "milliseconds",
            "break_even_steps": "seconds of the twin / seconds of a step",
            "break_even_steps_with_commit": "the same, a commit taken off first",
        },
        ceiling={**rates, "matrix_vector_bytes_per_second": round(bandwidth)},
        rounds=options.rounds,
        steps=options.steps,
        tokens_alike=round(alike, 4),
        runtimes=found,
        break_even_steps=round(border, 2),
        break_even_steps_with_commit=round(with_commit, 2),
        steps_per_canvas_measured=measured,
        steps_per_canvas_published_by_others=PUBLISHED_STEPS,
        passed=None,
    )
    finish(line, save=options.save)


def load_twin(config: dict[str, Any], arrays: Arrays) -> Any:
    """mlx-lm's Gemma 4 with experts, on the decoder's arrays."""
    from mlx_lm.models.gemma4_text import Model, ModelArgs

    text = config["text_config"]
    twin = Model(
        ModelArgs.from_dict(
            text
            | {
                "model_type": "gemma4_text",
                "enable_moe_block": True,
                "attention_k_eq_v": True,  # in full layers, as in the 26B model
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 0,
                "use_double_wide_mlp": False,
            }
        )
    )
    kept = {
        name.replace("model.decoder.", "model."): array
        for name, array in arrays.tensors.items()
        if name.startswith("model.decoder.") and ".self_conditioning." not in name
    }
    named = {
        name.removesuffix(".weight") if ".experts." in name else name: array
        for name, array in kept.items()
    }
    twin.load_weights(list(twin.sanitize(named).items()), strict=True)
    twin.eval()
    mx.eval(twin.parameters())
    weights = sum(array.size for _, array in tree_flatten(twin.parameters()))
    assert weights == sum(array.size for array in kept.values())
    return twin


def decode(twin: Any, ids: list[int], count: int) -> tuple[float, list[int]]:
    """Seconds for `count` tokens behind the first, which is the prefill's; and all of them."""
    from mlx_lm.generate import generate_step

    tokens, started = [], 0.0
    for token, _ in generate_step(mx.array(ids), twin, max_tokens=count + 1):
        tokens.append(int(token))
        if len(tokens) == 1:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    assert len(tokens) == count + 1
    return seconds, tokens


def likeliest(twin: Any, ids: list[int], tokens: list[int]) -> float:
    """Share of tokens that are the argmax of one causal pass over everything before them."""
    logits = twin(mx.array([ids + tokens[:-1]]))[0, len(ids) - 1 :]
    return float((mx.argmax(logits, axis=-1) == mx.array(tokens)).mean().item())


def timed_steps(ours: Ours, ids: list[int], count: int) -> list[float]:
    """Seconds of each self-conditioned step, behind the prefill and the first steps."""
    run = ours.run(ids, SETTLING_STEPS + 1 + count)
    assert run.steps == SETTLING_STEPS + 1 + count and len(run.step_seconds) == count
    return run.step_seconds


def commit(ours: Ours, ids: list[int], canvas: int) -> float:
    """Seconds to read a finished canvas behind the context."""
    context = ours.model.prefill(mx.array([ids], dtype=mx.int32))
    tokens = mx.array([(ids * canvas)[:canvas]], dtype=mx.int32)
    mx.eval(context.arrays, tokens)
    started = time.perf_counter()
    mx.eval(ours.model.commit(tokens, context).arrays)
    return time.perf_counter() - started


def bytes_per_token(config: dict[str, Any], context: int, element_bytes: int) -> float:
    """What the twin must read for one token: weights it uses, and keys and values."""
    one = config | {"canvas_length": 1}
    unused = ("self-conditioning", "soft embedding", "sampler")
    parts = step_work(one, "dense", context, element_bytes)
    return sum(part.nbytes for part in parts if part.name not in unused)


def matrix_vector_bandwidth() -> float:
    """Bytes per second of a product of a large matrix with a vector here."""
    matrix, vector = mx.random.normal((32768, 2048)), mx.random.normal((1, 2048))
    mx.eval(matrix, vector)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        mx.eval(vector @ matrix.T)
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds[1:])


def measured_steps() -> dict[str, float] | None:
    """Steps per canvas of the bundled model by policy and runtime, where bench/answer.py has
    measured them."""
    path = RESULTS / "answer.jsonl"
    if not path.is_file():
        return None
    *_, last = path.read_text(encoding="utf-8").splitlines()
    pooled = json.loads(last)["groups"]["pooled"]
    return {name: row["steps_per_canvas"] for name, row in pooled.items()}


def print_table(
    found: dict[str, dict[str, Any]],
    border: float,
    with_commit: float,
    measured: dict[str, float] | None,
    canvas: int,
) -> None:
    twin, ours = found["twin"], found["ours"]
    low, high = PUBLISHED_STEPS
    steps = "not measured" if measured is None else measured
    for name, value in (
        (f"twin, {canvas} tokens", f"{twin['seconds']:.2f} s, {twin['ms_per_token']:.2f} ms each"),
        ("ours, a step", f"{ours['step_ms']:,.1f} ms"),
        ("ours, a commit", f"{ours['commit_ms']:,.1f} ms"),
        ("equally fast at", f"{border:.2f} steps per canvas"),
        ("with a commit", f"{with_commit:.2f} steps per canvas"),
        ("measured, bundled model", f"{steps} steps per canvas"),
        ("real model, by others", f"{low} to {high} steps per canvas"),
    ):
        print(f"{name:26}{value}")


if __name__ == "__main__":
    main()
