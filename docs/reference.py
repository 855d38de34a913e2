"""Write the reference pages from the code: settings.md, commands.md, and the tree of files in
architecture.md.

    python docs/reference.py            # says which pages differ from the code, exit code 1
    python docs/reference.py --write    # writes them

A test checks that the committed pages are what this writes.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import typer
from typer.main import get_command

from mlx_diffgemma import GenerationSettings, ImageSettings
from mlx_diffgemma.cli.options import app_of as made_app
from mlx_diffgemma.config.entry import Entry, choices, kinds, range_of
from mlx_diffgemma.config.generation import decider_of
from mlx_diffgemma.config.policies import NEED_FREE_TEXT, POLICIES
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.config.training import LoraParameters, TrainSettings

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = "<!-- made by docs/reference.py: change the code, then run it with --write -->"
BEGIN, END = "<!-- tree of files -->", "<!-- /tree of files -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    stale = [path for path, text in pages().items() if not is_current(path, text)]
    for path in stale:
        if options.write:
            path.write_text(pages()[path], encoding="utf-8")
        print(f"{'wrote' if options.write else 'differs from the code:'} {path.relative_to(ROOT)}")
    sys.exit(bool(stale) and not options.write)


def is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def pages() -> dict[Path, str]:
    """Return every generated page and its text."""
    architecture = DOCS / "architecture.md"
    return {
        DOCS / "settings.md": settings_page(),
        DOCS / "commands.md": commands_page(),
        architecture: with_tree(architecture.read_text(encoding="utf-8")),
    }


# Settings


def settings_page() -> str:
    """Return the reference of all settings."""
    policies = [
        f"- `{name}`: {', '.join(f'`{key}={value!r}`' for key, value in fills.items())}"
        for name, fills in POLICIES.items()
        if fills
    ]
    return join(
        "# Settings",
        GENERATED,
        "## A run",
        "The fields of `GenerationSettings`, and the options of `mlx_diffgemma.generate`, "
        "`mlx_diffgemma.chat`, `mlx_diffgemma.fill`, `mlx_diffgemma.edit` and "
        "`mlx_diffgemma.serve`. A value that you "
        "give always wins. Where you give none, the policy decides, then the checkpoint's "
        "`generation_config.json`, then the default in this table. A setting that has no effect "
        "together with another one is an error.",
        settings_table(GenerationSettings),
        "A policy sets several of them:",
        "\n".join(policies),
        "In `fill`, `edit` and the routes made of them text is pinned; there a policy leaves out "
        f"{', '.join(f'`{name}`' for name in NEED_FREE_TEXT)}.",
        "## Pictures and videos",
        "The fields of `ImageSettings`, which `PromptOptions.images` holds, and options of "
        "`mlx_diffgemma.generate` and `mlx_diffgemma.chat`; see [Pictures and videos](images.md).",
        settings_table(ImageSettings),
        "## A training run",
        "The keys of a YAML file for `mlx_diffgemma.train --config`. Most are options too; an "
        "option wins over the file. Names are those of mlx-lm where it has the same setting.",
        settings_table(TrainSettings),
        "### Adapters",
        "The keys under `lora_parameters`:",
        settings_table(LoraParameters),
        "## Bounds of a server",
        "The options of `mlx_diffgemma.serve` that bound what clients may ask for; see "
        "[Server](server.md).",
        settings_table(Limits),
    )


def elsewhere(flags: dict[tuple[str, str], str], name: str, entry: Any) -> str:
    """Return a setting's option of other commands than the table's, with their names; "" without
    one."""
    commands = [c for c in (entry.commands if entry else ()) if (c, name) in flags]
    return f"{flags[commands[0], name]} of {', '.join(entry.commands)}" if commands else ""


def settings_table(cls: Any) -> str:
    """Return a table of a dataclass of settings, one row for each field."""
    commands = {GenerationSettings: "generate", ImageSettings: "generate", Limits: "serve"}
    of = commands.get(cls, "train")
    flags = {} if cls is LoraParameters else options_by_setting()
    heads = ["setting", "option", "value", "default", "what it does"]
    if cls is LoraParameters:
        heads.remove("option")
    rows = []
    for field in fields(cls):
        entry = field.metadata.get("entry")
        row = [
            f"`{field.name}`",
            flags.get((of, field.name)) or elsewhere(flags, field.name, entry),
            value_of(cls, field, entry),
            default_of(field, entry),
            help_of(field, entry),
        ]
        rows.append(row if "option" in heads else row[:1] + row[2:])
    return table(heads, rows)


def options_by_setting() -> dict[tuple[str, str], str]:
    """Return the option for each setting: (command, name) -> flag."""
    found = {}
    for name in ("generate", "train", "serve"):
        for option in parameters(name):
            if option.param_type_name == "option":
                found[name, option.name] = f"`{option.opts[0]}`"
    return found


def value_of(cls: Any, field: Field[Any], entry: Entry | None) -> str:
    """Return the type of a setting and its bounds, in words."""
    kind = kinds(cls)[field.name] if entry is not None else type_of(cls, field.name)
    if options := choices(kind):
        return " or ".join(f"`{option}`" for option in options)
    words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    text = words.get(kind) or ("list" if get_origin(kind) is tuple else "keys and values")
    if entry is None:
        return text
    return ",".join(filter(None, [text, range_of(entry)]))


def type_of(cls: Any, name: str) -> Any:
    """The type of a field without an entry, without None."""
    hint = get_type_hints(cls)[name]
    kept = [kind for kind in get_args(hint) if kind is not type(None)]
    return kept[0] if type(None) in get_args(hint) and kept else hint


def default_of(field: Field[Any], entry: Entry | None) -> str:
    """Return the default of a setting, and who may decide before it."""
    if entry is not None and entry.shown_default is not None:
        return entry.shown_default
    value = field.default if entry is None else entry.default
    if value is MISSING or value is None or value == () or isinstance(value, LoraParameters):
        return ""
    text = f"{', '.join(value)}" if isinstance(value, tuple) else f"{value}".lower()
    if entry is None:
        return text
    if (decider := decider_of(field.name, entry)) == "policy":
        text = f"the policy's, else {text}"
    elif decider:
        text = f"the {decider}'s, else {text}"
    if entry.command_default is not None:
        text += f"; the command's is {entry.command_default}"
    return text


def help_of(field: Field[Any], entry: Entry | None) -> str:
    if entry is None:
        return str(field.metadata.get("help", OTHER_HELP.get(field.name, "")))
    if entry.only_with is None:
        return entry.help
    other, wanted = entry.only_with
    return f"{entry.help} Only with `{other}={wanted!r}`."


# Fields without an entry.
OTHER_HELP = {
    "extra_eos_token_ids": "More token ids that end an answer. The command takes tokens instead, "
    "with `--extra-eos-token`.",
    "rank": "Rank of the adapters.",
    "scale": "Factor of what adapters add; alpha / rank elsewhere.",
    "dropout": "Share of an adapter's inputs that is dropped in training.",
    "keys": "Modules that get adapters, within a layer or from the root of the model.",
}


# Commands


def commands_page() -> str:
    """Return the reference of all commands."""
    sections = []
    for name in command_names():
        command = get_command(app_of(name))
        sections += command_section("##", f"mlx_diffgemma.{name}", command)
        for part, subcommand in getattr(command, "commands", {}).items():
            sections += command_section("###", f"mlx_diffgemma.{name} {part}", subcommand)
    return join(
        "# Commands",
        GENERATED,
        "Every command is a program of this name, and `python -m mlx_diffgemma.NAME` and "
        "`python -m mlx_diffgemma NAME` run the same. `--help` prints what this page says. "
        "Settings are explained with their bounds in the [settings reference](settings.md).",
        "Every program also has `--version`, `--install-completion SHELL` and "
        "`--show-completion SHELL`, for bash, zsh and fish: see "
        "[Install](install.md#shell-completion).",
        *sections,
    )


def command_section(mark: str, title: str, command: Any) -> Iterator[str]:
    """Yield what the page says about a command or a subcommand."""
    words = [p.metavar or p.name.upper() for p in command.params if is_argument(p)]
    yield f"{mark} {title}"
    yield " ".join((command.help or "").split())
    yield f"```text\n{' '.join([title, *words, '[OPTIONS]'])}\n```"
    if command.params:
        heads = ["argument or option", "what it does", "default"]
        yield table(heads, map(option_row, command.params))


def command_names() -> list[str]:
    """Return the commands that the package installs, in pyproject.toml's order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [script.removeprefix("mlx_diffgemma.") for script in project["scripts"]]


def app_of(name: str) -> typer.Typer:
    """Return a command as an app: `app` of `mlx_diffgemma.cli.NAME`, where it has subcommands, or
    its function of the same name."""
    module = import_module(f"mlx_diffgemma.cli.{name}")
    if hasattr(module, "app"):
        return module.app
    return made_app(getattr(module, name))


def parameters(name: str) -> list[Any]:
    """Return the arguments and options of a command."""
    return list(get_command(app_of(name)).params)


def is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


def option_row(parameter: Any) -> list[str]:
    if is_argument(parameter):
        shown = f"`{(parameter.metavar or parameter.name.upper()).strip('[]')}`"
    else:
        shown = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.show_default if isinstance(parameter.show_default, str) else ""
    if parameter.required:
        default = "required"
    elif not default and isinstance(parameter.default, str | int) and not is_flag(parameter):
        default = f"{parameter.default}"
    return [shown, " ".join((parameter.help or "").split()), default]


def is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))


# Architecture


def with_tree(page: str) -> str:
    """Return the architecture page with the tree of the package's files between its marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    rows = table(["file", "what it holds"], tree())
    return f"{head}{BEGIN}\n\n{rows}\n\n{END}{tail}"


def tree() -> Iterator[list[str]]:
    """Yield the wings in their order and the files of each in reading order, from the test that
    enforces both."""
    for wing, files in wings().items():
        folder = ROOT / "mlx_diffgemma" / wing
        if not folder.is_dir():
            yield [f"**`{wing}.py`**", summary(folder.with_suffix(".py"))]
            continue
        yield [f"**`{wing}/`**", f"**{summary(folder / '__init__.py')}**"]
        for name in files:
            yield [f"`{wing}/{name}.py`", summary(folder / f"{name}.py")]


def wings() -> dict[str, list[str]]:
    """Return WINGS of tests/test_architecture.py, without importing the test."""
    source = (ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WINGS":
            return {wing: files.split() for wing, files in ast.literal_eval(node.value).items()}
    raise SystemExit("tests/test_architecture.py has no WINGS")


def summary(file: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


# Markdown


def join(*blocks: str) -> str:
    return "\n\n".join(blocks) + "\n"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(escaped, cells))} |" for cells in lines)


def escaped(cell: str) -> str:
    """Keep a cell in its column, and its placeholders from being read as HTML."""
    return cell.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
