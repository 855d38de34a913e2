"""Photographs of each part of the page, working and at rest, at two widths, light and dark, to be
looked at.

    python -m tests.page.photographs FOLDER

The model is the bundled one, with steps that take a while. Texts have long words, letters that run
from right to left, and emoji.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mlx_diffgemma.serve import steps
from tests.page.browsers import Person, chromium
from tests.page.test_looks import PARTS, STRANGE, look
from tests.serve.cases import scripted, serving

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, action="append")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    slow_down()
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


def slow_down(seconds: float = 1.0) -> None:
    """Let each step take a while."""
    step = steps._Teller._step

    def slowly(self, said):
        time.sleep(seconds)
        return step(self, said)

    steps._Teller._step = slowly


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
        person.ask(text)
        person.see("document.querySelector('.running .stats')?.textContent.includes('step')")
        time.sleep(0.1)
        shot(f"chat-{name}-working")
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
            person.click("Fill")
            person.see("document.querySelectorAll('.proposal .settling > span').length > 2")
            shot("document-working")
            person.see("document.querySelectorAll('.proposal button:not([hidden])').length === 3")
            time.sleep(0.3)
            shot("document-proposals")
            person.click("Keep the old text")
        elif part == "form":
            shot("form")
            person.click("Fill")
            person.see("document.querySelectorAll('.filled .given').length > 10")
            shot("form-working")
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
