"""Claude Code and Codex themselves against the server: each is asked for one command, runs it, and
sends its output back. The model follows a script. Not a test, since the programs come from npm:

    npm install @anthropic-ai/claude-code @openai/codex
    python -m tests.serve.agents --bin node_modules/.bin
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_diffgemma import GenerationSettings
from tests.serve.cases import Running, scripted, serving

COMMAND, PRINTED = "printf from-the-; echo shell", "from-the-shell"
THOUGHT = "<|channel>thought\nLet me see.<channel|>"
SAID = "It printed that."
CODEX_CONFIG = """
model = "bundled"
model_provider = "local"
model_context_window = 262144

[model_providers.local]
name = "mlx_diffgemma"
base_url = "{url}"
wire_api = "responses"
"""


def call(tool: str, argument: str) -> str:
    text = f'<|"|>{COMMAND}<|"|>'
    return f"{THOUGHT}I run it.<|tool_call>call:{tool}{{{argument}:{text}}}<tool_call|>"


def claude(folder: Path, home: Path, running: Running) -> list[str]:
    del home
    os.environ |= {
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{running.port}",
        "ANTHROPIC_AUTH_TOKEN": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    shown = ["--output-format", "stream-json", "--verbose"]
    return [str(folder / "claude"), "-p", "Run it.", "--allowedTools", "Bash", *shown]


def codex(folder: Path, home: Path, running: Running) -> list[str]:
    (home / "config.toml").write_text(CODEX_CONFIG.format(url=running.url))
    os.environ["CODEX_HOME"] = str(home)
    return [str(folder / "codex"), "exec", "--skip-git-repo-check", "Run it."]


Start = Callable[[Path, Path, Running], list[str]]
AGENTS: dict[str, tuple[Start, str]] = {
    "claude": (claude, call("Bash", "command")),
    "codex": (codex, call("exec_command", "cmd")),
}


def run(name: str, folder: Path) -> bool:
    """Whether an agent runs the command of the model, and shows the model's last words."""
    start, first = AGENTS[name]
    model, tokenizer = scripted(first, SAID, SAID)
    text = replace(model.config.text, max_position_embeddings=1 << 20)  # letters are tokens
    model.config = replace(model.config, text=text)
    settings = GenerationSettings(prefill_step_size=1 << 20)  # the script reads a prompt at once
    with (
        TemporaryDirectory() as home,
        serving(model=(model, tokenizer), settings=settings) as running,
    ):
        running.state.aliases = ("claude-*",)
        os.environ["HOME"] = home
        words = start(folder.resolve(), Path(home), running)
        done = subprocess.run(
            words, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        told = f"{done.stdout}\n{done.stderr}"
        works = done.returncode == 0 and PRINTED in told and SAID in told and not running.bugs
        print(f"{name}: {'works' if works else 'FAILS'}; {'; '.join(running.lines)}")
        if not works:
            print(told)
    return works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", type=Path, required=True, help="folder of claude and codex")
    folder = parser.parse_args().bin
    working = [run(name, folder) for name in AGENTS]
    sys.exit(not all(working))


if __name__ == "__main__":
    main()
