"""What must not happen, and what a person meets when things go wrong: hostile text, keys, a server
that goes and comes back."""

from __future__ import annotations

import threading

import pytest
from selenium.webdriver.common.keys import Keys

from mlx_diffgemma.serve.security import Access
from mlx_diffgemma.serve.server import listen
from tests.page.browsers import Person
from tests.page.test_looks import look
from tests.serve.cases import LONG, scripted, serving
from tests.write.test_tool_calls import CALL

KEY = "a key of this test"
HOSTILE = """<script>window.hit = 1</script>
<img src=x onerror="window.hit = 2"> <svg onload="window.hit = 3"></svg>

[click](javascript:window.hit=4) [data](data:text/html,<script>window.hit=5</script>)
![pixel](http://evil.example/?stolen) ![own](/metrics)

| a <b onclick="window.hit=6">x</b> | b |
|---|--:|
| <iframe src="javascript:window.hit=7"></iframe> | 1 |

```html
<script>window.hit = 8</script>
```
$\\href{javascript:window.hit=9}{x} \\htmlData{a=b}{y} \\includegraphics{http://evil.example/y.png}$

# heading <style>body { display: none }</style>
<a href="vbscript:x" style="position:fixed" onmouseover="window.hit=10">z</a> &lt;script&gt;
<form action="http://evil.example"><input name=x autofocus onfocus="window.hit=11"></form>
"""

FORMULAS = r"""Inline $x^2$ and \(a_b\), in a line $$\frac{a}{b}$$ and on.

\[ \int_0^1 x\,dx \]

3. In a list:

   $$
   - n + 1
   $$
4. Inline $\alpha$

> $$
> E
> = mc^2
> $$

| way | cost |
|:--|--:|
| $P(A|B)$ | $$|z|$$ |

Prices $5 and $6, and a bad one: $\frac{1$
"""


@pytest.fixture
def before(person, monkeypatch):
    """Return what puts the person before another server."""

    def put(port: int) -> Person:
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{port}/")
        return person

    return put


def test_an_answer_full_of_markup_and_scripts_runs_nothing(before):
    with serving(model=scripted(HOSTILE)) as running:
        person = before(running.port)
        person.open()
        person.driver.get_log("performance")
        person.ask("x")
        person.answered()
        person.see("document.querySelector('.answer table')")
        person.see("document.querySelector('.answer .katex')")
        person.see("document.querySelector('.answer .code')")
        assert person.js("return window.hit") is None
        # Raw HTML is shown as text.
        assert "<script>window.hit = 1</script>" in person.text(".answer")
        tags = set(
            person.js("return [...document.querySelectorAll('.answer *')].map(e => e.tagName)")
        )
        assert not tags & {"SCRIPT", "IMG", "IFRAME", "STYLE", "FORM", "INPUT", "OBJECT", "B"}
        links = person.js("return [...document.querySelectorAll('.answer a')].map(e => e.href)")
        assert links == ["http://evil.example/?stolen", ""]  # of pictures; nobody asks for them
        attributes = person.js(
            "return [...document.querySelectorAll('.answer *')]"
            ".flatMap((e) => e.getAttributeNames()).filter((name) => name.startsWith('on'))"
        )
        assert attributes == []
        asked = [entry["message"] for entry in person.driver.get_log("performance")]
        sent = [message for message in asked if "Network.requestWillBeSent" in message]
        assert sent and not [message for message in sent if '"url":"http://evil' in message]
        assert person.one("#message").is_displayed()
        person.open()  # and so does what is kept
        person.see("document.querySelector('.answer table')")
        assert person.js("return window.hit") is None


def test_code_mathematics_and_calls_are_shown(before):
    text = "So:\n\n```python\ndef f(x):\n    return x\n```\n\nand $x^2$, then $$\\frac{a}{b}$$\n"
    with serving(model=scripted(text, CALL, "It is 20 degrees.")) as running:
        person = before(running.port)
        person.open()
        person.ask("code")
        person.answered()
        person.see("document.querySelector('.answer .hljs-keyword')?.textContent === 'def'")
        person.see("document.querySelectorAll('.answer .katex').length === 2")
        # A formula is laid out: the page's policy lets KaTeX set its styles.
        assert person.js("return document.querySelector('.katex .vlist > span').style.top") != ""
        person.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        person.click("Copy", ".answer .code")
        person.see("window.copied")
        assert person.js("return window.copied") == "def f(x):\n    return x\n"
        person.js(
            "localStorage['mlx_diffgemma.settings'] = JSON.stringify({tools: JSON.stringify("
            "[{name: 'weather', parameters: {type: 'object', properties: {}}}])})"
        )
        person.open()
        person.click("New")
        person.ask("Weather?")
        person.see("document.querySelector('.call summary')?.textContent === 'Calls weather'")
        assert '"city": "Paris"' in person.text(".call pre")
        person.write(".results textarea", "20 degrees")
        person.click("Send the result")
        person.see("document.querySelectorAll('.turn.assistant').length === 2")
        assert person.answered(2) == "It is 20 degrees."
        assert "20 degrees" in person.text(".turn.tool pre")


def test_formulas_are_displayed_wherever_they_stand(before):
    with serving(model=scripted(FORMULAS)) as running:
        person = before(running.port)
        person.open()
        person.ask("formulas")
        person.answered()
        person.see("document.querySelectorAll('.answer .katex').length === 9")
        told = person.js(
            "return [...document.querySelectorAll('.answer .formula')].map((e) => ["
            "e.querySelector('annotation').textContent.replace(/\\s+/g, ' ').trim(),"
            "getComputedStyle(e).display === 'block' && Boolean(e.querySelector('.katex-display')),"
            "e.closest('ol, blockquote, td')?.tagName ?? ''])"
        )
        assert told == [
            ["x^2", False, ""],
            ["a_b", False, ""],
            [r"\frac{a}{b}", True, ""],
            [r"\int_0^1 x\,dx", True, ""],
            ["- n + 1", True, "OL"],
            [r"\alpha", False, "OL"],
            ["E = mc^2", True, "BLOCKQUOTE"],
            ["P(A|B)", False, "TD"],
            ["|z|", True, "TD"],
        ]
        # Below the text before it, in the middle, and within the page.
        line, shown, column = person.js(
            "const shown = document.querySelector('.answer .katex-display .mfrac');"
            "return [document.querySelector('.answer .katex'), shown, shown.closest('p')]"
            ".map((e) => { const {left, right, bottom, top} = e.getBoundingClientRect();"
            "return {left, right, bottom, top}; })"
        )
        assert shown["top"] >= line["bottom"]
        between = shown["left"] + shown["right"] - column["left"] - column["right"]
        assert abs(between) < 4
        assert person.one(".answer ol").get_attribute("start") == "3"
        assert "Prices $5 and $6" in person.text(".answer")
        # One that cannot be read is shown as it was written.
        assert person.texts(".answer code") == [r"$\frac{1$"]


def test_a_thought_is_folded_away(before):
    with serving(model=scripted("<|channel>thought\nLet me see.<channel|>Yes.")) as running:
        person = before(running.port)
        person.open()
        person.ask("x")
        assert person.answered() == "Yes."
        assert person.text(".thought .thinking") == "Let me see."
        assert not person.one(".thought .thinking").is_displayed()
        person.one(".thought summary").click()
        assert person.one(".thought .thinking").is_displayed()


def test_the_key_is_asked_for_once_and_kept_for_the_tab(before):
    with serving(access=Access(KEY)) as running:
        person = before(running.port)
        person.open(ready=False)
        person.see("document.getElementById('key-dialog').open")
        person.one("#key-field").send_keys("wrong")
        person.click("Use this key", "#key-dialog")
        person.see("document.getElementById('key-problem').textContent.includes('refused')")
        person.one("#key-field").send_keys(KEY)
        person.click("Use this key", "#key-dialog")
        person.see("document.documentElement.dataset.ready === 'yes'")
        person.ask("Sort: 6 3 1 7")
        assert person.answered() == "1 3 6 7"
        person.open()  # the tab has it still
        assert not person.js("return document.getElementById('key-dialog').open")
        assert person.js("return localStorage.length + document.cookie.length") == 0
        assert KEY not in person.driver.current_url
        assert not [line for line in running.lines if KEY in line]
        person.go("settings")
        person.click("Forget the key")
        person.go("decide")
        person.click("Decide")
        person.see("document.getElementById('key-dialog').open")


def test_a_key_may_be_given_later_and_must_be_one_that_can_be_sent(before):
    with serving(access=Access(KEY)) as running:
        person = before(running.port)
        look(person, 390, "light")
        person.open(ready=False)
        person.see("document.getElementById('key-dialog').open")
        box = person.js(
            "const {left, right} = document.getElementById('key-dialog').getBoundingClientRect();"
            "return [left, right]"
        )
        assert box[0] >= 8 and box[1] <= 390 - 8
        person.press(Keys.ESCAPE)
        person.see("document.getElementById('notice').textContent.includes('needs its key')")
        person.ask("Sort: 6 3 1 7")
        person.see("document.getElementById('key-dialog').open")
        person.click("Not now", "#key-dialog")
        person.see("document.querySelector('.turn.assistant .problem')")
        assert person.js("return document.activeElement.id") == "message"
        person.click("Give the key", "#notice")
        person.see("document.getElementById('key-dialog').open")
        person.one("#key-field").send_keys("ключ", Keys.ENTER)
        person.see("document.getElementById('key-problem').textContent.includes('characters')")
        person.one("#key-field").clear()
        person.one("#key-field").send_keys(KEY, Keys.ENTER)
        person.see("document.documentElement.dataset.ready === 'yes'")
        assert person.js("return document.getElementById('notice').hidden")
        person.click("Retry")
        person.see("document.querySelector('.versions')")
        assert person.answered() == "1 3 6 7"
        person.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_server_that_goes_and_comes_back_is_waited_for(person, monkeypatch):
    with serving(settings=LONG) as running:
        port = running.port
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{port}/")
        person.open()
        person.ask("Count from 38 to 63.")
        person.see("document.querySelectorAll('.settling > span').length > 3")
    person.see("document.getElementById('notice').textContent.length > 0")
    person.see("document.querySelector('.turn.assistant .problem')")
    person.write("#message", "Sort: 6 3 1 7")
    monkeypatch.setattr("tests.serve.cases.listen", at(port))
    with serving():
        person.see("document.getElementById('notice').hidden")
        assert person.js("return document.getElementById('message').value") == "Sort: 6 3 1 7"
        person.click("Retry")
        person.see("document.querySelector('.turn.assistant .versions')")
        assert person.answered().startswith("38 39")


def at(port: int):
    return lambda host, _: listen(host, port)


def test_a_model_that_is_loaded_is_waited_for(person, monkeypatch):
    gate = threading.Event()
    with serving(gate=gate) as running:
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{running.port}/")
        person.open(ready=False)
        person.see("document.getElementById('notice').textContent.includes('loads its model')")
        gate.set()
        person.see("document.documentElement.dataset.ready === 'yes'")
        person.ask("Sort: 6 3 1 7")
        assert person.answered() == "1 3 6 7"


def test_nothing_is_asked_of_another_host(person):
    person.driver.get_log("performance")
    for part in ("chat", "document", "form", "decide", "settings", "inside"):
        person.open(part)
    person.go("chat")
    person.ask("Squares from 4 to 6.")
    person.answered()
    urls = [
        entry["message"].split('"url":"')[1].split('"')[0]
        for entry in person.driver.get_log("performance")
        if "Network.requestWillBeSent" in entry["message"] and '"url":"' in entry["message"]
    ]
    own = (person.address, "about:", "data:", "blob:")
    assert urls and all(url.startswith(own) for url in urls), urls
