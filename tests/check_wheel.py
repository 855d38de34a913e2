"""Builds the wheel, installs it in a fresh environment without extras, and runs it elsewhere.

A script for `make wheel`, not a pytest file: the checkout would shadow the wheel.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Run inside the new environment: imports every module, opens every data file, generates.
INSIDE = """
import importlib, pathlib, pkgutil, sys
import mlx_diffgemma
assert "site-packages" in mlx_diffgemma.__file__, mlx_diffgemma.__file__
for module in pkgutil.walk_packages(mlx_diffgemma.__path__, "mlx_diffgemma."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "torch" not in sys.modules
folder = mlx_diffgemma.bundled_model()
names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja", "prompts.json", "README.md"}
for name in names:
    assert (folder / name).read_bytes(), name
assert (pathlib.Path(mlx_diffgemma.__file__).parent / "py.typed").is_file()
template = pathlib.Path(mlx_diffgemma.__file__).parent / "view/trace.html"
assert template.read_text(encoding="utf-8").count("@@RUN@@") == 1
model, tokenizer = mlx_diffgemma.load(folder)
settings = mlx_diffgemma.GenerationSettings(seed=1)
text = mlx_diffgemma.generate(model, tokenizer, "Squares from 2 to 3.", settings=settings)
assert text.startswith("|n|n*n|"), text
"""


def main() -> None:
    backend = "[cpu]" if platform.system() == "Linux" else ""
    with tempfile.TemporaryDirectory() as scratch:
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            scratch,
            str(ROOT),
            cwd=scratch,
        )
        (wheel,) = Path(scratch).glob("*.whl")
        run(sys.executable, "-m", "venv", "venv", cwd=scratch)
        bin_ = Path(scratch, "venv", "bin")
        run(
            str(bin_ / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            f"{wheel}{backend}",
            cwd=scratch,
        )
        run(str(bin_ / "python"), "-c", INSIDE, cwd=scratch)
        for command in (["mlx_diffgemma.info"], ["mlx_diffgemma.generate", "--help"]):
            run(str(bin_ / command[0]), *command[1:], cwd=scratch)
        prompt = ("--prompt", "Squares from 2 to 3.", "--seed", "1")
        for command in (
            ["mlx_diffgemma.generate", *prompt],
            ["python", "-m", "mlx_diffgemma", "generate", *prompt],
        ):
            out = run(str(bin_ / command[0]), *command[1:], cwd=scratch)
            assert out.startswith("|n|n*n|"), out
        run(str(bin_ / "mlx_diffgemma.generate"), *prompt, "--trace", "run.html", cwd=scratch)
        assert "<script" in Path(scratch, "run.html").read_text(encoding="utf-8")
    print("the wheel installs and runs")


def run(*command: str, cwd: str) -> str:
    """The command's stdout; stops with its output if it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
