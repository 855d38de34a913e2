"""The file of answers: whole lines only, one run at a time, and only for the same input."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest

from mlx_diffgemma.batch import answers
from mlx_diffgemma.batch.answers import AnswerFile
from mlx_diffgemma.batch.lines import extent_of
from mlx_diffgemma.errors import DataError

WITH = {"model": "bundled", "seed": 0}


@pytest.fixture
def source(tmp_path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(f'{{"n": {n}}}\n' for n in range(6)))
    return file


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


def opened(path: Path, source: Path, made_with=WITH) -> AnswerFile:
    return AnswerFile.open(path, source, extent_of(source), made_with)


def note(path: Path) -> Path:
    return path.with_name(path.name + ".unfinished")


def begun(path: Path, source: Path, count: int) -> None:
    file = opened(path, source)
    for n in range(count):
        file.write({"n": n})
    file.close()


def test_a_whole_file_holds_its_lines_and_leaves_nothing_beside(path, source):
    file = opened(path, source)
    assert note(path).exists() and file.done == 0
    for n in range(6):
        file.write({"n": n, "text": "é\n\ud800"})
        assert len(path.read_bytes().splitlines()) == n + 1 == file.done
    file.finish()
    file.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"n": n, "text": "é\n?"} for n in range(6)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("half", [b"", b'{"n": 3', b'{"n": 3}', '{"é'.encode()[:-1]])
def test_an_unfinished_file_goes_on_behind_its_last_whole_line(path, source, half):
    begun(path, source, 3)
    with path.open("ab") as file:
        file.write(half)
    again = opened(path, source)
    assert again.done == 3
    again.write({"n": 3})
    again.close()
    assert [json.loads(line)["n"] for line in path.read_bytes().splitlines()] == [0, 1, 2, 3]


def test_a_half_line_longer_than_a_piece_is_cut(path, source, monkeypatch):
    monkeypatch.setattr(answers, "_PIECE", 4)
    begun(path, source, 3)
    with path.open("ab") as file:
        file.write(b"x" * 11)
    assert opened(path, source).done == 3
    assert path.read_bytes() == b'{"n": 0}\n{"n": 1}\n{"n": 2}\n'


def refused(path, source, made_with=WITH) -> str:
    with pytest.raises(DataError) as raised:
        opened(path, source, made_with)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_finished_or_foreign_file_is_never_touched(path, source):
    path.write_text("mine\n")
    assert "is there already, and no run of it is unfinished" in refused(path, source)
    assert path.read_text() == "mine\n" and not note(path).exists()
    assert "both input and output" in refused(source, source)


def test_another_input_is_refused_but_a_longer_one_is_not(path, source):
    begun(path, source, 2)
    with source.open("a") as file:
        file.write('{"n": 6}\n')
    begun(path, source, 0)
    assert opened(path, source).done == 2
    source.write_text('{"m": 1}\n' * 9)
    assert "is not the input that" in refused(path, source)
    assert len(path.read_bytes().splitlines()) == 2


def test_other_settings_are_refused_by_name(path, source):
    begun(path, source, 2)
    assert "with seed 0, now it is 1" in refused(path, source, WITH | {"seed": 1})
    assert "with policy None, now it is 'fast'" in refused(path, source, WITH | {"policy": "fast"})
    assert opened(path, source, {"seed": 0, "model": "bundled"}).done == 2


def test_errors_of_an_earlier_run_count(path, source):
    file = opened(path, source)
    for answer in (
        {"error": "x"},
        {"error": None, "response": {"status_code": 400}},
        {"error": {"code": 1}, "response": None},
        {"error": None, "response": {"status_code": 200}},
        {"text": "x"},
    ):
        file.write(answer)
    file.close()
    again = opened(path, source)
    assert (again.done, again.failed) == (5, 3)
    again.write({"text": "last"})
    assert path.read_bytes().endswith(b'{"text": "last"}\n')


def test_two_runs_do_not_write_one_file(path, source):
    first = opened(path, source)
    assert "another run is writing" in refused(path, source)
    first.close()
    opened(path, source).close()


def test_a_damaged_note_or_too_many_answers_are_refused(path, source):
    begun(path, source, 2)
    with path.open("a") as file:
        file.write("{}\n" * 9)
    assert "has 11 answers to 6 lines" in refused(path, source)
    note(path).write_text("{")
    assert "is damaged" in refused(path, source)


def test_a_folder_that_is_not_there_is_named(tmp_path, source):
    assert "cannot be written: No such file" in refused(tmp_path / "no" / "out.jsonl", source)


def _write_on(path: str, source: str, total: int) -> None:
    """Go on with a file until it is whole, slowly."""
    file = opened(Path(path), Path(source))
    for n in range(file.done, total):
        file.write({"n": n, "text": "x" * (n % 7000)})
        time.sleep(0.0005)
    file.finish()


def test_killed_at_any_moment_it_goes_on_without_half_or_doubled_lines(tmp_path):
    """`python -m tests.batch.kills` does so with the program."""
    source, path, total = tmp_path / "in.jsonl", tmp_path / "out.jsonl", 3000
    source.write_text("{}\n" * total)
    processes, rng = multiprocessing.get_context("fork"), random.Random(3)
    kills = 0
    while kills < 12:
        process = processes.Process(target=_write_on, args=(str(path), str(source), total))
        process.start()
        process.join(rng.uniform(0.005, 0.08))
        process.kill()
        process.join()
        kills += 1
    begun_with = len(path.read_bytes().splitlines()) if path.exists() else 0
    assert 0 < begun_with < total, "the kills fell outside of the work"
    _write_on(str(path), str(source), total)
    assert [json.loads(line)["n"] for line in path.read_bytes().splitlines()] == [*range(total)]
    assert not note(path).exists()
