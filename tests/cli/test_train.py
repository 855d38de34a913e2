from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_diffgemma.cli.render_train import TrainView
from mlx_diffgemma.config.training import TrainSettings
from mlx_diffgemma.train.checkpoint import STATE
from mlx_diffgemma.train.session import Session
from tests.sampled import one_in
from tests.train.train_cases import LINES, small_model, write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    data = write_lines(folder / "data")
    write_lines(data, "valid", LINES[:8])
    write_lines(data, "test", LINES[:8])
    return small_model(folder / "model"), data


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlx_diffgemma", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        **options,
    )


def test_train_test_generate_and_fuse(folders, tmp_path):
    model, data = folders
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: true\ntest: true\nbatch_size: 4\niters: 99\nlearning_rate: 1e-2\n")
    done = run(
        "train", "-c", recipe, "--model", model, "--data", data, "--iters", 4,
        "--adapter-path", tmp_path / "run", "--steps-per-report", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("lora: ") and "24 examples, 8 for validation" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [
        "iteration 0", "iteration 2", "iteration 4", "iteration 4", "iteration 4",
        f"curves in {tmp_path / 'run' / 'curves.png'}", lines[-1].split(":")[0],
    ]  # fmt: skip
    assert lines[-1].startswith("test loss ") and done.stdout == ""
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["iters"] == 4
    ask = ("--prompt", "Say 3.", "--seed", 1, "--max-tokens", 8, "--max-denoising-steps", 4)
    answer = run("generate", "--model", model, "--adapter-path", tmp_path / "run", *ask)
    assert answer.returncode == 0, answer.stderr
    fused = run(
        "fuse", "--model", model, "--adapter-path", tmp_path / "run", "--save-path", tmp_path / "f"
    )
    assert fused.returncode == 0 and "modules changed" in fused.stdout, fused.stderr
    assert run("generate", "--model", tmp_path / "f", *ask).stdout == answer.stdout
    again = run("fuse", "--model", model, "--save-path", tmp_path / "f", "--adapter-path", tmp_path)
    assert again.returncode == 2 and again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    one_in(2, [
        ([], "nothing to do: give --train, --test, or both"),
        (["--train"], "--model is missing"),
        (["--train", "--model", "MODEL"], "--data is missing"),
        (["--train", "--model", "MODEL", "--data", "nowhere"], "nowhere is not a folder"),
        (["--train", "--model", "nobody", "--data", "DATA"], "nobody"),
        (["--train", "--model", "MODEL", "--data", "DATA", "--batch-size", "0"], "batch_size must"),
        (["--train", "--model", "MODEL", "--data", "DATA", "--num-layers", "9"], "has 2 layers"),
        (["--train", "--model", "MODEL", "--data", "DATA", "--resume"], "to go on from"),
        (["--train", "-c", "none.yaml"], "none.yaml cannot be read"),
        (
            ["--train", "--model", "MODEL", "--data", "DATA", "--resume-adapter-file", "none"],
            "none is not there",
        ),
        (
            ["--train", "--model", "MODEL", "--data", "DATA", "--adapter-path", "/proc/run"],
            "/proc/run cannot be written to",
        ),
    ]),
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(folders, tmp_path, arguments, says):
    names = {"MODEL": str(folders[0]), "DATA": str(folders[1])}
    given = [names.get(argument, argument) for argument in arguments]
    if "--adapter-path" not in given:
        given += ["--adapter-path", str(tmp_path / "run")]
    done = run("train", *given, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_bad_line_is_named_before_the_model_is_loaded(folders, tmp_path):
    data = write_lines(tmp_path / "data", lines=[LINES[0], '{"text": "x"}'])
    done = run("train", "--train", "--model", folders[0], "--data", data)
    assert done.returncode == 2
    assert f"{data / 'train.jsonl'}, line 2: plain text" in done.stderr


def test_a_run_that_breaks_at_once_names_no_file_that_is_not_there(folders, tmp_path):
    data = write_lines(tmp_path / "data")
    done = run(
        "train", "--train", "--model", folders[0], "--data", data, "--fine-tune-type", "full",
        "--optimizer", "sgd", "--learning-rate", "1e30", "--max-grad-norm", 0, "--save-every", 1,
        "--adapter-path", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 2
    assert "no checkpoint was written yet" in done.stderr
    assert "curves" not in done.stderr and str(tmp_path / "run") not in done.stderr
    assert not (tmp_path / "run" / STATE).exists()


def test_an_interrupt_in_the_middle_of_an_update_says_what_there_is(tmp_path, capsys):
    class Stopped:
        """A session whose weights and optimizer do not belong together."""

        def __init__(self, trainer):
            self.trainer = trainer

        def interrupted(self):
            return None

    model = small_model(tmp_path / "model")
    settings = TrainSettings(batch_size=4, iters=2)
    data = str(write_lines(tmp_path / "data"))
    session = Session.open(str(model), data, tmp_path / "run", settings)
    TrainView().interrupted(Stopped(session.trainer))
    assert capsys.readouterr().err.endswith("; no checkpoint was written yet\n")
    list(session.train())
    TrainView().interrupted(Stopped(session.trainer))
    says = f"; the last checkpoint in {tmp_path / 'run'} is of iteration 2\n"
    assert capsys.readouterr().err.endswith(says)


def test_ctrl_c_saves_and_resume_goes_on(folders, tmp_path):
    model, data = folders
    command = ["train", "--train", "--model", model, "--data", data, "--batch-size", 4]
    command += ["--adapter-path", tmp_path / "run", "--steps-per-report", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma", *map(str, command), "--iters", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    for line in process.stderr:
        if line.startswith("iteration 5:"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "stopping after this batch; press Ctrl-C again to stop at once" in rest
    assert "interrupted at iteration" in rest and "--resume continues" in rest, rest
    assert "Traceback" not in rest and (tmp_path / "run" / STATE).is_file()
    at = int(rest.split("interrupted at iteration ")[1].split(":")[0].replace(",", ""))
    done = run(*command, "--iters", at + 3, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming at iteration {at:,}" in done.stderr
    assert (tmp_path / "run" / "curves.png").is_file()


def test_data_that_vanishes_is_one_line(folders, tmp_path):
    data = write_lines(tmp_path / "data")
    (data / "valid.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (data / "train.jsonl").unlink()
    started = time.monotonic()
    done = run("train", "--train", "--model", folders[0], "--data", data)
    assert done.returncode == 2 and "train.jsonl cannot be read" in done.stderr
    assert time.monotonic() - started < 60
