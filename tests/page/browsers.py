"""Real browsers, and a person before them. Not a test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service as ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.webkitgtk.service import Service as WebKitService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
WEBKIT = shutil.which("WebKitWebDriver")
MINI = next(iter(sorted(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))), None)
XVFB = shutil.which("Xvfb")
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars window-size=1300,900"
).split()
PATIENCE = 60  # seconds; other tests have the processor too


@contextmanager
def chromium(downloads: Path | None = None) -> Iterator[WebDriver]:
    """Headless Chromium; skips the test where there is none."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no chromium is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.unhandled_prompt_behavior = "accept"
        driver = webdriver.Chrome(options=options, service=ChromeService(CHROMEDRIVER))
        # A page without a window in front gets no focus events.
        driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
        if downloads is not None:
            behavior = {"behavior": "allow", "downloadPath": str(downloads)}
            driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
        try:
            yield driver
        finally:
            driver.quit()


@contextmanager
def webkit() -> Iterator[WebDriver]:
    """WebKit as GTK has it, on a screen of its own; skips the test where there is none."""
    if WEBKIT is None or MINI is None or XVFB is None:
        pytest.skip("webkit2gtk-driver and xvfb are not installed")
    read, write = os.pipe()
    screen = subprocess.Popen(
        [XVFB, "-displayfd", str(write), "-screen", "0", "1400x1000x24"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    try:
        with os.fdopen(read) as told:
            number = told.readline().strip()
        env = {**os.environ, "DISPLAY": f":{number}", "WEBKIT_DISABLE_COMPOSITING_MODE": "1"}
        env["WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS"] = "1"  # as root there is no other way
        env.pop("LD_PRELOAD", None)
        options = webdriver.WebKitGTKOptions()
        options.binary_location = str(MINI)
        options.add_argument("--automation")
        driver = webdriver.WebKitGTK(options=options, service=WebKitService(WEBKIT, env=env))
        try:
            yield driver
        finally:
            driver.quit()
    finally:
        screen.terminate()
        screen.wait()


def until(holds: Callable[[], Any], what: str = "it") -> None:
    """Wait until something holds; what vanishes while it is looked at does not hold yet."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if holds():
                return
        except WebDriverException:
            pass
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.03)


class Person:
    """Somebody before the page of a server."""

    def __init__(self, driver: WebDriver, port: int) -> None:
        self.driver, self.address = driver, f"http://127.0.0.1:{port}/"

    def keep(self, **values: Any) -> None:
        """Have settings of runs from an earlier visit; the page is loaded anew for them."""
        kept = json.dumps({"values": values})
        self.js("localStorage['mlx_diffgemma.settings'] = arguments[0]", kept)

    def open(self, part: str = "chat", *, ready: bool = True) -> None:
        """Load the page anew at a part."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}#{part}")
        self.see(f"document.documentElement.dataset.shown === {part!r}")
        if ready:
            self.see("document.documentElement.dataset.ready === 'yes'")

    def go(self, part: str) -> None:
        """Follow a link to a part."""
        self.one(f"#nav a[href='#{part}']").click()
        self.see(f"document.documentElement.dataset.shown === {part!r}")

    def js(self, code: str, *given: Any) -> Any:
        return self.driver.execute_script(code, *given)

    def see(self, code: str) -> None:
        """Wait until an expression of the page is true."""
        until(lambda: self.js(f"return Boolean({code})"), code)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        code = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return list(self.js(code, selector))

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def click(self, text: str, inside: str = "#main") -> None:
        """Click the button with a text."""
        xpath = f".//button[normalize-space()={text!r}]"

        def is_clicked() -> bool:
            buttons = self.one(inside).find_elements(By.XPATH, xpath)
            button = next((each for each in buttons if each.is_displayed()), None)
            if button is not None:
                button.click()
            return button is not None

        until(is_clicked, f"a click on {text!r}")

    def choose(self, file: Path, opener: str, inside: str = "#main") -> None:
        """Choose a file as in a browser without pickers: Safari, or Firefox."""
        self.js(
            "delete window.showOpenFilePicker; delete window.showSaveFilePicker;"
            "HTMLInputElement.prototype.click = () => {}"  # a driver has no dialog
        )
        self.click(opener, inside)
        until(lambda: self.all("input[type=file].unseen"), "the field of a file")
        self.one("input[type=file].unseen").send_keys(str(file))

    def write(self, selector: str, text: str) -> None:
        """Put a text into a field, at once."""
        self.js(
            "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            selector,
            text,
        )

    # Chat

    def ask(self, text: str) -> None:
        """Send a message."""
        self.write("#message", text)
        self.one("#message").send_keys(Keys.ENTER)

    def answered(self, count: int = 1) -> str:
        """Wait for the end of the last answer, and return its text."""
        self.see(
            f"!document.querySelector('.running') && "
            f"document.querySelectorAll('.turn.assistant').length === {count}"
        )
        return self.texts(".turn.assistant .answer")[-1].strip()

    def select(self, selector: str, start: int, stop: int) -> None:
        """Select a part of a text field."""
        self.js(
            "const field = document.querySelector(arguments[0]); field.focus();"
            "field.setSelectionRange(arguments[1], arguments[2]);"
            "document.dispatchEvent(new Event('selectionchange'));",
            selector,
            start,
            stop,
        )

    def complaints(self) -> list[str]:
        """What Chromium's console has to say since it was asked last, but for answers that are
        errors, which a person is told of."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in told if "Failed to load resource" not in message]
