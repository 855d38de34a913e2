"""What the package says of itself to installers: its dependencies, its files, its description."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.check_wheel import relative_links

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = {"mlx_diffgemma", "tests", "bench", "recipes", "make", "tasks", "stepwise", "draw"}
# Modules whose distribution has another name, apart from case and hyphens.
DISTRIBUTIONS = {"PIL": "pillow", "markdown_it": "markdown-it-py", "yaml": "pyyaml"}
# Declared and imported nowhere, because another program or package uses them.
READ_BY_TRANSFORMERS = {"sentencepiece"}
# Clients of the server, which have an environment of their own: tests/serve/client_calls.py.
ELSEWHERE = {"litellm", "pydantic-ai"}
TOOLS = {"pytest-xdist", "ruff", "mypy", "build", "types-pyyaml"}


def declared(requirements: Iterable[str]) -> set[str]:
    """Names of distributions as they are compared: lower case, hyphens."""
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def imported(*folders: str) -> set[str]:
    """Distributions that the files of these folders import, anywhere in them, for type checkers
    too."""

    def names(tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                yield node.args[0].value

    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    if "mlx_diffgemma" in folders:  # rglob passes links by
        files += (ROOT / "mlx_diffgemma" / "convert").glob("*.py")
    assert files, folders
    local = OWN | {path.stem for path in files if "mlx_diffgemma" not in folders}
    found = {
        name.split(".")[0] for path in files for name in names(ast.parse(path.read_text("utf-8")))
    }
    found -= local | set(sys.stdlib_module_names)
    return {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in found}


def test_the_package_declares_what_it_imports_and_no_more():
    needed, given = imported("mlx_diffgemma"), declared(PROJECT["dependencies"])
    extras = declared(EXTRAS["train"]) | declared(EXTRAS["video"])
    assert needed - given == extras, "only the curves of a run, and videos, are an extra"
    assert given - needed == READ_BY_TRANSFORMERS


def test_the_test_extra_declares_what_tests_import_and_no_more():
    needed, given = imported("tests", "recipes"), declared(EXTRAS["test"])
    assert needed - given <= declared(PROJECT["dependencies"]) | ELSEWHERE
    assert given - needed == TOOLS | declared(EXTRAS["train"])


def test_the_bench_extra_declares_what_benchmarks_import_and_no_more():
    needed, given = imported("bench"), declared(EXTRAS["bench"])
    assert needed - given <= declared(PROJECT["dependencies"])
    assert given <= needed


def test_linux_gets_a_backend_of_mlx_from_either_extra():
    for extra in ("cpu", "cuda"):
        assert declared(EXTRAS[extra]) == {"mlx"}
        assert "Linux" in EXTRAS[extra][0]


def test_both_extras_hold_the_same_reference():
    pins = {
        extra: {line for line in EXTRAS[extra] if line.startswith(("transformers", "torch"))}
        for extra in ("test", "bench")
    }
    assert pins["test"] == pins["bench"]
    assert len(pins["test"]) == 2 and all("==" in pin for pin in pins["test"])


# --- the description ---


@pytest.fixture(scope="module")
def description():
    spec = spec_from_file_location("package_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.description


def test_the_description_is_the_readme_without_relative_links(description):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = description(readme)
    assert relative_links(shown) == []
    assert "https://" in shown and shown.splitlines()[0] == readme.splitlines()[0]
    for block in re.findall(r"^```.*?^```", readme, re.DOTALL | re.MULTILINE):
        assert block in shown


@pytest.mark.parametrize(
    ("readme", "shown"),
    [
        ("See [the page](docs/a.md#b) now.", "See the page now."),
        ("[a](https://x.org/b) [c](#d) [m](mailto:a@b.org)", None),
        ("![run](docs/run.svg)\ntext", "\ntext"),
        ('<img alt="run" src="docs/run.svg" width="600">text', "text"),
        ("![run](https://x.org/run.svg)", None),
        ("[![run](docs/run.svg)](docs/run.md)", ""),
        ("[a](LICENSE), [b](../c)", "a, b"),
    ],
)
def test_relative_links_become_text_and_others_stay(description, readme, shown):
    assert description(readme) == (readme if shown is None else shown)
    assert bool(relative_links(readme)) == (shown is not None)
    assert relative_links(description(readme)) == []


@pytest.mark.parametrize(
    "text",
    ["[a]: docs/a.md", '<a href="docs/a.md">a</a>', "<source srcset='docs/dark.svg'>"],
)
def test_the_check_sees_other_forms_of_links(text):
    assert len(relative_links(text)) == 1
    assert relative_links(f"```html\n{text}\n```") == []
    assert relative_links(text.replace("docs/", "https://x.org/")) == []
