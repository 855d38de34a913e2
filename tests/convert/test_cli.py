from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_diffgemma.cli.convert import convert
from mlx_diffgemma.convert import shards as shards_module
from mlx_diffgemma.convert import write as write_module
from tests.cli.test_cli import assert_one_line, invoke
from tests.convert.cases import official, sums


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
    assert lines[0].split() == ["part", "stored", "as", "bytes", "bits/weight", "error"]
    (experts,) = [line for line in lines if line.startswith("experts")]
    assert re.match(r"experts +4-bit affine g64 +[\d,]+ +4\.500 +0\.0\d+$", experts)
    assert re.match(rf"{out}: [\d.]+ s, peak resident memory [\d.]+ GB$", lines[-1])
    again = run("--hf-path", source, "--mlx-path", out, "-q")
    assert again.stdout == f"{out} is there already, from the same source by the same recipe\n"
    verified = run("--mlx-path", out, "--verify")
    assert verified.exit_code == 0, verified.output
    assert "checksums and sources are right" in verified.stdout
    assert "one denoise step" in verified.stdout


def test_dry_run_prints_every_move_and_writes_nothing(source, out):
    result = run("--hf-path", source, "--mlx-path", out, "-q", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "model.safetensors"
    name = "model.decoder.layers.0.experts.gate_up_proj.weight"
    (move,) = [line.split() for line in lines if name in line]
    assert move == [name, "2x128x64", "4-bit", "affine", "g64", f"{2 * 128 * (32 + 4):,}"]
    plan = write_module.prepare(source, quantize=True)
    assert sum(bool(re.match(r"  model\.", line)) for line in lines) == len(plan.moves)
    assert lines[-1].split()[:2] == ["all", f"{plan.tensor_bytes:,}"]
    assert list(out.parent.iterdir()) == []


def test_dry_run_lists_what_is_left_as_it_is(tmp_path):
    source = official(tmp_path / "source", moe_intermediate_size=32)
    result = run("--hf-path", source, "-q", "--dry-run")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("left as they are, since their width does not divide: ")
    assert last.count("experts.down_proj") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--hf-path is missing"),
        (("--hf-path", "/nowhere/at/all"), "no folder /nowhere/at/all"),
        (("--hf-path", "SOURCE", "--q-bits", "4"), "only have a meaning with -q"),
        (("--hf-path", "SOURCE", "-q", "--q-bits", "7"), "cannot pack 7 bits"),
        (("--hf-path", "SOURCE", "-q", "--recipe", "mixd"), "neither mixed nor uniform"),
        (("--hf-path", "SOURCE", "--verify"), "no other option goes with it"),
        (("--verify", "--force"), "no other option goes with it"),
        (("--hf-path", "SOURCE", "--dry-run", "--upload-repo", "a/b"), "--dry-run makes nothing"),
        (("--mlx-path", "/nowhere/at/all", "--verify"), "has no conversion.json"),
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
    assert_one_line(run(*command), "is full; free some space and run the same again")
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


def test_ctrl_c_is_exit_code_130_and_the_next_run_goes_on(source, tmp_path):
    plain = tmp_path / "plain"
    assert run("--hf-path", source, "--mlx-path", plain, "-q").exit_code == 0
    # Each tensor takes a tenth of a second here, so that there is a middle to interrupt.
    slow = (
        "import time, mlx_diffgemma.convert.shards as w; carry = w._carry\n"
        "w._carry = lambda *a: (time.sleep(0.1), carry(*a))[1]; w._SYNC_SECONDS = 0\n"
        "from mlx_diffgemma.cli.convert import main; main()"
    )
    out = tmp_path / "out"
    arguments = ["--hf-path", str(source), "--mlx-path", str(out), "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    journal = tmp_path / "out.partial/journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr.decode()
    assert b"Traceback" not in stderr and stdout == b""
    assert not out.exists() and (tmp_path / "out.partial/out").is_dir()
    result = run(*arguments)
    assert result.exit_code == 0 and "tensors from an earlier run" in result.stdout
    assert sums(out) == sums(plain)


def test_the_record_names_the_recipe_of_the_command_line(source, out):
    run("--hf-path", source, "--mlx-path", out, "-q", "--q-mode", "nvfp4", "--recipe", "uniform")
    record = json.loads((out / "conversion.json").read_text())
    assert record["recipe"] == {
        "name": "uniform",
        "rules": [{"pattern": "*", "bits": 4, "group_size": 16, "mode": "nvfp4"}],
    }
