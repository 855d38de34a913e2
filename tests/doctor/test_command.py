"""mlx_diffgemma.doctor as a person or a script meets it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from mlx_diffgemma import bundled_model
from mlx_diffgemma.cli.doctor import doctor
from mlx_diffgemma.cli.render_doctor import DoctorView
from mlx_diffgemma.doctor import answers, checks
from mlx_diffgemma.doctor import run as running
from mlx_diffgemma.doctor.outcome import Check
from mlx_diffgemma.doctor.report import from_object
from mlx_diffgemma.doctor.speed import Shape
from tests.cli.test_cli import assert_one_line, invoke
from tests.doctor.test_answers import OWN
from tests.doctor.test_report import whole_report
from tests.doctor.test_speed import BY_HAND

ROOT = Path(__file__).parents[2]
MODEL = str(bundled_model())


def check(name: str, difference: float) -> Check:
    return Check(
        name, "products", 1e-3, "products of the wrong row", f"{name} weights", lambda: difference
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Two checks that pass, and times that were measured before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "all_checks", lambda: [check("4-bit", 0), check("8-bit", 1e-4)])
    shape = Shape(10, 256, 1024, "float32", 11_000_000, None)
    monkeypatch.setattr(running, "time_parts", lambda *_: iter([shape, *BY_HAND]))
    monkeypatch.setattr(answers, "PROMPTS", OWN)


def test_everything_is_examined_and_nothing_is_left_behind(tmp_path):
    result = invoke(doctor, "--model", MODEL, "--json", "found.json")
    assert result.exit_code == 0, result.output
    report = from_object(json.loads((tmp_path / "found.json").read_text()))
    assert report.is_complete and report.is_all_right and report.seconds > 0
    assert [c.name for c in report.checks] == ["4-bit", "8-bit"]
    assert len(report.speed.timings) == 9 and len(report.answers.answers) == 6
    titles = ("Machine", "Checks", "Speed", "Answers", "To paste into a public report")
    places = [result.stdout.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert "products  2 of 2 passed" in result.stdout and "4-bit:" not in result.stdout
    assert "self-conditioning                  1     1.00" in result.stdout
    assert "autoregressive twin          100" in result.stdout
    progress = result.stderr.splitlines()
    assert "2 of 2: products, 8-bit: right" in progress
    assert "head of a token: 3.00 ms" in progress and len(progress) > 15
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_json_alone_is_on_stdout(tmp_path):
    result = invoke(doctor, "--only", "checks", "--json", "-")
    assert result.exit_code == 0, result.output
    report = from_object(json.loads(result.stdout))
    assert len(report.checks) == 2 and report.speed is None
    assert "products  2 of 2 passed" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_is_named_with_what_not_to_use(monkeypatch, tmp_path):
    wrong = [check("4-bit", 0.5), check("8-bit", 0.0), check("mxfp4", float("nan"))]
    monkeypatch.setattr(checks, "all_checks", lambda: wrong)
    result = invoke(doctor, "--json", "found.json")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last == "wrong results on this machine; do not use: 4-bit weights; mxfp4 weights"
    for line in (
        "products  1 of 3 passed",
        "  WRONG: 4-bit: difference 0.5, tolerance 0.001",
        "    looked for: products of the wrong row",
        "    do not use: 4-bit weights",
        "  WRONG: mxfp4: difference not a number",
    ):
        assert line in result.stdout
    assert "Speed" in result.stdout, "the other parts run"
    report = from_object(json.loads((tmp_path / "found.json").read_text()))
    assert [c.passed for c in report.checks] == [False, True, False]


def test_every_check_is_listed_on_request():
    result = invoke(doctor, "--only", "checks", "--all")
    assert "  8-bit: difference 0.0001, tolerance 0.001" in result.stdout


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch):
    def no_memory(*_):
        yield Shape(1, 256, 1024, "bfloat16", 0, None)
        raise RuntimeError("[metal::malloc] Attempting to allocate too much at /private/x")

    monkeypatch.setattr(running, "time_parts", no_memory)
    result = invoke(doctor, "--model", MODEL)
    assert result.exit_code == 1
    line = "speed could not be measured: [metal::malloc] Attempting to allocate too much at (path)"
    assert result.stderr.splitlines()[-1] == line
    assert "reference: " in result.stdout


def test_a_model_that_does_not_fit_is_one_line_and_no_failure(monkeypatch):
    monkeypatch.setattr(answers, "recommended_bytes", lambda: 1 << 20)
    result = invoke(doctor, "--only", "answers", "--model", MODEL)
    assert result.exit_code == 0
    assert "it was not loaded" in " ".join(result.stdout.split())
    assert not [line for line in result.stdout.splitlines() if "steps per canvas" in line]


def test_a_model_that_cannot_be_loaded_is_bad_input_and_the_rest_is_shown(tmp_path):
    shutil.copytree(MODEL, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").unlink()
    result = invoke(doctor, "--model", "damaged")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "products  2 of 2 passed" in result.stdout and "\nSpeed\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json", "nowhere/x.json"], "there is no folder nowhere; make it first"),
        (["--json", "."], "is a folder"),
        (["--json", "other"], "is not a report"),
        (["--model", "./missing"], "missing"),
        (["--model", "truncated"], "model.safetensors"),
        (["--only", "health"], "--only takes machine, checks, speed, answers, got 'health'"),
        (["--only", "answers"], "needs --model"),
        (["--adapter-path", "x"], "--adapter-path is of no use without --model"),
        (["--revision", "x"], "--revision is of no use without --model"),
    ],
)
def test_bad_input_is_one_line_before_the_work(monkeypatch, tmp_path, arguments, words):
    def never(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(running, "this_machine", never)
    (tmp_path / "other").write_text("my thesis")
    shutil.copytree(MODEL, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_line(invoke(doctor, *arguments), words)
    assert {file.name for file in tmp_path.iterdir()} == {"other", "truncated"}


def test_nothing_private_is_in_what_is_published(monkeypatch, tmp_path):
    (tmp_path / "home of janedoe").mkdir()
    monkeypatch.chdir(tmp_path / "home of janedoe")
    monkeypatch.setenv("HOME", str(tmp_path / "home of janedoe"))
    monkeypatch.setattr(platform, "node", lambda: "janes-mac.local")
    shutil.copytree(MODEL, "janes model")
    result = invoke(doctor, "--model", "janes model", "--json", "x.json")
    assert result.exit_code == 0, result.output
    published = Path("x.json").read_text() + result.stdout
    for word in ("jane", str(tmp_path), MODEL):
        assert word not in published


@pytest.mark.parametrize("width", [60, 100])
def test_the_result_fits_the_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with DoctorView(stdout_is_taken=False) as view:
        view.result(whole_report(), every_check=True)
    shown = capsys.readouterr().out.partition("\nTo paste into a public report\n")[0]
    assert "full layer" in shown and "mxfp4" in shown and "fact" in shown
    lines = shown.splitlines()
    assert max(map(cell_len, lines)) <= width
    # Rows of tables are not broken.
    row = next(line for line in lines if line.startswith("sliding layer"))
    assert row.split() == ["sliding", "layer", "25", "2.00", "1.00"]


def test_ctrl_c_prints_what_is_known(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma.doctor", "--only", "speed", "--json", "x.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for line in process.stderr:
        if line.startswith(b"made-up 4-bit layers"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert b"interrupted; this is what is known so far" in out and b"\nMachine\n" in out
    assert b"### mlx_diffgemma.doctor (interrupted)" in out and b"Traceback" not in err
    assert b"\nall " not in out, "no sum over some of the parts"
    report = from_object(json.loads((tmp_path / "x.json").read_text()))
    assert not report.is_complete and report.machine is not None
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
