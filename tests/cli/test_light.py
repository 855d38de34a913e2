"""No command imports what takes seconds before it needs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mlx_diffgemma import bundled_model
from tests.checkpoint.test_adapters import with_adapters
from tests.checkpoints import draw_config, write_checkpoint
from tests.language.tokenizer_files import KNOWN, trained, write
from tests.sampled import first

HEAVY = "transformers", "torch", "mlx_lm", "huggingface_hub", "httpx2"
BUNDLED = bundled_model()
COUNT = "Count from 12 to 15."
COMMANDS = {
    "generate": ["--prompt", "Sort: 3 1 2", "--max-tokens", "16"],
    "fill": ["12 {{gap:1}} 14", "--prompt", COUNT],
    "batch": ["--input", "in.jsonl", "--output", "out.jsonl"],
    "chat": ["--prompt", "Sort: 3 1 2"],
    "edit": ["notes.txt", "--select", "1:1-1:2", "--prompt", "x"],
    "decide": ["12 13", "--question", "Is 12 first?"],
    "info": [],
    "convert": ["--hf-path", str(BUNDLED), "--mlx-path", "made", "-q", "--q-group-size", "32"],
    "doctor": ["--only", "answers", "--model", str(BUNDLED)],
}
PICTURE = ["--image", str(BUNDLED / "shapes.png"), "--prompt", "Colour?", "--max-tokens", "16"]
SCHEMA = ["--prompt", "x", "--json-schema", '{"type": "integer"}']


def told(command: str, *arguments: str, cwd: Path) -> list[str]:
    """Run a command; return what it has imported of HEAVY."""
    words = ["mlx_diffgemma", command, *arguments]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(words=words, main="__main__")],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )
    assert "Error" not in done.stderr and done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("imported: ")[2])


_PROGRAM = f"""
import atexit, json, sys
sys.argv = {{words}}
imported = lambda: [name for name in {HEAVY} if sys.modules.get(name)]
atexit.register(lambda: print("imported:", json.dumps(imported())))
from mlx_diffgemma.{{main}} import main
main()
"""


@pytest.mark.parametrize("command", first(4, [*COMMANDS]))
def test_a_command_imports_neither_transformers_nor_torch(command, tmp_path):
    (tmp_path / "notes.txt").write_text("a b\n")
    (tmp_path / "in.jsonl").write_text('{"prompt": "Sort: 3 1 2"}\n')
    assert told(command, *COMMANDS[command], cwd=tmp_path) == []


@pytest.mark.parametrize("options", first(1, [PICTURE, SCHEMA]))
def test_nor_do_pictures_and_constraints(options, tmp_path):
    assert told("generate", *options, cwd=tmp_path) == []


def test_nor_does_a_model_with_tokenizer_files_as_published(tmp_path):
    size = len(trained()["model"]["vocab"])
    model = write_checkpoint(tmp_path / "model", draw_config(0, vocab_size=size), 0)
    write(model, KNOWN["as published"], (BUNDLED / "chat_template.jinja").read_text())
    options = ["--model", str(model), "--prompt", "to be", "--max-tokens", "16"]
    assert told("generate", *options, cwd=tmp_path) == []


def test_adapters_bring_mlx_lm(tmp_path):
    """So that the tests above can fail."""
    adapters = with_adapters(BUNDLED, tmp_path / "adapters")
    options = ["--adapter-path", str(adapters), "--prompt", "x", "--max-tokens", "16"]
    assert "mlx_lm" in told("generate", *options, cwd=tmp_path)


def test_the_server_imports_them_for_no_request(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _PROGRAM.format(words=["mlx_diffgemma.serve", "--port", "0"], main="cli.serve"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        lines = iter(process.stderr.readline, "")
        url = next(filter(None, (re.search(r"at (http://[^ ]*/v1)", line) for line in lines)))[1]
        tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
        body = {
            "messages": [{"role": "user", "content": COUNT}],
            "tools": [{"type": "function", "function": tool}],
            "max_tokens": 16,
        }
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["choices"]
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert json.loads(out.rpartition("imported: ")[2]) == []
