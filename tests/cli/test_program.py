"""What every command has as a program: its version, and completion in the shells that are
installed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_diffgemma.cli.program import scripts, variable
from tests.sampled import first

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, str]:
    """An environment with a fresh home folder, in which every command is a program."""
    folder = tmp_path_factory.mktemp("programs")
    for name, place in SCRIPTS.items():
        module, _, function = place.partition(":")
        file = folder / name
        file.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
        file.chmod(0o755)
    home = folder / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not re.match("COMP_|_?MLX|XDG|ZDOTDIR", k)}
    path = f"{folder}:{os.environ['PATH']}"
    return kept | {"PATH": path, "HOME": str(home), "PYTHONPATH": str(ROOT), "TERM": "dumb"}


def run(environment: dict[str, str], *words: str, cwd: str | None = None) -> str:
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, cwd=cwd or environment["HOME"]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_tells_its_version(programs, command):
    assert run(programs, command, "--version") == f"mlx-diffgemma {version('mlx-diffgemma')}\n"


def test_the_version_is_told_by_the_package_and_by_python_m(programs):
    told = f"mlx-diffgemma {version('mlx-diffgemma')}\n"
    assert run(programs, sys.executable, "-m", "mlx_diffgemma", "--version") == told
    assert run(programs, sys.executable, "-m", "mlx_diffgemma.fill", "--version") == told
    code = "import mlx_diffgemma; print('mlx-diffgemma', mlx_diffgemma.__version__)"
    assert run(programs, sys.executable, "-c", code) == told


def test_a_folder_that_is_not_installed_has_no_version(programs, tmp_path):
    environment = programs | {"PYTHONSAFEPATH": "1"}
    hide = (
        "import importlib.metadata as m, sys\n"
        "m.Distribution.discover = classmethod(lambda cls, **k: iter(()))\n"
    )
    for option in (["--version"], ["--show-completion", "bash"]):
        code = (
            f"{hide}sys.argv = ['x', *{option!r}]\nfrom mlx_diffgemma.__main__ import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1 and "pip install -e ." in done.stderr


# Completion. (words before the cursor, what is proposed among others, what is not)
PROPOSALS = {
    "option": (["mlx_diffgemma.generate", "--mo"], {"--model"}, {"--seed"}),
    "model": (["mlx_diffgemma.generate", "--model", ""], {"4bit", "nvfp4"}, {"--model"}),
    "start of a model": (["mlx_diffgemma.fuse", "--model", "mx"], {"mxfp4", "mxfp8"}, {"4bit"}),
    "setting": (["mlx_diffgemma.edit", "--policy", ""], {"fast", "reference"}, {"4bit"}),
    "training": (["mlx_diffgemma.train", "--optimizer", "ada"], {"adam", "adamw"}, {"sgd"}),
    "mode": (["mlx_diffgemma.convert", "--q-mode", ""], {"affine", "mxfp4"}, {"4bit"}),
    "source": (["mlx_diffgemma.convert", "--hf-path", "5"], {"5bit"}, {"4bit"}),
    "subcommand": (["mlx_diffgemma.models", "p"], {"pull"}, {"list", "rm"}),
    "argument": (["mlx_diffgemma.models", "rm", "4"], {"4bit"}, {"8bit"}),
}


def proposed(environment: dict[str, str], shell: str, words: list[str]) -> set[str]:
    """What a shell that reads the script of --show-completion proposes."""
    script = Path(environment["HOME"], f"shown.{shell}")
    if not script.exists():
        script.write_text(run(environment, words[0], "--show-completion", shell))
    if shell == "bash":
        found = run(
            environment,
            "bash",
            "--norc",
            "-c",
            f'source {script}; command=$1; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
            'set -- $(complete -p "$command"); '
            'while [ "$1" != -F ]; do shift; done; "$2" "$command"\n'
            'printf "%s\\n" "${COMPREPLY[@]}"',
            "bash",
            *words,
        )
    else:
        line = " ".join(words)
        found = run(
            environment, "fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"
        )
    return {line.split("\t")[0] for line in found.splitlines()}


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize("case", PROPOSALS)
def test_shells_propose_options_and_their_values(programs, shell, case):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    words, some, others = PROPOSALS[case]
    found = proposed(programs, shell, words)
    assert some <= found and not others & found, found


@pytest.mark.parametrize("shell", first(1, ["zsh", "bash", "fish"]))
def test_completion_works_in_a_session_once_it_is_installed(programs, shell, tmp_path):
    """At the first Tab, too, which is another one in zsh than those after it."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    home, said = tmp_path / "home", tmp_path / "said"
    home.mkdir()
    environment = programs | {"HOME": str(home)}
    run(environment, "mlx_diffgemma.info", "--install-completion", shell)
    (tmp_path / "notes.txt").write_text("a")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(shell, [shell, "-i"], environment)
    try:
        for typed, meant in (
            ("generate --mod\tnv\t", "generate --model nvfp4"),
            ("edit not\t", "edit notes.txt"),  # files are left to the shell
        ):
            said.unlink(missing_ok=True)  # Ctrl-A goes to the start of the line
            os.write(terminal, f"mlx_diffgemma.{typed}\x01echo >said \n".encode())
            shown, end = b"", time.monotonic() + 60
            while not (said.exists() and said.read_text()) and time.monotonic() < end:
                if select.select([terminal], [], [], 0.1)[0]:
                    shown += os.read(terminal, 65536)
            assert said.exists(), shown
            assert said.read_text().strip() == f"mlx_diffgemma.{meant}", shown
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def test_the_variable_of_completion_is_a_name_that_every_shell_keeps():
    assert all(re.fullmatch(r"_MLX_DIFFGEMMA_[A-Z]+_COMPLETE", variable(name)) for name in SCRIPTS)


def test_a_script_of_zsh_completes_at_the_first_tab_too():
    """Also where zsh is not installed: the file that zsh loads must run what it has defined."""
    assert scripts("zsh").count("loadautofunc ]] && ") == len(scripts("zsh").split("#compdef")) - 1
    assert "loadautofunc" not in scripts("bash") + scripts("fish")


def test_a_proposal_needs_nothing_heavy():
    code = (
        "import os, sys\nos.environ |= {'COMP_WORDS': 'x\\n--model\\n', 'COMP_CWORD': '2', "
        "'_MLX_DIFFGEMMA_GENERATE_COMPLETE': 'complete_bash'}\n"
        "sys.argv = ['mlx_diffgemma.generate']\n"
        "from mlx_diffgemma.cli.generate import main\n"
        "try:\n    main()\nfinally:\n    print([m for m in "
        "('mlx', 'numpy', 'transformers', 'huggingface_hub', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[0] == "4bit"
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("given", [[], ["tcsh"]])
def test_a_shell_that_is_not_known_is_refused_with_those_that_are(programs, given):
    done = subprocess.run(
        ["mlx_diffgemma.info", "--install-completion", *given],
        env=programs,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--install-completion" in done.stderr
    assert not given or all(shell in done.stderr for shell in ("bash", "zsh", "fish"))
