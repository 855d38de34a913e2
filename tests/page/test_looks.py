"""How the page looks and is read: accessibility, widths, motion, the weight of its first paint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.page.browsers import Person

AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text(encoding="utf-8")
PARTS = ("chat", "document", "form", "decide", "inside", "settings")
LONG = "Donaudampfschifffahrtsgesellschaftskapitän" * 4
STRANGE = f"Sort: 6 3 1 7 {LONG} שלום עולם مرحبا بالعالم 👩‍👩‍👧‍👦 🏳️‍🌈"


def look(person: Person, width: int, scheme: str, *, motion: str = "no-preference") -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": motion},
    ]
    person.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    person.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def looked(person):
    yield person
    person.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    person.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def serious(person: Person) -> list[Any]:
    """What axe finds that is serious or critical."""
    if not person.js("return 'axe' in window"):
        person.js(AXE)
    found = person.driver.execute_async_script(
        "const done = arguments[0];"
        "axe.run({resultTypes: ['violations']}).then((told) => done(told.violations.map((each) => "
        "[each.impact, each.id, each.nodes.map((node) => node.html.slice(0, 150)).slice(0, 3)])))"
    )
    return [each for each in found if each[0] in ("serious", "critical")]


def work(person: Person, part: str) -> None:
    """Let a part show a result."""
    if part == "chat":
        person.ask(STRANGE)
        person.answered()
        person.click("Retry")
        person.see("document.querySelector('.versions')")
        person.answered()
    elif part == "document":
        person.click("Fill the slots")
        person.see("document.querySelector('.proposal button.primary:not([hidden])')")
    elif part == "decide":
        person.click("Decide")
        person.see("document.querySelectorAll('.bars table').length === 3")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1440, "light"),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in ((1440, "dark"), (390, "light"), (390, "dark"), (360, "dark"))
        ),
    ],
)
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(looked, width, scheme):
    look(looked, width, scheme)
    looked.keep(seed=1, max_denoising_steps=4, max_new_tokens=64)
    for part in PARTS:
        looked.open(part) if part == "chat" else looked.go(part)
        work(looked, part)
        assert serious(looked) == [], part
        assert looked.js("return document.documentElement.scrollWidth") <= width, part


def test_every_part_is_in_sight_of_a_telephone(looked):
    for width in (390, 360):
        look(looked, width, "light")
        looked.open()
        edges = looked.js(
            "return [...document.querySelectorAll('#nav a')].map((link) => {"
            "const {left, right, height} = link.getBoundingClientRect();"
            "return [left, right, height]; })"
        )
        assert len(edges) == len(PARTS)
        for left, right, height in edges:
            assert left >= 0 and right <= width and height >= 24


def test_a_field_keeps_its_lines_in_sight_when_the_width_changes(looked):
    look(looked, 1440, "light")
    looked.open()
    looked.write("#message", STRANGE)
    looked.one("#message").click()
    for width in (390, 1440):
        look(looked, width, "light")
        looked.see("Math.abs(message.scrollHeight - message.clientHeight) <= 2")


def test_tokens_keep_their_places_where_some_run_from_right_to_left(looked):
    look(looked, 1440, "light")
    looked.open()
    told = looked.driver.execute_async_script(
        "const done = arguments[0]; import('/page/settle.js').then(({Canvas}) => {"
        "const canvas = new Canvas(), drawn = [];"
        "document.querySelector('.turns').append(canvas.element);"
        "for (const words of [['one', ' two'], ['\u05d0', ' \u05d1'], ['\u05d0', '']]) {"
        "canvas.draw(words.map((text) => ({text, certainty: 1000, accepted: true})));"
        "const spans = [...canvas.element.children];"
        "drawn.push([spans.map((span) => span.textContent), getComputedStyle(spans[0]).unicodeBidi,"
        "spans[0].getBoundingClientRect().right <= spans[1].getBoundingClientRect().left + 0.5]); }"
        "canvas.draw([{text: 'x', certainty: 0, accepted: true}]);"
        "done([drawn, canvas.element.textContent]); })"
    )
    assert told == [
        [
            [["one", " two"], "normal", True],
            [["\u05d0", " \u05d1"], "isolate", True],
            [["\u05d0", ""], "isolate", True],
        ],
        "x",
    ]


def test_axe_finds_nothing_serious_while_text_settles(looked, slow):
    look(looked, 1440, "light")
    looked.open()
    looked.ask("Count from 38 to 63.")
    looked.see("document.querySelectorAll('.settling > span').length > 10")
    assert serious(looked) == []
    looked.answered()


def test_reduced_motion_is_kept_to(looked, slow):
    for motion, moves in (("reduce", False), ("no-preference", True)):
        look(looked, 1440, "light", motion=motion)
        looked.open()
        looked.click("New")
        looked.ask("Count from 38 to 63.")
        looked.js(
            "window.fresh = false; new MutationObserver(() => {"
            "window.fresh ||= Boolean(document.querySelector('.settling.fresh')); })"
            ".observe(document.body, {subtree: true, attributes: true})"
        )
        looked.see("document.querySelector('.settling > .new')")
        assert looked.js("return window.fresh") is moves
        looked.press(Keys.ESCAPE)
        looked.answered()


def test_the_first_paint_needs_less_than_100_kb(person):
    person.open()
    bytes_ = person.js(
        "const shown = performance.getEntriesByName('shown')[0].startTime;"
        "return [...performance.getEntriesByType('navigation'),"
        "...performance.getEntriesByType('resource').filter((each) => each.startTime < shown)]"
        ".reduce((sum, each) => sum + each.decodedBodySize, 0)"
    )
    assert 20_000 < bytes_ < 100_000
    assert person.js("return performance.getEntriesByType('paint').length") > 0
