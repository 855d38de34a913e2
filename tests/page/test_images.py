"""Images beside messages, in Chromium against a real server: dropped, pasted and chosen."""

from __future__ import annotations

import base64
import json
from io import BytesIO

from PIL import Image
from selenium.webdriver.common.keys import Keys

from mlx_diffgemma import bundled_model, load
from mlx_diffgemma.config.serving import Limits
from tests.page.browsers import Person, until
from tests.serve.cases import LONG, serving

FEW = {"seed": 1, "max_denoising_steps": 2, "max_new_tokens": 16}
GIVE = """
const [kind, files, text] = arguments;
const transfer = new DataTransfer();
for (const [name, type, data] of files) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  transfer.items.add(new File([bytes], name, {type}));
}
if (text) transfer.setData("text/plain", text);
const event = kind === "paste"
  ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
  : new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
const at = kind === "paste" ? document.getElementById("message") : document.body;
return !at.dispatchEvent(event);
"""


def picture(kind: str = "PNG", size: tuple[int, int] = (32, 24), colour: str = "red") -> bytes:
    made = BytesIO()
    Image.new("RGB", size, colour).save(made, kind)
    return made.getvalue()


def give(person: Person, how: str, *files: tuple[str, str, bytes], text: str = "") -> bool:
    """Drop or paste files, each a name, a type and bytes; return whether the page takes them."""
    coded = [(name, kind, base64.b64encode(data).decode()) for name, kind, data in files]
    return bool(person.js(GIVE, how, coded, text))


def attached(person: Person, count: int) -> None:
    person.see(
        f"document.querySelectorAll('.attached img').length === {count} && "
        "[...document.querySelectorAll('.attached img')].every((e) => e.naturalWidth)"
    )


def told(person: Person, words: str) -> None:
    person.see(f"document.getElementById('notice').textContent.includes({words!r})")


def seen(person: Person) -> list[list[int]]:
    """The sizes of the images of the user's turns."""
    person.see("[...document.querySelectorAll('.user .images img')].every((e) => e.complete)")
    return list(
        person.js(
            "return [...document.querySelectorAll('.user .images img')]"
            ".map((e) => [e.naturalWidth, e.naturalHeight])"
        )
    )


def test_images_are_attached_sent_kept_and_go_from_browser_to_browser(person, tmp_path, downloads):
    person.open()
    person.keep(**FEW)
    person.open()
    (tmp_path / "a.png").write_bytes(picture(size=(24, 20)))
    person.one("input[type=file]").send_keys(str(tmp_path / "a.png"))
    attached(person, 1)
    assert give(person, "dragover", ("b.jpg", "image/jpeg", b""))
    # A file is what its bytes say, whatever its name says.
    assert give(person, "drop", ("b.png", "image/png", picture("JPEG", (26, 20))))
    attached(person, 2)
    assert give(person, "paste", ("c.webp", "image/webp", picture("WEBP", (28, 20))))
    attached(person, 3)
    person.one("[aria-label='Remove image 1']").click()
    attached(person, 2)
    assert person.js("return document.activeElement.id") == "message"
    person.ask("What is this?")
    person.answered()
    sizes = [[26, 20], [28, 20]]
    assert seen(person) == sizes
    assert not person.all(".attached, .turn.assistant .problem")
    person.open()
    person.see("document.querySelector('.turn.user')")
    assert seen(person) == sizes
    # Images alone are a message too, and can be edited.
    person.click("New")
    give(person, "drop", ("d.gif", "image/gif", picture("GIF", (30, 20))))
    attached(person, 1)
    person.one("#message").send_keys(Keys.ENTER)
    person.answered()
    assert seen(person) == [[30, 20]] and not person.one(".user .said").is_displayed()
    assert person.text(".conversation") == "Image"
    person.click("Edit")
    person.one(".editing textarea").send_keys(Keys.ENTER)
    person.see("document.querySelector('.turn.user .versions span')?.textContent === '2/2'")
    person.answered()
    assert seen(person) == [[30, 20]]
    # An image that the model cannot take must not stay in the way.
    person.click("Edit")
    person.one(".turn.user [aria-label='Remove image 1']").click()
    person.one(".editing textarea").send_keys("Sort: 6 3 1 7", Keys.ENTER)
    person.see("document.querySelector('.turn.user .versions span')?.textContent === '3/3'")
    person.answered()
    assert seen(person) == []
    person.click("Export", "#side")
    file = downloads / "conversations.json"
    until(file.is_file, "the download")
    kept = json.loads(file.read_text())
    kept["conversations"] = kept["conversations"][1:]
    urls = kept["conversations"][0]["root"]["children"][0]["images"]
    assert [url[:16] for url in urls] == ["data:image/jpeg;", "data:image/webp;"]
    urls += ["http://evil.example/x.png", "data:image/svg+xml;base64,PHN2Zz4=", [urls[0]], 1]
    file.write_text(json.dumps(kept))
    person.choose(file, "Import", "#side")
    until(lambda: len(person.all(".conversation")) == 3, "the import")
    file.unlink()
    person.all(".conversation")[0].click()
    until(lambda: seen(person) == sizes, "the imported images")
    person.click("Retry")
    person.see("document.querySelector('.turn.assistant .versions')")
    person.answered()
    assert not person.all(".turn.assistant .problem")


def test_what_is_no_image_or_too_large_is_refused_by_name(person, monkeypatch):
    limits = Limits(max_image_pixels=5000, max_images=2, max_body_mb=0.2)
    with serving(limits=limits) as running:
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{running.port}/")
        person.open()
        png = picture()
        for name, kind, data, words in (
            ("notes.txt", "text/plain", b"hello", "notes.txt is no image"),
            ("notes.png", "image/png", b"hello", "notes.png is no image"),
            ("x.svg", "image/svg+xml", b"<svg/>", "x.svg is no image"),
            ("half.png", "image/png", png[:40], "half.png is damaged"),
            ("wide.png", "image/png", picture(size=(100, 51)), "51 pixels"),
            ("fat.png", "image/png", png + bytes(200_000), "fat.png is too large"),
        ):
            assert give(person, "drop", (name, kind, data))
            told(person, words)
            assert not person.all(".attached")
        # Those that can be read are taken all the same, and what is wrong is forgotten then.
        give(person, "drop", ("a.png", "image/png", png), ("notes.txt", "text/plain", b"hello"))
        told(person, "notes.txt is no image")
        attached(person, 1)
        give(person, "drop", ("b.png", "image/png", png))
        attached(person, 2)
        assert not person.one("#notice").is_displayed()
        give(person, "drop", ("c.png", "image/png", png))
        told(person, "c.png is one image too many")
        attached(person, 2)
        # Cells of a table are pasted as text, though a picture of them comes along.
        assert not give(person, "paste", ("image.png", "image/png", png), text="1 2 3")
        assert give(person, "paste", ("b.png", "image/png", png), text="b.png")


def test_images_wait_while_an_answer_is_written(person, monkeypatch):
    with serving(settings=LONG) as running:
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{running.port}/")
        person.open()
        person.ask("Count from 38 to 63.")
        person.see("document.querySelector('.settling > span')")
        give(person, "drop", ("a.png", "image/png", picture()))
        attached(person, 1)
        person.ask("And this?")
        attached(person, 1)
        assert person.js("return document.getElementById('message').value") == "And this?"
        person.press(Keys.ESCAPE)
        person.answered()


def test_a_model_without_a_tower_takes_no_images(person, monkeypatch):
    with serving(model=load(bundled_model(), vision=False)) as running:
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{running.port}/")
        person.open()
        assert not person.one("[aria-label='Add an image']").is_displayed()
        for how in ("drop", "paste"):
            person.js("document.getElementById('notice').hidden = true")
            # The browser must not open the file in place of the page.
            assert give(person, how, ("a.png", "image/png", picture()))
            person.see("!document.getElementById('notice').hidden")
            told(person, "reads no images")
        person.go("document")
        assert give(person, "drop", ("a.txt", "text/plain", b"x"))
        assert not person.all(".attached")
