"""Contexts in a folder: found after a restart, never used if damaged or foreign, within the budget.
`make long` runs more of `tests.denoise.store_kills`."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_diffgemma import Store
from mlx_diffgemma.checkpoint.headers import read_header
from mlx_diffgemma.denoise import store_files
from mlx_diffgemma.denoise.store_files import ContextFiles, fingerprint
from mlx_diffgemma.denoise.store_format import are_finite, content_hash, header_of, parsed
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.model import Context, DiffusionGemma
from mlx_diffgemma.model.context import LayerContext
from tests.checkpoints import load_drawn
from tests.denoise import store_kills
from tests.denoise.conversations import answer
from tests.denoise.mixtures import model_of

MODEL = 2  # one sliding layer, two full ones
TEXT = np.random.default_rng(5).integers(6, 70, 400).astype(np.int32)
ROOT = Path(__file__).parents[2]


def disk(folder: Path, model: DiffusionGemma | None = None, *, budget: int = 1 << 30) -> Store:
    """A new store over a folder, with nothing in memory."""
    store = Store(1 << 30, every=64, folder=folder, folder_bytes=budget)
    store.serve(model or model_of(MODEL))
    return store


def read(tokens: np.ndarray) -> Context:
    context = model_of(MODEL).prefill(mx.array(tokens[None]))
    mx.eval(context.arrays)
    return context


def keep(folder: Path, *texts: np.ndarray, budget: int = 1 << 30) -> None:
    store = disk(folder, budget=budget)
    for text in texts:
        store.keep(text, read(text), model_of(MODEL).config.text)
        store.flush()


def found(folder: Path, tokens: np.ndarray, model: DiffusionGemma | None = None) -> int:
    """How many tokens of a text a new store finds in a folder."""
    return length_of(disk(folder, model), tokens)


def length_of(store: Store, tokens: np.ndarray) -> int:
    context = store.find(np.append(tokens, np.int32(2)), model_of(MODEL).config.text)
    return 0 if context is None else context.length


def files_of(folder: Path, kind: str = "") -> list[Path]:
    return sorted(folder.glob(f"{kind}*.safetensors"), key=lambda f: int(f.name.split("-")[3]))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.fixture
def kept(tmp_path) -> Path:
    """A folder with a text, and the same text 100 tokens longer."""
    keep(tmp_path, TEXT[:100], TEXT[:200])
    return tmp_path


# --- what is written is found


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_bit_comes_back(tmp_path, dtype):
    model = load_drawn(MODEL, sliding_window=16)
    model.set_dtype(dtype)
    drawn, rng = read(TEXT[:100]), np.random.default_rng(3)  # for its shapes

    def any_bits(array: mx.array) -> mx.array:
        unsigned = np.uint32 if dtype == mx.float32 else np.uint16
        bits = rng.integers(np.iinfo(unsigned).max, size=array.shape, dtype=unsigned, endpoint=True)
        some = mx.array(bits).view(dtype)
        finite = mx.isfinite(some.astype(mx.float32))
        return mx.where(finite, some, mx.array(-0.0, dtype))

    context = Context(
        tuple(LayerContext(any_bits(each.keys), any_bits(each.values)) for each in drawn.layers),
        *(100, 1),
    )
    store = disk(tmp_path, model)
    store.keep(TEXT[:100], context, model.config.text)
    store.flush()
    again = disk(tmp_path, model).find(TEXT[:101], model.config.text)
    assert again is not None and again.length == 100
    for mine, expected in zip(again.arrays, context.arrays, strict=True):
        assert mine.dtype == dtype and mine.shape == expected.shape
        kind = mx.uint32 if dtype == mx.float32 else mx.uint16
        assert mx.array_equal(mine.view(kind), expected.view(kind))


def test_parts_are_shared_and_join_to_the_whole(kept):
    keep(kept, np.append(TEXT[:100], TEXT[:60]), TEXT[:200], TEXT[:150])
    starts = sorted(tuple(map(int, f.name.split("-")[2:4])) for f in files_of(kept, "part"))
    assert starts == [(0, 100), (100, 150), (100, 160), (100, 200)]
    assert len(files_of(kept, "end")) == 4
    context = disk(kept).find(TEXT, model_of(MODEL).config.text)
    for mine, expected in zip(context.arrays, read(TEXT[:200]).arrays, strict=True):
        assert mine.shape == expected.shape
        assert np.allclose(mine, expected, atol=1e-5)


def test_files_are_those_of_safetensors(kept):
    for file in files_of(kept):
        theirs, metadata = load_file(file), parsed(file.read_bytes())[0]
        assert read_header(file).keys() == theirs.keys() == mx.load(str(file)).keys()
        assert theirs["tokens"].tolist() == TEXT[: len(theirs["tokens"])].tolist()
        assert metadata["format"] == "mlx_diffgemma context"


def test_the_longest_is_found_and_one_token_is_left(kept):
    assert [found(kept, TEXT[:n]) for n in (99, 100, 199, 200, 300)] == [0, 100, 100, 200, 200]
    assert disk(kept).find(TEXT[:100], model_of(MODEL).config.text) is None
    assert found(kept, TEXT[1:]) == 0


def test_what_memory_has_is_not_read_from_disk(kept, monkeypatch):
    store = disk(kept)
    assert length_of(store, TEXT[:200]) == 200
    monkeypatch.setattr(ContextFiles, "_read", None)
    assert length_of(store, TEXT[:200]) == 200  # it is in memory since
    assert store.nbytes == read(TEXT[:200]).nbytes


def test_a_context_larger_than_memory_is_found_on_disk(kept):
    store = Store(1, every=64, folder=kept)
    store.serve(model_of(MODEL))
    assert length_of(store, TEXT[:200]) == 200
    assert store.nbytes == 0


# --- damaged and foreign files


def refused(folder: Path, expected: int, tokens: np.ndarray = TEXT[:200]) -> list[str]:
    """What a new store says while it finds so many tokens."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert found(folder, tokens) == expected
    return [str(each.message) for each in said]


def damages(raw: bytes) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(len(raw))
    yield "empty", b""
    for length in (1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1):
        yield f"cut to {length}", raw[:length]
    yield "longer", raw + b"\0"
    yield "zeros", bytes(len(raw))
    for place in [*range(0, 160, 7), *rng.integers(160, len(raw), 40), len(raw) - 1]:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << rng.integers(8)
        yield f"byte {place}", bytes(flipped)


@pytest.mark.parametrize("kind", ["part", "end"])
def test_a_damaged_file_is_never_used_and_is_written_again(kept, kind):
    file = files_of(kept, kind)[-1]
    raw = file.read_bytes()
    for what, damaged in damages(raw):
        file.write_bytes(damaged)
        (said,) = refused(kept, 100)
        assert said == f"{file} is not used: it is damaged", what
    store = disk(kept)
    with pytest.warns(UserWarning, match="it is damaged"):
        assert length_of(store, TEXT[:200]) == 100
    store.keep(TEXT[:200], read(TEXT[:200]), model_of(MODEL).config.text)
    store.flush()
    assert refused(kept, 200) == [] and file.read_bytes() == raw


def test_without_a_first_part_nothing_is_found(kept):
    files_of(kept, "part")[0].unlink()
    assert refused(kept, 0) == []


def forged(file: Path, *, named: str | None = None, **changes) -> None:
    """Replace a file by one with other arrays or metadata, under the name that it must have, or
    that of another model."""
    raw = file.read_bytes()
    metadata, arrays = parsed(raw)
    for name, value in changes.items():
        if name in metadata:
            metadata[name] = value
        else:
            arrays |= value
    data = b"".join(bits.tobytes() for _, bits in arrays.values())
    content = header_of(metadata, arrays) + data
    words = file.name.removesuffix(".safetensors").split("-")
    words[-1] = content_hash(content)
    if named is not None:
        words[1] = named
    file.unlink()
    (file.parent / f"{'-'.join(words)}.safetensors").write_bytes(content)


OTHER = "its arrays have other names, types or shapes than the model's"
FORGERIES = {
    "version": ({"version": "1"}, "it is of another model or version"),
    "model": ({"model": "0" * 16}, "it is of another model or version"),
    "text": ({"arrays": {"tokens": ("I32", np.roll(TEXT[:200], 1))}}, "it is of another text"),
    "a shorter text": ({"arrays": {"tokens": ("I32", TEXT[:100])}}, "it is of another text"),
    "type": ({"arrays": {"0.keys": ("F16", np.zeros((1, 1, 15, 4), np.uint16))}}, OTHER),
    "shape": ({"arrays": {"0.keys": ("F32", np.zeros((1, 1, 4, 15), np.uint32))}}, OTHER),
    "a layer too many": ({"arrays": {"9.keys": ("F32", np.zeros((1, 1, 1, 1), np.uint32))}}, OTHER),
    "not finite": (
        {"arrays": {"0.keys": ("F32", np.full((1, 1, 15, 4), 0x7F800000, np.uint32))}},
        "it holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize(("changes", "why"), FORGERIES.values(), ids=FORGERIES)
def test_a_foreign_file_under_a_right_name_is_never_used(kept, changes, why):
    forged(files_of(kept, "end")[-1])
    assert refused(kept, 200) == []  # nothing is changed
    forged(files_of(kept, "end")[-1], **changes)
    (said,) = refused(kept, 100)
    assert said.endswith(f"is not used: {why}")


@pytest.mark.parametrize("raw", [b"", b"\1", b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_safetensors_file_is_never_used(kept, raw):
    file = files_of(kept, "end")[-1]
    words = file.name.removesuffix(".safetensors").split("-")
    file.unlink()
    name = "-".join([*words[:-1], content_hash(raw)])
    (kept / f"{name}.safetensors").write_bytes(raw)
    (said,) = refused(kept, 100)
    assert "it is no safetensors file of contexts" in said


def test_another_models_files_are_passed_by(kept):
    model = load_drawn(MODEL, sliding_window=16)
    assert found(kept, TEXT[:200], model) == 200  # the same weights
    model.model.decoder.layers[0].layer_scalar = mx.array([1.5])  # one number of one adapter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(kept, TEXT[:200], model) == 0
        assert found(kept, TEXT[:200], load_drawn(5, sliding_window=16)) == 0
    other = fingerprint(model)
    for file in files_of(kept, "end"):
        forged(file, named=other)
    for file in files_of(kept, "part"):
        forged(file, named=other)
    with pytest.warns(UserWarning, match="it is of another model or version"):
        assert found(kept, TEXT[:200], model) == 0


def test_a_models_fingerprint_sees_config_types_and_large_weights():
    model = load_drawn(MODEL, sliding_window=16)
    prints = {fingerprint(model), fingerprint(load_drawn(MODEL, sliding_window=8))}
    assert fingerprint(model) == fingerprint(load_drawn(MODEL, sliding_window=16))
    embedding = model.model.decoder.embed_tokens
    embedding.weight = mx.tile(embedding.weight, (40, 60))
    assert embedding.weight.size > store_files._HASHED_WHOLE
    prints.add(fingerprint(model))
    embedding.weight = embedding.weight * 1.01
    prints.add(fingerprint(model))
    model.set_dtype(mx.bfloat16)
    prints.add(fingerprint(model))
    assert len(prints) == 5


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    text, context = TEXT[:60], read(TEXT[:60])
    for value in (np.nan, np.inf, -np.inf):
        bad = LayerContext(context.layers[0].keys.at[0, 0, 3].add(value), context.layers[0].values)
        store = disk(tmp_path)
        store.keep(text, Context((bad, *context.layers[1:]), 60, 1), model_of(MODEL).config.text)
        store.flush()
    assert files_of(tmp_path, "end") == files_of(tmp_path, "part") == []
    for type_, largest in (("F32", 0x7F7FFFFF), ("F16", 0xFBFF), ("BF16", 0x7F7F)):
        kind = np.uint32 if type_ == "F32" else np.uint16
        assert are_finite({"x": (type_, np.array([0, largest], kind))})
        assert not are_finite({"x": (type_, np.array([0, largest + 1], kind))})


# --- the budget


def test_the_folder_stays_within_its_budget_and_the_oldest_goes_first(tmp_path):
    texts = [np.roll(TEXT, 50 * i)[:50] for i in range(4)]
    keep(tmp_path, *texts[:3])
    budget = size(tmp_path) + 10
    store = disk(tmp_path, budget=budget)
    assert length_of(store, texts[0]) == 50  # used
    store.keep(texts[3], read(texts[3]), model_of(MODEL).config.text)
    store.flush()
    assert [found(tmp_path, text) for text in texts] == [50, 0, 50, 50]
    assert size(tmp_path) <= budget


def test_a_conversation_loses_earlier_ends_before_parts(tmp_path):
    keep(tmp_path / "all", TEXT[:100], TEXT[:200], TEXT[:210])
    earlier = sum(file.stat().st_size for file in files_of(tmp_path / "all", "end")[:2])
    budget = size(tmp_path / "all") - earlier
    keep(tmp_path / "a", TEXT[:100], TEXT[:200], TEXT[:210], budget=budget)
    assert found(tmp_path / "a", TEXT[:210]) == 210 and size(tmp_path / "a") == budget
    keep(tmp_path / "b", TEXT[:100], TEXT[:200], TEXT[:210], budget=budget - 1)
    assert found(tmp_path / "b", TEXT[:210]) == 200


def test_parts_that_a_new_file_needs_stay(tmp_path):
    keep(tmp_path, TEXT[:100])
    mine = files_of(tmp_path)
    keep(tmp_path, TEXT[200:300])
    for file in set(files_of(tmp_path)) - set(mine):
        os.utime(file, (2e9, 2e9))  # used by another process later than the parts
    keep(tmp_path, TEXT[:110], budget=size(tmp_path) - 1)
    assert found(tmp_path, TEXT[:110]) == 110 and found(tmp_path, TEXT[200:300]) == 0


def test_a_text_that_does_not_fit_is_not_written_and_removes_nothing(tmp_path):
    keep(tmp_path, TEXT[:60])
    budget = size(tmp_path)
    before = files_of(tmp_path)
    keep(tmp_path, TEXT[100:250], budget=budget)
    keep(tmp_path, TEXT[:200], budget=budget)  # the part that it needs may not go
    assert files_of(tmp_path) == before and size(tmp_path) == budget


def test_many_texts_never_take_more_than_the_budget(tmp_path):
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most.append(store_kills.bytes_in(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    store = disk(tmp_path, budget=60_000)
    for i in range(40):
        text = np.roll(TEXT, 37 * i)[: 50 + 3 * i]
        store.keep(text, read(text), model_of(MODEL).config.text)
    store.flush()
    stop.set()
    watcher.join()
    assert 45_000 < max(most) <= 60_000
    assert found(tmp_path, text) == len(text)


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_counted(tmp_path):
    keep(tmp_path, TEXT[:60])
    budget = 2 * size(tmp_path)
    left = tmp_path / f".context-{budget}-{'0' * 16}.tmp"
    left.write_bytes(b"x")
    keep(tmp_path, TEXT[100:150], budget=budget)
    assert left.exists() and found(tmp_path, TEXT[100:150]) == 0  # it is too young
    os.utime(left, (1, 1))
    foreign = tmp_path / "notes.txt"
    foreign.write_bytes(b"not ours")
    keep(tmp_path, TEXT[100:150], budget=budget)
    assert not left.exists() and found(tmp_path, TEXT[100:150]) == 50
    with left.open("xb") as stream:
        store_files.fcntl.flock(stream, store_files.fcntl.LOCK_EX)
        keep(tmp_path, TEXT[200:240], budget=budget)
    assert left.exists() and found(tmp_path, TEXT[200:240]) == 0
    assert foreign.exists()


# --- trouble with the disk


def test_a_file_that_vanishes_while_it_is_read_is_a_miss(kept, monkeypatch):
    real = Path.read_bytes

    def vanishing(path: Path) -> bytes:
        if path.name.startswith("end") and "-200-" in path.name:
            path.unlink()
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", vanishing)
    assert refused(kept, 100) == []


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_full_disk_is_one_warning_and_the_store_goes_on(tmp_path, monkeypatch, function):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.warns(UserWarning) as said:
        keep(tmp_path, TEXT[:50], TEXT[:100])
    assert [str(each.message) for each in said] == [
        f"contexts cannot be written to {tmp_path}: No space left on device"
    ]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    keep(tmp_path, TEXT[:50])
    assert found(tmp_path, TEXT[:50]) == 50


def test_a_folder_that_is_removed_is_one_warning(tmp_path):
    store = disk(tmp_path / "contexts")
    (tmp_path / "contexts").rmdir()
    with pytest.warns(UserWarning, match="No such file or directory"):
        store.keep(TEXT[:50], read(TEXT[:50]), model_of(MODEL).config.text)
        store.flush()
    assert length_of(store, TEXT[:50]) == 50  # from memory


def test_what_a_slow_disk_cannot_follow_is_left_out(tmp_path, monkeypatch):
    keep(tmp_path, TEXT[:10])
    monkeypatch.setattr(store_files, "_MOST_WAITING", size(tmp_path))
    keep(tmp_path, TEXT[:300], TEXT[:12])
    assert found(tmp_path, TEXT[:300]) == 12


def test_texts_that_wait_to_be_written_are_written_once(tmp_path, monkeypatch):
    store, go = disk(tmp_path), threading.Event()
    real = ContextFiles._write

    writes = []

    def late(*arguments):
        assert go.wait(30)
        writes.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(ContextFiles, "_write", late)
    for text in (TEXT[:50], TEXT[:50], TEXT[:100], TEXT[:50]):
        store.keep(text, read(text), model_of(MODEL).config.text)
    go.set()
    store.flush()
    assert len(files_of(tmp_path)) == len(writes) == 4
    assert found(tmp_path, TEXT[:100]) == 100


@pytest.mark.parametrize(
    ("folder", "why"),
    [("file", "is a file; contexts are kept in a folder"), ("file/x", "Not a directory")],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, folder, why):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=why):
        Store(1, folder=tmp_path / folder)


def test_a_folder_is_made_and_its_limit_is_checked(tmp_path):
    Store(1, folder=tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(ConfigError, match=r"^folder_bytes of a store must be at least 1, got 0$"):
        Store(1, folder=tmp_path, folder_bytes=0)
    with pytest.raises(ConfigError, match="has no effect without a folder"):
        Store(1, folder_bytes=1)


def test_a_file_system_without_locks_works_too(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(store_files.fcntl, "flock", flock)
    left = tmp_path / f".context-100-{'0' * 16}.tmp"
    left.touch()
    keep(tmp_path, TEXT[:50])
    assert left.exists() and found(tmp_path, TEXT[:50]) == 50
    os.utime(left, (1, 1))
    keep(tmp_path, TEXT[:60])
    assert not left.exists() and found(tmp_path, TEXT[:60]) == 60


def test_what_is_no_file_is_passed_by(kept):
    file = files_of(kept, "end")[-1]
    file.unlink()
    file.mkdir()
    assert refused(kept, 100) == []


# --- restarts, kills, and several processes


def test_a_new_process_finds_contexts_and_writes_the_same(tmp_path):
    program = (
        "import json, sys, numpy as np\n"
        "from mlx_diffgemma import Store\n"
        "from tests.denoise.conversations import answer\n"
        "from tests.denoise.mixtures import model_of\n"
        "text = np.array(json.loads(sys.argv[2]), np.int32)\n"
        "store = Store(1 << 30, every=64, folder=sys.argv[1])\n"
        "print(answer(model_of(-1), text, 7, store)[0])\n"  # and ends, without a flush
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path, json.dumps(TEXT.tolist())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[400, 0]\n"
    counts, canvases = answer(model_of(-1), TEXT, 7, disk(tmp_path, model_of(-1)))
    assert counts == [400, 399]
    plain = answer(model_of(-1), TEXT, 7, None)[1]
    assert [c.tolist() for c in canvases] == [c.tolist() for c in plain]
    edited = TEXT.copy()
    edited[-22] += 1
    assert answer(model_of(-1), edited, 7, disk(tmp_path, model_of(-1)))[0] == [400, 320]


def test_no_damaged_context_is_used_after_kills(tmp_path):
    tally = store_kills.kills(6, 0, tmp_path)
    assert tally.wrong == [] and tally.kills == 6


def test_two_processes_on_one_folder_give_no_wrong_answer(tmp_path):
    tally = store_kills.together(2, 12, 0, tmp_path)
    assert tally.wrong == [] and tally.found > 0
