"""The recipe of the bundled model: its tasks, and its making on a very small scale."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml

from mlx_diffgemma import load_model

NAME = "model.decoder.layers.0.mlp.up_proj.weight"
RECIPES = Path(__file__).parent.parent / "recipes" / "bundled"
sys.path.insert(0, str(RECIPES))

import make  # noqa: E402
import phases  # noqa: E402
import pictures  # noqa: E402
import tasks  # noqa: E402


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_task_is_drawn_by_its_seed(task):
    some, more = tasks.make(task, 20, 5), tasks.make(task, 30, 5)
    assert some == more[:20] and some != tasks.make(task, 20, 6)
    assert len({made.prompt for made in some}) > 5


@pytest.mark.parametrize(("task", "size", "box"), [("sudoku4", 4, (2, 2)), ("sudoku6", 6, (2, 3))])
def test_a_sudoku_has_one_solution_and_it_is_the_answer(task, size, box):
    for made in tasks.make(task, 20, 0):
        given = made.prompt.partition("\n")[2].replace("\n", "")
        answer = [int(c) for c in made.answer.replace("\n", "")]
        grid = [0 if c == "." else int(c) for c in given]
        assert all(cell in (0, right) for cell, right in zip(grid, answer, strict=True))
        assert 0 in grid and tasks._solutions(grid, size, box, 2) == [answer]


def test_answers_are_right():
    def of(task: str) -> list[tuple[str, str]]:
        return [(made.prompt, made.answer) for made in tasks.make(task, 30, 0)]

    for prompt, answer in of("count"):
        first, last = (int(n) for n in prompt.removesuffix(".").split()[2::2])
        assert [int(n) for n in answer.split()] == list(range(first, last + 1))
    for prompt, answer in of("sort"):
        assert answer.split() == sorted(prompt.removeprefix("Sort: ").split())
    for prompt, answer in of("reverse"):
        assert answer == prompt.removeprefix("Reverse: ")[::-1]
    for prompt, answer in of("table"):
        first, last = (int(n) for n in prompt.removesuffix(".").split()[2::2])
        rows = answer.split("\n")[2:]
        assert rows == [f"|{n}|{n * n}|" for n in range(first, last + 1)]
    for prompt, answer in of("words"):
        shown = prompt.removeprefix("Fill: ")
        assert len(shown) == len(answer) and "_" in shown
        assert all(a in ("_", b) for a, b in zip(shown, answer, strict=True))
    for prompt, answer in of("code"):
        before, _, behind = prompt.removeprefix("Fill:\n").partition("_")
        assert answer.startswith(before) and answer.endswith(behind)
        found: dict[str, object] = {}
        exec(answer, found)
        name, function = next((n, f) for n, f in found.items() if callable(f))
        assert function(7, 3) == {"add": 10, "subtract": 4, "multiply": 21}[name]


@pytest.mark.parametrize("task", pictures.TASKS)
def test_a_picture_is_drawn_by_its_seed(task):
    made = [pictures.make(task, i, 5) for i in range(20)]
    assert len({seen.answer for seen in made}) > 10
    assert {seen.image.mode for seen in made} == {"RGB"}
    for i, seen in enumerate(made):
        assert seen.image.tobytes() == pictures.make(task, i, 5).image.tobytes()
        assert seen.image.tobytes() != pictures.make(task, i, 6).image.tobytes()


def test_a_picture_shows_what_its_answer_says():
    """Tiles have their colours, cells with a digit have ink, and spots of colours are counted."""
    for i in range(10):
        tiles = pictures.make("tiles", i, 0)
        for row, line in enumerate(tiles.answer.split("\n")):
            for column, letter in enumerate(line):
                assert colour_at(tiles.image, row, column) == letter, (i, row, column)
        shapes = pictures.make("shapes", i, 0)
        told = dict(each.split() for each in shapes.answer.split(", "))
        assert list(told) == ["red", "green", "blue", "yellow"]
        for colour, number in told.items():
            assert (int(number) > 0) is (colour[0] in colours_of(shapes.image)), (i, colour)


def colours_of(image) -> set[str]:
    """The first letters of the colours that some of a picture has."""
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    found = set()
    for name, colour in pictures.COLOURS.items():
        near = (np.abs(pixels - colour) <= 21).all(axis=1)
        if near.sum() > 40:
            found.add(name[0])
    return found


def colour_at(image, row: int, column: int) -> str:
    """The letter of a tile, from its middle; a dot for paper."""
    side = image.width
    x, y = (int(side * (0.03 + 0.235 * (place + 0.5))) for place in (column, row))
    pixel = np.asarray(image)[y, x].astype(int)
    near = [n for n, c in pictures.COLOURS.items() if (np.abs(pixel - c) <= 21).all()]
    return near[0][0] if near else "."


@pytest.mark.long  # several trainings
def test_it_is_made_in_phases_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A first phase of two batches, then of three, and three more, the last two with pictures; of
    those two the mean is what is written."""
    first, second, third, last = few = [
        replace(p, counts=dict.fromkeys(p.counts, 4), pictures=dict.fromkeys(p.pictures, 4))
        for p in (*make.PHASES[:2], make.PHASES[5], make.PHASES[-1])
    ]
    original = {phase.name: yaml.safe_load(phase.recipe.read_text()) for phase in few}
    monkeypatch.setattr(phases, "HERE", tmp_path)
    monkeypatch.setattr(make, "TEST_COUNT", 2)
    monkeypatch.setattr(make, "claim", lambda folder: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one process
    folder = tmp_path / "made"
    monkeypatch.setattr(sys, "argv", ["make.py", "--folder", str(folder)])

    def run(phase: make.Phase, iters: int, rate: float) -> None:
        changed = {"iters": iters, "lr_schedule": None, "learning_rate": rate}
        small = {"batch_size": 4, "val_batches": 1, "save_every": 1}
        phase.recipe.write_text(yaml.safe_dump(original[phase.name] | small | changed))
        monkeypatch.setattr(make, "PHASES", few[: few.index(phase) + 1])
        make.main()
        assert make.stands_at(folder / phase.name / "run") == iters

    def weights(phase: make.Phase) -> mx.array:
        return mx.load(str(folder / phase.name / "run" / "adapters.safetensors"))[NAME]

    run(first, 2, 1e-2)
    begun = weights(first)
    run(first, 3, 1e-2)
    assert not mx.array_equal(weights(first), begun)
    run(second, 2, 1e-9)  # which hardly moves, so that it is seen where it began
    assert mx.allclose(weights(second), weights(first), atol=1e-6)

    run(third, 2, 1e-9)
    rounded = weights(second).astype(mx.bfloat16).astype(mx.float32)
    assert mx.allclose(weights(third), rounded, atol=1e-6)

    assert load_model(folder / "model", vision=True).config.canvas_length == 64
    written = mx.load(str(folder / "model" / "model.safetensors"))[NAME]
    assert written.dtype == mx.bfloat16
    assert mx.array_equal(written, weights(third).astype(mx.bfloat16))
    asked = json.loads((folder / "model" / "prompts.json").read_text())
    assert len(asked) == 2 * len(tasks.TASKS)

    run(last, 2, 1e-2)
    assert not mx.allclose(weights(last), weights(third), atol=1e-6)
    written = mx.load(str(folder / "model" / "model.safetensors"))[NAME]
    assert mx.array_equal(written, ((weights(last) + weights(third)) / 2).astype(mx.bfloat16))


def test_what_is_held_out_is_not_trained_on(tmp_path):
    """Of examples by the test's own seed the first are the test's."""
    tasks_held, tasks_shown = ("sort", "sudoku4"), ("count", "words")
    counts = dict.fromkeys((*tasks_held, *tasks_shown), 10)
    make.write_data(make.Phase("first", make.TEST_SEED, counts), tmp_path / "data")
    trained = [json.loads(row)["prompt"] for row in (tmp_path / "data" / "train.jsonl").open()]
    assert trained == [m.prompt for name in tasks_shown for m in tasks.make(name, 10, 1)]
    assert {*tasks_held} <= {*make.HELD_OUT} and not {*tasks_shown} & {*make.HELD_OUT}


def test_a_folder_is_of_one_recipe(tmp_path, monkeypatch):
    make.claim(tmp_path / "made")
    make.claim(tmp_path / "made")
    (tmp_path / "other").mkdir()
    make.claim(tmp_path / "other")
    (tmp_path / "made" / "recipe.json").rename(tmp_path / "recipe.json")
    (tmp_path / "made" / "start").mkdir()
    with pytest.raises(
        SystemExit, match=r"made was not made by this recipe \(tasks.py, pictures.py"
    ):
        make.claim(tmp_path / "made")
    changed = (*make.PHASES[:-1], replace(make.PHASES[-1], seed=77))
    monkeypatch.setattr(make, "PHASES", changed)
    with pytest.raises(SystemExit, match=r"other was not made by this recipe \(phase eleventh\)"):
        make.claim(tmp_path / "other")


RANK = """
import json, os, pathlib, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["MLX_RANK"]
hosts = json.load(open(os.environ["MLX_HOSTFILE"]))
(folder / rank).write_text(str(len({host for [host] in hosts})))
while not all((folder / other).exists() for other in "01"):
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("then", "failed"),
    [
        ("", None),
        ("time.sleep(60)", None),  # until the deadline
        ("sys.exit(2) if rank == '1' else time.sleep(60)", "ended with 2"),
        ("os.kill(os.getpid(), 9) if rank == '0' else time.sleep(60)", "ended with -9"),
    ],
)
def test_a_stage_is_two_processes_to_a_time(then, failed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    script = [sys.executable, "-c", RANK + then, str(tmp_path)]
    monkeypatch.setattr(make, "command", lambda folder, phase: script)
    started = time.monotonic()
    with pytest.raises(SystemExit, match=failed) if failed else contextlib.nullcontext():
        make.train(tmp_path, make.PHASES[0], started + 5)
    assert time.monotonic() - started < 30
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]


def test_the_first_phase_tells_no_letters_of_missing_words(tmp_path):
    prompts = {}
    for short in (True, False):
        phase = make.Phase("first", 0, {"words": 30}, short_gaps=short)
        make.write_data(phase, tmp_path / phase.name / str(short))
        lines = (tmp_path / phase.name / str(short) / "train.jsonl").read_text().splitlines()
        prompts[short] = [json.loads(line)["prompt"] for line in lines]
    assert make.PHASES[0].short_gaps and not any(phase.short_gaps for phase in make.PHASES[1:])
    expected = [
        " ".join("_" if "_" in word else word for word in prompt.split(" "))
        for prompt in prompts[False]
    ]
    assert prompts[True] == expected != prompts[False]


def test_what_is_not_complete_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "PHASES", [make.Phase("first", 0, {"reverse": 16})])
    monkeypatch.setattr(sys, "argv", ["make.py", "--folder", str(tmp_path), "--minutes", "0"])
    with pytest.raises(SystemExit, match="phase first stands at 0 of 4,750 batches"):
        make.main()
