"""A run kept step by step: what is kept is what happened, and the page is safe to open."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import signal
import zlib
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_diffgemma
from mlx_diffgemma import GenerationSettings, Template, bundled_model, load, stream_generate
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.errors import SourceError
from mlx_diffgemma.events import CanvasCommitted, Finished, StepDone, Text, TrialStarted
from mlx_diffgemma.view.trace import CANDIDATES, FORMAT, PAGE_FILES, Trace
from mlx_diffgemma.write.fill import Filled, stream_fill
from tests.cli.test_cli import TABLE, TABLE_ANSWER, assert_one_line, invoke, program

MODEL, TOKENIZER = load(bundled_model())
COUNT = "Count from 12 to 36."


def run_events(prompt: str, **settings) -> list:
    return list(stream_generate(MODEL, TOKENIZER, prompt, settings=GenerationSettings(**settings)))


def traced(events: list, tokenizer=TOKENIZER, **about) -> Trace:
    settings = GenerationSettings(seed=1, max_new_tokens=64)
    about = {"model": "a model", "prompt": "a prompt", "settings": settings, **about}
    trace = Trace(tokenizer, **about)
    for event in events:
        trace.observe(event)
    return trace


class Page(HTMLParser):
    """What a browser's parser makes of a page: its tags, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)

    @property
    def run(self) -> dict:
        return json.loads(self.scripts[0])


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def columns(run: dict) -> dict[str, np.ndarray]:
    """Reads the columns of a page as its script does."""
    count = sum(step["width"] for canvas in run["canvases"] for step in canvas["steps"])
    planes = np.frombuffer(unpacked(run["columns"]), np.uint8).reshape(-1, count).astype(int)
    taken = iter(planes)

    def column(size: int) -> np.ndarray:
        return sum(next(taken) << 8 * i for i in range(size))

    names = {"accepted": 1, "certainty": 2, "entropy": 2, "draft": 3}
    read = {name: column(size) for name, size in names.items()}
    pairs = [(column(3), column(2)) for _ in range(run["candidates"])]
    read["ids"], read["shares"] = (np.stack(part, axis=1) for part in zip(*pairs, strict=True))
    assert next(taken, None) is None
    read["draft"] ^= read["ids"][:, 0]
    read["certainty"] ^= read["shares"][:, 0]
    return read


# --- what is kept ---


def test_the_object_holds_every_step_as_its_event_had_it():
    events = run_events(COUNT, seed=1, top_candidates=CANDIDATES)
    kept = json.loads(json.dumps(traced(events).as_object()))
    assert kept["format"] == FORMAT
    assert kept["settings"] == {"max_new_tokens": 64} and kept["seed"] == 1
    assert (kept["model"], kept["prompt"], kept["complete"]) == ("a model", "a prompt", True)
    assert kept["text"]["answer"] == "".join(e.piece for e in events if isinstance(e, Text))
    steps = [(c["canvas"], step) for c in kept["canvases"] for step in c["steps"]]
    happened = [event for event in events if isinstance(event, StepDone)]
    assert len(kept["canvases"]) > 1 and len(steps) == len(happened)
    for (canvas, step), event in zip(steps, happened, strict=True):
        assert (canvas, step["step"], step["attempt"]) == (event.canvas_index, event.step, 0)
        assert step["draft"] == event.draft[0].tolist()
        assert step["accepted"] == event.accepted[0].tolist()
        assert step["accepted_tokens"] == int(event.accepted.sum())
        assert step["mean_entropy"] == pytest.approx(float(event.entropy.mean()), abs=1e-5)
        assert step["certainty"] == pytest.approx(event.certainty[0].tolist(), abs=1e-5)
        assert step["entropy"] == pytest.approx(event.entropy[0].tolist(), abs=1e-5)
        ids, shares = (np.array(array[0]) for array in event.candidates)
        pairs = np.array(step["candidates"])
        assert pairs.shape == (64, CANDIDATES, 2)
        np.testing.assert_array_equal(pairs[..., 0], ids)
        np.testing.assert_allclose(pairs[..., 1], shares, atol=1e-5)
    committed = [e.tokens[0].tolist() for e in events if isinstance(e, CanvasCommitted)]
    assert [canvas["tokens"] for canvas in kept["canvases"]] == committed
    used = {i for _, step in steps for i in step["draft"]}
    assert used <= {int(i) for i in kept["vocabulary"]}
    assert kept["vocabulary"]["1"] == "<eos>" and 1 in kept["controls"]


def test_the_page_holds_the_same_numbers_in_thousandths():
    trace = traced(run_events(COUNT, seed=1, top_candidates=CANDIDATES))
    kept, run = trace.as_object(), Page(trace.html()).run
    read, words = columns(run), json.loads(unpacked(run["words"]))
    steps = [step for canvas in kept["canvases"] for step in canvas["steps"]]

    def flat(name: str) -> list:
        return [value for step in steps for value in step[name]]

    vocabulary = kept["vocabulary"]
    assert [words[i] for i in read["draft"]] == [vocabulary[str(i)] for i in flat("draft")]
    assert read["accepted"].tolist() == flat("accepted")
    np.testing.assert_allclose(read["certainty"] / 1000, flat("certainty"), atol=6e-4)
    np.testing.assert_allclose(read["entropy"] / 1000, flat("entropy"), atol=6e-4)
    pairs = np.array(flat("candidates"))
    np.testing.assert_allclose(read["shares"] / 1000, pairs[..., 1], atol=6e-4)
    named = [[vocabulary[str(int(i))] for i in row] for row in pairs[..., 0]]
    assert [[words[i] for i in row] for row in read["ids"]] == named
    assert [words[i] for i in run["controls"]] == [vocabulary[str(i)] for i in kept["controls"]]


def test_steps_may_be_narrow_and_a_canvas_may_be_drawn_again():
    def step(number: int, width: int) -> StepDone:
        zeros = mx.zeros((1, width))
        return StepDone(0, number, zeros.astype(mx.int32), zeros > 0, zeros, zeros)

    trace = traced([step(0, 8), step(1, 5), step(0, 8), step(1, 8), step(0, 8)])
    (canvas,) = trace.as_object()["canvases"]
    assert [s["attempt"] for s in canvas["steps"]] == [0, 0, 1, 1, 2]
    assert [len(s["draft"]) for s in canvas["steps"]] == [8, 5, 8, 8, 8]
    assert canvas["tokens"] is None and canvas["text"] is None
    assert canvas["steps"][0]["candidates"] == [[]] * 8
    assert not trace.as_object()["complete"]
    assert Page(trace.html()).run["candidates"] == 0


def test_nothing_seen_is_nothing_to_show():
    trace = traced([])
    assert trace.is_empty and trace.as_object()["canvases"] == []
    assert Page(trace.html()).run["columns"]


@pytest.mark.parametrize("policy", ["reference", "fast"])
def test_asking_for_candidates_changes_no_token(policy):
    def tokens(**more) -> list:
        events = run_events(COUNT, seed=5, policy=policy, **more)
        return [e.draft.tolist() for e in events if isinstance(e, StepDone)] + [
            e.tokens.tolist() for e in events if isinstance(e, CanvasCommitted)
        ]

    assert tokens() == tokens(top_candidates=CANDIDATES)


# --- the page ---


class Spelled:
    """A vocabulary of strange words; a tokenizer as far as a trace needs one."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.added_tokens_decoder: dict = {}

    def decode(self, ids, **_) -> str:
        return "".join(self.words[i] for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.words[token]


STRANGE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "-->",
    "<script>",
    "\"'`",
    "&lt;&amp;",
    "\u2028\u2029",
    "\u202eabc",
    "\x00\x1b[2J",
    "\ud800",
    "]]>",
    "@@RUN@@",
    "\\u003c",
    "ไทยعربيעברית",
]


def strange_events() -> list:
    ids = mx.array([list(range(len(STRANGE)))], dtype=mx.int32)
    some = mx.full(ids.shape, 0.5)
    step = StepDone(0, 0, ids, some > 0, some, some, (ids[..., None], some[..., None]))
    return [step, CanvasCommitted(0, ids, 1), Text("".join(STRANGE), "answer")]


def test_no_text_of_a_run_can_leave_its_script():
    text = "".join(STRANGE)
    trace = traced(strange_events(), Spelled(STRANGE), prompt=text, model=text)
    html = trace.html()
    html.encode("ascii", "replace")  # and a lone surrogate can be written
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    run = page.run
    assert run["prompt"] == run["model"] == run["text"]["answer"] == text
    assert run["canvases"][0]["text"] == text
    assert json.loads(unpacked(run["words"])) == STRANGE
    data = html.split('id="run">')[1].split("</script>")[0]
    assert not re.search(r"[<>&\x00-\x09\x0b-\x1f\x7f-\uffff]", data)


def test_the_page_asks_for_nothing_from_outside():
    html = traced(strange_events(), Spelled(STRANGE)).html()
    allowed = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"'\s]+", html)) <= allowed
    for tag, attributes in Page(html).tags:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), tag
        assert tag not in ("link", "iframe", "img", "object", "embed")
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_the_template_comes_with_the_package():
    template = files("mlx_diffgemma.view").joinpath("trace.html").read_text(encoding="utf-8")
    assert template.count("@@RUN@@") == 1
    pyproject = Path(mlx_diffgemma.__file__).parent.parent / "pyproject.toml"
    for name in PAGE_FILES:
        assert f'"{name}"' in pyproject.read_text()


def test_three_canvases_of_48_random_steps_stay_under_two_megabytes():
    rng = np.random.default_rng(0)
    size, length, count = 262_144, 256, CANDIDATES
    syllables = "".join(map(chr, range(97, 123)))
    lengths = rng.integers(2, 11, size)
    letters = rng.choice(list(syllables), int(lengths.sum()))
    ends = np.cumsum(lengths)
    words = ["".join(letters[e - n : e]) for n, e in zip(lengths, ends, strict=True)]

    def step(canvas: int, number: int) -> StepDone:
        ids = rng.integers(0, size, (1, length, count), dtype=np.int32)
        shares = -np.sort(-rng.dirichlet([0.3] * count, (1, length)).astype(np.float32), axis=-1)
        entropy = rng.uniform(0, math.log(size), (1, length)).astype(np.float32)
        return StepDone(
            canvas,
            number,
            mx.array(ids[..., 0]),
            mx.array(rng.random((1, length)) < 0.5),
            mx.array(entropy),
            mx.array(shares[..., 0]),
            (mx.array(ids), mx.array(shares)),
        )

    events = []
    for canvas in range(3):
        events += [step(canvas, number) for number in range(48)]
        tokens = mx.array(rng.integers(0, size, (1, length), dtype=np.int32))
        events.append(CanvasCommitted(canvas, tokens, 48))
    page = traced(events, Spelled(words)).html()
    assert len(page.encode()) < 2_000_000


# --- the files ---


def test_the_command_writes_both_files_and_the_answer_is_the_same(tmp_path):
    page = tmp_path / "run.html"
    result = invoke(generate, *TABLE, "--trace", str(page), "--max-tokens", "64")
    assert (result.exit_code, result.stdout) == (0, TABLE_ANSWER)
    assert result.stderr.splitlines()[-1] == f"wrote {page} and {tmp_path / 'run.json'}"
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["text"]["answer"] + "\n" == TABLE_ANSWER and kept["complete"]
    assert kept["settings"] == {"max_new_tokens": 64} and kept["seed"] == 3
    assert kept["prompt"] == TABLE[1]
    assert len(kept["canvases"][0]["steps"][0]["candidates"][0]) == CANDIDATES
    assert Page(page.read_text()).run["text"] == kept["text"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.html", "run.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert page.stat().st_mode & 0o777 == 0o666 & ~mask


def test_trace_goes_with_json_watch_and_silence(tmp_path):
    page = tmp_path / "run.html"
    for more in (("--json",), ("--watch",), ("--verbose", "False")):
        result = invoke(generate, *TABLE, "--trace", str(page), *more)
        assert result.exit_code == 0
        assert (page.is_file(), "wrote" in result.stderr) == (True, more[0] != "--verbose")
        page.unlink()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".", "is a folder; name a file in it"),
        ("folder.html", "is a folder"),
        ("other.html", "other.json, which is a folder"),
        ("nowhere/run.html", "there is no folder"),
        ("run.htm", "must name a file that ends in .html"),
        ("run", "must name a file that ends in .html"),
        ("n" * 300 + "/run.html", "there is no folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tmp_path, name, expected
):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "other.json").mkdir()
    arguments = "--prompt", "x", "--model", "./no-such-folder", "--trace", str(tmp_path / name)
    assert_one_line(invoke(generate, *arguments), expected)


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    arguments = "--prompt", "x", "--trace", str(tmp_path / "run.html")
    assert_one_line(invoke(generate, *arguments), "no file can be made in the folder")


def test_an_empty_name_is_refused():
    assert_one_line(invoke(generate, "--prompt", "x", "--trace", ""), "--trace")


def test_a_run_that_never_began_writes_nothing(tmp_path):
    result = invoke(generate, "--prompt", " ", "--trace", str(tmp_path / "run.html"))
    assert_one_line(result, "the prompt is empty")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_was_seen(tmp_path):
    page = tmp_path / "run.html"
    # Never sure enough, every canvas takes all its steps.
    command = ("generate", "--prompt", COUNT, "--confidence-threshold", "0")
    running = program(*command, "--trace", str(page))
    seen = os.read(running.stdout.fileno(), 4)  # of the first canvas, of several
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, seen[:2]) == (130, b"12"), errors
    assert b"Traceback" not in errors
    kept = json.loads((tmp_path / "run.json").read_text())
    assert not kept["complete"]
    assert kept["canvases"][0]["tokens"] and kept["text"]["answer"].startswith("12 13")
    assert "cut short" in page.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.html", "run.json"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failure):
    page = tmp_path / "run.html"
    old = '{"format": "mlx_diffgemma.trace/1", "old": true}'
    (tmp_path / "run.json").write_text(old)

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    expected = SourceError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space" if expected is SourceError else None):
        traced(strange_events(), Spelled(STRANGE)).write(page)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("run.json", old)]


@pytest.mark.parametrize(
    ("name", "content", "is_ours"),
    [
        ("run.json", '{"name": "a package"}', False),
        ("run.json", "", True),
        ("run.json", '{"format": "mlx_diffgemma.trace/1", "model": "x"}', True),
        ("run.json", '{"format": "another"}', False),
        ("run.html", "<html><title>A page</title>", False),
        ("run.html", "", True),
        ("run.html", None, True),  # an older trace of ours
    ],
)
def test_no_file_is_replaced_but_an_older_trace(tmp_path, name, content, is_ours):
    trace = traced(strange_events(), Spelled(STRANGE))
    file = tmp_path / name
    file.write_text(trace.html() if content is None else content)
    before = file.read_text()
    arguments = "--prompt", "x", "--model", "./none", "--trace", str(tmp_path / "run.html")
    result = invoke(generate, *arguments)
    if is_ours:
        assert_one_line(result, "no folder ./none")
        assert trace.write(tmp_path / "run.html") == tmp_path / "run.json"
        assert json.loads((tmp_path / "run.json").read_text())["format"] == FORMAT
        return
    assert_one_line(result, "exists and is not a trace; choose another name")
    with pytest.raises(SourceError, match="is not a trace"):
        trace.write(tmp_path / "run.html")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(name, before)]


def test_a_trace_tells_the_name_of_a_model_and_not_its_place(tmp_path):
    cached = tmp_path / "hub" / "models--google--some-model" / "snapshots" / "0123abcd"
    cached.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    for source, name in (
        (str(tmp_path / "mine"), "mine"),
        (str(cached), "google/some-model"),
        ("google/some-model", "google/some-model"),
        (str(bundled_model()), "demo"),
    ):
        trace = traced(strange_events(), Spelled(STRANGE), model=source)
        assert trace.as_object()["model"] == name
        for written in (json.dumps(trace.as_object()), trace.html()):
            assert str(tmp_path) not in written and str(bundled_model().parent) not in written


def test_a_run_of_fill_is_kept_trial_by_trial_with_what_was_given():
    template, trace = Template.parse("12 13 {{n = gap:2..4}} 17"), traced([])
    settings = GenerationSettings(seed=1, top_candidates=CANDIDATES)
    trials, steps = [], []
    for event in stream_fill(MODEL, TOKENIZER, template, settings=settings):
        if isinstance(event, Filled):
            trace.conclude(event.text)
            continue
        trace.observe(event)
        if isinstance(event, TrialStarted):
            trials.append(event)
            steps.append(0)
        elif isinstance(event, StepDone):
            steps[-1] += 1
    kept, run = trace.as_object(), Page(trace.html()).run
    assert kept["complete"] and kept["text"]["answer"].startswith("12 13 ")
    assert [len(canvas["steps"]) for canvas in kept["canvases"]] == steps
    assert [canvas["trial"]["final"] for canvas in kept["canvases"]] == [False, True]
    first, last = (canvas["trial"] for canvas in kept["canvases"])
    assert first["lengths"] == {"n": None} and last["lengths"]["n"] in (2, 3, 4)
    assert run["canvases"][0]["trial"] == first
    bits = iter(columns(run)["accepted"])
    for canvas, event in zip(kept["canvases"], trials, strict=True):
        assert canvas["pinned"] == event.pinned[0].tolist()
        for step in canvas["steps"]:
            given = canvas["pinned"][: len(step["draft"])]
            n = step["free_tokens"]
            assert given.count(False) == n
            assert n == canvas["trial"]["lengths"]["n"] or (n > 4 and not canvas["trial"]["final"])
            assert step["accepted_tokens"] <= n
            for accepted, is_given in zip(step["accepted"], given, strict=True):
                assert next(bits) == accepted + 2 * is_given


def test_a_finished_run_says_so():
    finished = Finished("stop", 3, 1, 1, 32)
    assert traced([*strange_events(), finished], Spelled(STRANGE)).as_object()["complete"]
