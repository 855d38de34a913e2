"""Help at any width of the terminal, and what is said of a wrong command line."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mlx_diffgemma.cli import models
from mlx_diffgemma.cli.options import app_of, program_of
from mlx_diffgemma.cli.usage import OF_MLX_LM

COMMANDS = "generate chat fill edit info doctor convert train fuse".split()


def app(name: str):
    if name == "models":
        return models.app
    return app_of(getattr(import_module(f"mlx_diffgemma.cli.{name}"), name))


def part_of(name: str):
    """A command, or "models pull" for its part, as a program."""
    name, *rest = name.split()
    command = program_of(app(name))
    for part in rest:
        command = command.commands[part]
    return command


def help_of(name: str) -> str:
    command = part_of(name)
    with command.make_context(f"mlx_diffgemma.{name}", [], resilient_parsing=True) as context:
        return command.get_help(context)


def last_line(name: str, *arguments: str) -> str:
    """The last line on stderr of a command line that is refused."""
    done = CliRunner().invoke(app(name), list(arguments), input="")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage:" in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", [*COMMANDS, "models list", "models pull", "models rm"])
def test_help_shows_every_option_whole_and_stays_within_the_terminal(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown, command = help_of(name), part_of(name)
    flags = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    for flag in {flag for flag in flags if flag.startswith("-")}:
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown), flag
    texts = [line for line in shown.splitlines() if not line.startswith("  --")]
    assert all(len(line) <= columns for line in texts)
    assert "…" not in shown and not re.search(r"--\w+-$", shown, re.MULTILINE)
    if "MLX_DIFFGEMMA_MODEL" in str([getattr(p, "envvar", "") for p in command.params]):
        assert re.search(r"MLX_DIFFGEMMA_MODEL[];]", shown)


def test_help_keeps_the_panels_and_the_whole_sentences_of_subcommands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of("generate")
    options, _, constraint = shown.partition("\nConstraint:\n")
    assert "--json-schema" in constraint and "--json-schema" not in options
    assert "--max-tokens" in options
    assert "print its folder on stdout." in help_of("models")


def test_the_help_of_doctor_says_that_it_loads_no_model_by_default():
    assert "no model is loaded" in " ".join(help_of("doctor").split())
    assert "by default the small model" not in " ".join(help_of("doctor").split())
    assert "by default the small model" in " ".join(help_of("generate").split())


def options_of_mlx_lm() -> set[tuple[str, str]]:
    """(our command, option) for every option of mlx-lm's command of the same use."""
    folder = Path(pytest.importorskip("mlx_lm").__file__).parent
    ours = {"generate": "generate", "chat": "chat", "convert": "convert", "lora": "train"}
    found = set()
    for theirs, name in (ours | {"fuse": "fuse"}).items():
        text = (folder / f"{theirs}.py").read_text()
        for flag in re.findall(r'add_argument\(\s*(?:"-\w",\s*)?"(--[\w-]+)"', text):
            found.add((name, flag))
    assert len(found) > 60
    return found


def test_each_option_of_mlx_lm_exists_or_is_named_with_the_reason():
    for name, flag in sorted(options_of_mlx_lm()):
        known = {flag for p in get_command(app(name)).params for flag in p.opts}
        if flag in known:
            continue
        if (name, flag) == ("convert", "--model"):  # its other name for --hf-path
            continue
        said = last_line(name, *(["x"] if name == "generate" else []), flag, "1")
        assert said == (
            f"Error: mlx-lm's {flag} does not exist here: {OF_MLX_LM[flag]}; see "
            "docs/not-supported.md"
        )


WRONG = {
    ("generate", "x", "--tempp", "1"): "No such option: --tempp",
    ("generate", "x", "--policy", "turbo"): "'turbo' is not one of 'reference', 'fast'",
    ("generate", "x", "--max-tokens", "abc"): "'abc' is not a whole number",
    ("generate", "x", "--temp", "hot"): "'hot' is not a number",
    ("generate", "x", "--json-indent", "-1"): "'-1' is less than 0",
    ("train", "--fine-tune-type", "dora"): "DoRA is not supported; see docs/not-supported.md",
    ("train", "--fine-tune-type", "dore"): "'dore' is not one of 'lora', 'full'",
    ("generate", "Sort:", "5", "2"): "if they are part of the prompt, give it in quotes: 'Sort: 5",
    ("fill", "a", "{{gap}}"): "if they are part of the template, give it in quotes: 'a {{gap}}'",
    ("chat", "Hello", "you"): "the first message is given with an option: --prompt 'Hello you'",
    ("edit", "f", "--prompt", "x", "y"): "the prompt is given with an option: --prompt y",
    ("info", "demo"): "these words belong to nothing: demo",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_command_line_is_said_in_plain_words(words):
    said = last_line(*words)
    assert WRONG[words] in said
    assert "Value error" not in said and "Input should" not in said
