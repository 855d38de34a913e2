from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest

from mlx_diffgemma.cli import render_convert
from mlx_diffgemma.cli.convert import convert
from mlx_diffgemma.convert import shards as shards_module
from mlx_diffgemma.convert import write as write_module
from tests.cli.test_cli import ROOT, assert_one_line, invoke
from tests.convert.cases import load_all, nvfp4, official, sums


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return official(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(*arguments):
    return invoke(convert, *map(str, arguments))


def test_a_conversion_ends_in_a_summary_and_verify_and_a_second_run_agree(source, out):
    result = run("--hf-path", source, "--mlx-path", out, "-q")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["part", "stored", "as", "bytes", "bits/weight", "relative", "error"]
    (experts,) = [line for line in lines if line.startswith("experts")]
    assert re.match(r"experts +4-bit affine g64 +[\d,]+ +4\.500 +0\.0\d+$", experts)
    assert re.match(rf"{out}: [\d.]+ s, peak resident memory [\d.]+ GB$", lines[-1])
    again = run("--hf-path", source, "--mlx-path", out, "-q")
    assert again.stdout == f"{out} exists already, from the same source with the same settings\n"
    verified = run("--mlx-path", out, "--verify")
    assert verified.exit_code == 0, verified.output
    assert "checksums and sources are right" in verified.stdout
    assert "one denoise step" in verified.stdout


def test_a_summary_has_no_column_of_errors_where_nothing_is_packed(source, out):
    assert run("--hf-path", source, "--mlx-path", out, "-q").exit_code == 0
    result = run("--hf-path", out, "--mlx-path", out.with_name("plain"), "--dequantize")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["part", "stored", "as", "bytes", "bits/weight"]


def test_dry_run_sums_up_the_plan_and_writes_nothing(source, out):
    result = run("--hf-path", source, "--mlx-path", out, "-q", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    plan = write_module.prepare(source, quantize=True)
    assert lines[0].split() == [
        *("part", "tensors", "stored", "as", "before", "after", "bits/weight")
    ]
    end = next(i for i, line in enumerate(lines) if line.startswith("all "))
    rows = {line[:17].strip(): line[17:].split() for line in lines[1:end]}
    assert len(lines) < 15 and max(map(len, lines[: end + 1])) <= 80
    assert rows["experts"][:4] == ["4", "4-bit", "affine", "g64"] and rows["experts"][-1] == "4.500"
    stored = sum(array.nbytes for array in load_all(source).values())
    _, *total = lines[end].split()
    assert int(total[0]) == len(plan.moves) == sum(int(row[0]) for row in rows.values())
    assert total[1:3] == [f"{stored / 1e3:.2f}", "kB"] and total[4] == "kB"
    assert f"result: {plan.tensor_bytes:,} bytes of tensors in 1 file" in lines
    assert lines[-1].startswith("memory to run the result with 1,024 tokens of context: about ")
    assert list(out.parent.iterdir()) == []


def test_verbose_prints_every_move_of_a_dry_run(source, out):
    result = run("--hf-path", source, "--mlx-path", out, "-q", "--dry-run", "--verbose")
    lines = result.stdout.splitlines()
    assert lines[0] == "model.safetensors"
    name = "model.decoder.layers.0.experts.gate_up_proj.weight"
    (move,) = [line.split() for line in lines if name in line]
    assert move == [name, "2x128x64", "4-bit", "affine", "g64", f"{2 * 128 * (32 + 4):,}"]
    plan = write_module.prepare(source, quantize=True)
    assert sum(bool(re.match(r"  model\.", line)) for line in lines) == len(plan.moves)
    short = run("--hf-path", source, "--mlx-path", out, "-q", "--dry-run").stdout
    assert result.stdout.endswith(short)
    assert_one_line(run("--hf-path", source, "-q", "--verbose"), "--verbose prints the plan of")


def test_dry_run_says_what_is_left_as_it_is_and_what_is_left_out(tmp_path):
    narrow = official(tmp_path / "narrow", moe_intermediate_size=32, num_hidden_layers=5,
        layer_types=["sliding_attention"] * 4 + ["full_attention"])  # fmt: skip
    lines = run("--hf-path", narrow, "-q", "--dry-run").stdout.splitlines()
    (left,) = [line for line in lines if line.startswith("not packed, since groups do not divide")]
    assert ": 5 modules: " in left and left.count("experts.down_proj") == 3
    assert left.endswith(" and 2 more (--dry-run --verbose lists them)")
    lines = run("--hf-path", narrow, "-q", "--dry-run", "--verbose").stdout.splitlines()
    (left,) = [line for line in lines if line.startswith("not packed, since groups do not divide")]
    assert left.count("experts.down_proj") == 5 and "more" not in left
    folder, _ = nvfp4(tmp_path / "nvfp4")
    lines = run("--hf-path", folder, "--dry-run").stdout.splitlines()
    assert "left out: 12 tensors (scales activations, which stay unquantized)" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--hf-path is missing"),
        (("--hf-path", "/nowhere/at/all"), "no folder /nowhere/at/all"),
        (("--hf-path", "SOURCE", "--q-bits", "4"), "need -q"),
        (("--hf-path", "SOURCE", "-q", "--q-bits", "7"), "cannot pack 7 bits"),
        (("--hf-path", "SOURCE", "-q", "--recipe", "mixd"), "neither mixed nor uniform"),
        (("--verify", "--force"), "--force has no effect with --verify"),
        (("--verify", "--q-bits", "4"), "--q-bits has no effect with --verify"),
        (("--verify", "--recipe", "mixed"), "--recipe has no effect with --verify"),
        (("--verify", "--upload-repo", "a/b"), "--upload-repo has no effect with --verify"),
        (("--hf-path", "SOURCE", "--dry-run", "--upload-repo", "a/b"), "--dry-run makes nothing"),
        (("--mlx-path", "/nowhere/at/all", "--verify"), "no folder /nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(source, arguments, message):
    arguments = [str(source) if a == "SOURCE" else a for a in arguments]
    assert_one_line(run(*arguments), message)


def test_a_damaged_shard_is_exit_code_2_and_named(source, out):
    run("--hf-path", source, "--mlx-path", out)
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    assert_one_line(run("--mlx-path", out, "--verify"), f"{out}/model.safetensors: the bytes of ")


def test_force_moves_aside_and_the_summary_counts_what_was_resumed(source, out, monkeypatch):
    assert run("--hf-path", source, "--mlx-path", out).exit_code == 0
    assert_one_line(run("--hf-path", source, "--mlx-path", out, "-q"), "--force moves it aside")
    carry, calls = shards_module._carry, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return carry(*arguments)

    monkeypatch.setattr(shards_module, "_carry", failing)
    command = ("--hf-path", source, "--mlx-path", out, "-q", "--force")
    assert_one_line(
        run(*command), "is full; free some space and run the same command again, which resumes"
    )
    monkeypatch.undo()
    result = run(*command)
    assert result.exit_code == 0 and "3 tensors from an earlier run" in result.stdout
    assert out.with_name("out.old-1").is_dir()


def test_upload_sends_the_finished_folder(source, out, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "mlx_diffgemma.checkpoint.files.upload", lambda *arguments: sent.append(arguments)
    )
    result = run("--hf-path", source, "--mlx-path", out, "--upload-repo", "me/mine")
    assert result.exit_code == 0 and sent == [(out, "me/mine")]
    assert result.stdout.splitlines()[-1] == "uploaded to me/mine"
    again = run("--hf-path", source, "--mlx-path", out, "--upload-repo", "me/mine")
    assert again.exit_code == 0 and len(sent) == 2  # a finished result is only uploaded


def test_verify_takes_the_source_that_is_named(source, out, tmp_path):
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    run("--hf-path", moved, "--mlx-path", out, "-q")
    moved.rename(tmp_path / "moved")
    alone = run("--mlx-path", out, "--verify")
    assert "the source, source, was not found; name it with --hf-path" in alone.stdout
    named = run("--mlx-path", out, "--verify", "--hf-path", tmp_path / "moved")
    assert named.exit_code == 0 and "relative error" in named.stdout


# Each tensor takes a tenth of a second here, so that there is a middle to interrupt.
SLOW = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as a shell's job
    "import time, mlx_diffgemma.convert.shards as w; carry = w._carry\n"
    "w._carry = lambda *a: (time.sleep(0.1), carry(*a))[1]; w._SYNC_SECONDS = 0\n"
    "from mlx_diffgemma.cli.convert import main; main()"
)


def start(program: str, *arguments, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *program.split(maxsplit=1), *map(str, arguments)],
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
        env=environment,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interruption_says_how_to_go_on_and_the_next_run_does(source, tmp_path, number):
    plain = tmp_path / "plain"
    assert run("--hf-path", source, "--mlx-path", plain, "-q").exit_code == 0
    out = tmp_path / "with space"
    arguments = ["--hf-path", str(source), "--mlx-path", str(out), "-q"]
    process = start(f"-c {SLOW}", *arguments)
    partial = tmp_path / "with space.partial"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and (partial / "journal").read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr.decode()
    (line,) = stderr.decode().splitlines()
    said, command = line.split("; to resume, run: ")
    assert said == f"interrupted: {partial} keeps the work so far" and stdout == b""
    assert shlex.split(command)[-5:] == arguments
    assert not out.exists() and (partial / "out").is_dir()
    result = run(*arguments)
    assert result.exit_code == 0 and "tensors from an earlier run" in result.stdout
    assert sums(out) == sums(plain)


@pytest.fixture
def interrupting(monkeypatch):
    """Has a function raise KeyboardInterrupt, as Ctrl-C in it would."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["/somewhere/mlx_diffgemma.convert", "--force", "a b"])
    return lambda place: monkeypatch.setattr(place, stop)


def test_an_interruption_before_the_first_tensor_promises_nothing(source, out, interrupting):
    interrupting("mlx_diffgemma.convert.shards._carry")
    result = run("--hf-path", source, "--mlx-path", out)
    assert result.exit_code == 130 and list(out.parent.iterdir()) == []
    assert result.stderr == (
        "interrupted: this run has written nothing; to start again, run: "
        "/somewhere/mlx_diffgemma.convert --force 'a b'\n"
    )
    interrupting("mlx_diffgemma.convert.write.open_checkpoint")
    result = run("--hf-path", source, "--dry-run")
    assert result.exit_code == 130 and "this run has written nothing" in result.stderr


def test_an_interrupted_check_and_an_interrupted_upload_say_how_to_go_on(source, out, interrupting):
    interrupting("mlx_diffgemma.checkpoint.files.upload")
    result = run("--hf-path", source, "--mlx-path", out, "--upload-repo", "a/b")
    assert result.exit_code == 130 and out.is_dir()
    # Without --force, which would convert it again.
    assert result.stderr == (
        f"interrupted: {out} is complete; to upload it, run: "
        "/somewhere/mlx_diffgemma.convert 'a b'\n"
    )
    interrupting("mlx_diffgemma.convert.verify._check_sums")
    result = run("--mlx-path", out, "--verify")
    assert result.exit_code == 130
    assert "interrupted: the check is not complete; to start it again, run: " in result.stderr


def test_the_command_to_repeat_is_the_one_that_was_typed(source, out):
    process = start("-m mlx_diffgemma", "convert", "--verify", "--mlx-path", "/", "--force")
    assert process.wait(60) == 2
    code = "import sys; sys.argv[0] = '/x/__main__.py'; from mlx_diffgemma.cli.convert import "
    code += "_command; print(_command(), _command(without='--force'), sep='\\n')"
    process = start(f"-c {code}", "a b", "--force")
    typed, without = process.communicate(timeout=60)[0].decode().splitlines()
    assert shlex.split(typed)[-2:] == ["a b", "--force"] and shlex.split(typed)[1] == "-c"
    assert shlex.split(without)[-1] == "a b"


def test_a_terminal_shows_what_is_done_from_the_start(source, out):
    """MLX and what it brings take seconds to import; --verify and resuming have stages too."""
    seen = in_a_terminal("-m mlx_diffgemma.convert", "--hf-path", source, "--mlx-path", out, "-q")
    order = ["loading MLX", f"reading the headers of {source}", "part  "]
    places = [seen.index(text) for text in order]
    assert places == sorted(places), seen
    seen = in_a_terminal("-m mlx_diffgemma.convert", "--mlx-path", out, "--verify")
    assert seen.index("loading MLX") < seen.index("checksums and sources are right")


def in_a_terminal(program: str, *arguments) -> str:
    """All that a program draws on a terminal of 200 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start(program, *arguments, **options)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, seen.decode()
    return seen.decode()


def test_a_log_gets_a_line_now_and_then(source, out, monkeypatch):
    monkeypatch.setattr(render_convert, "_SECONDS_BETWEEN_LINES", 0)
    result = run("--hf-path", source, "--mlx-path", out)
    lines = result.stderr.splitlines()
    assert len(lines) == len(write_module.prepare(source).moves)
    assert re.fullmatch(r"[\d.]+ kB of [\d.]+ kB, about \d+ min left", lines[5]), lines[5]
    monkeypatch.undo()
    assert run("--hf-path", source, "--mlx-path", out, "-q", "--force").stderr == ""


def test_the_record_names_the_recipe_of_the_command_line(source, out):
    run("--hf-path", source, "--mlx-path", out, "-q", "--q-mode", "nvfp4", "--recipe", "uniform")
    record = json.loads((out / "conversion.json").read_text())
    assert record["recipe"] == {
        "name": "uniform",
        "rules": [{"pattern": "*", "bits": 4, "group_size": 16, "mode": "nvfp4"}],
    }
