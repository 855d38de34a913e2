"""What the README shows works as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from mlx_diffgemma.cli.convert import convert
from mlx_diffgemma.cli.edit import edit
from mlx_diffgemma.cli.fill import fill
from mlx_diffgemma.cli.fuse import fuse
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.cli.info import info
from mlx_diffgemma.cli.train import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    "convert": convert,
    "edit": edit,
    "fill": fill,
    "fuse": fuse,
    "generate": generate,
    "info": info,
    "train": train,
}
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if "mlx_diffgemma" in line
]


@pytest.mark.parametrize("code", PYTHON)
def test_its_python_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", SHELL)
def test_its_commands_have_only_flags_that_exist(line):
    words = shlex.split(line.replace("python -m mlx_diffgemma ", "mlx_diffgemma."), comments=True)
    app = typer.Typer()
    app.command()(COMMANDS[words[0].removeprefix("mlx_diffgemma.")])
    known = {flag for p in get_command(app).params for flag in (*p.opts, *p.secondary_opts)}
    assert {word for word in words if word.startswith("-") and word != "-"} <= known | {"--help"}


@pytest.mark.parametrize(
    "line", [line for line in SHELL if ".generate" in line and "--model" not in line]
)
def test_its_commands_on_the_bundled_model_run(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.replace("python -m mlx_diffgemma ", "mlx_diffgemma."), comments=True)
    stdin = "Squares from 2 to 3." if "<" in words else None
    words = words[: words.index("<")] if "<" in words else words
    app = typer.Typer()
    app.command()(generate)
    result = CliRunner().invoke(app, words[1:], input=stdin)
    assert result.exit_code == 0, result.output
    assert result.stdout


def test_what_fill_and_edit_print_is_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("numbers.md").write_text("# Numbers\n\n12 13 41 15 16\n")
    shown = README.partition("numbers.md`):\n\n```\n")[2].partition("```")[0]
    printed = []
    for line in SHELL:
        words = shlex.split(line)
        command = COMMANDS.get(words[0].removeprefix("mlx_diffgemma."))
        if command in (fill, edit) and "--seed" in words:
            app = typer.Typer()
            app.command()(command)
            printed.append(CliRunner().invoke(app, words[1:]).stdout.rstrip("\n"))
    assert "\n\n".join(printed) == shown.rstrip("\n")


def test_the_files_it_names_exist():
    for name in re.findall(r"`?((?:bench|tests|recipes)/[\w/]+(?:\.py|\.yaml|/))`?", README):
        assert (ROOT / name).exists(), name


def test_it_makes_no_claim_about_apple_hardware():
    assert "Nothing here has been run on Apple hardware" in " ".join(README.split())
