"""Photographs of each part of the page, working and at rest, at two widths, light and dark, to be
looked at; and the picture of README.

    python -m tests.page.photographs FOLDER
    python -m tests.page.photographs --picture docs/page.png

The model is the bundled one, held within its runs. Texts have long words, letters that run from
right to left, and emoji.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from mlx_diffgemma.serve import steps
from mlx_diffgemma.serve.security import Access
from tests.page.browsers import Person, chromium
from tests.page.test_looks import LONG, PARTS, STRANGE, look
from tests.serve.cases import scripted, serving

# The puzzle of docs/picture.py, which the model was not trained on.
PUZZLE = "Sudoku:\n..426.\n..3.1.\n...42.\n241356\n3.264.\n.65.32"
SUDOKU = "Sudoku:\n2..563\n536214\n654.3.\n.23645\n4..3.1\n..5.26"
RICH = """Here is **one** answer with all that it may have, and a
Donaudampfschifffahrtsgesellschaftskapitänsmützenfabrikationsgebäude.

## A table

| way | worst case | in place |
|:--|--:|:-:|
| bubble sort | $n^2$ | yes |
| merge sort | $n \\log n$ | no |

```python
def palindrome(text: str) -> bool:
    # letters alone
    kept = [c.lower() for c in text if c.isalnum()]
    return kept == kept[::-1]
```

1. שלום עולם, and مرحبا بالعالم
2. emoji: 👩‍👩‍👧‍👦 🏳️‍🌈 🧪

> The roots are

$$x = \\frac{-b \\pm \\sqrt{b^2 - 4ac}}{2a}$$
"""

RIGHT_TO_LEFT = (
    "שלום עולם! זהו משפט ארוך מאוד בעברית עם מילה English באמצע, ומספר 12345.\n\n"
    f"* مرحبا بالعالم 👩‍👩‍👧‍👦 🏳️‍🌈\n* {LONG}\n\n"
    "שורה שנייה בעברית עם קוד `x = 1` ועוד מילים רבות אחריו."
)
VIEWS = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--picture", type=Path, help="write README's picture")
    parser.add_argument("--width", type=int, action="append")
    options = parser.parse_args()
    if options.picture is not None:
        with chromium() as driver, serving() as running:
            picture(Person(driver, running.port), options.picture)
    if options.folder is None:
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    with chromium() as driver, serving() as running, serving(model=scripted(RICH)) as rich:
        for width in options.width or (390, 1440):
            for scheme in ("light", "dark"):
                person = Person(driver, running.port)
                look(person, width, scheme)
                photograph(person, options.folder, f"{width}-{scheme}")
        person = Person(driver, rich.port)
        look(person, 1440, "light")
        person.open()
        person.ask("Show me everything.")
        person.answered()
        person.see("document.querySelector('.hljs-keyword') && document.querySelector('.katex')")
        for width in (1440, 390):
            for scheme in ("light", "dark"):
                look(person, width, scheme)
                time.sleep(0.5)
                take(person, options.folder / f"rich-{width}-{scheme}.png")
    with chromium() as driver:
        photograph_strange(driver, options.folder)


def photograph_strange(driver: WebDriver, folder: Path) -> None:
    """Take an answer from right to left, a turn that is edited, and the question for a key."""

    def shots(person: Person, name: str) -> None:
        for width, scheme in VIEWS:
            look(person, width, scheme)
            time.sleep(0.3)
            take(person, folder / f"{name}-{width}-{scheme}.png")

    with serving(model=scripted(RIGHT_TO_LEFT)) as running:
        person = Person(driver, running.port)
        person.open()
        HOLD.after(21)  # within a canvas
        person.ask(f"שלום {STRANGE}")
        person.see("document.querySelectorAll('.settling > span').length > 3")
        shots(person, "right-to-left-working")
        HOLD.release()
        person.answered()
        shots(person, "right-to-left")
        person.click("Edit")
        shots(person, "editing")
    with serving(access=Access("k")) as running:
        person = Person(driver, running.port)
        person.open(ready=False)
        person.see("document.getElementById('key-dialog').open")
        person.one("#key-field").send_keys("wrong", Keys.ENTER)
        person.see("document.getElementById('key-problem').textContent.includes('refused')")
        shots(person, "key")


class Hold:
    """Holds the engine within a run."""

    def __init__(self) -> None:
        self._steps, self._most = 0, 0
        self._open = threading.Event()
        self._open.set()
        step = steps._Teller._step

        def held(teller, said):
            self._steps += 1
            if self._steps > self._most:
                self._open.wait(60)
            return step(teller, said)

        steps._Teller._step = held

    def after(self, count: int) -> None:
        """Hold the next run after some steps of its rows."""
        self._steps, self._most = 0, count
        self._open.clear()

    def release(self) -> None:
        self._open.set()


HOLD = Hold()


def picture(person: Person, file: Path) -> None:
    """Take README's picture: a canvas after its first step."""
    look(person, 880, "light")
    size = {"width": 880, "height": 600, "deviceScaleFactor": 1, "mobile": False}
    person.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    person.open()
    person.keep(seed=2)
    person.open()
    HOLD.after(1)
    person.ask(PUZZLE)
    person.see("document.querySelectorAll('.settling > span').length > 30")
    person.see("!document.querySelector('.settling.fresh')")
    take(person, file)
    HOLD.release()
    person.answered()


def take(person: Person, file: Path) -> None:
    person.driver.save_screenshot(str(file))


def photograph(person: Person, folder: Path, kind: str) -> None:
    """Take every part, before, during and after its work."""

    def shot(name: str) -> None:
        take(person, folder / f"{name}-{kind}.png")

    person.open()
    person.js("localStorage.clear(); sessionStorage.clear()")
    person.keep(seed=3, max_denoising_steps=4, max_new_tokens=64)
    person.open()
    shot("chat-empty")
    for name, text in (("sudoku", SUDOKU), ("strange", STRANGE)):
        person.click("New")
        HOLD.after(1)
        person.ask(text)
        person.see("document.querySelector('.running .stats')?.textContent.includes('step')")
        person.see("!document.querySelector('.settling.fresh')")
        shot(f"chat-{name}-working")
        HOLD.release()
        person.answered()
        time.sleep(0.3)
        shot(f"chat-{name}")
    for part in PARTS[1:]:
        person.go(part)
        time.sleep(0.2)
        if part == "document":
            person.write("#pane", f"Monday  Wednesday\n\n{STRANGE}\n")
            person.select("#pane", 7, 7)
            person.one(".document select").send_keys("3")
            person.see("document.querySelector('.composer button.primary').textContent === 'Fill'")
            shot("document")
            HOLD.after(9)
            person.click("Fill")
            person.see("document.querySelectorAll('.proposal .settling > span').length > 2")
            time.sleep(0.5)
            shot("document-working")
            HOLD.release()
            person.see("document.querySelectorAll('.proposal button:not([hidden])').length === 3")
            time.sleep(0.3)
            shot("document-proposals")
            person.click("Keep the old text")
        elif part == "form":
            shot("form")
            HOLD.after(2)
            person.click("Fill")
            person.see("document.querySelectorAll('.filled .settling > span').length > 10")
            time.sleep(0.5)
            shot("form-working")
            HOLD.release()
            person.see("document.querySelector('.valid:not([hidden])')")
            shot("form-filled")
        elif part == "decide":
            person.click("Decide")
            person.see("document.querySelectorAll('.bars table').length === 3")
            time.sleep(0.5)
            shot("decide")
        else:
            shot(part)


if __name__ == "__main__":
    main()
