"""What the README and the pages in docs/ show works: commands, Python, outputs, links, files.

The blocks of a page run in their order, in one folder. A `sh` block runs line by line; a `python`
block runs as a program; `json`, `toml` and `yaml` are written into the file that the text before
them names last; a `text` block right behind one of the first two is what that printed on stdout,
with "..." for what differs from run to run.

The published checkpoints are 50 GB and more, so small stand-ins take their place.
"""

from __future__ import annotations

import doctest
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import unescape

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from mlx_diffgemma import bundled_model
from mlx_diffgemma.checkpoint.memory import context_bytes
from mlx_diffgemma.cli.options import _every_program, app_of
from mlx_diffgemma.convert import convert
from mlx_diffgemma.doctor.published import published_model
from tests.language.drawn import clip

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SHOWN = [README, CONTRIBUTING, *sorted(DOCS.glob("*.md"))]
LINKED = [*SHOWN, ROOT / "mlx_diffgemma" / "demo" / "README.md", ROOT / "recipes" / "README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BF16, PACKED = (
    "google/diffusiongemma-26B-A4B-it",
    "mlx-community/diffusiongemma-26B-A4B-it-4bit",
)
# What a test adds to a long training run, and to an examination. An option's last value counts.
SHORTER = ["--iters", "2", "--batch-size", "1", "--grad-accumulation-steps", "1"]
ONLY_A_PART = ["--only", "machine"]
# Tools that pages use beside our commands.
TOOLS = {"printf", "mkdir", "cat"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def module_of(path: Path) -> ModuleType:
    """A script, imported from its file."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


REFERENCE = module_of(DOCS / "reference.py")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    file: str  # the last name in backticks in the paragraph before it
    line: int
    follows: bool  # right behind the block before it


def blocks(page: Path) -> Iterator[Block]:
    text, end = page.read_text(encoding="utf-8"), 0
    for found in BLOCK.finditer(text):
        between = text[end : found.start()]
        names = re.findall(r"`([^`\n]+)`", between.strip().rpartition("\n\n")[2])
        line = text[: found.start()].count("\n") + 2
        follows = end > 0 and not between.strip()
        yield Block(found[1], found[2], names[-1] if names else "", line, follows)
        end = found.end()


def lines(block: Block) -> list[list[str]]:
    """The words of each command of a shell block."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|")
        lexer.whitespace_split = True
        if words := list(lexer):
            commands.append(words)
    return commands


def command_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(name of our command, its arguments), or None for another program."""
    if words[:2] == ["python", "-m"]:
        words = words[2:]
        if words[0] == "mlx_diffgemma" and len(words) > 1:
            words = [f"mlx_diffgemma.{words[1]}", *words[2:]]
    name = words[0].rpartition("/")[2]
    return (name.partition(".")[2], words[1:]) if name.startswith("mlx_diffgemma.") else None


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, str]:
    """Hub id -> a folder with a small checkpoint of the same layout, which takes few steps."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(bundled_model(), folder / "bf16")
    path = folder / "bf16" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_denoising_steps": 2}))
    convert(folder / "bf16", folder / "packed", quantize=True)
    return {BF16: str(folder / "bf16"), PACKED: str(folder / "packed")}


class Shell:
    """Runs the blocks of one page."""

    def __init__(self, stand_ins: dict[str, str], folder: Path) -> None:
        self.stand_ins, self.folder = stand_ins, folder
        for name in ("recipes", "bench", "docs", "mlx_diffgemma"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "data").mkdir()
        example = {"prompt": "Sort: 2 1", "completion": "1 2"}
        (folder / "data" / "train.jsonl").write_text(f"{json.dumps(example)}\n" * 4)
        for name in ("photo.jpg", "a.png", "b.webp"):
            Image.new("RGB", (64, 64), "navy").save(folder / name)
        (folder / "clip.mp4").write_bytes(clip(4, rate=2, size=(64, 64)))

    def run(self, block: Block) -> str | None:
        """What a block prints on stdout; None for blocks that are not run."""
        if block.kind == "sh":
            return "".join(map(self.run_line, lines(block)))
        if block.kind == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(self.placed(block.text), "page", "exec"), {"__name__": "__main__"})
            return printed.getvalue()
        if block.kind in ("json", "toml", "yaml"):
            (self.folder / block.file).write_text(block.text)
        else:
            # tests/serve/test_page.py runs "py" against a server.
            assert block.kind in ("", "text", "py"), f"nobody runs a block of {block.kind!r}"
        return None

    def run_line(self, words: list[str]) -> str:
        words, stdin, target = [self.placed(word) for word in words], "", None
        if "<" in words:
            at = words.index("<")
            stdin, words = (self.folder / words[at + 1]).read_text(), words[:at] + words[at + 2 :]
        if ">" in words:
            at = words.index(">")
            target, words = self.folder / words[at + 1], words[:at] + words[at + 2 :]
        printed = stdin
        while words:
            at = words.index("|") if "|" in words else len(words)
            printed, words = self.run_words(words[:at], printed), words[at + 1 :]
        if target is None:
            return printed
        target.write_text(printed)
        return ""

    def run_words(self, words: list[str], stdin: str) -> str:
        if words[0] in ("make", "pip", "uv", "pipx", "source", "ruff", "mypy"):
            check_setup(words)
            return ""
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ[name] = value  # the fixture restores it
            return ""
        if words[0] == "python" and (
            words[1].endswith(".py") or (words[2:3] and words[1:3] == ["-m", "pytest"])
        ):
            check_script(words[1:])
            return ""
        if (found := command_of(words)) is None:
            assert words[0] in TOOLS, f"nobody runs {words[0]}"
            finished = subprocess.run(
                words, input=stdin, capture_output=True, text=True, cwd=self.folder, check=True
            )
            return finished.stdout
        name, arguments = found
        check_options(name, arguments)
        if PROGRAM_FLAGS & {*arguments}:  # of the program around the command
            program = [sys.executable, "-m", f"mlx_diffgemma.{name}", *arguments]
            home = os.environ | {"HOME": str(self.folder), "PYTHONPATH": str(ROOT)}
            return subprocess.run(
                program, env=home, capture_output=True, text=True, check=True
            ).stdout
        if "--upload-repo" in arguments or (name == "models" and arguments):  # needs the Hub
            return ""
        arguments = [
            self.stand_ins[PACKED] if before == "--model" and word == "4bit" else word
            for before, word in zip(["", *arguments], arguments, strict=False)
        ]
        if name == "train" and not re.search(r"--iters \d( |$)", " ".join(arguments)):
            arguments = [*arguments, *SHORTER]
        if name == "doctor" and "--only" not in arguments:
            arguments = [*arguments, *ONLY_A_PART]
        result = CliRunner().invoke(REFERENCE.app_of(name), arguments, input=stdin)
        assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
        return result.stdout

    def placed(self, text: str) -> str:
        """A text with folders in place of repositories."""
        for repo, folder in self.stand_ins.items():
            text = re.sub(f"{re.escape(repo)}(?![\\w-])", folder, text)
        return text


def check_setup(words: list[str]) -> None:
    """Commands that set up the environment: what they name exists."""
    if words[0] == "make":
        assert re.search(f"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "source":
        assert words[1:] == [".venv/bin/activate"], words
    elif words[0] in ("ruff", "mypy"):
        makefile = (ROOT / "Makefile").read_text()
        assert f"$(BIN)/{words[0]}" in makefile and words[2:] in ([], ["."]), words
    else:
        at = 2 if words[0] == "uv" else 1
        assert words[at - 1 : at + 1] in (["tool", "install"], [words[0], "install"]), words
        extras = re.findall(r"\[([\w,]+)\]", words[at + 1])
        assert {e for group in extras for e in group.split(",")} <= {
            *PROJECT["optional-dependencies"]
        }, words


def check_script(words: list[str]) -> None:
    """Scripts of this repository, and pytest: they exist, and so do what they are given."""
    if words[:2] == ["-m", "pytest"]:
        given = [word for word in words[2:] if not word.startswith("-")]
        assert given and all((ROOT / word).exists() for word in given), words
        return
    text = (ROOT / words[0]).read_text()
    for word in words[1:]:
        assert f'"{word}"' in text if word.startswith("-") else word in text, words


PROGRAM_FLAGS = {
    flag for option in get_command(app_of(_every_program)).params for flag in option.opts
}


def flags_of(name: str) -> set[str]:
    command = get_command(REFERENCE.app_of(name))
    parts = [command, *getattr(command, "commands", {}).values()]
    options = [option for part in parts for option in part.params]
    return (
        {flag for p in options for flag in (*p.opts, *p.secondary_opts)}
        | {"--help"}
        | PROGRAM_FLAGS
    )


def check_options(name: str, arguments: list[str]) -> None:
    given = {word for word in arguments if re.match(r"--?[a-z]", word)}
    assert given <= flags_of(name), f"mlx_diffgemma.{name} has no {given - flags_of(name)}"


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_everything_that_a_page_shows_runs(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    shell, printed = Shell(stand_ins, tmp_path), None
    for block in blocks(page):
        if block.kind == "text" and block.follows and printed is not None:
            assert same(block.text, printed), f"{page.name}:{block.line} prints\n{printed}"
        printed = shell.run(block)


def same(shown: str, printed: str) -> bool:
    """Whether an output is as shown; "..." stands for anything, also within a line."""
    printed = printed if printed.endswith("\n") else f"{printed}\n"
    return doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)


def test_an_output_that_differs_is_noticed():
    assert same("1 2 ...\n", "1 2 3")
    assert not same("1 2 3\n", "1 2 4")
    with pytest.raises(AssertionError, match="has no"):
        check_options("generate", ["--promt", "x"])


# Links, files and options in the text.


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts make of a page's headings."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    wings = "|".join(REFERENCE.wings())
    for name in re.findall(
        rf"`((?:bench|tests|recipes|docs|convert|mlx_diffgemma|{wings})/[\w./*]*)`", text
    ):
        inside = [ROOT, ROOT / "mlx_diffgemma", ROOT / "recipes"]
        assert any(list(folder.glob(name.rstrip("/"))) for folder in inside), name


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_options_named_in_the_text_exist(page):
    known = {flag for name in REFERENCE.command_names() for flag in flags_of(name)}
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    scripts = " ".join(p.read_text() for p in [*ROOT.glob("bench/*.py"), *DOCS.glob("*.py")])
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", code):
        assert any(k.startswith(flag) for k in known) or f'"{flag}"' in scripts, flag


def test_every_page_is_listed_in_both_indexes():
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w[\w-]*\.md)\)", (DOCS / "README.md").read_text())) == pages
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README.read_text())) == pages


# Pages that are made.


def test_reference_pages_are_what_the_code_says():
    stale = [p.name for p, text in REFERENCE.pages().items() if not REFERENCE.is_current(p, text)]
    assert not stale, f"{stale}: run python docs/reference.py --write"


@pytest.mark.parametrize("name", ["speed.md", "constraints.md"])
def test_tables_of_figures_are_those_of_the_records(name):
    table, page = module_of(ROOT / "bench" / "table.py"), DOCS / name
    text = table.pages(table.RESULTS)[name]
    assert table.between_marks(page, text) == page.read_text(), "run python bench/table.py --write"


def test_the_plot_of_speed_is_that_of_the_records():
    plot = module_of(ROOT / "bench" / "plot.py")
    text = unescape((DOCS / "speed.svg").read_text(encoding="utf-8"))
    drawn = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    assert drawn is not None
    assert json.loads(drawn[1]) == plot.panels(), "run python bench/plot.py --write"


def test_the_picture_is_drawn_by_its_script():
    picture = module_of(DOCS / "picture.py")
    panels = picture.panels()
    drawn = picture.draw(panels)
    assert drawn == picture.FILE.read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    answer = [cell.text for cell in panels[-1].cells]
    given = [cell.text for cell in panels[0].cells]
    assert all(a == g for a, g in zip(answer, given, strict=True) if g)
    assert len(panels) >= 5
    assert any(cell.renoised for panel in panels for cell in panel.cells)


# What the README must say, and may not.


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_makes_no_claim_about_apple_hardware_or_speed():
    text = " ".join(README.read_text(encoding="utf-8").replace("\n>", "\n").split())
    assert "Nothing here has been run on Apple hardware or on the published weights yet." in text
    assert not re.search(r"tokens/s|tokens per second|\d ?ms\b|\d ?x\b|times (?:as )?fast", text)


def test_a_new_setting_appears_in_the_reference(monkeypatch):
    from dataclasses import dataclass, fields

    from mlx_diffgemma import GenerationSettings
    from mlx_diffgemma.config.entry import Entry, setting

    @dataclass(frozen=True, kw_only=True)
    class More(GenerationSettings):
        made_up: int | None = setting(Entry(help="Of no use.", default=3, at_least=1), is_open=True)

    table: Any = REFERENCE.settings_table(More)
    assert "| `made_up` |  | whole number, at least 1 | 3 | Of no use. |" in table
    assert table.count("\n") == len(fields(More)) + 1


def test_the_bytes_of_kept_contexts_are_those_of_the_published_model():
    """As its config gives them."""
    text, tokens = published_model().text, 32_768
    whole = context_bytes(text, tokens)
    token = context_bytes(text, tokens + 1) - whole
    end = whole - tokens * token
    page = (DOCS / "python.md").read_text()
    shown = dict(re.findall(r"^\| ([^|]+) \| ([\d,]+) \|$", page, re.MULTILINE))
    assert shown == {
        "full layers, a token": f"{token:,}",
        "full layers, a chat of 32,768 tokens": f"{token * tokens:,}",
        "sliding layers, a snapshot": f"{end:,}",
        "such a chat with a snapshot every 2,048 tokens": (
            f"{token * tokens + end * (tokens // 2048):,}"
        ),
    }
    count = (2_000_000_000 - token * tokens) // end
    assert f"a store of 2 GB holds such a chat with {count} snapshots" in page
    assert f"With `every={-(-tokens // count)}`, {count} snapshots cover the whole" in page
