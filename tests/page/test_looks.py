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
    [(1440, "light"), pytest.param(360, "dark", marks=pytest.mark.long)],
)
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(looked, width, scheme):
    look(looked, width, scheme)
    looked.keep(seed=1, max_denoising_steps=4, max_new_tokens=64)
    for part in PARTS:
        looked.open(part) if part == "chat" else looked.go(part)
        work(looked, part)
        assert serious(looked) == [], part
        assert looked.js("return document.documentElement.scrollWidth") <= width, part


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
