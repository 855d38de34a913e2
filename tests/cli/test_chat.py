"""The chat command: its lines from a pipe, and typed at a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text as Styled
from typer.main import get_command

from mlx_diffgemma.cli.chat import chat
from mlx_diffgemma.cli.options import app_of
from mlx_diffgemma.cli.render_chat import ChatView, Settling, markdown, split_blocks
from mlx_diffgemma.cli.session import _short, setting_named, value_of
from mlx_diffgemma.denoise.store import FOLDER_BYTES
from mlx_diffgemma.errors import ChatError
from tests.cli.test_cli import ROOT, invoke
from tests.cli.test_render import ESCAPE

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


def test_answers_are_held_to_a_constraint_until_it_is_off(tmp_path):
    schema = {"type": "object", "properties": {"n": {"maximum": 9, "type": "integer"}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    file = tmp_path / "n.json"
    file.write_text(json.dumps(schema))
    result = talk(
        "/constraint", COUNT, "/constraint choices yes, no", "/retry", f"/edit 1 {COUNT}",
        f"/constraint json-schema {file}", "/retry", "/constraint off", "/reset", "/seed 7", COUNT,
        options=(*QUICK, "--json-object", "--json-compact", "--max-tokens", "40"),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    first, *others, schema_answer, last = result.stdout.splitlines()
    assert isinstance(json.loads(first), dict) and set(others) <= {"yes", "no"} and len(others) == 2
    assert list(json.loads(schema_answer)) == ["n"] and " " not in schema_answer
    assert last == "12 13 14 15"
    told = [line for line in result.stderr.splitlines() if line.startswith("constraint: ")]
    assert told == [
        "constraint: --json-object",
        "constraint: choices yes, no",
        f"constraint: json-schema {_short(str(file))}",
        "constraint: none",
    ]


def test_a_constraint_for_every_answer_cannot_come_from_stdin():
    result = invoke(chat, *QUICK, "--json-schema", "-", stdin=COUNT)
    assert result.exit_code == 2 and "stdin has the messages" in result.stderr
    result = invoke(chat, *QUICK, "--regex", "(", stdin=COUNT)
    assert result.exit_code == 2 and "--regex: " in result.stderr and not result.stdout


def test_a_constraint_to_tool_calls_ends_with_its_tools(tmp_path):
    with_tools, without = tmp_path / "tools.json", tmp_path / "none.json"
    talk(f"/save {without}")
    saved = json.loads(without.read_text())
    clock = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    with_tools.write_text(json.dumps({**saved, "tools": [{"type": "function", "function": clock}]}))
    result = talk(f"/load {with_tools}", "/constraint tool-call", COUNT, f"/load {without}")
    assert result.exit_code == 0, result.stderr
    assert "tool call call_0: clock" in result.stderr and not result.stdout.strip()
    assert "the constraint to tool calls is off" in result.stderr


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
    "/set nosuch 1": "there is no setting 'nosuch'; docs/settings.md lists them",
    "/set temp hot": "temp must be a number at least 0, got 'hot'",
    "/set max-tokens 0": "max-tokens must be a whole number at least 1, got 0",
    "/set max_new_tokens 1.5": "max_new_tokens must be a whole number at least 1, got '1.5'",
    "/set policy slow": "policy must be 'reference' or 'fast', got 'slow'",
    "/set canvas_width answer": "stop_on must be 'answer' too",
    "/set canvas_length 9999": "canvas_length 9999 is longer",
    "/set max_tokens x": "max_tokens must be a whole number at least 1, got 'x'",
    "/seed -1": "seed must be a whole number at least 0",
    "/constraint person.json": "there is no constraint 'person.json'; there are json-schema, json-",
    "/constraint regex": "regex needs something behind it",
    "/constraint json-object x": "json-object takes nothing behind it",
    "/constraint json-schema -": "stdin has the messages",
    "/constraint json-schema missing.json": "there is no file missing.json",
    "/constraint regex (": "error: regex: ",
    "/constraint tool-call": "this conversation has no tools to call",
    "/image cat.png": "cat.png does not exist",
    "x" * 70_000: "positions",
}


def test_a_limit_on_thoughts_needs_thinking():
    idle = talk(COUNT, options=(*QUICK, "--max-thinking-tokens", "9"))
    assert errors(idle) == ["error: --max-thinking-tokens has no effect without --thinking"]
    assert (
        talk("/quit", options=(*QUICK, "--max-thinking-tokens", "9", "--thinking")).exit_code == 0
    )


def test_each_mistake_is_one_line_and_the_chat_goes_on():
    result = talk(*MISTAKES, COUNT)
    for given, said in zip(errors(result), MISTAKES.values(), strict=True):
        assert said in given
    assert result.stdout == "12 13 14 15\n"  # the last line was answered as if nothing had been
    assert result.exit_code == 2


def test_an_edited_message_begins_with_two_slashes_or_none():
    result = talk(COUNT, "/edit 1 /quit", "/edit 1 //quit", "/save /dev/null")
    assert (
        "nothing is changed: a message that begins with / is written with two, as in //quit"
        in (errors(result)[0])
    )
    assert len(errors(result)) == 2  # the second is /save's: the edit with two was answered


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
        "policy fast", "seed 3", "seed 3", "seed 7",
    ]  # fmt: skip


def test_default_gives_back_what_the_command_started_with():
    given = ("/set max-tokens 8", "/set max-tokens default", "/set temp 1", "/set temp default")
    result = talk("/set", *given, options=("--seed", "7", "--temp", "0.5"))
    assert result.stderr.splitlines()[2:] == [
        "temperature 0.5", "seed 7", "max_new_tokens 8", "max_new_tokens 1024 (default)",
        "temperature 1.0", "temperature 0.5",
    ]  # fmt: skip
    assert "max_new_tokens 24" in talk("/set max-tokens 8", "/set max-tokens default").stderr


def test_contexts_in_a_folder_are_known_after_a_restart(tmp_path):
    options = (*QUICK, "--context-cache", str(tmp_path / "new" / "folder"))
    known = [r"36 prompt tokens read, 0 known", r"8 prompt tokens read, 28 known"]
    for expected in known:
        result = talk(COUNT, "/stats", options=(*options, "--context-cache-gb", "0.5"))
        eventually_written(tmp_path / "new" / "folder")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == "12 13 14 15\n"
        assert expected in result.stderr
        numbers = re.search(r"contexts: ([\d.]+) of at most 500 MB in (.+)", result.stderr)
        assert numbers is not None and numbers[2] == str(tmp_path / "new" / "folder")
    assert float(numbers[1]) > 0


def eventually_written(folder: Path) -> None:
    """Wait until a chat's contexts are written; the end of a program waits by itself."""
    for _ in range(300):
        if len(list(folder.glob("*.safetensors"))) == 4 and not list(folder.glob(".*")):
            return
        time.sleep(0.1)
    raise AssertionError(sorted(folder.iterdir()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--context-cache", "{}/file"), "/file is a file; contexts are kept in a folder"),
        (("--context-cache", "{}/file/x"), "/file/x cannot be written to: Not a directory"),
        (("--context-cache", "/proc/x"), "error: /proc/x cannot be written to: "),
        *(
            (
                ("--context-cache", "{}", f"--context-cache-gb={number}"),
                f"error: --context-cache-gb must be a number above 0, got {number}",
            )
            for number in ("0", "-1", "nan", "inf")
        ),
        (
            ("--context-cache-gb", "2"),
            "error: --context-cache-gb has no effect without --context-cache FOLDER",
        ),
    ],
)
def test_a_context_cache_that_cannot_be_used_is_one_line_before_the_model_loads(
    tmp_path, options, said
):
    (tmp_path / "file").touch()
    options = [option.format(tmp_path) for option in options]
    result = invoke(chat, *options, "--model", "nowhere", stdin="")
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr


def test_the_help_names_the_default_size_of_the_context_cache():
    option = next(p for p in get_command(app_of(chat)).params if p.name == "context_cache_gb")
    assert option.show_default == f"{FOLDER_BYTES / 1e9:g}"


def test_help_names_every_command_and_stats_the_numbers():
    result = talk("/stats", COUNT, "/stats", "/help")
    for word in ("no answer yet", "last answer: prompt", "session: 1 answer, ", "contexts: ",
                 "/exit and Ctrl-D", "/edit N [TEXT]", "/image FILE",
                 "Alt-Enter", "backslash"):  # fmt: skip
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
    assert setting_named("max_tokens") == setting_named("--max_tokens") == "max_new_tokens"
    assert (value_of("seed", "3"), value_of("temperature", "3")) == (3, 3.0)
    with pytest.raises(ChatError, match="no setting 'x'"):
        setting_named("x")


# --- a terminal ---

# Time to press keys between steps.
SLOW = """
import sys, time
from mlx_diffgemma.cli import chat, render_chat
seconds, draft = float(sys.argv.pop(1)), render_chat.ChatView.draft
def slow_draft(self, pieces, caption):
    draft(self, pieces, caption)
    time.sleep(seconds)
render_chat.ChatView.draft = slow_draft
chat.main()
"""
CTRL_C, CTRL_D, ENTER, NEW_LINE, LEFT = "\x03", "\x04", "\r", "\x1b\r", "\x1b[D"


class Typist:
    """Types at a chat in a terminal, and reads what it shows."""

    def __init__(self, seconds: float, *options: str, rows: int = 24, columns: int = 60) -> None:
        fcntl = pytest.importorskip("fcntl", reason="no pseudo-terminals on this system")
        termios = pytest.importorskip("termios", reason="no pseudo-terminals on this system")
        self.master, slave = os.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TERM": "xterm"}
        environment |= {"PROMPT_TOOLKIT_NO_CPR": "1"}  # nobody answers where the cursor is
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(seconds), *options],
            pass_fds=(slave,),
            env=environment,
            preexec_fn=partial(os.login_tty, slave),  # Ctrl-C is sent to its session
        )
        os.close(slave)
        self.raw = b""

    @property
    def seen(self) -> str:
        return ESCAPE.sub(b"", self.raw).replace(b"\r", b"").decode("utf-8", "replace")

    def prompted(self, words: str) -> str:
        """Wait for the words and the prompt behind them; return what was shown."""
        return self.wait_for(words, "\n>")

    def wait_for(self, words: str, behind: str = "", *, seconds: float = 60) -> str:
        """Read until the words are there; return what came with them, and begin anew."""
        until = time.monotonic() + seconds
        while words not in self.seen or behind not in self.seen.partition(words)[2]:
            ready, _, _ = select.select([self.master], [], [], max(0, until - time.monotonic()))
            assert ready, f"no {words!r} in {self.seen!r}"
            self.raw += os.read(self.master, 65536)
        seen, self.raw = self.seen, b""
        return seen

    def type(self, *keys: str) -> None:
        os.write(self.master, "".join(keys).encode())

    def end(self) -> int:
        """Read to the end; the exit code."""
        try:
            while chunk := os.read(self.master, 65536):
                self.raw += chunk
        except OSError:  # Linux ends a closed terminal so
            pass
        return self.process.wait(timeout=30)


def test_a_person_at_a_terminal(tmp_path):
    file = tmp_path / "chat.json"
    typist = Typist(0.15, "--seed", "7", "--canvas-length", "24", "--max-tokens", "72")
    started = typist.prompted("leaves")
    assert started.startswith("loading the model ...") and "Ctrl-D leaves" in started
    typist.type("Count from 12 to x.", LEFT, "\x7f15", ENTER)  # the line is edited
    shown = typist.prompted("tokens/s")
    assert "canvas 1, step 1" in shown and "12 13 14 15" in shown
    # A stopped answer without any text: the conversation is what it was.
    typist.type("Sort: 3 1", NEW_LINE, "2", ENTER)
    typist.wait_for("canvas 1, step 2")
    typist.type(CTRL_C)
    assert "stopped before there was any text; /retry" in typist.prompted("again")
    typist.type("/retry", ENTER)
    typist.wait_for("canvas 1, step 2")
    typist.type(CTRL_C)
    typist.prompted("again")
    typist.type(f"/save {file}", ENTER)
    typist.prompted("wrote")
    typist.type("/unod", ENTER)
    assert "did you mean /undo?" in typist.prompted("/undo?")
    typist.type("half a line", CTRL_C)
    assert "leaves" in typist.prompted("leaves)")
    typist.type("Sort: 3 1 2", ENTER, CTRL_C)  # at once, while the line is still edited
    assert "step" not in typist.prompted("stopped before it was sent")
    for leave in (CTRL_C, "\x15" + CTRL_D):  # on an empty line
        typist.type("/edit 1", ENTER)
        assert "Ctrl-C leaves it as it" in typist.wait_for("1> Count from 12 to 15.")
        typist.type("6", leave)
        assert "Ctrl-D or /quit" not in typist.prompted("nothing is changed")
    typist.type("/edit 1", ENTER)
    typist.wait_for("1> Count from 12 to 15.")
    typist.type("\x7f\x7f8.", ENTER)
    assert "12 13 14 15 16 17 18" in typist.prompted("tokens/s")
    typist.type("/undo", ENTER)
    assert "took back: Count from 12 to 18." in typist.prompted("18.")
    typist.type(f"/load {file}", ENTER)
    loaded = typist.prompted("12 13 14 15")
    assert "1> Count from 12 to 15.\n12 13 14 15\n" in loaded
    typist.type("exit", ENTER)
    assert "/quit or Ctrl-D leaves; this word alone is not sent" in typist.prompted("sent")
    saved = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in saved] == [COUNT, "12 13 14 15"]
    # A stopped answer with text: the text stays.
    typist.type("/reset", ENTER, "/set canvas_length 8", ENTER, "Count from 12 to 90.", ENTER)
    typist.wait_for("canvas 3, step 1")
    typist.type(CTRL_C)
    typist.prompted("stopped; what is written so far stays")
    typist.type(f"/save {file}", ENTER)
    typist.prompted("wrote")
    asked, said = json.loads(file.read_text())["messages"]
    assert asked["content"] == "Count from 12 to 90." and said["content"].startswith("12 13 14")
    typist.type(CTRL_D)
    assert typist.end() == 0
    assert "Traceback" not in typist.seen


# --- Markdown ---


def shown(*pieces: str, monkeypatch, width: int = 40) -> str:
    """What a terminal has of an answer in the end, without colours."""
    view, written = ChatView(markdown=True), io.StringIO()
    view._console = Console(file=io.StringIO(), force_terminal=True, width=width, height=12)
    monkeypatch.setattr(view, "_is_markdown", True)
    monkeypatch.setattr(view, "is_live", True)
    monkeypatch.setattr(view, "_write", written.write)
    for piece in pieces:
        view.answer(piece)
        view.draft([("draft ", True), ("more", False)], "canvas 1, step 1")
    view.close()
    return ESCAPE.sub(b"", written.getvalue().encode()).decode()


def test_markdown_loses_nothing_of_the_text(monkeypatch):
    """Line breaks, indents and HTML, which Markdown gives another meaning, stay."""
    text = (
        "1 2\n3 4\n\ndef f(x):\n    return <b>x</b>\n\nuse <div> & co, \x1b[2Jthen [a](http://b)\n"
    )
    assert shown(text, monkeypatch=monkeypatch).splitlines() == [
        "1 2", "3 4", "", "def f(x):", "    return <b>x</b>", "",
        "use <div> & co, ·[2Jthen a (http://b)",
    ]  # fmt: skip


def test_markdown_is_styled_and_pieces_are_joined(monkeypatch):
    pieces = (
        "# Ti",
        "tle\n\nsome *wo",
        "rds*\n\n- one\n- two\n\n```py",
        "thon\nx = 1\n\ny = 2\n```\nend",
    )
    lines = [line.strip() for line in shown(*pieces, monkeypatch=monkeypatch).splitlines()]
    for line in ("some words", "• one", "• two", "x = 1", "y = 2", "end"):
        assert line in lines, lines
    assert any("Title" in line for line in lines) and not any("`" in line for line in lines)


def test_blocks_are_split_where_no_text_behind_can_change_them():
    assert split_blocks("a\n\nb") == ("a\n\n", "b")
    for text in ("a\n\n", "a\nb", "```\na\n\nb", "- a\n\n  b", "````\n```\n\na", "~~~\n```\n\na"):
        assert split_blocks(text) == ("", text)
    assert split_blocks("```\na\n\nb\n```\n\nc\n\n") == ("```\na\n\nb\n```\n\n", "c\n\n")


@pytest.mark.parametrize("height", [1, 2, 4, 8, 40])
def test_the_settling_picture_leaves_one_line_free(height):
    console = Console(width=20, height=height, force_terminal=True)
    block = markdown("\n".join(f"line {i}" for i in range(12)))
    picture = Settling(block, Styled("word " * 8), Styled("canvas 1"))
    with console.capture() as capture:
        console.print(picture, end="")
    lines = ESCAPE.sub(b"", capture.get().encode()).decode().split("\n")
    lines = [line.rstrip() for line in lines if line.strip()]
    assert len(lines) == min(height - 1, 12 + 2 + 1)
    if height >= 8:
        assert lines[-3:] == ["word word word word", "word word word word", "canvas 1"]
        assert lines[-4] == "line 11"
