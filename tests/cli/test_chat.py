"""The chat command: its lines from a pipe, and typed at a pseudo-terminal."""

from __future__ import annotations

import json

import pytest

from mlx_diffgemma.cli.chat import chat
from mlx_diffgemma.cli.session import setting_named, value_of
from mlx_diffgemma.errors import ChatError
from tests.cli.test_cli import invoke

# The bundled model answers a first message in a few steps; the limits are for the others.
QUICK = ("--seed", "7", "--max-tokens", "24", "--canvas-length", "24")
QUICK = (*QUICK, "--max-denoising-steps", "6")
COUNT = "Count from 12 to 15."


def talk(*lines: str, options: tuple[str, ...] = QUICK):
    """A chat whose stdin has these lines."""
    return invoke(chat, *options, stdin="".join(f"{line}\n" for line in lines))


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


# --- a pipe ---


def test_lines_become_turns_and_stdout_gets_the_answers_alone(tmp_path):
    result = talk(COUNT, "", "/reset", "Count from 3 to \\", "5.", "/reset", COUNT)
    answers = result.stdout.splitlines()
    assert result.exit_code == 0 and answers[0] == answers[-1] == "12 13 14 15"
    notes = result.stderr.splitlines()
    assert "bundled model" in notes[0] and "no conversations" in notes[1]
    assert not errors(result) and "\x1b" not in result.output


def test_prompt_is_the_first_turn_and_the_system_prompt_is_said():
    options = (*QUICK, "--prompt", "Count from 12\\nto 15.", "--system-prompt", "Be brief.")
    result = talk("/system", '/system ""', "/undo", options=options)
    assert result.stdout.splitlines() != []
    told = result.stderr.splitlines()[-3:]
    assert told == [
        "system prompt: Be brief.",
        "no system prompt",
        "took back: Count from 12 to 15.",
    ]


def test_undo_retry_edit_and_two_slashes():
    result = talk(
        COUNT, "/retry", "/edit 1 Count from 31 to 34.", "/undo", "//reset is a command", "/undo"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[:3] == ["12 13 14 15", "12 13 14 15", "31 32 33 34"]
    assert "took back: Count from 31 to 34." in result.stderr
    assert "took back: /reset is a command" in result.stderr


def test_a_saved_chat_is_loaded_and_goes_on(tmp_path):
    file = tmp_path / "my chat.json"
    first = talk(COUNT, f"/save {file}", "/reset", f"/load {file}", "/undo")
    assert first.exit_code == 0, first.stderr
    told = first.stderr.splitlines()
    assert told[-3:] == ["loaded 1 message", f"1> {COUNT}", f"took back: {COUNT}"]
    assert json.loads(file.read_text())["messages"][1]["content"] == "12 13 14 15"


MISTAKES = {
    "/hepl": "there is no command /hepl; did you mean /help?",
    "/etc/passwd is a file": "there is no command /etc/passwd; /help lists them",
    "/undo": "the conversation has no message yet",
    "/retry": "the conversation has no message yet",
    "/edit": "/edit needs N [TEXT]",
    "/edit x y": "/edit needs the number of a message, got 'x'",
    "/edit 1": "/edit needs N TEXT where there is no terminal",
    "/edit 1 y": "the conversation has no message yet",
    "/reset all": "/reset takes nothing behind it, got 'all'",
    "/save": "/save needs FILE",
    "/load missing.json": "missing.json cannot be read: No such file or directory",
    "/save /dev/null": "/dev/null is no saved chat: it is no ordinary file; it is not replaced",
    "/set tempp 1": "there is no setting 'tempp'; did you mean temp?",
    "/set temp hot": "temperature must be a number at least 0, got 'hot'",
    "/set max-tokens 0": "max_new_tokens must be a whole number at least 1, got 0",
    "/set max_new_tokens 1.5": "max_new_tokens must be a whole number at least 1, got '1.5'",
    "/set policy slow": "policy must be 'reference' or 'fast', got 'slow'",
    "/set canvas_width answer": "stop_on must be 'answer' too",
    "/set canvas_length 9999": "canvas_length 9999 is longer",
    "/seed -1": "seed must be a whole number at least 0",
    "/image cat.png": "cat.png is not read: images are not supported yet",
    "x" * 70_000: "positions",
}


def test_each_mistake_is_one_line_and_the_chat_goes_on():
    result = talk(*MISTAKES, COUNT)
    for given, said in zip(errors(result), MISTAKES.values(), strict=True):
        assert said in given
    assert result.stdout == "12 13 14 15\n"  # the last line was answered as if nothing had been
    assert result.exit_code == 2


def test_a_line_that_is_no_text_is_one_error():
    result = invoke(chat, *QUICK, stdin=b"\xef\xbb\xbf/seed 4\n\xff\xfe\n" + COUNT.encode())
    assert errors(result) == [
        line for line in errors(result) if "a line of stdin is not UTF-8" in line
    ]
    assert len(errors(result)) == 1 and "seed 4" in result.stderr
    assert result.stdout == "12 13 14 15\n"


def test_settings_are_shown_changed_and_opened_again():
    result = talk("/set temp 0.5", "/set temp", "/set temp default", "/set", "/set policy fast",
                  "/set seed 3", "/seed", "/seed default", "/quit", COUNT)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""  # nothing behind /quit is read
    assert result.stderr.splitlines()[2:] == [
        "temperature 0.5", "temperature 0.5", "temperature 1.0 (default)",
        "max_new_tokens 24", "seed 7", "max_denoising_steps 6", "canvas_length 24",
        "policy fast", "seed 3", "seed 3", "seed fresh (default)",
    ]  # fmt: skip


def test_help_names_every_command_and_stats_the_numbers():
    result = talk("/stats", COUNT, "/stats", "/help")
    for word in ("no answer yet", "last answer: prompt", "session: 1 answers", "contexts: ",
                 "/edit N [TEXT]", "/image FILE", "Alt-Enter", "backslash"):  # fmt: skip
        assert word in result.stderr, word


def test_a_file_with_open_calls_takes_the_next_lines_as_results(tmp_path):
    file = tmp_path / "chat.json"
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": {}}}
        for i, name in enumerate(("time", "place"))
    ]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    saved = {"format": "mlx_diffgemma chat", "version": 1, "messages": messages}
    file.write_text(json.dumps(saved))
    result = talk(f"/load {file}", "/set max_denoising_steps 2", "noon", "Rome", f"/save {file}")
    assert result.exit_code == 0, result.stderr
    after = json.loads(file.read_text())["messages"][2:]
    assert [message["content"] for message in after[:2]] == ["noon", "Rome"]
    assert after[2]["role"] == "assistant"


def test_names_and_values_of_settings():
    assert setting_named("--temp") == setting_named("temperature") == "temperature"
    assert setting_named("max-tokens") == setting_named("max-new-tokens") == "max_new_tokens"
    assert (value_of("seed", "3"), value_of("temperature", "3"), value_of("seed", "default")) == (
        3, 3.0, None,
    )  # fmt: skip
    with pytest.raises(ChatError, match="no setting 'x'"):
        setting_named("x")
