"""One browser and one server for the tests that need nothing special."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from mlx_diffgemma.serve import steps
from tests.page.browsers import Person, chromium
from tests.serve.cases import Running, serving


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads) -> Iterator[WebDriver]:
    with chromium(downloads) as driver:
        yield driver


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running
        assert not running.bugs


@pytest.fixture
def person(browser, server) -> Iterator[Person]:
    """Somebody before a page that keeps nothing of earlier tests."""
    made = Person(browser, server.port)
    browser.get(made.address + "page/icon.svg")
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.execute_async_script(FORGET)
    made.complaints()
    yield made
    assert made.complaints() == []


FORGET = """
const done = arguments[0], asked = indexedDB.deleteDatabase("mlx_diffgemma");
asked.onsuccess = asked.onerror = asked.onblocked = () => done();
"""


@pytest.fixture
def slow(monkeypatch) -> None:
    """Let each step take a while, so that a run can be met under way."""
    step = steps._Teller._step

    def slowly(self, said):
        time.sleep(0.12)
        return step(self, said)

    monkeypatch.setattr(steps._Teller, "_step", slowly)
