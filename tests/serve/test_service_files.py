"""The examples of docs/clients.md that keep the server running."""

from __future__ import annotations

import plistlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from mlx_diffgemma.cli.options import app_of
from mlx_diffgemma.cli.serve import serve as command

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


def block(first: str) -> str:
    (found,) = (text for text in PAGE.split("```text\n")[1:] if text.startswith(first))
    return found.split("```")[0]


UNIT, PLIST = block("[Unit]"), block("<?xml")


def check_command(words: list[str]) -> None:
    known = {flag for p in typer.main.get_command(app_of(command)).params for flag in p.opts}
    assert words[0].endswith("/mlx_diffgemma.serve")
    assert {word for word in words if word.startswith("--")} <= known


def test_the_launch_agent_is_read():
    job = plistlib.loads(PLIST.encode())
    check_command(job["ProgramArguments"])
    assert f"gui/$(id -u)/{job['Label']}" in PAGE and f"LaunchAgents/{job['Label']}.plist" in PAGE
    assert job["RunAtLoad"] is True and job["KeepAlive"] == {"SuccessfulExit": False}
    assert set(job["EnvironmentVariables"]) == {"MLX_DIFFGEMMA_API_KEY"}


def test_the_unit_starts_the_server():
    (line,) = (line for line in UNIT.splitlines() if line.startswith("ExecStart="))
    check_command(shlex.split(line.removeprefix("ExecStart=")))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("spoilt", [False, True])
def test_systemd_reads_the_unit(tmp_path, spoilt):
    program = tmp_path / "mlx-diffgemma" / ".venv" / "bin" / "mlx_diffgemma.serve"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / "mlx-diffgemma.service"
    text = UNIT.replace("Restart=on-failure", "Restart=often") if spoilt else UNIT
    file.write_text(text.replace("%h", str(tmp_path)))
    words = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(words, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if file.name in line]
    assert bool(complaints) is spoilt, done.stderr
    assert spoilt or done.returncode == 0, done.stderr
