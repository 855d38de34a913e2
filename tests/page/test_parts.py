"""Document, Form, Decide, Look inside and Settings, driven in Chromium against a real server."""

from __future__ import annotations

import json

from selenium.webdriver.common.keys import Keys

from tests.page.browsers import Person, until

COUNT_UP = "12 13 14 {{gap}} 18 19 20"
WHOLE = "12 13 14 15 16 17 18 19 20"
FEW = {"seed": 1, "max_denoising_steps": 4}


def pane(person: Person) -> str:
    return str(person.js("return document.getElementById('pane').value"))


def proposed(person: Person, count: int) -> None:
    person.see(
        f"document.querySelectorAll('.proposal button.primary:not([hidden])').length === {count}"
    )


# Document


def test_slots_are_filled_between_pinned_text_and_accepted(person, slow):
    person.open("document")
    person.write("#pane", COUNT_UP)
    person.write("#wish", "Count from 12 to 20.")
    assert person.text(".document .composer button.primary") == "Fill the slots"
    person.click("Fill the slots")
    person.see("document.querySelectorAll('.proposal .settling .given').length > 8")
    proposed(person, 1)
    assert person.texts(".proposal ins") == ["15 16 17"]
    assert person.texts(".proposal .given") == ["12 13 14 ", " 18 19 20"]
    person.click("Accept")
    assert pane(person) == WHOLE
    person.click("Undo")
    assert pane(person) == COUNT_UP
    person.click("Redo")
    assert pane(person) == WHOLE


def test_a_selection_gets_proposals_side_by_side(person):
    person.keep(**FEW)
    person.open("document")
    text = "Größe \U0001d4b3: 12 13 xx 15 and so on."
    person.write("#pane", text)
    start = text.encode("utf-16-le").index("xx".encode("utf-16-le")) // 2
    person.select("#pane", start, start + 2)
    person.see("document.querySelector('.choice').textContent.includes('(2 characters)')")
    person.one(".document select").send_keys("3")
    person.write("#wish", "The next number")
    person.click("Rewrite")
    proposed(person, 3)
    cards = person.js(
        "return [...document.querySelectorAll('.proposal')]"
        ".map((e) => e.getBoundingClientRect().top)"
    )
    assert len(set(cards)) == 1  # side by side
    before, behind = person.texts(".pinned-text")
    assert before.endswith("12 13 ") and behind == " 15 and so on."
    new = person.js(
        "return [...document.querySelectorAll('.proposal')].map((card) =>"
        "[...card.querySelectorAll('.proposed > :not(del)')].map((e) => e.textContent).join(''))"
    )
    person.all(".proposal button.primary")[1].click()
    assert pane(person) == text.replace("xx", new[1])
    person.one("#pane").send_keys(Keys.CONTROL, "z")
    assert pane(person) == text


def test_a_proposal_may_be_refused_and_a_wish_is_needed(person):
    person.keep(**FEW)
    person.open("document")
    person.write("#pane", "12 13 xx 15")
    person.select("#pane", 6, 8)
    person.write("#wish", "")
    person.click("Rewrite")
    assert "Say what to do" in person.text(".document .problem")
    person.click("Shorter")
    proposed(person, 1)
    person.click("Keep the old text")
    assert pane(person) == "12 13 xx 15"


def test_the_cursor_is_a_place_to_write_at(person):
    person.keep(**FEW)
    person.open("document")
    person.write("#pane", "12 13  15 16")
    person.select("#pane", 6, 6)
    person.see("document.querySelector('.composer button.primary').textContent === 'Fill'")
    person.click("Fill")
    proposed(person, 1)
    (new,) = person.texts(".proposal ins")
    person.click("Accept")
    assert pane(person) == f"12 13 {new} 15 16"


def test_a_text_from_its_first_character_has_nothing_pinned_before(person):
    person.keep(**FEW)
    person.open("document")
    person.write("#pane", "12 13 15 16")
    person.select("#pane", 0, 2)
    person.write("#wish", "The number before")
    person.click("Rewrite")
    proposed(person, 1)
    assert person.texts(".pinned-text") == [" 13 15 16"]
    # The keyboard reaches pinned text, which may be longer than its place.
    assert person.js("return document.querySelector('.pinned-text').tabIndex") == 0


def test_an_error_of_a_template_is_told(person):
    person.open("document")
    person.write("#pane", "{{match: (}}")
    person.click("Fill the slots")
    person.see("document.querySelector('.document .problem').textContent.includes('is not closed')")
    assert person.one("#pane").is_displayed()


def test_a_run_of_a_document_stops(person, slow):
    person.open("document")
    person.write("#pane", COUNT_UP)
    person.click("Fill the slots")
    person.see("document.querySelector('.proposal .settling > span')")
    person.press(Keys.ESCAPE)
    person.see("!document.getElementById('pane').hidden")
    assert pane(person) == COUNT_UP


def test_a_document_of_200_000_characters_is_edited(person):
    person.keep(**FEW)
    person.open("document")
    person.js(
        "const line = 'All work and no play, said number '; let text = '';"
        "for (let i = 0; text.length < 200000; i++) text += line + i + '.\\n';"
        "document.getElementById('pane').value = text;"
        "document.getElementById('pane').dispatchEvent(new Event('input', {bubbles: true}))"
    )
    text = pane(person)
    place = text.index("All", 150_000)
    person.select("#pane", place, place + 3)
    person.write("#wish", "Another word")
    person.click("Rewrite")
    proposed(person, 1)
    assert "characters, around the selection" in person.text(".notes")
    assert "more characters, pinned" in person.text(".pinned-side p")
    new = person.js(
        "return [...document.querySelectorAll('.proposed > :not(del)')]"
        ".map((e) => e.textContent).join('')"
    )
    person.click("Accept")
    assert pane(person) == text[:place] + new + text[place + 3 :]
    person.click("Undo")
    until(lambda: pane(person) == text, "the undo")


def test_files_are_opened_and_saved_byte_for_byte(person, tmp_path, downloads):
    person.open("document")
    content = "\ufeffeins\r\nzwei é\r\n\r\n".encode()
    (tmp_path / "lines.txt").write_bytes(content)
    person.choose(tmp_path / "lines.txt", "Open")
    person.see("document.querySelector('.document h1').textContent === 'lines.txt'")
    assert pane(person) == content.decode().replace("\r\n", "\n")
    person.click("Save")
    until((downloads / "lines.txt").is_file, "the download")
    assert (downloads / "lines.txt").read_bytes() == content
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00x")
    person.choose(tmp_path / "image.bin", "Open")
    person.see("document.getElementById('notice').textContent.includes('is not a text in UTF-8')")
    assert "eins" in pane(person)


def test_a_picker_is_used_where_the_browser_has_one(person):
    person.open("document")
    person.js(
        "window.written = [];"
        "const handle = {name: 'picked.md',"
        "getFile: async () => new File(['# hello'], 'picked.md'), createWritable: async () =>"
        "({write: async (text) => written.push(text), close: async () => {}})};"
        "window.showOpenFilePicker = async () => [handle];"
    )
    person.click("Open")
    person.see("document.querySelector('.document h1').textContent === 'picked.md'")
    person.write("#pane", "# hello you")
    person.click("Save")
    person.see("written.length === 1")
    assert person.js("return written[0]") == "# hello you"


# Form


def test_an_object_fills_with_its_structure_given(person, slow):
    person.keep(**FEW)
    person.open("form")
    person.one("#schema-example").send_keys("A list")
    person.see("document.getElementById('schema').value.includes('is_sorted')")
    person.click("Fill")
    person.see("document.querySelectorAll('.filled .settling .given').length > 20")
    given = "".join(person.texts(".filled .settling .given"))
    assert '"least":' in given and '"is_sorted":' in given
    person.see("document.querySelector('.valid:not([hidden])')")
    assert "fits the schema" in person.text(".valid")
    value = json.loads(person.text(".filled"))
    assert set(value) == {"least", "is_sorted"} and isinstance(value["is_sorted"], bool)
    person.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    person.click("Copy")
    person.see("window.copied")
    assert json.loads(person.js("return window.copied")) == value


def test_a_schema_that_cannot_be_held_is_refused_by_its_keyword(person):
    person.open("form")
    person.write("#schema", '{"type": "object", "properties": {"a": {"type": "never"}}}')
    person.click("Fill")
    person.see("document.querySelector('.form .problem').textContent.includes('type')")
    person.write("#schema", "{")
    person.click("Fill")
    assert "is no JSON" in person.text(".form .problem")


# Decide


def test_questions_are_answered_with_bars(person):
    person.open("decide")
    person.click("Decide")
    person.see("document.querySelectorAll('.bars table').length === 3")
    shares = person.js(
        "return [...document.querySelectorAll('.bars table')].map((table) =>"
        "[...table.querySelectorAll('.number')].map((cell) => parseFloat(cell.textContent)))"
    )
    assert [len(each) for each in shares] == [2, 3, 3]
    assert all(abs(sum(each) - 100) < 0.5 for each in shares)
    assert person.texts(".bars th")[2:] == [
        *("sales", "support", "nobody"),
        *("not at all", "somewhat", "very"),
    ]
    assert "3 steps" in person.text(".decide .stats")
    person.all(".question [aria-label='Remove this question']")[0].click()
    person.click("Add a question")
    assert len(person.all(".question")) == 3
    person.press("Is it red?", Keys.ENTER)
    person.see("document.querySelectorAll('.question')[2].querySelector('.bars table')")


def test_a_question_that_cannot_be_asked_is_told(person):
    person.open("decide")
    person.write(".question:nth-child(2) .asked input:nth-of-type(2)", "only one")
    person.click("Decide")
    person.see("document.querySelector('.decide .problem').textContent.includes('questions[1]')")


# Look inside


def test_the_last_run_is_stepped_back_and_forth(person):
    person.keep(seed=1, top_candidates=3)
    person.open("inside")
    assert "Nothing has run" in person.text(".inside")
    person.go("chat")
    person.ask("Count from 38 to 63.")
    person.answered()
    person.one(".turn a[href='#inside']").click()
    person.see("document.querySelectorAll('#tokens .token').length === 64")
    figures = dict(zip(person.texts(".figures dt"), person.texts(".figures dd"), strict=True))
    steps = int(person.one("#slider").get_property("max")) + 1
    assert figures["rows \u00d7 steps"] == f"1 \u00d7 {steps}"
    assert float(figures["steps per canvas"]) == round(steps / 2, 1)
    assert float(figures["tokens per forward"]) == round(78 / steps, 1)
    assert float(figures["ms per step"]) >= 0
    assert person.text("#now").startswith("canvas 1, step 1 of")
    person.press(Keys.END)
    assert person.text("#now").startswith("canvas 2, step")
    assert person.text("#before").startswith("38 39")
    person.press(Keys.LEFT)
    assert person.one("#slider").get_property("value") == str(steps - 2)
    person.one("#tokens .token").click()
    person.see("!document.getElementById('tip').hidden")
    assert len(person.all("#tip tr")) == 3
    # Elsewhere its keys do nothing any more.
    person.go("document")
    person.write("#pane", "ab")
    person.select("#pane", 2, 2)
    person.one("#pane").send_keys(Keys.LEFT, "x")
    assert pane(person) == "axb"


def test_the_rows_of_a_run_are_seen_one_by_one(person):
    person.open("document")
    person.write("#pane", COUNT_UP)
    person.one(".document select").send_keys("2")
    person.click("Fill the slots")
    proposed(person, 2)
    person.go("inside")
    person.see("document.querySelectorAll('#row-choice option').length === 2")
    person.one("#row-choice").send_keys("2")
    person.see("document.getElementById('now').textContent.includes('lengths of slots')")
    assert person.all("#tokens .pinned")


# Settings


def test_settings_are_kept_and_take_effect(person, server):
    person.open("settings")
    helps = person.texts(".settings .setting p.faint")
    assert "Most denoise steps per canvas." in helps
    field = person.one("#setting-max_new_tokens")
    field.send_keys("5", Keys.TAB)
    person.one("#setting-seed").send_keys("7", Keys.TAB)
    person.one("#setting-policy").send_keys("fast", Keys.TAB)
    person.open("chat")
    assert "max new tokens 5" in person.text(".strip")
    person.ask("Count from 38 to 63.")
    assert person.answered() == "38 39"
    assert "limit of tokens" in person.text(".turn.assistant")
    assert "seed 7" in person.text(".turn.assistant .stats")
    person.go("settings")
    person.one("#setting-max_new_tokens").clear()
    person.one("#setting-max_new_tokens").send_keys("0", Keys.TAB)
    person.see("document.querySelector('.setting .problem:not([hidden])')")
    person.click("Back to the defaults")
    assert person.one("#setting-seed").get_property("value") == ""
