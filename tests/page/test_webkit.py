"""The page in WebKit, which most Mac users have: what the parts do, once through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver.common.keys import Keys

from tests.page.browsers import Person, until, webkit
from tests.page.test_guards import HOSTILE
from tests.serve.cases import LONG, scripted, serving


@pytest.fixture(scope="module")
def driver() -> Iterator:
    with webkit() as made:
        yield made


def test_every_part_works(driver, tmp_path):
    with serving() as running:
        person = Person(driver, running.port)
        person.open()
        person.keep(seed=1, max_denoising_steps=4)
        person.open()
        person.ask("Sort: 6 3 1 7")
        assert person.answered() == "1 3 6 7"
        person.click("Retry")
        person.see("document.querySelector('.turn.assistant .versions')")
        person.answered()
        until(lambda: person.all(".conversation"), "the list")
        person.go("document")
        person.write("#pane", "12 13 14 {{gap}} 18 19 20")
        person.write("#wish", "Count from 12 to 20.")
        person.click("Fill the slots")
        person.see("document.querySelector('.proposal button.primary:not([hidden])')")
        person.click("Accept")
        assert person.js("return pane.value") == "12 13 14 15 16 17 18 19 20"
        person.click("Undo")
        until(lambda: "{{gap}}" in person.js("return pane.value"), "the undo")
        # It has no pickers: files come by upload.
        assert not person.js("return 'showOpenFilePicker' in window")
        person.go("decide")
        person.click("Decide")
        person.see("document.querySelectorAll('.bars table').length === 3")
        person.go("inside")
        person.see("document.querySelectorAll('#tokens .token').length === 64")
        person.press(Keys.END)
        assert person.js("return slider.value === slider.max")
        person.go("settings")
        person.see("document.getElementById('setting-policy')")
        person.go("form")
        person.js(
            "document.getElementById('schema').value = JSON.stringify("
            "{type: 'object', properties: {n: {enum: [1, 2]}}})"
        )
        person.click("Fill")
        person.see("document.querySelector('.valid:not([hidden])')")
        assert "fits the schema" in person.text(".valid")


@pytest.mark.long
def test_stop_and_hostile_text(driver):
    with serving(settings=LONG) as running:
        person = Person(driver, running.port)
        person.open()
        person.ask("Count from 38 to 63.")
        person.see("document.querySelectorAll('.settling > span').length > 3")
        person.click("Stop", ".composer")
        person.answered()
        until(lambda: running.engine.counts["running"] == 0, "the end of the run")
    with serving(model=scripted(HOSTILE)) as running:
        person = Person(driver, running.port)
        person.open()
        person.ask("x")
        person.answered()
        person.see("document.querySelector('.answer .katex')")
        assert person.js("return window.hit") is None
        assert not person.all(".answer script, .answer img, .answer iframe")
