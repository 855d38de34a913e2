"""Clients that are too heavy for every change, each in its own environment and as it was published,
against the real server; and Open WebUI's own requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlx_diffgemma import GenerationSettings
from tests.serve.cases import SORTED, Running, ask, get, post, scripted, serving

PACKAGES = ("llm==0.36", "litellm==1.110.2", "pydantic-ai-slim[openai]==2.68.0")
AIDER = "aider-chat==0.86.2"  # wants another litellm
PROGRAM = Path(__file__).with_name("client_calls.py")
# What pip says where there is no registry.
UNREACHABLE = ("connection broken", "NameResolutionError", "Failed to establish", "timed out")
NUMBER = {"n", "ok"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment with the clients."""
    return environment(tmp_path_factory.mktemp("clients"), *PACKAGES)


def environment(folder: Path, *packages: str) -> Path:
    """Make an environment with some packages; return the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    words = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(words, env=clean(), capture_output=True, text=True)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip(f"no package registry: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def clean(**more: str) -> dict[str, str]:
    """The environment without this checkout, and without keys and proxies of the person."""
    hidden = ("PYTHONPATH", "LD_PRELOAD", "VIRTUAL_ENV")
    kept = {k: v for k, v in os.environ.items() if k not in hidden}
    return {k: v for k, v in kept.items() if not k.startswith(("OPENAI_", "ANTHROPIC_"))} | more


def called(installed: Path, client: str, url: str) -> dict:
    words = [installed / "python", PROGRAM, client, url]
    done = subprocess.run(words, env=clean(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_llm_with_its_yaml(installed, server, tmp_path):
    """The file of docs/clients.md."""
    page = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
    text = page.split("extra-openai-models.yaml")[1].split("```yaml\n")[1].split("```")[0]
    models = yaml.safe_load(text)
    models[0] |= {"model_name": "bundled", "api_base": server.url}
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))

    def llm(*words: str) -> subprocess.CompletedProcess:
        asked = [installed / "llm", *words]
        env = clean(LLM_USER_PATH=str(tmp_path))
        return subprocess.run(asked, env=env, capture_output=True, text=True, timeout=300)

    def said(*words: str) -> str:
        done = llm("-m", models[0]["model_id"], "Sort: 6 3 1 7", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said() == said("--no-stream") == SORTED
    assert said("-s", "Be short.", "-o", "temperature", "0.5", "-o", "max_tokens", "3")
    usage = llm("logs", "-n", "1", "--usage").stdout
    assert "3 output" in usage, usage
    for more in ((), ("--no-stream",)):
        assert set(json.loads(said("--schema", "n int, ok bool", *more))) == NUMBER
    assert said("-T", "llm_version")
    refused = llm("-m", models[0]["model_id"], "x", "-o", "top_p", "0.5")
    assert refused.returncode == 1 and "top_p is not supported" in refused.stderr


@pytest.mark.long
def test_litellm(installed, server):
    found = called(installed, "litellm", server.url)
    assert found["chat"] == found["stream"] == found["anthropic"] == found["responses"] == SORTED
    assert found["tokens"] == [29, 8] and found["streamed tokens"] == 37
    ((name, arguments),) = found["called"]
    assert name == "weather" and arguments["city"] in ("Oslo", "Rome")
    assert json.loads(found["streamed call"])["city"] in ("Oslo", "Rome")
    assert set(json.loads(found["schema"])) == NUMBER
    text, calls = found["either"]
    assert calls or set(json.loads(text)) == NUMBER
    assert isinstance(json.loads(found["object"]), dict)
    assert "there is no model 'none'" in found["refusal"]


@pytest.mark.long
def test_pydantic_ai(installed, server):
    for kind, found in called(installed, "pydantic_ai", server.url).items():
        assert found["text"] == found["stream"] == SORTED, kind
        assert set(found["tool output"]) == set(found["native output"]) == NUMBER, kind


@pytest.mark.long
def test_an_agent_of_pydantic_ai_calls_a_tool_and_answers_in_a_form(installed):
    call = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
    with serving(model=scripted(call, '{"city": "Rome", "sunny": true}')) as running:
        found = called(installed, "agent", running.url)
    assert found == {"asked": ["Rome"], "report": {"city": "Rome", "sunny": True}}
    assert not running.bugs


@pytest.mark.long
def test_aider_edits_a_file(tmp_path):
    programs = environment(tmp_path / "aider", AIDER)
    work = tmp_path / "work"
    work.mkdir()
    file = work / "hello.py"
    file.write_text("print('before')\n")
    said = "hello.py\n```\nprint('after')\n```\n"
    with reading_long_prompts(said) as running:
        env = clean(OPENAI_API_BASE=running.url, OPENAI_API_KEY="none", HOME=str(work))
        quiet = ("--yes-always", "--no-git", "--no-check-update", "--analytics-disable")
        words = [programs / "aider", "--model", "openai/bundled", "--message", "Say after.", *quiet]
        done = subprocess.run(
            [*words, file.name], cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True
        )
    assert done.returncode == 0 and not running.bugs, done.stderr
    assert file.read_text() == "print('after')\n"


@contextmanager
def reading_long_prompts(*texts: str) -> Iterator[Running]:
    """Serve a model that answers with these texts, to prompts of any length."""
    model, tokenizer = scripted(*texts)
    text = replace(model.config.text, max_position_embeddings=1 << 20)  # letters are tokens
    model.config = replace(model.config, text=text)
    settings = GenerationSettings(prefill_step_size=1 << 20)  # the script reads a prompt at once
    with serving(model=(model, tokenizer), settings=settings) as running:
        yield running


# Open WebUI, from its backend: routers/openai.py, routers/tasks.py, utils/payload.py.
TASK = """### Task:
Generate a concise title summarizing the chat history.
### Output:
JSON format: { "title": "your concise title here" }
### Chat History:
<chat_history>
USER: Sort: 6 3 1 7
ASSISTANT: 1 3 6 7
</chat_history>"""
TITLE = '{ "title": "Sorting" }'


def test_open_webuis_requests_are_answered():
    """It lists models, streams a chat with its settings and usage, and asks for a title."""
    with reading_long_prompts(SORTED, TITLE) as running:
        (listed,) = get(running, "/v1/models", Authorization="Bearer none").json["data"]
        assert (listed["id"], listed["object"]) == ("bundled", "model")
        spoken = {
            "stream": True,
            "model": listed["id"],
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "Sort: 6 3 1 7"}]},
            ],
            "stream_options": {"include_usage": True},
            "temperature": 0.8,
            "min_p": 0.05,
            "seed": 3,
            "reasoning_effort": "none",
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "logit_bias": {},
        }
        *chunks, usage, done = ask(running, post("/v1/chat/completions", spoken)).events
        title = ask(
            running,
            post(
                "/v1/chat/completions",
                {
                    "model": listed["id"],
                    "messages": [{"role": "user", "content": TASK}],
                    "stream": False,
                    "max_completion_tokens": 1000,
                },
            ),
        )
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == SORTED
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] > 0 and done == "[DONE]"
    assert json.loads(title.json["choices"][0]["message"]["content"]) == {"title": "Sorting"}
