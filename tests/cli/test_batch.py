"""mlx_diffgemma.batch as a user runs, interrupts and continues it."""

from __future__ import annotations

import json
import signal
import time

import pytest

from mlx_diffgemma import GenerationSettings, bundled_model, generate, load
from mlx_diffgemma.cli.batch import batch
from tests.cli.test_cli import assert_one_line, invoke, program

PROMPTS = [f"Count from {n} to {n + 30}." for n in range(12, 40)]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


def arguments(source, *more: str) -> list[str]:
    output = source.with_name("answers.jsonl")
    return ["--input", str(source), "--output", str(output), "--max-denoising-steps", "6", *more]


def heed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def answers(source) -> list[dict]:
    lines = source.with_name("answers.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    return [json.loads(line) for line in lines]


def test_interrupted_and_killed_it_goes_on_to_what_generate_gives_alone(source):
    ways = [(signal.SIGINT, 130), (signal.SIGKILL, -9)]
    counts = []
    for number, code in ways:
        # Ctrl-C works in it even where this process ignores it, as one in the background does.
        run = program("batch", *arguments(source, "--max-rows", "3"), preexec_fn=heed)
        end, before = time.monotonic() + 300, counts[-1] if counts else 0
        output = source.with_name("answers.jsonl")
        while time.monotonic() < end and run.poll() is None:
            if output.exists() and output.read_bytes().count(b"\n") > before + 2:
                break
            time.sleep(0.002)
        run.send_signal(number)
        said = run.communicate()[1].decode()
        assert run.returncode == code, said
        counts.append(output.read_bytes().count(b"\n"))
        if number != signal.SIGKILL:
            told = f"interrupted: {counts[-1]} of {len(PROMPTS)} answers are in {output}; the same"
            assert told in said and "Traceback" not in said, said
    assert 0 < counts[0] < counts[1] < len(PROMPTS), counts
    whole = invoke(batch, *arguments(source, "--max-rows", "3"))
    assert whole.exit_code == 0, whole.output
    assert f"{len(PROMPTS)} answers ({counts[1]} by an earlier run)" in whole.stderr
    found = answers(source)
    assert [each["id"] for each in found] == [*range(1, len(PROMPTS) + 1)]
    model, tokenizer = load(bundled_model())
    for at in range(0, len(PROMPTS), 5):
        settings = GenerationSettings(seed=at, max_denoising_steps=6, max_new_tokens=1024)
        assert found[at]["text"] == generate(model, tokenizer, PROMPTS[at], settings=settings)
    assert not source.with_name("answers.jsonl.unfinished").exists()


def test_a_bad_line_fails_alone_and_the_exit_code_says_so(source):
    source.write_text('{"prompt": "Sort: 6 3 1 7"}\noops\n{"prompt": "Reverse: kaa", "id": "x"}\n')
    result = invoke(batch, *arguments(source))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "3 answers, 1 of them failed" in result.stderr
    first, second, third = answers(source)
    assert first["text"] == "1 3 6 7" and third["text"] == "aak" and third["id"] == "x"
    assert "line 2 is not JSON" in second["error"]


def test_a_line_of_openais_form_is_answered_in_it(source):
    body = {"model": "bundled", "messages": [{"role": "user", "content": "Sort: 6 3 1 7"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source.write_text(json.dumps(line) + "\n")
    result = invoke(batch, *arguments(source, "--verbose", "False"))
    assert (result.exit_code, result.output) == (0, "")
    (found,) = answers(source)
    assert found["response"]["body"]["choices"][0]["message"]["content"] == "1 3 6 7"


def test_mistakes_are_one_line(source, tmp_path):
    quiet = ("--verbose", "False")
    assert_one_line(
        invoke(batch, "--input", "no.jsonl", "--output", "x", *quiet), "no.jsonl cannot be read"
    )
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert_one_line(invoke(batch, *arguments(empty, *quiet)), "empty.jsonl has no lines")
    source.with_name("answers.jsonl").write_text("mine\n")
    assert_one_line(invoke(batch, *arguments(source, *quiet)), "is there already")
    assert source.with_name("answers.jsonl").read_text() == "mine\n"
    bad = invoke(batch, *arguments(source, "--model", "nowhere/none", *quiet))
    assert bad.exit_code == 2 and "Traceback" not in bad.stderr
