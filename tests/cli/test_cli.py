"""The commands as a person or a script meets them."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_diffgemma import GenerationSettings, bundled_model
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.cli.info import info
from mlx_diffgemma.cli.options import app_of, prompt_text
from mlx_diffgemma.config.entry import entries
from mlx_diffgemma.config.generation import default_of

ROOT = Path(__file__).parents[2]
TABLE = ("--prompt", "Squares from 2 to 3.", "--seed", "3")
TABLE_ANSWER = "|n|n*n|\n|-|-|\n|2|4|\n|3|9|\n"
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def invoke(command, *arguments: str, stdin: str | bytes | None = None):
    """In this process; exit code, stdout and stderr as a program would give them."""
    return CliRunner().invoke(app_of(command), list(arguments), input=stdin, env=WIDE)


def program(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


def assert_one_line(result, expected: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that says `expected`."""
    errors = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0], errors


def test_the_answer_alone_is_on_stdout_and_the_bundled_model_is_announced():
    result = invoke(generate, *TABLE)
    assert result.exit_code == 0, result.output
    assert result.stdout == TABLE_ANSWER
    assert result.stderr.splitlines() == [
        "no --model given: this is the bundled model, trained on small puzzles only"
    ]


def test_a_fresh_seed_is_printed_and_repeats_the_run():
    first = invoke(generate, "--prompt", "Reverse: abc", "--max-denoising-steps", "4")
    (seed,) = re.findall(r"^seed (\d+)$", first.stderr, re.MULTILINE)
    again = invoke(
        generate, "--prompt", "Reverse: abc", "--max-denoising-steps", "4", "--seed", seed
    )
    assert first.stdout == again.stdout


def test_verbose_false_prints_the_answer_only():
    result = invoke(generate, *TABLE, "--verbose", "False")
    assert (result.stdout, result.stderr) == (TABLE_ANSWER, "")
    assert invoke(generate, *TABLE, "--verbose", "perhaps").exit_code == 2


def test_stdin_is_a_prompt():
    result = invoke(generate, "--prompt", "-", "--seed", "1", stdin="Squares from 2 to 3.\n")
    assert result.stdout == TABLE_ANSWER


def test_a_prompt_is_an_argument_an_option_or_what_stdin_holds():
    for words in (("Squares from 2 to 3.",), ("-",), ()):
        result = invoke(generate, *words, "--seed", "1", stdin="Squares from 2 to 3.\n")
        assert result.stdout == TABLE_ANSWER, result.stderr
    assert_one_line(invoke(generate), "the prompt is empty")
    assert_one_line(
        invoke(generate, "one", "--prompt", "two"), "'one' as an argument, and 'two' with --prompt"
    )


def test_a_prompt_as_an_argument_is_taken_as_it_is():
    assert prompt_text(r"a\nb\t", None) == r"a\nb\t"
    assert prompt_text(None, r"a\nb\t") == "a\nb\t"


def test_a_prompt_with_a_spelled_line_break_is_noted():
    said = r"note: \n in this prompt is two characters; --prompt reads it as a line break"
    for words, is_said in (((r"Sort: 2\n1",), True), (("Sort: 2\n1",), False),
                           (("--prompt", r"Sort: 2\n1"), False)):  # fmt: skip
        shown = invoke(generate, *words, "--seed", "1", "--max-denoising-steps", "1").stderr
        assert (said in shown.splitlines()) == is_said


def test_what_a_constraint_leaves_out_is_a_note():
    done = invoke(generate, "Sort: 2 1", "--json-object", "--seed", "1", "--max-tokens", "20")
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert "values of any type hold 2 levels" in note and '"additionalProperties": false' in note
    assert done.exit_code == 0 and "cut" not in done.stderr


def test_a_limit_on_thoughts_is_taken_where_there_may_be_some():
    limit = ("--max-thinking-tokens", "9", "--max-denoising-steps", "1", "--seed", "1")
    for more in (
        ("--thinking",),
        ("--ignore-chat-template",),
        ("--chat-template-config", '{"enable_thinking": true}'),
    ):
        assert invoke(generate, "Sort: 2 1", *limit, *more).exit_code == 0


def test_json_is_one_object_per_line_and_its_text_is_the_answer():
    result = invoke(generate, *TABLE, "--json")
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert [o["event"] for o in objects[:2]] == ["start", "prefill"]
    assert objects[0] == {"event": "start", "model": "demo", "seed": 3}  # no path of this machine
    assert objects[-1]["event"] == "finished" and objects[-1]["reason"] == "stop"
    text = "".join(o["text"] for o in objects if o["event"] == "text" and o["channel"] == "answer")
    assert text + "\n" == TABLE_ANSWER


def test_max_tokens_cuts_exactly():
    result = invoke(generate, *TABLE, "--max-tokens", "5", "--json")
    finished = json.loads(result.stdout.splitlines()[-1])
    assert (finished["new_tokens"], finished["reason"]) == (5, "length")


def test_a_policy_and_its_settings_are_flags():
    result = invoke(generate, *TABLE, "--policy", "fast")
    assert result.exit_code == 0 and result.stdout.startswith("|n|n*n|\n|-|-|\n")
    result = invoke(generate, *TABLE, "--policy", "fast", "--entropy-bound", "1")
    said = "--entropy-bound has no effect with acceptance 'confidence', which policy 'fast' sets"
    assert result.exit_code == 2 and said in result.stderr
    result = invoke(generate, *TABLE, "--acceptance", "confidence", "--entropy-bound", "1")
    said = "--entropy-bound has no effect with --acceptance 'confidence', only with 'entropy'"
    assert result.exit_code == 2 and said in result.stderr
    result = invoke(generate, *TABLE, "--policy", "fastest")
    assert result.exit_code == 2 and "policy" in result.stderr


def test_an_extra_end_token_ends_the_answer():
    result = invoke(generate, *TABLE, "--extra-eos-token", "*")
    assert result.stdout == "|n|n\n"


def test_a_second_end_token_is_not_taken_for_the_prompt():
    done = invoke(generate, "--extra-eos-token", "*", "<turn|>", stdin="Squares from 2 to 3.")
    assert_one_line(done, "--extra-eos-token takes one token; repeat it for each")


def test_an_empty_answer_is_said_to_be_empty():
    done = invoke(generate, *TABLE, "--stop", "|", "--verbose", "True")
    assert done.stdout.strip() == ""
    assert "the answer is empty" in done.stderr
    assert "empty" not in invoke(generate, *TABLE).stderr


def test_a_stop_string_ends_the_answer_before_it():
    assert TABLE_ANSWER.count("\n|-") == 1
    for stop in ("\\n|-", "\n|-"):
        result = invoke(generate, *TABLE, "--stop", "nowhere", "--stop", stop, "--json")
        objects = [json.loads(line) for line in result.stdout.splitlines()]
        assert "".join(o["text"] for o in objects if o["event"] == "text") == "|n|n*n|"
        assert objects[-1]["reason"] == "stop"
    assert_one_line(invoke(generate, *TABLE, "--stop", ""), "stop")


def test_a_response_that_is_begun_is_continued():
    count = ("--prompt", "Count from 12 to 18.", "--seed", "3")
    result = invoke(generate, *count, "--prefill-response", "12 13 14 ")
    assert result.exit_code == 0 and result.stdout == "15 16 17 18\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "./no-such-folder"), "no folder ./no-such-folder"),
        (("--model", str(ROOT / "README.md")), "is a file"),
        (("--model", str(ROOT / "tests")), "has no config.json"),
        (("--canvas-length", "65"), "--canvas-length 65 is longer than the checkpoint's 64"),
        (("--model", ""), "the name of the model is empty"),
        (("--temp", "1e-9"), "0 is the greedy limit"),
        (("--temp", "-1"), "--temp must be a number at least 0, got -1.0"),
        (("--temp", "nan"), "--temp must be a number"),
        (("--max-tokens", "0"), "--max-tokens must be a whole number at least 1, got 0"),
        (("--entropy-bound", "-0.5"), "--entropy-bound must be"),
        (("--t-min", "0.9"), "--t-min 0.9 is above t_max 0.8"),
        (("--chat-template-config", "{"), "--chat-template-config is not valid JSON"),
        (("--chat-template-config", "[1]"), "must be a JSON object"),
        (("--extra-eos-token", "two words"), "'two words' is not one token"),
        (("--prompt", " "), "the prompt is empty"),
        (("--max-thinking-tokens", "9"), "--max-thinking-tokens has no effect without --thinking"),
        *(
            (("--ignore-chat-template", *idle), f"{idle[0]} has no effect with --ignore-chat-")
            for idle in (
                ("--system-prompt", "x"),
                ("--thinking",),
                ("--chat-template-config", '{"a": 1}'),
                ("--allow-special-tokens",),
            )
        ),
        (("--prompt", "x" * 3000), "positions are free"),
        (("--revision", "main", "--model", str(bundled_model())), "revision"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected):
    given = arguments if "--prompt" in arguments else ("--prompt", "hello", *arguments)
    assert_one_line(invoke(generate, *given), expected)


def test_a_byte_order_mark_on_stdin_is_no_part_of_the_prompt():
    marked, plain = (mark + b"Squares from 2 to 3." for mark in (b"\xef\xbb\xbf", b""))
    answers = [
        invoke(generate, *words, "--seed", "1", "--json", stdin=stdin).stdout.splitlines()[1]
        for words, stdin in ((("--prompt", "-"), marked), ((), marked), (("-",), plain))
    ]
    assert {json.loads(line)["prompt_tokens"] for line in answers} == {36}
    assert_one_line(invoke(generate, "-", stdin=b"\xef\xbb\xbf"), "the prompt is empty")
    inside = invoke(generate, "-", "--json", stdin=b"Squares\xef\xbb\xbf from 2 to 3.")
    assert json.loads(inside.stdout.splitlines()[1])["prompt_tokens"] > 36


def test_stdin_that_is_not_utf8_is_refused():
    assert_one_line(invoke(generate, "--prompt", "-", stdin=b"caf\xe9"), "stdin is not UTF-8")


def test_usage_errors_keep_typers_form():
    for arguments in (("--no-such-flag",), ("--prompt", "x", "--seed", "many")):
        result = invoke(generate, *arguments)
        assert result.exit_code == 2 and "Usage:" in result.stderr


def test_info_prints_the_parameters_and_as_json_the_same():
    plain, as_json = invoke(info), invoke(info, "--json")
    assert "1,952,292 parameters" in plain.stdout and "memory at 2K context" in plain.stdout
    assert "\nvision: 542,208 bytes, loaded with the first image\n" in plain.stdout
    assert json.loads(as_json.stdout)["parameters"] == 1_952_292
    assert_one_line(invoke(info, "--model", "./no-such-folder"), "no folder ./no-such-folder")


@pytest.mark.perf
def test_help_answers_in_about_a_second():
    def seconds() -> float:
        """Of processor time: 0.75 here, and up to twice that beside other work."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        program("generate", "--help").communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 2


def test_help_shows_every_flag_with_its_help_and_default_from_the_settings():
    shown = " ".join(invoke(generate, "--help").stdout.replace("│", " ").split())
    for flag, name in {
        "--temp": "temperature",
        "--max-tokens": "max_new_tokens",
        **{
            f"--{name.replace('_', '-')}": name
            for name in (
                "max_denoising_steps entropy_bound confidence_threshold stability_threshold "
                "t_min t_max canvas_length empty_rerolls prefill_step_size seed policy acceptance "
                "acceptance_confidence acceptance_share stop_on canvas_width self_conditioning "
                "sparse_tokens sparse_entropy schedule_steps"
            ).split()
        },
    }.items():
        assert flag in shown
        assert entries(GenerationSettings)[name].help.split(";")[0][:40] in shown, name
    for name in ("max_denoising_steps", "entropy_bound", "confidence_threshold"):
        assert f"the checkpoint's, else {default_of(name)}" in shown


def test_ctrl_c_exits_130_and_keeps_what_was_written():
    # Never sure enough, every canvas takes all its steps.
    command = ("generate", "--prompt", "Count from 12 to 36.", "--seed", "1")
    running = program(*command, "--confidence-threshold", "0")
    seen = os.read(running.stdout.fileno(), 4)  # of the first canvas, of several
    running.send_signal(signal.SIGINT)
    rest, errors = running.communicate(timeout=30)
    assert running.returncode == 130, errors
    assert b"Traceback" not in errors
    assert (seen + rest).startswith(b"12 13 14 15")
    assert (seen + rest).endswith(b"\n") and b" 35 36" not in rest


def test_a_reader_that_leaves_ends_the_run_without_a_traceback():
    running = program("generate", "--prompt", "Count from 12 to 36.", "--json")
    running.stdout.readline()
    running.stdout.close()
    errors = running.stderr.read()
    running.wait(timeout=60)
    assert b"Traceback" not in errors


@pytest.mark.parametrize("module", ["mlx_diffgemma", "mlx_diffgemma.info", "mlx_diffgemma.train"])
def test_ctrl_c_during_imports_is_silent(module, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # a line on stderr for every import
    running = subprocess.Popen(
        [sys.executable, "-m", module, *(["info"] if module == "mlx_diffgemma" else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not running.stderr.readline().rstrip().endswith(b"mlx_diffgemma.cli.interrupt"):
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert all(line.startswith(b"import time:") for line in errors.splitlines())


def test_a_backslash_n_in_a_prompt_is_a_line_break_as_in_mlx_lm():
    one = invoke(generate, "--prompt", r"Sudoku:\n..13\n.3.4\n413.\n3241", "--seed", "1")
    assert one.stdout == "2413\n1324\n4132\n3241\n"


@pytest.mark.parametrize(
    ("stream", "message"), [("stdin", "stdin is closed"), ("stdout", "stdout")]
)
def test_a_closed_stream_is_one_line(stream, message):
    prompt = "-" if stream == "stdin" else "Squares from 2 to 3."
    line = f"exec {sys.executable} -m mlx_diffgemma generate --prompt '{prompt}' "
    line += "<&-" if stream == "stdin" else ">&-"
    done = subprocess.run(
        ["sh", "-c", line],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr and message.encode() in done.stderr


def test_an_unreadable_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert_one_line(invoke(info, "--model", str(tmp_path)), "permission denied")
