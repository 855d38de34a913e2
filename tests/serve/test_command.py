"""`mlx_diffgemma.serve` as a program: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_diffgemma import bundled_model
from mlx_diffgemma.cli.serve import _hello
from mlx_diffgemma.config.training import DEFAULT_KEYS
from tests.checkpoint.test_adapters import with_adapters
from tests.engine.cases import PATIENCE
from tests.sampled import first
from tests.serve.cases import COUNT, SORTED, chat

ROOT = Path(__file__).parents[2]
LONG = ("--max-denoising-steps", "200", "--stability-threshold", "200")

SAY = [{"role": "user", "content": "Write something."}]


class Program:
    """The program under way."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_diffgemma.serve", "--port", "0", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.lines: list[str] = []
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches."""

        def found():
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self.changed:
            assert self.changed.wait_for(found, PATIENCE), self.lines
            return found()

    @property
    def url(self) -> str:
        return self.line(r"at (http://[^ ]*/v1)")[1]

    def ended(self, most: float = PATIENCE) -> int:
        code = self.process.wait(most)
        self.reader.join(PATIENCE)
        return code


@contextmanager
def program(*options: str, **environment: str):
    running = Program(*options, **environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def curl(*arguments: str) -> str:
    return subprocess.run(
        ["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("fd00::7", "[fd00::7]"),
        ("box.example", "box.example"),
    ],
)
def test_the_address_that_is_printed_is_one_that_clients_can_use(host, shown):
    first_line, call = _hello("m", host, 8080, has_key=False)
    assert f" http://{shown}:8080/v1, " in first_line
    assert call.startswith(f"curl http://{shown}:8080/v1/chat/completions ")


def test_it_prints_its_address_and_a_curl_call_that_works():
    with program() as running:
        url = running.url
        call = shlex.split(running.line("^curl .*")[0])
        assert call[1].startswith(url)
        answer = json.loads(curl(*call[1:]))
        assert answer["choices"][0]["message"]["content"] == SORTED
        running.line(r"^POST /v1/chat/completions 200 29\+8 tokens \d+ steps \d+ ms$")
        running.process.send_signal(signal.SIGINT)
        assert running.ended() == 0
    assert "bundled model" in running.lines[0]
    assert len(running.lines) == 4  # note, address, curl, request


@pytest.mark.parametrize("option", [(), ("--no-vision",)])
def test_without_vision_it_reads_no_images(option):
    with program(*option) as running:
        address = f"{running.url.removesuffix('/v1')}/x/settings"
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            assert (json.load(answer)["images"] is None) == bool(option)


@pytest.mark.long
def test_the_key_comes_from_the_environment_and_is_not_printed():
    key = "a key of this test"
    with program("--quiet", MLX_DIFFGEMMA_API_KEY=key) as running:
        call = running.line("^curl .*")[0]
        assert json.loads(curl(f"{running.url}/models"))["error"]["code"] == "invalid_api_key"
        shell = subprocess.run(
            ["sh", "-c", f"{call} -sS"],
            env=os.environ | {"MLX_DIFFGEMMA_API_KEY": key},
            capture_output=True,
            text=True,
        )
        assert json.loads(shell.stdout)["choices"][0]["message"]["content"] == SORTED
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0
    assert not [line for line in running.lines if key in line or line.startswith("POST")]


@pytest.mark.parametrize("stream", first(1, [True, False]))
def test_ctrl_c_ends_within_two_seconds_and_answers_what_is_under_way(stream):
    body = json.dumps(chat(COUNT, stream=stream))
    with program(*LONG) as running:
        request = subprocess.Popen(
            ["curl", "-sSN", "-w", "%{http_code}", f"{running.url}/chat/completions", "-d", body],
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(1.5)  # it is being written
        start = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        told = request.communicate(timeout=PATIENCE)[0]
        assert running.ended() == 0
        assert time.monotonic() - start < 2 * slack()
    if stream:
        last = told.removesuffix("200").strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert told.endswith("503")
        error = json.loads(told.removesuffix("503"))["error"]
    assert "ends" in error["message"] and error["type"] == "service_unavailable_error"


def slack() -> float:
    """How much longer a busy machine may take."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.long
def test_a_second_ctrl_c_ends_at_once():
    with program(*LONG) as running:
        assert running.url
        running.process.send_signal(signal.SIGINT)
        running.process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert running.ended() in (0, 130)  # the first one may be done already
        assert time.monotonic() - start < 2 * slack()


@pytest.mark.long
def test_ctrl_c_while_the_model_loads_ends_it():
    with program() as running:
        running.line("bundled model")
        running.process.send_signal(signal.SIGINT)
        assert running.ended() in (0, 130)


@pytest.mark.parametrize(
    ("options", "said"),
    first(
        2,
        [
            (("--model", "/nonexistent"), "/nonexistent"),
            (("--warm-read", "0.5"), "--warm-read has no effect without"),
            (("--host", "0.0.0.0"), "--api-key"),
            (("--host", "no.such.host.invalid", "--insecure"), "cannot listen"),
            (("--adapter", "x"), "NAME=FOLDER"),
            (("--adapter", "bundled=x"), "'bundled'"),
            (("--adapter", "mine=/nonexistent"), "/nonexistent"),
            (("--max-n-of-nothing", "3"), "No such option"),
            (("--max-stops", "0"), "max_stops"),
            (("--context-cache-gb", "3"), "--context-cache"),
        ],
    ),
)
def test_what_cannot_be_served_is_one_line(options, said):
    with program(*options) as running:
        assert running.ended() == 2
    assert said in " ".join(running.lines)
    assert not [line for line in running.lines if "Traceback" in line]


@pytest.mark.long
def test_a_port_that_is_taken_is_one_line():
    with program() as first:
        port = first.url.split(":")[2].split("/")[0]
        with program("--port", port) as second:
            assert second.ended() == 2
        assert "cannot listen" in second.lines[-1] and port in second.lines[-1]


@pytest.mark.long
def test_adapters_are_further_models(tmp_path):
    folder = with_adapters(bundled_model(), tmp_path / "adapters", keys=DEFAULT_KEYS)
    with program("--adapter", f"mine={folder}", "--alias", "gpt-x") as running:
        listed = json.loads(curl(f"{running.url}/models"))["data"]
        assert [each["id"] for each in listed] == ["bundled", "mine"]
        answers = {}
        for name in ("bundled", "gpt-x", "mine"):
            body = json.dumps({**chat(SAY, seed=1, max_tokens=20), "model": name})
            answer = json.loads(curl(f"{running.url}/chat/completions", "-d", body))
            answers[name] = (answer["model"], answer["choices"][0]["message"]["content"])
        assert answers["bundled"] == answers["gpt-x"]
        assert (answers["bundled"][0], answers["mine"][0]) == ("bundled", "mine")
        assert answers["bundled"][1] != answers["mine"][1]


@pytest.mark.parametrize(
    "program_",
    first(
        1,
        ["import mlx_diffgemma, mlx_diffgemma.cli.serve", "import mlx_diffgemma.generate"],
    ),
)
def test_other_programs_load_nothing_of_the_server(program_):
    heavy = ("starlette", "uvicorn", "pydantic", "h11", "anyio")
    code = f"import sys; {program_}; print([n for n in {heavy!r} if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_generating_and_help_load_nothing_of_the_server():
    code = (
        "import sys; sys.argv = ['mlx_diffgemma.{0}', {1}]\n"
        "from mlx_diffgemma.cli.{0} import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([n for n in ('starlette', 'uvicorn', 'mlx_diffgemma.serve') if n in sys.modules])"
    )
    for name, options in (("serve", "'--help'"), ("generate", "'Sort: 2 1', '--seed', '1'")):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(name, options)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert ran.stdout.strip().endswith("[]"), ran.stdout + ran.stderr
