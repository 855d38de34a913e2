"""The house rules that a machine can check: one direction of imports, light imports, one place for
styling."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mlx_diffgemma

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_diffgemma"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The reading order. A file imports only wings that stand before its own, and files of its own
# wing that stand before it.
WINGS = {
    "errors": "",
    "events": "",
    "config": "entry reading formats refusals policies generation generation_file quantization "
    "vision images model learning_rate training serving",
    "language": "known_tokenizer chat_template of_transformers tokenizer controls tools bombs "
    "pictures images video encoded given media prompt template stops text",
    "constraint": "dfa ranges minimise net build characters regex search json_text formats dialect "
    "facts strings negation alternatives keys values schema parts tool_calls python_types "
    "constraint groups vocabulary utf8 tokens line decode marginals",
    "model": "backend elementary switch_linear products layers rope masks context attention "
    "experts self_conditioning vision stack images columns diffusion_gemma fused",
    "checkpoint": "choice files headers cache names layouts tied memory blas factors peft adapters "
    "weights load variants info",
    "denoise": "schedule sampler classes constrained pinned noise stopping ahead standing canvas "
    "prefix plans warm images store_format store_files store checked row conditioning step loop",
    "write": "job verbose constrained regions lengths writer generate fill edit questions decide "
    "said chat_file chat_images chat",
    "engine": "run engine",
    "train": "pictures data batches objective optimizer checkpoint trainer curves session fuse",
    "doctor": "outcome device exact random_models products experts attention kernels sampling "
    "writes whole checks published floors machine made_up speed answers report block run",
    "view": "pages report trace",
    "serve": "errors limits images fetch metrics pieces threads state page runs log sse body "
    "security structured openai_types page_settings openai_chat decisions fills fim completions "
    "infill edits responses_types responses_store responses_items responses anthropic_types "
    "anthropic status steps forms events app server",
    "batch": "lines answers run decisions requests",
    "convert": "recipe sources origin plan card journal shards record write verify",
    "cli": "interrupt program usage options constraints render render_convert render_train "
    "render_watch render_doctor render_chat render_batch output lines session lines_of_file "
    "convert generate chat fill edit decide info doctor models train fuse batch serve",
    "__main__": "",
    "demo": "",
}
ORDER = list(WINGS)
PUBLIC_FROM_ELSEWHERE = re.compile(r"from mlx_diffgemma\.([\w.]+) import (\([^)]*\)|[^#\n]*)")
# These call a command and are called by nobody.
ENTRIES = {"__main__", "as_module"}


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, of all packages; a package's own file ends in `.__init__`."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "convert").glob("*.py")]  # rglob passes links by
    return {
        ".".join(("mlx_diffgemma", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in sorted(set(files))
    }


def is_entry(name: str) -> bool:
    return bool(set(name.split(".")[2:]) & ENTRIES)


def imports(name: str, *, typing_too: bool = False) -> Iterator[str]:
    """What a module imports, anywhere in it; what is there for type checkers only on request."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_typing and not typing_too:
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            target = [*base, *(node.module or "").split(".")] if node.module else base
            submodules = [".".join([*target, alias.name]) for alias in node.names]
            inner = [module for module in submodules if module in modules()]
            yield from inner or [".".join(target)]


def place(name: str) -> tuple[int, int]:
    """(place of a module's wing, its place in the wing; the wing's own `__init__` comes last)."""
    _, wing, *rest = name.split(".")
    files = WINGS[wing].split()
    return ORDER.index(wing), files.index(rest[0]) if rest and rest[0] in files else len(files)


def run(program: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_file_is_listed_in_its_wing():
    found: dict[str, set[str]] = {}
    for name in modules():
        _, wing, *rest = name.split(".")
        if wing != "__init__" and not is_entry(name):
            found.setdefault(wing, set()).update(set(rest) - {"__init__"})
    assert found == {wing: set(files.split()) for wing, files in WINGS.items()}


def test_imports_point_upstream():
    for name in modules():
        if name == "mlx_diffgemma.__init__" or is_entry(name):  # resolves names on first use
            continue
        for target in imports(name, typing_too=True):
            if target.split(".")[0] == "mlx_diffgemma" and target != "mlx_diffgemma":
                assert place(target) < place(name), f"{name} imports {target}, which is downstream"


def test_only_commands_import_the_converter():
    for name in modules():
        if name.split(".")[1] not in ("convert", "cli"):
            assert not any(t.startswith("mlx_diffgemma.convert") for t in imports(name)), name


def test_one_file_imports_transformers():
    """It keeps quiet what transformers has to say; others name its types only."""
    importing = [
        name
        for name, path in modules().items()
        for node in ast.parse(path.read_text()).body  # functions run later
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        and "from transformers" in ast.unparse(node)
    ]
    assert importing == ["mlx_diffgemma.language.of_transformers"]


def test_the_package_imports_neither_tests_nor_benchmarks():
    for name in modules():
        assert not {t.split(".")[0] for t in imports(name)} & {"tests", "bench", "convert"}, name


def test_packages_of_the_project_are_those_on_disk():
    on_disk = {
        name.removesuffix(".__init__") for name in modules() if name.endswith(".__init__")
    } | {"mlx_diffgemma.cli.as_module"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_module_imports():
    names = [name.removesuffix(".__init__") for name in modules()]
    run(f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)")


def test_python_m_runs_every_command():
    for command in PROJECT["project"]["scripts"]:
        helped = subprocess.run(
            [sys.executable, "-m", command, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert helped.returncode == 0, helped.stderr
        assert "Usage" in helped.stdout, command


def test_python_m_runs_a_command_by_its_deep_path_too():
    for command in PROJECT["project"]["scripts"]:
        deep = command.replace(".", ".cli.")
        told = subprocess.run(
            [sys.executable, "-m", deep, "--version"], capture_output=True, text=True, cwd=ROOT
        )
        assert told.returncode == 0 and told.stdout.startswith("mlx-diffgemma "), deep


def test_importing_the_package_and_its_commands_loads_nothing_heavy():
    heavy = "mlx", "transformers", "torch", "tokenizers", "huggingface_hub", "jinja2", "numpy"
    commands = [
        f"mlx_diffgemma.cli.{name}" for name in WINGS["cli"].split() if "render" not in name
    ]
    loaded = run(
        f"import importlib, sys\nimport mlx_diffgemma, mlx_diffgemma.__main__\n"
        f"for name in {commands!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_config_headers_and_info_read_a_checkpoint_without_mlx():
    loaded = run(
        "import sys\nfrom mlx_diffgemma.checkpoint.info import describe\n"
        "from mlx_diffgemma import bundled_model\ndescribe(bundled_model())\n"
        "print([name for name in ('mlx', 'transformers', 'torch') if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_public_names_resolve_and_others_do_not():
    for name in mlx_diffgemma.__all__:
        assert callable(getattr(mlx_diffgemma, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mlx_diffgemma.nonsense  # noqa: B018


FIRST_IMPORTS = [
    "import mlx_diffgemma",
    "import mlx_diffgemma.generate",
    "import mlx_diffgemma.write.generate, mlx_diffgemma.checkpoint.load",
    "import mlx_diffgemma.checkpoint.load as name",
    "from mlx_diffgemma.write.generate import BatchResponse",
    "from mlx_diffgemma import load, generate",
    "from mlx_diffgemma import generate; import mlx_diffgemma.generate",
    "import mlx_diffgemma.cli.generate",
    "import importlib; importlib.import_module('mlx_diffgemma.generate')",
    "from mlx_diffgemma import *",
]


def test_generate_and_load_stay_functions_whatever_is_imported_first():
    run(
        "import sys, types\n"
        f"for statement in {FIRST_IMPORTS!r}:\n"
        "    for name in [n for n in sys.modules if n.split('.')[0] == 'mlx_diffgemma']:\n"
        "        del sys.modules[name]\n"
        "    exec(statement, {})\n"
        "    for _ in range(2):\n"
        "        import mlx_diffgemma\n"
        "        assert isinstance(mlx_diffgemma.generate, types.FunctionType), statement\n"
        "        assert isinstance(mlx_diffgemma.load, types.FunctionType), statement\n"
        "        import mlx_diffgemma.generate, mlx_diffgemma.checkpoint.load\n"
    )


def test_only_render_files_style_text():
    for name, path in modules().items():
        text = path.read_text()
        styles = any(target.split(".")[0] == "rich" for target in imports(name))
        styles |= any(code in text for code in ("\x1b", "\\x1b", "\\033", "\\u001b", "secho"))
        assert not styles or name.startswith("mlx_diffgemma.cli.render"), name


def test_only_two_files_reach_the_network():
    network = {"huggingface_hub", "httpx2", "httpx", "requests", "urllib", "socket", "http"}
    for name in modules():
        reaches = {target.split(".")[0] for target in imports(name)} & network
        # Models; and images by their address, which the server reads only where it is told to.
        allowed = {"mlx_diffgemma.checkpoint.files", "mlx_diffgemma.serve.fetch"}
        if reaches == {"socket"}:
            allowed.add("mlx_diffgemma.serve.server")  # listens
        if reaches == {"huggingface_hub"}:
            allowed.add("mlx_diffgemma.checkpoint.cache")  # only what is on this machine
        assert not reaches or name in allowed, (name, reaches)


def test_nothing_is_unpickled():
    for name, path in modules().items():
        assert not {t.split(".")[0] for t in imports(name)} & {"pickle", "torch", "dill"}, name
        assert "trust_remote_code=True" not in path.read_text(), name


# The tokenizers library raises a bare Exception for a damaged file, so nothing narrower catches it.
ALLOWED_BROAD_EXCEPTS = {
    "mlx_diffgemma.language.known_tokenizer": 1,
    "mlx_diffgemma.language.of_transformers": 1,
    "mlx_diffgemma.language.pictures": 1,  # so do Pillow's readers, of every kind
    # Listeners and jobs are other people's code; their errors end their own row or request.
    "mlx_diffgemma.denoise.loop": 1,
    "mlx_diffgemma.engine.engine": 3,
    "mlx_diffgemma.serve.runs": 1,  # passed on to the client
    "mlx_diffgemma.serve.security": 1,  # a bug is answered with status 500
}


def test_no_error_is_caught_without_naming_its_kind():
    for name, path in modules().items():
        broad = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ExceptHandler)
            and ast.unparse(node.body[-1]) != "raise"  # tidies up and lets the error go on
            and (
                node.type is None
                or {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                & {"Exception", "BaseException"}
            )
        ]
        assert len(broad) == ALLOWED_BROAD_EXCEPTS.get(name, 0), (name, broad)


def test_only_commands_print_and_verbose_as_mlx_lm_does():
    for name, path in modules().items():
        if name.startswith("mlx_diffgemma.cli") or name == "mlx_diffgemma.write.verbose":
            continue
        assert "sys.stdout" not in path.read_text(), name
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Name) and node.id == "print"), (name, node.lineno)


def test_no_file_and_no_function_is_long():
    for name, path in modules().items():
        source = path.read_text()
        assert source.count("\n") <= 450, f"{name}: cut it by meaning"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}: {node.name}"


def test_what_is_public_is_imported_from_the_package_itself():
    folders = ("bench", "docs", "recipes", "tests")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in [*code, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        found = PUBLIC_FROM_ELSEWHERE.findall(path.read_text(encoding="utf-8"))
        deep = [
            (home, word)
            for home, words in found
            for word in re.findall(r"\w+", words)
            if mlx_diffgemma._HOME.get(word) == home
        ]
        assert not deep, f"{path.name}: import these from mlx_diffgemma: {deep}"
