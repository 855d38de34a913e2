"""Mutates headers and configs of tiny checkpoints, and converts what comes out.

usage: python -m tests.convert.fuzz [--cases 2000] [--seed 0]

Every case must end in a DiffGemmaError, or in a result that `verify` accepts, that loads, and whose
tensors are those of the source under our names. Anything else is a finding: another exception, a
run of more than ten seconds, a result that `verify` accepts and `load_model` refuses, a tensor that
changed. Exits 1 with the findings. Some hundred cases run with every test, in
test_convert_fuzz.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import signal
import struct
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mlx_diffgemma import DiffGemmaError, load_model
from mlx_diffgemma.convert import convert, origin
from mlx_diffgemma.convert.verify import verify
from tests.convert.cases import fp8_dynamic, load_all, nvfp4, official

SMALL: dict[str, Any] = {  # quick to load, and still packed in groups of 16 and 32
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
}
LIMIT_SECONDS = 10
# One is drawn per case.
REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {"quantize": True, "q_mode": "nvfp4"},
    {"quantize": True, "recipe": "uniform", "q_group_size": 32},
    {"quantize": True, "recipe": "uniform", "q_mode": "mxfp8", "dtype": "float16"},
    {"dequantize": True},
    {"dtype": "float32"},
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 31, 32, 33, 64, 128, 1.5, -0.0, 2**31, 2**32 + 1,
    2**40, 2**63, 10**30, float("nan"), float("inf"), "", "x", "affine", "nvfp4", "F8_E4M3", "32",
    [], {}, [1, 2], {"a": 1}, [[]], "diffusion_gemma",
)  # fmt: skip
DTYPES = ("BF16", "F16", "F32", "U8", "I8", "U32", "F8_E4M3", "F8_E5M2", "F64", "BOOL", "X", "")


@dataclass
class Tally:
    errors: Counter[str] = field(default_factory=Counter)
    results: int = 0
    findings: list[str] = field(default_factory=list)


class TooSlowError(Exception):
    pass


def bases(folder: Path) -> list[Path]:
    """One source in every layout, written once."""
    made = [
        official(folder / "official", **SMALL),
        official(folder / "shards", shards=2, per_layer=True, **SMALL),
        nvfp4(folder / "nvfp4", **SMALL)[0],
        fp8_dynamic(folder / "fp8", **SMALL)[0],
        folder / "affine",
        folder / "mxfp4",
    ]
    convert(made[0], made[4], quantize=True, recipe="uniform", q_group_size=32)
    convert(made[0], made[5], quantize=True, recipe="uniform", q_mode="mxfp4")
    return made


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value changed, removed, added, doubled or exchanged."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in pairs:
            places.append((node, key))
            if isinstance(child, (dict, list)):
                visit(child)

    visit(value)
    if not places:
        return rng.choice(VALUES)
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1:
        other, key2 = rng.choice(places)
        node[key] = copy.deepcopy(other[key2])
    elif kind == 2 and isinstance(node, dict):
        node[_garble(str(key), rng)] = node.pop(key)
    elif kind == 3 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += rng.choice((-1, 1, 2, 16, -16, node[key]))
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _garble(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            text[:place],
            text + "_",
            text.replace("0", "1"),
            text.replace("1", "0"),
            text.replace("weight", "scales"),
            text.replace("_proj", "_proj.weight"),
            text[:place] + rng.choice("é\0/.٣x\n") + text[place:],
        )
    )


def mutate_config(folder: Path, rng: random.Random) -> None:
    name = rng.choice(("config.json",) * 6 + ("generation_config.json", "index"))
    path = folder / ("model.safetensors.index.json" if name == "index" else name)
    if not path.exists():
        path = folder / "config.json"
    if rng.random() < 0.1:
        _mutate_bytes(path, rng, path.stat().st_size)
        return
    value = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = mutate_json(value, rng) if isinstance(value, (dict, list)) else value
    path.write_text(json.dumps(value))


def mutate_header(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    kind = rng.randrange(10)
    if kind == 0:
        _mutate_bytes(path, rng, 8 + length)
        return
    if kind == 1:
        path.write_bytes(raw[: rng.randrange(len(raw))])
        return
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    if kind == 2:
        header = mutate_json(header, rng)
    elif kind == 3:
        header[name]["dtype"] = rng.choice(DTYPES)
    elif kind == 4:
        header[_garble(name, rng)] = header.pop(name)
    elif kind == 5:
        header[name]["shape"] = _other_shape(header[name]["shape"], rng)
    elif kind == 6:  # a sound file without one tensor
        data = _without(header, data, name)
    elif kind == 7:  # a sound file with one tensor more
        shape = rng.choice(([], [0], [1], [0, 5], [3, 4], [2, 32, 32]))
        count = int(np.prod(shape, dtype=int))
        header[_garble(name, rng)] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [len(data), len(data) + 2 * count],
        }
        data += bytes(2 * count)
    elif kind == 8:  # two tensors change places
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    else:  # a type of the same width
        twin = {"BF16": "F16", "F16": "BF16", "U8": "F8_E4M3", "F8_E4M3": "U8", "U32": "F32"}
        header[name]["dtype"] = twin.get(header[name]["dtype"], "F32")
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _mutate_bytes(path: Path, rng: random.Random, end: int) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4))):
        raw[rng.randrange(end)] = rng.randrange(256)
    path.write_bytes(raw)


def _other_shape(shape: list[int], rng: random.Random) -> list[int]:
    choices = [shape[::-1], [*shape, 1], [1, *shape], shape[1:], [int(np.prod(shape))]]
    if len(shape) >= 2 and shape[0] % 2 == 0:
        choices.append([shape[0] // 2, shape[1] * 2, *shape[2:]])
    choices.append([-1 if rng.random() < 0.5 else 2**62, *shape[1:]])
    return rng.choice(choices)


def _without(header: dict[str, Any], data: bytes, name: str) -> bytes:
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        offsets = entry.get("data_offsets")
        if offsets and offsets[0] >= end:
            entry["data_offsets"] = [place - (end - begin) for place in offsets]
    return data[:begin] + data[end:]


def case(base: Path, scratch: Path, rng: random.Random, tally: Tally) -> None:
    """Mutates a copy, converts it, and looks at what comes out."""
    source, out = scratch / "source", scratch / "out"
    shutil.copytree(base, source)
    (source / "conversion.json").unlink(missing_ok=True)
    mutations = rng.choice(((mutate_config,), (mutate_header,), (mutate_config, mutate_header)))
    for mutate in mutations:
        mutate(source, rng)
    request = rng.choice(REQUESTS)
    what = f"{base.name}, {' and '.join(m.__name__ for m in mutations)}, {request}"
    started = time.perf_counter()
    try:
        convert(source, out, **request)
    except DiffGemmaError as error:
        tally.errors[type(error).__name__] += 1
        if not str(error) or "\n" in str(error):
            tally.findings.append(f"{what}: no line: {error!r}")
        if out.exists():
            tally.findings.append(f"{what}: an error and a result: {error!r}")
    else:
        _look_at(what, out, tally)
    if (seconds := time.perf_counter() - started) > LIMIT_SECONDS:
        tally.findings.append(f"{what}: took {seconds:.1f} s")


def _look_at(what: str, out: Path, tally: Tally) -> None:
    try:
        found = verify(out)
    except DiffGemmaError as error:
        # The record, names and sums come from the run itself: only the numbers may be impossible.
        if "not finite" in str(error):
            tally.errors["not finite"] += 1
        else:
            tally.findings.append(f"{what}: converted, but not verified: {error!r}")
        return
    try:
        load_model(out)
    except DiffGemmaError as error:
        tally.findings.append(f"{what}: verified, but not loaded: {error!r}")
    wrong = {part: e for part, e in found.errors.items() if not e < 0.2}
    exact = [p for p in ("norms and scalars", "vision") if found.errors.get(p, 0) > 0.005]
    if len(load_all(out)) != found.tensors or wrong or exact:
        tally.findings.append(f"{what}: a wrong result: {found.errors}")
    tally.results += 1


def run(cases: int, seed: int, scratch: Path, *, log: bool = False) -> Tally:
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = bases(scratch)
        before = signal.signal(signal.SIGALRM, _too_slow)
        try:
            for number in range(cases):
                place = scratch / "case"
                place.mkdir()
                signal.alarm(6 * LIMIT_SECONDS)
                try:
                    case(made[number % len(made)], place, random.Random(f"{seed} {number}"), tally)
                except Exception:
                    last = traceback.format_exc().strip().splitlines()
                    tally.findings.append(f"case {number}: " + "\n    ".join(last[-7:]))
                finally:
                    signal.alarm(0)
                    shutil.rmtree(place)
                if log and number % 100 == 99:
                    print(f"{number + 1}: {summary(tally)}", flush=True)
        finally:
            signal.signal(signal.SIGALRM, before)
    return tally


def _too_slow(*_: object) -> None:
    raise TooSlowError


def summary(tally: Tally) -> str:
    return (
        f"{tally.results} right results, {sum(tally.errors.values())} errors "
        f"{dict(tally.errors)}, {len(tally.findings)} findings"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        origin._cache = lambda: Path(scratch) / "cache"  # not the user's
        tally = run(options.cases, options.seed, Path(scratch), log=True)
    print(*tally.findings, summary(tally), sep="\n")
    if tally.findings:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
