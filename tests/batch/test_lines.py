"""Lines of an input: what is a JSON object, and what one line says of another."""

from __future__ import annotations

import hashlib

import pytest

from mlx_diffgemma.batch.lines import Line, extent_of, lines_of
from mlx_diffgemma.errors import DataError


def test_empty_lines_count_in_numbers_only(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes('\ufeff{"a": 1}\r\n\n  \n{"b": "é"}\n{}'.encode())
    found = list(lines_of(file))
    assert [line.number for line in found] == [1, 4, 5]
    assert [line.object() for line in found] == [{"a": 1}, {"b": "é"}, {}]
    assert extent_of(file).lines == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "line 7 is not JSON"),
        (b"\xff{}", "line 7 is not JSON"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[1]", "line 7 is no JSON object"),
        (b'{"a":' * 100_000, "line 7 is nested too deep"),
        (b"{} {}", "line 7 is not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named(content, expected):
    with pytest.raises(DataError) as raised:
        Line(7, content).object()
    assert expected in str(raised.value)


def test_a_digest_is_of_the_whole_file_or_of_its_beginning(tmp_path):
    file = tmp_path / "in.jsonl"
    content = b'{"a": 1}\n' * 300_000  # several pieces
    file.write_bytes(content)
    whole = extent_of(file)
    assert (whole.nbytes, whole.lines) == (len(content), 300_000)
    assert whole.sha256 == hashlib.sha256(content).hexdigest()
    assert extent_of(file, 10).sha256 == hashlib.sha256(content[:10]).hexdigest()
    file.write_bytes(content + b"{}\n")
    assert whole.begins(file)
    file.write_bytes(b"{" + content)
    assert not whole.begins(file)
    file.write_bytes(content[:-1])
    assert not whole.begins(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for read in (extent_of, lambda file: list(lines_of(file))):
        with pytest.raises(DataError, match=r"none\.jsonl cannot be read: No such file"):
            read(tmp_path / "none.jsonl")
