"""A report as JSON and as a block to paste: whole, and without anything private."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import pytest

from mlx_diffgemma import bundled_model
from mlx_diffgemma.doctor.answers import Answer, find
from mlx_diffgemma.doctor.block import markdown, number
from mlx_diffgemma.doctor.machine import this_machine
from mlx_diffgemma.doctor.outcome import Check, Outcome
from mlx_diffgemma.doctor.report import (
    FORMAT,
    Note,
    Report,
    Started,
    added,
    as_object,
    check_target,
    from_object,
    public,
)
from mlx_diffgemma.doctor.speed import Shape, extrapolated
from mlx_diffgemma.errors import SourceError
from tests.doctor.test_speed import BY_HAND


def outcome(name: str, difference: float, error: str | None = None) -> Outcome:
    check = Check(name, "products", 1e-3, "wrong products", f"{name} weights", lambda: difference)
    return Outcome(check, difference, 0.5, error)


def whole_report() -> Report:
    answers = [
        Answer("fact", policy, 20, 12, 1, 8, 0.5, 2.0, 1 << 30, True)
        for policy in ("reference", "fast")
    ]
    events = [
        Started("machine"),
        this_machine(),
        Started("checks", 3),
        outcome("4-bit", 1e-5),
        outcome("8-bit", 0.25),
        outcome("mxfp4", float("nan"), "no kernel at /Users/janedoe/x"),
        Shape(1, 256, 1024, "bfloat16", 1_470_000_000, "M3 Ultra"),
        *BY_HAND,
        extrapolated(BY_HAND, 256),
        find(str(bundled_model())).facts,
        *answers,
        Note("answers", "ended early: no memory", has_failed=True),
    ]
    report = Report()
    for event in events:
        report = added(report, event)
    return replace(report, is_complete=True, seconds=12.5)


def test_a_report_survives_json():
    report = whole_report()
    text = json.dumps(as_object(report), allow_nan=False)
    assert json.loads(text)["format"] == FORMAT == "mlx_diffgemma.doctor/1"
    assert from_object(json.loads(text)) == report
    assert from_object(json.loads(json.dumps(as_object(Report())))) == Report()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "format is None"),
        ([], "format is None"),
        ({"format": "mlx_diffgemma.doctor/2"}, "doctor/2"),
        ({"format": FORMAT}, "damaged"),
        (as_object(Report()) | {"machine": 3}, "damaged"),
    ],
)
def test_what_is_no_report_of_this_version_is_refused(value, words):
    with pytest.raises(SourceError, match=words):
        from_object(value)


def test_failures_are_named_with_what_not_to_use():
    report = whole_report()
    assert [check.name for check in report.failures] == ["8-bit", "mxfp4"]
    assert report.avoid == ["8-bit weights", "mxfp4 weights"]
    assert not report.is_all_right
    assert not replace(report, checks=()).is_all_right, "a part has failed"
    assert replace(report, checks=report.checks[:1], notes=()).is_all_right


def test_the_block_says_what_was_found_in_one_line_each():
    report = whole_report()
    text = markdown(report)
    assert text.startswith("### mlx_diffgemma.doctor\n\n- machine: ")
    for words in (
        "- checks: 1 of 3 passed\n",
        "- **WRONG** products, 8-bit: difference 0.25, tolerance 0.001\n",
        "- **WRONG** products, mxfp4: no kernel at (path)\n",
        "25 x sliding layer 2.00 (floor 1.00), 5 x full layer",
        "96.0 ms per step (floor 47.5)",
        "305 at 8,",
        "twin 100 tokens/s, faster above 25.9 steps",
        "- reference: 8.0 steps per canvas, 250 ms per step, 6.00 tokens/s, peak 1.1 GB, 1 of 1",
        "- answers: ended early: no memory\n",
    ):
        assert words in text, f"{words}\n{text}"
    interrupted = markdown(replace(report, is_complete=False, speed=None))
    assert "(interrupted)" in interrupted and "speed" not in interrupted
    assert markdown(Report()).count("\n") == 2


def test_nothing_private_is_in_json_or_block(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "node", lambda: "janes-mac.local")
    monkeypatch.setenv("HOME", "/Users/jane doe")
    folder = tmp_path / "secret place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    error = (
        f"cannot open /Users/jane doe/x.metal nor {folder}/y or ~/z at janes-mac, "
        "C:\\Users\\jane\\k; 3.5 tokens/s and/or 1/10 stay"
    )
    report = added(whole_report(), outcome("2-bit", 1.0, error))
    report = added(report, Note("speed", f"failed: {error}", has_failed=True))
    for text in (json.dumps(as_object(report)), markdown(report)):
        for word in ("jane", "secret", str(tmp_path), "Users", "x.metal"):
            assert word not in text, f"{word} in {text}"
        assert "3.5 tokens/s and/or 1/10 stay" in text


def test_long_and_broken_messages_become_one_short_line():
    found = public("kernel\nfailed " + "x" * 1000)
    assert "\n" not in found and found.startswith("kernel failed x") and len(found) < 310


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (1.239, "1.24"), (12.34, "12.3"), (123.4, "123"), (42080.1, "42,080")],
)
def test_numbers_have_no_exponent(value, text):
    assert number(value) == text


def test_a_report_replaces_only_a_report(tmp_path):
    new, empty, old, other = (tmp_path / name for name in ("new", "empty", "old", "other"))
    empty.touch()
    old.write_text(json.dumps(as_object(Report())))
    other.write_text('{"thesis": 1}')
    for file in (new, empty, old):
        check_target(file)
    for file, words in (
        (other, "is not a report"),
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere" / "x.json", "make it first"),
    ):
        with pytest.raises(SourceError, match=words):
            check_target(file)
    assert other.read_text() == '{"thesis": 1}' and not new.exists()
