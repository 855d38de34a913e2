"""What a person meets whose installation lacks something: MLX's backend, or torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlx_diffgemma import DiffGemmaError, errors
from mlx_diffgemma.errors import BackendError, backend_error
from tests.sampled import one_in

ROOT = Path(__file__).parent.parent
# As without any wheel of MLX, and as with the one of Linux without a backend.
MISSING = "ModuleNotFoundError(f'No module named {name!r}', name=name)"
BROKEN = "ImportError('libmlx.so: cannot open it', name='core', path='/lib/mlx/core.abi3.so')"
WITHOUT_MLX = """
import sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "mlx":
            raise {error}
sys.meta_path.insert(0, Finder)
"""
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = None\n"
COMMANDS = {
    "generate": ["--prompt", "hi"],
    "chat": ["--prompt", "hi"],
    "fill": ["a {{gap}}"],
    "edit": ["notes.txt", "--select", "1:1-1:2", "--prompt", "hi"],
    "train": ["--train", "--model", "model", "--data", "data"],
    "fuse": ["--model", "model"],
    "convert": ["--hf-path", "model"],
    "doctor": [],
}


def python(program: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | more
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.mark.parametrize("error", [MISSING, BROKEN], ids=["missing", "without a backend"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_mlx_says_in_one_line_what_to_install(command, error, tmp_path):
    (tmp_path / "notes.txt").write_text("a b\n")
    (tmp_path / "model").symlink_to(ROOT / "mlx_diffgemma" / "demo")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["mlx_diffgemma", command, *COMMANDS[command]]
    done = python(
        WITHOUT_MLX.format(error=error)
        + f"sys.argv = {words!r}\nfrom mlx_diffgemma.__main__ import main\nmain()",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MLX cannot be used here")
    if sys.platform == "linux":
        assert "[cpu]' (or '" in line and "[cuda]' for NVIDIA cards)" in line


@pytest.mark.parametrize("error", [MISSING, BROKEN], ids=["missing", "without a backend"])
def test_public_names_without_mlx_raise_an_error_of_both_kinds(error):
    done = python(
        WITHOUT_MLX.format(error=error) + "import mlx_diffgemma\n"
        "for kind in (ImportError, mlx_diffgemma.DiffGemmaError):\n"
        "    try:\n"
        "        from mlx_diffgemma import generate\n"
        "    except kind as caught:\n"
        "        print(caught)\n"
        "mlx_diffgemma.load_tokenizer(mlx_diffgemma.bundled_model())\n"  # needs no MLX
        "mlx_diffgemma.load"
    )
    assert len(set(done.stdout.splitlines())) == 1 and len(done.stdout.splitlines()) == 2
    assert "pip install " in done.stdout
    trace = done.stderr.splitlines()
    assert trace[-1].startswith("mlx_diffgemma.errors.BackendError: MLX cannot be used here")
    assert len(trace) <= 8 and sum("Traceback" in line for line in trace) == 1


def test_other_imports_that_fail_keep_their_error():
    assert backend_error(ImportError("no numpy", name="numpy")) is None
    assert backend_error(ImportError("no mlx_lm", name="mlx_lm")) is None
    assert backend_error(ImportError("nothing known")) is None
    found = backend_error(ModuleNotFoundError("No module named 'mlx'", name="mlx"))
    assert isinstance(found, BackendError)
    assert isinstance(found, DiffGemmaError) and isinstance(found, ImportError)


@pytest.mark.parametrize("origin", ["checkout", "index", "gone", "nothing"])
def test_the_missing_backend_is_installed_from_where_the_package_came(
    origin, tmp_path, monkeypatch
):
    """From the folder that pip was given, if it is still there, else from the index."""

    class Installed:
        def read_text(self, name):
            folder = tmp_path / ("a b" if origin == "checkout" else "gone")
            assert name == "direct_url.json"
            return None if origin == "index" else json.dumps({"url": folder.as_uri()})

    def from_name(name):
        if origin == "nothing":
            raise errors.PackageNotFoundError(name)
        return Installed()

    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(errors.Distribution, "from_name", from_name)
    monkeypatch.setattr(errors.platform, "system", lambda: "Linux")
    said = str(backend_error(ModuleNotFoundError("No module named 'mlx'", name="mlx")))
    if origin == "checkout":
        assert said.endswith(
            f"; run in {tmp_path}/a b: pip install '.[cpu]' (or '.[cuda]' for NVIDIA cards)"
        )
    else:
        assert "; run: pip install 'mlx-diffgemma[cpu]' (or 'mlx-diffgemma[cuda]'" in said


# --- torch ---

QUIET = {
    "load": "from mlx_diffgemma import load, bundled_model\nload(bundled_model())",
    "tokenizer": "from mlx_diffgemma import load_tokenizer, bundled_model\n"
    "load_tokenizer(bundled_model()).transformers",
    "prompt": "from mlx_diffgemma import encode_prompt",
    "deep": "import mlx_diffgemma.write.generate, mlx_diffgemma.train.session",
    "command": "sys.argv = ['mlx_diffgemma', 'generate', '--prompt', 'Sort: 3 1 2', '--verbose', "
    "'false']\nfrom mlx_diffgemma.__main__ import main\nmain()",
}


def test_transformers_says_that_torch_is_missing_where_nobody_stops_it():
    assert "PyTorch" in python(WITHOUT_TORCH + "import transformers").stderr


@pytest.mark.parametrize("name", one_in(3, QUIET))
def test_nothing_says_that_torch_is_missing(name):
    done = python(WITHOUT_TORCH + QUIET[name])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("command", ["generate", "info", "fill", "train"])
def test_no_command_imports_torch(command):
    arguments = {"generate": ["Sort: 3 1 2"], "fill": ["12 {{gap:1}} 14"]}
    arguments |= {"train": ["--test", "--data", "nowhere"], "info": []}
    told = python(
        f"import atexit, sys\nsys.argv = {['mlx_diffgemma', command, *arguments[command]]}\n"
        "atexit.register(lambda: print('torch', bool(sys.modules.get('torch'))))\n"
        "from mlx_diffgemma.__main__ import main\nmain()"
    )
    assert told.stdout.endswith("torch False\n"), told


STATE = """
import logging, os
theirs = logging.getLogger("transformers")
print(theirs.level, theirs.filters, theirs.propagate, len(theirs.handlers), logging.root.handlers)
print({k: v for k, v in os.environ.items() if k.startswith("TRANSFORMERS")})
"""


@pytest.mark.parametrize("before", [{}, {"TRANSFORMERS_NO_ADVISORY_WARNINGS": ""}])
def test_the_logging_of_a_program_is_what_transformers_alone_makes_it(before):
    alone = python(WITHOUT_TORCH + "import transformers\n" + STATE, **before)
    ours = python(WITHOUT_TORCH + QUIET["tokenizer"] + STATE, **before)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout == alone.stdout
