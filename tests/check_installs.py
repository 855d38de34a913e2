"""Installs the package as people do: with pip, uv and pipx, on every Python of this machine, and as
pip would on a Mac. Needs a package index, and takes some minutes.

usage: python tests/check_installs.py [WORD ...]    only checks whose name holds one of the words

A script for `make long`. One line per check; exits 1 if one fails.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA = "[cpu]" if platform.system() == "Linux" else ""
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
# Tags that pip accepts on each platform, the newest first.
MAC = ("macosx_14_0_arm64", "macosx_13_0_arm64", "macosx_12_0_arm64", "macosx_11_0_arm64")
LINUX = tuple(f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 17, 12, 5))
TOOLS = ("uv", "pipx", "twine", "pyright", "mypy", "build")
ANSWER = "|n|n*n|"
CONSUMER = """
import mlx_diffgemma
settings = mlx_diffgemma.GenerationSettings(seed=1)
settings = mlx_diffgemma.GenerationSettings(seed="one")
"""


class CheckError(Exception):
    """A check that failed, with what was printed."""


def run(*words: object, cwd: Path, ok: tuple[int, ...] = (0,), **more: str) -> str:
    """A command's output, without this checkout on the path."""
    hidden = ("PYTHONPATH", "LD_PRELOAD", "VIRTUAL_ENV", "MLX_DIFFGEMMA_MODEL")
    kept = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=kept | more, capture_output=True, text=True
    )
    if done.returncode not in ok:
        raise CheckError(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def pythons() -> dict[str, Path]:
    """Version -> interpreter, of those of this machine that the package runs on."""
    folders = [Path(p) for p in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin")
    )
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.glob("python3.*")):
            if not re.fullmatch(r"python3\.\d+", file.name):
                continue
            code = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([file, "-c", code], capture_output=True, text=True)
            version = done.stdout.strip()
            if done.returncode == 0 and tuple(map(int, version.split("."))) >= (3, 11):
                found.setdefault(version, file)
    return found


def check_commands(folder: Path, scratch: Path) -> None:
    """Every command is in a folder, tells its version, is proposed, and the model answers."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    expected = f"mlx-diffgemma {PROJECT['version']}\n"
    for name in PROJECT["scripts"]:
        told = run(name, "--version", cwd=scratch, PATH=path)
        if told != expected:
            raise CheckError(f"{name} --version prints {told!r}")
    script = run("mlx_diffgemma.info", "--show-completion", "bash", cwd=scratch, PATH=path)
    proposed = run(
        "bash",
        "--norc",
        "-c",
        f"{script}\nCOMP_WORDS=(mlx_diffgemma.generate --model nv); COMP_CWORD=2\n"
        '_mlx_diffgemmagenerate_completion mlx_diffgemma.generate; echo "${COMPREPLY[@]}"',
        cwd=scratch,
        PATH=path,
    )
    if proposed != "nvfp4\n":
        raise CheckError(f"completion proposes {proposed!r}")
    asked = ("mlx_diffgemma.generate", "Squares from 2 to 3.", "--seed", "1")
    if not (answer := run(*asked, cwd=scratch, PATH=path)).startswith(ANSWER):
        raise CheckError(f"the answer is {answer!r}")


def with_pip(python: Path, wheel: Path, scratch: Path) -> None:
    venv = scratch / f"pip-{python.name}"
    run(python, "-m", "venv", venv, cwd=scratch)
    run(venv / "bin/python", "-m", "pip", "install", "-q", f"{wheel}{EXTRA}", cwd=scratch)
    check_commands(venv / "bin", scratch)


def with_uv(python: Path, tools: Path, scratch: Path) -> None:
    """From the checkout, as `uv tool install .` there."""
    home = scratch / f"uv-{python.name}"
    places = {"UV_TOOL_DIR": f"{home}/tools", "UV_TOOL_BIN_DIR": f"{home}/bin"}
    run(tools / "uv", "tool", "install", "-q", "--python", python, f"{ROOT}{EXTRA}", cwd=scratch,
        **places)  # fmt: skip
    check_commands(home / "bin", scratch)


def with_pipx(python: Path, tools: Path, scratch: Path) -> None:
    home = scratch / f"pipx-{python.name}"
    places = {"PIPX_HOME": f"{home}/home", "PIPX_BIN_DIR": f"{home}/bin"}
    run(tools / "pipx", "install", "-q", "--python", python, f"{ROOT}{EXTRA}", cwd=scratch,
        **places)  # fmt: skip
    check_commands(home / "bin", scratch)


def resolves(tags: tuple[str, ...], system: str, version: str, scratch: Path) -> None:
    """Pip finds wheels of everything for another platform. It evaluates markers for this one, so
    requirements of the other, MLX's too, are given without their markers."""
    needed = [line for line in PROJECT["dependencies"] if "platform_system" not in line]
    extra = PROJECT["optional-dependencies"]["cpu"] if system == "Linux" else []
    own = [line for line in [*PROJECT["dependencies"], *extra] if f"'{system}'" in line]
    assert own, system
    own += ["mlx-metal"] if system == "Darwin" else []  # which mlx requires there
    platforms = [word for tag in tags for word in ("--platform", tag)]
    out = run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
        *("--only-binary=:all:", "--python-version", version, "--target", scratch / "target"),
        *platforms,
        *needed,
        *(line.split(";")[0] for line in own),
        cwd=scratch,
    )
    wanted = " mlx-metal-" if system == "Darwin" else " mlx-cpu-"
    if wanted not in out.split("Would install")[-1]:
        raise CheckError(out)


def check_types(tool: str, python: Path, tools: Path, scratch: Path) -> None:
    """A consumer's type checker accepts the right line and refuses the wrong one."""
    (scratch / "consumer.py").write_text(CONSUMER)
    option = "--python-executable" if tool == "mypy" else "--pythonpath"
    out = run(tools / tool, option, python, "consumer.py", cwd=scratch, ok=(1,))
    errors = [line for line in out.splitlines() if "error:" in line]
    given = ('"str"', "Literal['one']")  # the wrong argument, in each tool's words
    if len(errors) != 1 or ":4:" not in errors[0] or not any(word in out for word in given):
        raise CheckError(out)


def checks(scratch: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and function of every check, in an order in which each finds what it needs."""
    tools, dist = scratch / "tools/bin", scratch / "dist"
    run(sys.executable, "-m", "venv", scratch / "tools", cwd=scratch)
    run(tools / "python", "-m", "pip", "install", "-q", *TOOLS, cwd=scratch)
    run(tools / "python", "-m", "build", "-q", "--outdir", dist, ROOT, cwd=scratch)
    (wheel,) = dist.glob("*.whl")
    files = sorted(dist.iterdir())
    yield "metadata: twine", lambda: run(tools / "twine", "check", "--strict", *files, cwd=scratch)
    for version, python in pythons().items():
        yield f"pip, Python {version}", partial(with_pip, python, wheel, scratch)
        yield f"uv, Python {version}", partial(with_uv, python, tools, scratch)
        yield f"pipx, Python {version}", partial(with_pipx, python, tools, scratch)
    for version in VERSIONS:
        yield (
            f"macOS arm64, Python {version}",
            partial(resolves, MAC, "Darwin", version, scratch),
        )
        yield (
            f"Linux x86-64, Python {version}",
            partial(resolves, LINUX, "Linux", version, scratch),
        )
    (installed, *_) = pythons().values()
    for kind in ("wheel", "editable"):
        venv = scratch / f"types-{kind}"
        run(installed, "-m", "venv", venv, cwd=scratch)
        what = ("-e", f"{ROOT}") if kind == "editable" else (wheel,)
        run(venv / "bin/python", "-m", "pip", "install", "-q", "--no-deps", *what, cwd=scratch)
        for tool in ("mypy", "pyright"):
            yield (
                f"types: {tool}, {kind}",
                partial(check_types, tool, venv / "bin/python", tools, scratch),
            )


def main() -> None:
    words, failed = sys.argv[1:], 0
    with TemporaryDirectory() as folder:
        for name, check in checks(Path(folder)):
            if words and not any(word in name for word in words):
                continue
            start = time.monotonic()
            try:
                check()
                result = "ok"
            except CheckError as error:
                result, failed = f"FAILED\n{error}", failed + 1
            print(f"{name}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
