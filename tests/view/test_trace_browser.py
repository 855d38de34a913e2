"""The page of --trace in a browser: opened from disk, driven by mouse and keys."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from mlx_diffgemma.view.trace import CANDIDATES
from tests.view.test_trace import (
    COUNT,
    STRANGE,
    Spelled,
    run_events,
    strange_events,
    traced,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
).split()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    # A page without a window in front gets no focus events.
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    page = tmp_path_factory.mktemp("run") / "run.html"
    traced(run_events(COUNT, seed=1, top_candidates=CANDIDATES)).write(page)
    return page


@pytest.fixture(scope="module")
def steps(written) -> list[dict]:
    """What the page is to show, from run.json."""
    kept = json.loads(written.with_suffix(".json").read_text())
    return [
        {**step, "canvas": canvas["canvas"], "words": kept["vocabulary"]}
        for canvas in kept["canvases"]
        for step in canvas["steps"]
    ]


@pytest.fixture
def page(browser, written) -> Iterator[WebDriver]:
    browser.get_log("browser")
    open_page(browser, written)
    yield browser
    assert browser.get_log("browser") == []


def open_page(browser: WebDriver, file: Path) -> None:
    browser.get(file.as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes")


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def by_id(page: WebDriver, name: str) -> WebElement:
    return page.find_element(By.ID, name)


def place(page: WebDriver) -> int:
    return int(by_id(page, "slider").get_property("value"))


def tokens(page: WebDriver) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, "#tokens .token:not([hidden])")


def press(page: WebDriver, *keys: str) -> None:
    for key in keys:
        ActionChains(page).send_keys(key).perform()


def assert_shows(page: WebDriver, steps: list[dict], index: int) -> None:
    step = steps[index]
    assert place(page) == index
    now = by_id(page, "now").text
    assert now.startswith(f"canvas {step['canvas'] + 1}, step {step['step'] + 1} of ")
    assert f"{step['accepted_tokens']} of 64 accepted" in now
    assert f"mean entropy {step['mean_entropy']:.3f} nats" in now
    spans = page.execute_script(
        "return [...document.querySelectorAll('#tokens .token:not([hidden])')]"
        ".map((s) => [s.textContent, s.className])"
    )
    words = [step["words"][str(i)].replace("\n", "⏎\n") for i in step["draft"]]
    assert [text for text, _ in spans] == words
    assert ["accepted" in name for _, name in spans] == step["accepted"]
    for (_, name), certainty in zip(spans, step["certainty"], strict=True):
        share = round(certainty, 3)
        band = sum(share >= limit for limit in (0.25, 0.5, 0.75, 0.95))
        near = any(abs(certainty - limit) < 1e-3 for limit in (0.25, 0.5, 0.75, 0.95))
        assert near or f"b{band}" in name.split()


def test_the_first_step_is_shown_on_opening(page, steps):
    assert_shows(page, steps, 0)
    assert by_id(page, "prompt").text == "Prompt: a prompt"
    assert by_id(page, "previous").get_property("disabled")
    assert by_id(page, "before").get_property("textContent") == ""


def test_the_slider_goes_to_every_step_and_shows_it(page, steps):
    slider = by_id(page, "slider")
    assert int(slider.get_property("max")) == len(steps) - 1
    slider.send_keys(Keys.HOME)
    for index in range(len(steps)):
        assert_shows(page, steps, index)
        slider.send_keys(Keys.RIGHT)
    assert_shows(page, steps, len(steps) - 1)
    named = f"canvas {steps[-1]['canvas'] + 1}, step {steps[-1]['step'] + 1} of "
    assert slider.get_attribute("aria-valuetext").startswith(named)


def test_the_slider_follows_the_mouse(page, steps):
    slider = by_id(page, "slider")
    width = slider.size["width"] // 2
    ActionChains(page).click_and_hold(slider).move_by_offset(width, 0).release().perform()
    assert_shows(page, steps, len(steps) - 1)


def test_canvases_before_this_one_stand_in_front_of_it(page, steps):
    second = next(i for i, step in enumerate(steps) if step["canvas"] == 1)
    page.execute_script("view.showStep(arguments[0])", second)
    before = by_id(page, "before").get_property("textContent")
    last = steps[second - 1]
    assert before == "".join(last["words"][str(i)] for i in last["draft"])


def test_play_runs_to_the_end_pauses_and_begins_again(page, steps):
    play = by_id(page, "play")
    # Slow, so that a busy machine does not see the end before it can pause.
    page.find_element(By.CSS_SELECTOR, "#speed option[value='1']").click()
    play.click()
    assert "pause" in play.text
    until(lambda: place(page) >= 1)
    play.click()
    stopped = place(page)
    assert "play" in play.text
    time.sleep(1.5)
    assert place(page) == stopped
    assert_shows(page, steps, stopped)
    page.find_element(By.CSS_SELECTOR, "#speed option[value='20']").click()
    play.click()
    until(lambda: place(page) == len(steps) - 1)
    until(lambda: "play" in play.text)
    play.click()
    assert place(page) < len(steps) - 1


def test_previous_and_next_go_one_step(page, steps):
    by_id(page, "next").click()
    by_id(page, "next").click()
    assert_shows(page, steps, 2)
    by_id(page, "previous").click()
    assert_shows(page, steps, 1)


def test_keys_step_and_play_wherever_the_focus_is(page, steps):
    press(page, Keys.RIGHT, Keys.RIGHT, Keys.LEFT)
    assert_shows(page, steps, 1)
    press(page, Keys.END)
    assert_shows(page, steps, len(steps) - 1)
    press(page, Keys.HOME)
    assert_shows(page, steps, 0)
    press(page, Keys.SPACE)
    until(lambda: place(page) > 0)
    press(page, Keys.SPACE)
    assert "play" in by_id(page, "play").text
    by_id(page, "slider").send_keys(Keys.SPACE)
    assert "pause" in by_id(page, "play").text
    press(page, Keys.LEFT)
    assert "play" in by_id(page, "play").text


def test_hovering_a_token_shows_its_candidates(page, steps):
    tip = by_id(page, "tip")
    assert not tip.is_displayed()
    position = steps[0]["accepted"].index(False)
    ActionChains(page).move_to_element(tokens(page)[position]).perform()
    assert tip.is_displayed()
    lines = tip.text.splitlines()
    assert lines[0].startswith(f"position {position + 1}: ")
    assert f"entropy {steps[0]['entropy'][position]:.3f} nats, renoised" in " ".join(lines)
    rows = tip.find_elements(By.TAG_NAME, "tr")
    candidates = steps[0]["candidates"][position]
    assert len(rows) == len(candidates) == CANDIDATES
    for row, (token, share) in zip(rows, candidates, strict=True):
        word, number = (cell.text for cell in row.find_elements(By.TAG_NAME, "td")[:2])
        assert word == steps[0]["words"][str(token)].replace(" ", "␣").replace("\n", "⏎")
        assert number == ("<0.1%" if share < 5e-4 else f"{round(share, 3) * 100:.1f}%")
    ActionChains(page).move_to_element(by_id(page, "about")).perform()
    assert not tip.is_displayed()


def test_tokens_are_reached_by_keys_and_their_tip_follows_the_steps(page, steps):
    tip = by_id(page, "tip")
    by_id(page, "slider").send_keys(Keys.TAB)
    for key, position in ((None, 0), (Keys.RIGHT, 1), (Keys.END, 63), (Keys.LEFT, 62)):
        press(page, *([key] if key else []))
        assert tip.is_displayed() and tip.text.startswith(f"position {position + 1}:")
        focused = page.switch_to.active_element
        assert focused == tokens(page)[position]
        assert focused.get_attribute("aria-describedby") == "tip"
        assert page.execute_script("return arguments[0].matches(':focus-visible')", focused)
    press(page, Keys.DOWN)
    assert_shows(page, steps, 1)
    assert f"entropy {steps[1]['entropy'][62]:.3f} nats" in tip.text
    assert page.switch_to.active_element == tokens(page)[62]
    press(page, Keys.ESCAPE)
    assert not tip.is_displayed()


def test_a_click_into_the_curves_goes_there(page, steps):
    chart = by_id(page, "chart")
    ActionChains(page).move_to_element_with_offset(
        chart, int(chart.size["width"] / 2) - 1, 0
    ).click().perform()
    assert_shows(page, steps, len(steps) - 1)
    assert float(by_id(page, "mark").get_attribute("x1")) == 1000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_every_text_can_be_read_in_both_schemes_and_at_both_widths(page, steps, scheme, width):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        press(page, Keys.RIGHT)
        found = page.execute_script(LEAST_CONTRAST)
        assert found["background"] == (
            "rgb(22, 23, 26)" if scheme == "dark" else "rgb(251, 251, 249)"
        )
        assert found["contrast"] >= 4.5, found
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


LEAST_CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color;
  }
};
let least = {contrast: 99};
const texts = "p, .token, #legend li, .key span, #now, #before";
for (const element of document.querySelectorAll(texts)) {
  const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < least.contrast) least = {contrast, element: element.outerHTML.slice(0, 200)};
}
return {...least, background: getComputedStyle(document.body).backgroundColor};
"""


def test_strange_words_are_shown_and_nothing_of_them_runs(browser, tmp_path):
    text = "".join(STRANGE)
    file = tmp_path / "strange.html"
    traced(strange_events(), Spelled(STRANGE), prompt=text).write(file)
    browser.get_log("browser")
    open_page(browser, file)
    shown = [token.get_property("textContent") for token in tokens(browser)]
    assert shown[:4] == STRANGE[:4]
    named = [re.sub("\u2039U\\+([0-9A-F]{4})\u203a", r"{\1}", text) for text in shown[6:10]]
    assert named == ["{2028}{2029}", "{202E}abc", "{0000}{001B}[2J", "{D800}"]
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert "<script>alert(1)</script>" in by_id(browser, "prompt").text
    starts = browser.execute_script(
        "return view.spans.map((s) => s.getClientRects()[0]).map((box) => [box.top, box.left])"
    )
    assert starts == sorted(starts)  # in the order of positions, whatever way the letters run
    assert browser.get_log("browser") == []


def test_nothing_but_the_file_is_asked_for(browser, written):
    browser.get_log("performance")
    open_page(browser, written)
    asked = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert asked == [written.as_uri()]
