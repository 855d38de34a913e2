"""Chat, driven in Chromium against a real server."""

from __future__ import annotations

import json

import pytest
from selenium.webdriver.common.keys import Keys

from tests.page.browsers import until
from tests.serve.cases import COUNTED, LONG, serving

COUNT = "Count from 38 to 63."
SORT = "Sort: 6 3 1 7"


@pytest.fixture
def endless(person, monkeypatch):
    """A server whose runs take two hundred steps; the person is before its page."""
    with serving(settings=LONG) as running:
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{running.port}/")
        yield running


def test_an_answer_settles_in_place_and_stands(person, slow):
    person.open()
    person.ask(COUNT)
    person.see("document.querySelector('.settling > span')")
    drawn = person.js(
        "return [...document.querySelectorAll('.settling > span')].map((s) => s.className)"
    )
    assert drawn and all(name.split()[0][0] == "b" for name in drawn)
    assert person.one(".settling").get_attribute("aria-hidden") == "true"
    # The first canvas is firm while the second one settles behind it.
    person.see("document.querySelector('.tail').textContent.startsWith('38 39')")
    assert person.js("return document.querySelector('.running .stats').textContent").startswith(
        "canvas"
    )
    assert person.answered() == COUNTED
    stats = person.text(".turn.assistant .stats")
    assert "78 tokens" in stats and "2 canvases" in stats and "ms/step" in stats
    # A screen reader hears what has settled, each piece once.
    assert "".join(person.texts("#live p")) == COUNTED


def test_stop_ends_the_run_within_a_step_and_keeps_the_draft(person, endless):
    server = endless
    person.open()
    person.ask(COUNT)
    person.see("document.querySelectorAll('.settling > span').length > 3")
    person.press(Keys.ESCAPE)
    person.answered()
    assert "Stopped." in person.text(".turn.assistant")
    kept = person.text(".turn.assistant .answer")
    assert kept.strip()
    until(lambda: server.engine.counts["running"] == 0, "the end of the run")
    assert server.steps < 200
    person.open()  # it was kept
    person.see("document.querySelector('.turn.assistant')")
    assert person.text(".turn.assistant .answer").strip() == kept.strip()


def test_retry_and_edit_keep_the_versions_before(person):
    person.open()
    person.ask(SORT)
    assert person.answered() == "1 3 6 7"
    person.click("Retry")
    person.see("document.querySelector('.turn.assistant .versions span')?.textContent === '2/2'")
    assert person.answered() == "1 3 6 7"
    person.click("Edit")
    person.write(".editing textarea", "Sort: 4 2 8")
    person.one(".editing textarea").send_keys(Keys.ENTER)
    person.see("document.querySelector('.turn.user .versions span')?.textContent === '2/2'")
    assert person.answered() == "2 4 8"
    person.one(".turn.user [aria-label='the version before']").click()
    assert person.text(".turn.user .said") == SORT
    assert person.answered() == "1 3 6 7"


def test_several_conversations_are_kept_and_go_from_browser_to_browser(person, downloads):
    person.open()
    person.ask(SORT)
    person.answered()
    person.click("New")
    person.ask("Reverse: kaa")
    assert person.answered() == "aak"
    until(lambda: len(person.all(".conversation")) == 2, "two conversations")
    person.click(SORT, "#side")
    assert person.answered() == "1 3 6 7"
    person.click("Export", "#side")
    file = downloads / "conversations.json"
    until(file.is_file, "the download")
    kept = json.loads(file.read_text())
    assert {each["title"] for each in kept["conversations"]} == {SORT, "Reverse: kaa"}
    # Another browser reads the file. What is in it is not believed.
    turn = kept["conversations"][0]["root"]["children"][0]
    turn["children"][0]["text"] = "<img src=x onerror=alert(1)>"
    turn["images"] = ["javascript:alert(1)", "http://evil.example/x.png"]
    file.write_text(json.dumps(kept))
    person.choose(file, "Import", "#side")
    until(lambda: len(person.all(".conversation")) == 4, "the import")
    person.all(".conversation")[0].click()
    person.see("document.querySelector('.turn.assistant')")
    assert not person.all("#main .answer img, #main .images img")
    file.unlink()
    assert "2 conversations were imported" in person.text("#notice")


def test_a_file_that_holds_no_conversations_is_refused(person, tmp_path):
    person.open()
    (tmp_path / "x.json").write_text('{"format": "another"}')
    person.choose(tmp_path / "x.json", "Import", "#side")
    person.see("document.getElementById('notice').textContent.includes('its format is not')")


def test_two_tabs_do_not_overwrite_each_other(person):
    person.open()
    person.ask(SORT)
    person.answered()
    driver = person.driver
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        person.open()
        until(lambda: person.all(".conversation"), "the other tab's conversation")
        person.all(".conversation")[0].click()
        person.see("document.querySelectorAll('.turn').length === 2")
        person.ask("Sort: 9 8")
        person.answered(2)
        driver.switch_to.window(first)
        # This tab shows what the other one wrote, and goes on from there.
        person.see("document.querySelectorAll('.turn').length === 4")
        assert "Sort: 9 8" in person.texts(".turn.user .said")
    finally:
        for handle in driver.window_handles:
            if handle != first:
                driver.switch_to.window(handle)
                driver.close()
        driver.switch_to.window(first)


def test_the_keyboard_alone_is_enough(person):
    person.open()
    person.js("document.activeElement.blur()")
    person.press(Keys.TAB)
    assert person.js("return document.activeElement.className") == "skip"
    for _ in range(40):
        if person.js("return document.activeElement.id") == "message":
            break
        person.press(Keys.TAB)
    person.press(SORT, Keys.ENTER)
    assert person.answered() == "1 3 6 7"
    for name in ("Copy", "Retry"):
        for _ in range(60):
            if person.js("return document.activeElement.textContent") == name:
                break
            person.press(Keys.TAB)
        assert person.js("return document.activeElement.textContent") == name
        assert person.js("return document.activeElement.matches(':focus-visible')")
    person.press(Keys.ENTER)
    person.see("document.querySelector('.turn.assistant .versions')")


def test_a_table_is_a_table(person):
    person.open()
    person.ask("Squares from 4 to 6.")
    person.answered()
    person.see("document.querySelectorAll('.answer table td').length === 6")
    assert person.texts(".answer td")[-2:] == ["6", "36"]


@pytest.mark.parametrize("wide", [True, False])
def test_the_list_of_conversations_is_there_at_every_width(person, wide):
    size = {"width": 1300 if wide else 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    person.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        person.open()
        person.ask(SORT)
        person.answered()
        assert person.js("return document.documentElement.scrollWidth") <= size["width"]
        until(lambda: person.all(".conversation"), "the list")
        if not wide:
            assert not person.one(".conversation").is_displayed()
            person.click("Conversations")
        assert person.one(".conversation").is_displayed()
    finally:
        person.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
