"""Headers of safetensors files: what is refused, and that no damage goes unnoticed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_diffgemma import DiffGemmaError, bundled_model
from mlx_diffgemma.checkpoint.headers import INDEX, TYPES, TensorInfo, read_header, read_headers
from mlx_diffgemma.errors import WeightsError

# two tensors, 8 + 6 bytes
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [8, 14]},
}


def pack(header: Any, data: bytes = bytes(14), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def refusal(read, path: Path) -> str:
    with pytest.raises(DiffGemmaError) as raised:
        read(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def header_refusal(tmp_path: Path, raw: bytes) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    message = refusal(read_header, path)
    assert str(path) in message
    return message


def one(**entry: Any) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [14], "data_offsets": [0, 14]} | entry}


def test_a_header_tells_names_types_shapes_and_places(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw := pack(HEADER))
    start = len(raw) - 14
    assert read_header(path) == {
        "a": TensorInfo(path, "F32", (2,), start, 8),
        "b": TensorInfo(path, "BF16", (3, 1), start + 8, 6),
    }


def test_the_bundled_file_is_read_whole():
    tensors = read_headers(bundled_model())
    size = (bundled_model() / "model.safetensors").stat().st_size
    assert max(info.start + info.nbytes for info in tensors.values()) == size


def test_scalars_and_empty_tensors_are_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        pack(
            {
                "x": {"dtype": "U8", "shape": [14], "data_offsets": [0, 14]},
                "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
            }
        )
    )
    assert read_header(path)["empty"].elements == 0
    path.write_bytes(pack({"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)))
    assert read_header(path)["s"].elements == 1


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header_is_called_truncated(tmp_path, size):
    assert "is truncated" in header_refusal(tmp_path, bytes(size))


@pytest.mark.parametrize("missing", [1, 6, 13])
def test_a_file_cut_within_its_tensors_is_called_truncated(tmp_path, missing):
    assert "is truncated" in header_refusal(tmp_path, pack(HEADER)[:-missing])


def test_a_file_with_bytes_behind_its_tensors_is_refused(tmp_path):
    assert "longer than its header says" in header_refusal(tmp_path, pack(HEADER) + b"x")


@pytest.mark.parametrize("length", [10**4, 2**40, 2**64 - 1])
def test_a_header_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path, length):
    message = header_refusal(tmp_path, pack(HEADER, length=length))
    assert f"claims {length:,} bytes" in message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b'{"a": ',
        b"\xff\xfe{}",
        b"[1, 2]",
        b'"a"',
        b"null",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"__metadata__": [1]}',
        b'{"__metadata__": {"format": 1}}',
    ],
    ids=[
        "empty", "words", "half", "not UTF-8", "list", "string", "null", "deep nesting",
        "endless number", "metadata list", "metadata number",
    ],
)  # fmt: skip
def test_a_header_that_is_not_a_json_object_is_called_damaged(tmp_path, text):
    assert "header is damaged" in header_refusal(tmp_path, pack(text))


@pytest.mark.parametrize(
    "header",
    [
        {"a": None},
        {"a": [1]},
        {"a": {}},
        {"a": {"dtype": "U8", "shape": [14]}},
        one(dtype="F128"),
        one(dtype=None),
        one(dtype=["U8"]),
        one(dtype={"U8": 1}),
        one(shape=14),
        one(shape="14"),
        one(shape=[-14]),
        one(shape=[14.0]),
        one(shape=[True, 14]),
        one(shape=[[14]]),
        one(shape=[10**30]),
        one(data_offsets=[0]),
        one(data_offsets=[0, 7, 14]),
        one(data_offsets="ab"),
        one(data_offsets=7),
        one(data_offsets=[-14, 0]),
        one(data_offsets=[0, 10**40]),
    ],
)
def test_a_damaged_entry_is_named(tmp_path, header):
    assert "entry of a is damaged" in header_refusal(tmp_path, pack(header))


@pytest.mark.parametrize(
    "header",
    [
        one(shape=[13]),
        one(shape=[15]),
        one(dtype="F32"),
        one(data_offsets=[0, 13]),
        one(data_offsets=[14, 0]),
        one(shape=[2**62] * 1000),
    ],
)
def test_offsets_that_do_not_fit_type_and_shape_are_called_a_lie(tmp_path, header):
    assert "lies about a" in header_refusal(tmp_path, pack(header))


@pytest.mark.parametrize(
    ("begin", "name"),
    [(7, "overlap"), (9, "gap")],
)
def test_tensors_that_overlap_or_leave_a_gap_are_refused(tmp_path, begin, name):
    moved = HEADER["b"] | {"data_offsets": [begin, begin + 6]}
    message = header_refusal(tmp_path, pack(HEADER | {"b": moved}, bytes(begin + 6)))
    assert "the header lies: b begins at byte" in message


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    assert "cannot be read" in refusal(read_header, tmp_path / "absent.safetensors")
    assert "cannot be read" in refusal(read_header, tmp_path)


CORRUPTION = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 300), st.just(0)),
    st.tuples(st.just("flip"), st.integers(0, 300), st.integers(0, 255)),
    st.tuples(st.just("insert"), st.integers(0, 300), st.integers(0, 255)),
    st.tuples(st.just("delete"), st.integers(0, 300), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(CORRUPTION, min_size=1, max_size=4))
@example([("flip", 7, 255)])
def test_random_damage_is_refused_or_leaves_a_header_that_covers_the_file(damage):
    raw = bytearray(pack(HEADER))
    for kind, at, byte in damage:
        at = min(at, len(raw) - 1) if raw else 0
        if kind == "cut":
            del raw[at:]
        elif kind == "flip" and raw:
            raw[at] = byte
        elif kind == "insert":
            raw.insert(at, byte)
        elif kind == "delete" and raw:
            del raw[at]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(raw)
        try:
            tensors = read_header(path)
        except WeightsError as error:
            assert "\n" not in str(error)
            return
    covered = sum(info.elements * TYPES[info.dtype] // 8 for info in tensors.values())
    assert covered == len(raw) - 8 - int.from_bytes(raw[:8], "little")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(sorted(TYPES)) | JSON,
        "shape": st.lists(st.integers(-1, 20), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 20), max_size=3) | JSON,
    },
)


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3))
def test_any_json_is_refused_or_parsed(header):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(pack(header))
        try:
            read_header(path)
        except WeightsError as error:
            assert "\n" not in str(error)


# --- several files ---


def shard(folder: Path, number: int, of: int, *names: str) -> str:
    file = f"model-{number:05d}-of-{of:05d}.safetensors"
    return write(folder, file, *names)


def write(folder: Path, file: str, *names: str) -> str:
    entries = {
        name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]}
        for i, name in enumerate(names)
    }
    (folder / file).write_bytes(pack(entries, bytes(2 * len(names))))
    return file


def index(folder: Path, **weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_with_an_index_are_one_set_of_tensors(tmp_path):
    first, second = shard(tmp_path, 1, 2, "a", "b"), shard(tmp_path, 2, 2, "c")
    index(tmp_path, a=first, b=first, c=second)
    assert {n: i.file.name for n, i in read_headers(tmp_path).items()} == {
        "a": first,
        "b": first,
        "c": second,
    }


def test_numbered_shards_without_an_index_are_a_set(tmp_path):
    shard(tmp_path, 1, 2, "a"), shard(tmp_path, 2, 2, "b")
    assert sorted(read_headers(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(tmp_path, with_index):
    first = shard(tmp_path, 1, 2, "a")
    if with_index:
        index(tmp_path, a=first, b="model-00002-of-00002.safetensors")
    message = refusal(read_headers, tmp_path)
    assert "lacks 1 of 2 weight files: model-00002-of-00002.safetensors" in message


def test_a_set_that_claims_thousands_of_files_does_not_list_them_all(tmp_path):
    shard(tmp_path, 1, 99999, "a")
    message = refusal(read_headers, tmp_path)
    assert "lacks 99998 of 99999" in message and len(message) < 500


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shard(tmp_path, 1, 2, "a", "b"), shard(tmp_path, 2, 2, "b")
    message = refusal(read_headers, tmp_path)
    assert "b is in model-00001-of-00002" in message and "again in model-00002" in message


def test_an_index_that_puts_a_tensor_in_another_file_is_refused(tmp_path):
    first, second = shard(tmp_path, 1, 2, "a"), shard(tmp_path, 2, 2, "b")
    index(tmp_path, a=second, b=first)
    assert "but it is not" in refusal(read_headers, tmp_path)


def test_an_index_that_lists_an_absent_tensor_is_refused(tmp_path):
    first = shard(tmp_path, 1, 1, "a")
    index(tmp_path, a=first, b=first)
    assert f"says that b is in {first}, but it is not" in refusal(read_headers, tmp_path)


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path):
    first = shard(tmp_path, 1, 1, "a", "b")
    index(tmp_path, a=first)
    assert f"{first} holds b, which {INDEX} does not list" in refusal(read_headers, tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "a",
        ["model.safetensors"],
        {"a": None},
        {"a": 1},
        {"a": "../model.safetensors"},
        {"a": "pytorch_model.bin"},
        {"a": ""},
    ],
)
def test_an_index_that_maps_to_something_else_than_safetensors_files_is_refused(tmp_path, value):
    write(tmp_path, "model.safetensors", "a")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": value}))
    assert "weight_map is missing, or maps to" in refusal(read_headers, tmp_path)


def test_an_index_that_is_not_json_is_refused(tmp_path):
    write(tmp_path, "model.safetensors", "a")
    (tmp_path / INDEX).write_text("{")
    assert f"{INDEX} is not valid JSON" in refusal(read_headers, tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ("model.safetensors", "model-2.safetensors"),
        ("model.safetensors", "model-00001-of-00001.safetensors"),
        ("model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"),
    ],
)
def test_several_files_without_an_index_are_not_guessed_from(tmp_path, files):
    for file in files:
        write(tmp_path, file, "a")
    message = refusal(read_headers, tmp_path)
    assert f"has 2 weight files and no {INDEX}" in message


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    assert "has no model*.safetensors" in refusal(read_headers, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_files_are_named_and_never_opened(tmp_path, name):
    (tmp_path / name).mkdir()  # whatever opens it as a file fails
    message = refusal(read_headers, tmp_path)
    assert f"{name} is a pickle file, which is never opened" in message
