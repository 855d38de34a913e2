"""The template language, by hand and by round trip."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma import Template
from mlx_diffgemma.errors import TemplateError
from mlx_diffgemma.language.template import Slot


def test_the_three_kinds_of_slots_names_and_literals():
    text = (
        '{"name": "{{gap:12}}", "vip": {{vip = one of: true | false}}, '
        '"age": {{match: [0-9]{1,3}}}}'
    )
    assert Template.parse(text).parts == (
        '{"name": "',
        Slot("1", "gap", 12, 12),
        '", "vip": ',
        Slot("vip", "one of", options=("true", "false")),
        ', "age": ',
        Slot("3", "match", pattern="[0-9]{1,3}"),
        "}",
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{{gap}}", (Slot("1", "gap"),)),
        ("{{ x=gap : 2..5 }}", (Slot("x", "gap", 2, 5),)),
        (r"a \{{ b {{gap}}", ("a {{ b ", Slot("1", "gap"))),
        (r"\\{{gap}}", ("\\", Slot("1", "gap"))),
        (r"\\\{{ {{gap}}", ("\\{{ ", Slot("1", "gap"))),
        ("{{{gap}}}", ("{", Slot("1", "gap"), "}")),
        ("{{gap}}{{gap}}", (Slot("1", "gap"), Slot("2", "gap"))),
        (r"{{one of: a\|b | {} | \}\} }}", (Slot("1", "one of", options=("a|b", "{}", "}}")),)),
        (r"{{one of: a\\|b}}", (Slot("1", "one of", options=("a\\", "b")),)),
        ("{{one of: a | a}}", (Slot("1", "one of", options=("a",)),)),
        (r"{{match: \}[{}]*\{}}", (Slot("1", "match", pattern=r"\}[{}]*\{"),)),
    ],
)
def test_borders_of_the_language(text, parts):
    assert Template.parse(text).parts == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain", "the template has no slot"),
        ("a\n  {{gp}}", "template, line 2, column 5: 'gp' is not a slot"),
        ("a\nbc {{gap", "template, line 2, column 4: this slot has no }} at its end"),
        ("{{gap:0}}", "line 1, column 3: a gap of 0 to 0 tokens is not possible"),
        ("{{x = gap:5..2}}", "line 1, column 7: a gap of 5 to 2 tokens is not possible"),
        ("{{one of: a || b}}", "option 2 is empty"),
        ("{{match: }}", "there is nothing to match"),
        ("{{a = gap}}{{a = gap}}", "two slots of the template are called 'a'"),
        ("{{}}", "'' is not a slot"),
        ('a {{x = json: {"type": }}', "template, line 1, column 24: json: Expecting value"),
        ("\n{{json: {} []}}", "template, line 2, column 12: there is more than one JSON text"),
        ("\ufeff{{gp}}", "template, line 1, column 3: 'gp' is not a slot"),
    ],
)
def test_errors_point_at_the_column(text, message):
    with pytest.raises(TemplateError, match=re.escape(message)):
        Template.parse(text)


def written(literal: str) -> str:
    """A literal as it is spelled before a slot."""
    return re.sub(
        r"(\\*)(\{{2,}|\{?\Z)",
        lambda found: found[1] * 2 + r"\{{" * (len(found[2]) // 2) + "{" * (len(found[2]) % 2),
        literal,
    )


@given(st.lists(st.text(st.sampled_from("\\{} aé\n"), max_size=8), min_size=1, max_size=4))
def test_any_literal_can_be_written(literals):
    template = Template.parse("{{gap}}".join([*map(written, literals), ""]))
    shown = "".join(part if isinstance(part, str) else "\0" for part in template.parts)
    assert shown == "".join(f"{literal}\0" for literal in literals)


def test_a_byte_order_mark_is_kept_and_is_no_part_of_the_text():
    template = Template.parse("\ufeffa {{gap}}")
    assert template.parts == ("a ", Slot("1", "gap"))
    assert template.shown() == "a ____" and template.filled({"1": "b"}) == "\ufeffa b"
    assert Template.parse("\ufeff{{gap}}").filled({"1": "b"}) == "\ufeffb"
    assert Template.parse("a\ufeff{{gap}}").parts[0] == "a\ufeff"


def test_a_slot_says_where_it_is():
    (slot,) = Template.parse("a\n  {{x = gap}}").slots
    assert slot.label == "template, line 2, column 9: slot x"
    assert Slot("y", "gap").label == "slot y"


def test_what_is_shown_and_what_is_filled():
    template = Template.parse("a {{x = gap}} b {{gap}}")
    assert template.shown() == "a ____ b ____"
    assert template.filled({"x": "1", "2": ""}) == "a 1 b "
