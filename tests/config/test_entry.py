"""One setting, one entry: what is made from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from mlx_diffgemma import GenerationSettings
from mlx_diffgemma.cli.options import command
from mlx_diffgemma.config.entry import Entry, check, choices, entries, kinds, range_of, setting
from mlx_diffgemma.config.training import TrainSettings
from mlx_diffgemma.errors import ConfigError
from tests.cli.test_cli import invoke

ROOT = Path(__file__).parents[2]
MADE_UP = """
    made_up: int | Open = _setting(
        Entry(help="Nobody needs it.", default=5, at_least=2, at_most=9, commands=_ALL)
    )
"""
FIRST = "    max_new_tokens: int | Open = _setting("


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Settings of a made-up command."""

    count: int = setting(Entry(help="A count.", default=3, at_least=1, commands=("play",)))
    share: float | None = setting(
        Entry(help="A share.", above=0, at_most=1, commands=("play",)), is_open=True
    )
    mode: Literal["a", "b"] = setting(Entry(help="A mode.", default="a", commands=("play",)))
    is_on: bool = setting(Entry(help="A switch.", default=False))
    most: int = setting(Entry(help="Of all.", default=-1, at_least=1, below=9, all_is=-1))
    name: str = setting(Entry(help="A name.", default="x"))
    more: Mapping[str, int] | None = setting(Entry(help="More."))

    def __post_init__(self) -> None:
        check(self)


def test_types_and_bounds_are_checked_as_the_entry_says():
    assert Sample(count=1, share=1, mode="b", is_on=True).share == 1
    assert Sample(most=8, name="", more={}).most == 8
    for given, said in [
        ({"count": 0}, "count must be a whole number at least 1, got 0"),
        ({"count": None}, "count must be a whole number at least 1, got None"),
        ({"count": 2.0}, "count must be a whole number at least 1, got 2.0"),
        ({"share": 0}, "share must be a number above 0 and at most 1, got 0"),
        ({"share": True}, "share must be a number above 0 and at most 1, got True"),
        ({"mode": "c"}, "mode must be 'a' or 'b', got 'c'"),
        ({"mode": None}, "mode must be 'a' or 'b', got None"),
        ({"is_on": 1}, "is_on must be true or false, got 1"),
        ({"most": 0}, "most must be a whole number at least 1 and below 9, or -1 for all, got 0"),
        ({"most": 9}, "most must be a whole number at least 1 and below 9, or -1 for all, got 9"),
        (
            {"most": -1.0},
            "most must be a whole number at least 1 and below 9, or -1 for all, got -1.0",
        ),
        ({"name": 3}, "name must be text, got 3"),
        ({"more": [1]}, "more must be an object, got [1]"),
    ]:
        with pytest.raises(ConfigError) as raised:
            Sample(**given)
        assert str(raised.value) == said


def test_kinds_leave_none_and_type_variables_out():
    expected = {"count": int, "share": float, "mode": Literal["a", "b"], "is_on": bool}
    assert kinds(Sample) == expected | {"most": int, "name": str, "more": Mapping[str, int]}
    assert kinds(GenerationSettings)["max_new_tokens"] is int
    assert choices(kinds(GenerationSettings)["policy"]) == ("reference", "fast")
    assert range_of(entries(Sample)["count"]) == " at least 1"


@dataclass(frozen=True)
class Block:
    """Options of a made-up command that are no settings."""

    word: Annotated[str | None, typer.Option(help="A word.")] = None


def test_a_command_gets_the_options_that_its_entries_name():
    seen = []

    @command
    def play(settings: Sample, block: Block) -> None:
        seen.append((settings, block))

    assert "--is-on" not in invoke(play, "--help").stdout
    result = invoke(play, "--count", "2", "--mode", "b", "--word", "x")
    assert result.exit_code == 0, result.output
    assert seen == [(Sample(count=2, mode="b"), Block("x"))]
    refused = invoke(play, "--share", "2")
    assert refused.exit_code == 2 and "share must be a number" in refused.stderr


def test_a_command_may_take_only_what_was_given():
    seen = []

    @command
    def play(given: Annotated[dict, Sample]) -> None:
        seen.append(given)

    assert invoke(play, "--count", "0").exit_code == 0
    assert invoke(play).exit_code == 0
    assert seen == [{"count": 0}, {}]


def test_every_setting_has_an_entry_whose_default_passes_its_own_check():
    names = set(GenerationSettings.__dataclass_fields__)
    assert names - set(entries(GenerationSettings)) == {"extra_eos_token_ids"}
    GenerationSettings(**{name: e.default for name, e in entries(GenerationSettings).items()})
    TrainSettings()


def test_a_setting_that_is_added_in_one_place_is_an_option_and_is_resolved(tmp_path):
    shutil.copytree(ROOT / "mlx_diffgemma", tmp_path / "mlx_diffgemma", symlinks=False)
    file = tmp_path / "mlx_diffgemma" / "config" / "generation.py"
    source = file.read_text()
    assert source.count(FIRST) == 1
    file.write_text(source.replace(FIRST, MADE_UP.strip("\n") + "\n" + FIRST))

    def python(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )

    for name in ("generate", "fill", "edit"):
        shown = python("-m", "mlx_diffgemma", name, "--help").stdout
        assert "--made-up" in shown and "Nobody needs it." in shown and "[default: (5)]" in shown
    for value, code in (("9", 0), ("10", 2)):
        ran = python("-m", "mlx_diffgemma", "generate", "Squares from 2 to 3.", "--made-up", value)
        assert ran.returncode == code, ran.stderr
    assert "--made-up must be a whole number at least 2 and at most 9, got 10" in ran.stderr
    resolved = python(
        "-c",
        "from mlx_diffgemma import GenerationSettings, bundled_model\n"
        "from mlx_diffgemma.config.model import ModelConfig\n"
        "config = ModelConfig.from_folder(bundled_model())\n"
        "print(GenerationSettings(made_up=7).resolve(config).made_up,"
        " GenerationSettings().resolve(config).made_up)",
    )
    assert resolved.stdout.split() == ["7", "5"], resolved.stderr
