"""Builds the source distribution, runs tests from it, builds the wheel from it, installs that in
a fresh environment without extras, and runs it elsewhere.

A script for `make wheel`, not a pytest file: the checkout would shadow the wheel.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from email import message_from_bytes
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
         "tokenizer_config.json", "chat_template.jinja", "prompts.json", "README.md",
         "processor_config.json", "shapes.png"}
for name in names:
    assert (folder / name).read_bytes(), name
assert (pathlib.Path(mlx_diffgemma.__file__).parent / "py.typed").is_file()
assert not pathlib.Path(mlx_diffgemma.__file__).parent.joinpath("convert").is_symlink()
from mlx_diffgemma.serve import page
for name in ("index.html", "app.js", "vendor/katex/katex.min.js", "trace_view.js"):
    assert page.file(name).content, name
template = pathlib.Path(mlx_diffgemma.__file__).parent / "view/trace.html"
assert template.read_text(encoding="utf-8").count("@@RUN@@") == 1
model, tokenizer = mlx_diffgemma.load(folder)
settings = mlx_diffgemma.GenerationSettings(seed=1)
text = mlx_diffgemma.generate(model, tokenizer, "Squares from 2 to 3.", settings=settings)
assert text.startswith("|n|n*n|"), text
"""


# Loading prints nothing, not even transformers' advice that there is no torch.
QUIET = """
import os, sys
sys.stderr = sys.stdout
os.dup2(1, 2)
from mlx_diffgemma import bundled_model, load
load(bundled_model())
"""
# A program that uses the package: a type checker accepts the first line and refuses the second.
CONSUMER = """
import mlx_diffgemma
settings = mlx_diffgemma.GenerationSettings(seed=1)
settings = mlx_diffgemma.GenerationSettings(seed="one")
"""
# Tests that are run from the source distribution: they import the helpers beside them.
FROM_SOURCE = (
    "tests/test_packaging.py",
    "tests/config/test_model.py",
    "tests/checkpoint/test_names.py",
)


def main() -> None:
    backend = "[cpu]" if platform.system() == "Linux" else ""
    with tempfile.TemporaryDirectory() as scratch:
        python = (sys.executable, "-m")
        run(*python, "build", "--quiet", "--sdist", "--outdir", scratch, str(ROOT), cwd=scratch)
        (archive,) = Path(scratch).glob("*.tar.gz")
        unpacked = check_source(archive, Path(scratch))
        run(*python, "pip", "wheel", "--quiet", "--no-deps", "-w", scratch, unpacked, cwd=scratch)
        (wheel,) = Path(scratch).glob("*.whl")
        check_contents(wheel)
        run(*python, "venv", "venv", cwd=scratch)
        bin_ = Path(scratch, "venv", "bin")
        run(
            str(bin_ / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            f"{wheel}{backend}",
            cwd=scratch,
        )
        run(str(bin_ / "python"), "-c", INSIDE, cwd=scratch)
        quiet = run(str(bin_ / "python"), "-c", QUIET, cwd=scratch)
        assert quiet == "", quiet
        check_types(Path(scratch), bin_ / "python")
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
        check_page(Path(scratch), bin_ / "mlx_diffgemma.serve")
    print("the source distribution, and the wheel that is made of it, install and run")


def check_source(archive: Path, scratch: Path) -> str:
    """Unpack a source distribution, which has no links in it, and run tests there; its folder."""
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
        assert all(member.isfile() or member.isdir() for member in members), "a link was packed"
        opened.extractall(scratch / "source", filter="data")
    (folder,) = (scratch / "source").iterdir()
    python = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder))
    ran = run(*python, *FROM_SOURCE, cwd=str(folder), PYTHONPATH=str(folder))
    assert " passed" in ran and "failed" not in ran, ran
    return str(folder)


def check_contents(wheel: Path) -> None:
    """Files of every package, the converter's too, and a description that package indexes show as
    it is meant."""
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = message_from_bytes(opened.read(metadata))
    sources = {
        f"mlx_diffgemma/{path.relative_to(ROOT / 'mlx_diffgemma')}"
        for pattern in ("**/*.py", "convert/*.py")
        for path in (ROOT / "mlx_diffgemma").glob(pattern)
    }
    assert sources <= set(names), sources - set(names)
    assert not any(name.startswith(("tests/", "bench/", "convert/")) for name in names), names
    assert described["Description-Content-Type"] == "text/markdown"
    description = described.get_payload(decode=True).decode("utf-8")
    assert description.startswith("# mlx-diffgemma")
    assert relative_links(description) == []


def check_page(folder: Path, command: Path) -> None:
    """The command, in an empty folder, serves the page."""
    (folder / "empty").mkdir()
    process = subprocess.Popen(
        [str(command), "--port", "0"],
        cwd=folder / "empty",
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "as a page at" in line)
        address = line.split()[-1]
        with urllib.request.urlopen(address) as answer:
            assert b"/page/app.js" in answer.read()
        with urllib.request.urlopen(f"{address}page/app.js") as answer:
            assert answer.headers["content-type"].startswith("text/javascript")
    finally:
        process.terminate()
        process.wait()


def check_types(folder: Path, python: Path) -> None:
    """A consumer's type checker sees the types of the wheel. Those of the libraries that it uses
    are left out here: they take a minute."""
    (folder / "consumer.py").write_text(CONSUMER)
    (folder / "mypy.ini").write_text(
        "[mypy]\n[mypy-transformers.*,mlx_lm.*,mlx.*,numpy.*,huggingface_hub.*,matplotlib.*]\n"
        "follow_imports = skip\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(python), "consumer.py"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    (error,) = (line for line in done.stdout.splitlines() if ": error:" in line)
    assert error.startswith("consumer.py:4:") and '"str"' in error, done.stdout


def relative_links(markdown: str) -> list[str]:
    """The targets of links and images that are neither web addresses nor headings of the same
    page, outside blocks of code."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    found += re.findall(r"^ {0,3}\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    found += re.findall(r"<[^>]+?\s(?:href|src|srcset)=[\"']([^\"']+)", text)
    return [target for target in found if not re.match(r"[a-z]+:|#", target)]


def environment(**more: str) -> dict[str, str]:
    """This process's, in which the checkout does not shadow what is installed."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more


def run(*command: str, cwd: str, **more: str) -> str:
    """The command's stdout; stops with its output if it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
