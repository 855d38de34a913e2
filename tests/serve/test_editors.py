"""Gaps for editors: completions with a suffix or markers, /infill, and Inception's edits."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from unittest.mock import patch

import openai
import pytest

from mlx_diffgemma import GenerationSettings, Template, bundled_model, fill, load
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.denoise import standing
from mlx_diffgemma.events import PrefillDone
from mlx_diffgemma.serve import fills
from mlx_diffgemma.serve.errors import ApiError
from mlx_diffgemma.serve.fills import AskedFill, _between, _near
from mlx_diffgemma.serve.fim import Gap, gap_of
from mlx_diffgemma.serve.runs import Answers
from mlx_diffgemma.serve.state import FILL_PROMPT, State
from mlx_diffgemma.write.fill import FillTask
from tests.engine.cases import PATIENCE, eventually, is_idle, loaded
from tests.sampled import first
from tests.serve.cases import LONG, ask, ask_chat, chat, connected, post, serving
from tests.serve.test_openai import client_of

# The bundled model has learned this task, under this request.
BEFORE, AFTER, WRITTEN = "def add(a, b):\n    return a ", " b", "+"
PROMPT = "Fill:\n{code}"
FIXED = {"seed": 3, "max_tokens": 1}


@pytest.fixture(scope="module")
def editor():
    with serving() as running:
        running.state.fill_prompt = "Fill:\ndef add(a, b):\n    return a _ b"
        yield running
        assert not running.bugs


@pytest.fixture(scope="module")
def client(editor):
    return client_of(editor)


def complete(client, prompt=BEFORE, **fields):
    return client.completions.create(model="bundled", prompt=prompt, **fields)


def infill(running, **fields):
    body = {"input_prefix": BEFORE, "input_suffix": AFTER, "n_predict": 1, "seed": 3, **fields}
    return ask(running, post("/infill", body))


def test_a_suffix_fills_the_gap_as_fill_does(client):
    answer = complete(client, suffix=AFTER, **FIXED)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (WRITTEN, "stop", None)
    assert answer.object == "text_completion" and answer.usage.completion_tokens == 1
    model, tokenizer = load(bundled_model())
    told = "Fill:\ndef add(a, b):\n    return a _ b"
    template = Template.parse(BEFORE + "{{gap:1}}" + AFTER)
    settings = GenerationSettings(seed=3)
    filled = fill(model, tokenizer, template, prompt=told, settings=settings, is_shown=True)
    assert filled.slots["1"].text == choice.text


def test_a_stream_of_a_gap(client):
    chunks = list(complete(client, suffix=AFTER, stream=True, **FIXED))
    assert "".join(chunk.choices[0].text for chunk in chunks) == WRITTEN
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("fields", [{"suffix": AFTER}, {"prompt": "Count from 12 to 20."}])
def test_with_drafts_the_last_text_replaces_all_before(client, fields):
    asked = {**FIXED, "max_tokens": 1 if "suffix" in fields else 12, **fields}
    whole = complete(client, **asked).choices[0].text
    drafts = {"stream": True, "extra_body": {"diffusing": True}}
    chunks = list(complete(client, **asked, **drafts))
    assert chunks[-1].choices[0].finish_reason is not None
    assert chunks[-1].choices[0].text == whole != ""


def test_several_proposals_are_rows(client):
    answer = complete(client, suffix=AFTER, n=3, **FIXED)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (index, WRITTEN) for index in range(3)
    ]


@pytest.mark.long
def test_continues_own_request_is_answered(editor):
    """Its inception provider sends these fields, and <|endoftext|> for no suffix."""
    body = {
        "model": "bundled",
        "prompt": BEFORE,
        "suffix": AFTER,
        "max_tokens": 1,
        "temperature": 0,
        "presence_penalty": 1.5,
        "stop": ["<|endoftext|>", "\n\n", "\n \n"],
        "stream": True,
    }
    events = ask(editor, post("/v1/completions", body)).events
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == WRITTEN
    last = ask(editor, post("/v1/completions", {**body, "suffix": "<|endoftext|>"}))
    assert last.status == 200


def test_a_raw_prompt_is_continued(client):
    prompt = "<bos><|turn>user\nSort: 6 3 1 7<turn|>\n<|turn>model\n"
    answer = complete(client, prompt, seed=1)
    assert answer.choices[0].text == "1 3 6 7"
    assert complete(client, [prompt], seed=1).choices[0].text == "1 3 6 7"
    constraint = {"constraint": {"choices": ["yes", "no"]}}
    assert complete(client, prompt, extra_body=constraint).choices[0].text in ("yes", "no")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2], "suffix": "x"}, "suffix"),
        ({"logprobs": 2}, "logprobs"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"suffix": "x", "extra_body": {"constraint": {"regex": "a"}}}, "constraint"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"n": 100}, "n"),
    ],
)
def test_completions_refuse_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, **fields)
    assert error.value.param == param


QWEN = "<|fim_prefix|>{0}<|fim_suffix|>{1}<|fim_middle|>"
SPELLINGS = [
    QWEN,
    "<fim_prefix>{0}<fim_suffix>{1}<fim_middle>",
    "<PRE> {0} <SUF>{1} <MID>",
    "<｜fim▁begin｜>{0}<｜fim▁hole｜>{1}<｜fim▁end｜>",  # noqa: RUF001
    "<|fim_suffix|>{1}<|fim_prefix|>{0}<|fim_middle|>",
    "[SUFFIX]{1}[PREFIX]{0}",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_markers_of_a_gap_are_read(spelling):
    assert gap_of(spelling.format(BEFORE, AFTER)) == Gap(BEFORE, AFTER)
    assert gap_of(spelling.format("", AFTER)) == Gap("", AFTER)


def test_files_before_the_markers_come_apart():
    lead = "<|repo_name|>mine\n<|file_sep|>a.py\nx = 1\n<|file_sep|>b.py\n"
    assert gap_of(lead + QWEN.format("p", "s")) == Gap("p", "s", (("a.py", "x = 1"),))
    assert gap_of("no markers") is gap_of("<|fim_prefix|>half") is None
    assert gap_of("<|fim_middle|><|fim_prefix|>a<|fim_suffix|>b") is None


def test_many_markers_without_a_name_take_little_time():
    start = time.process_time()
    found = gap_of("<|file_sep|>" * 400_000 + QWEN.format("p", "s"))
    assert found == Gap("p", "s") and time.process_time() - start < 1.5


def test_markers_in_a_prompt_fill_the_gap(client):
    for spelling in SPELLINGS[:1]:
        answer = complete(client, spelling.format(BEFORE, AFTER), **FIXED)
        assert answer.choices[0].text == WRITTEN


# /infill


def test_infill_answers_as_llama_cpp_does(editor):
    answer = infill(editor).json
    assert answer["content"] == WRITTEN
    assert answer["tokens_predicted"] == 1 and answer["truncated"] is False
    assert answer["tokens_cached"] + answer["timings"]["prompt_n"] > 20
    assert answer["timings"]["predicted_ms"] > 0 and answer["stop"] is True


def test_the_line_up_to_the_cursor_belongs_to_the_prefix(editor):
    head, _, line = BEFORE.partition("\n")
    answer = infill(editor, input_prefix=f"{head}\n", prompt=line)
    assert answer.json["content"] == WRITTEN


def test_several_proposals_are_a_list(editor):
    assert [each["content"] for each in infill(editor, n_cmpl=2).json] == [WRITTEN] * 2
    assert infill(editor, n_cmpl=9).error["param"] == "n_cmpl"


def test_a_warm_up_computes_nothing(editor):
    before = editor.steps
    answer = infill(editor, n_predict=0)
    assert answer.json["content"] == "" and answer.json["tokens_predicted"] == 0
    assert editor.steps == before


def test_llama_vims_request_is_answered(editor):
    """With all that it sends, some of which means nothing here."""
    more = {
        "input_extra": [{"text": "x = 1", "filename": "a.py", "time": 1}],
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.9,
        "samplers": ["top_k", "infill"],
        "cache_prompt": True,
        "stream": False,
        "t_max_prompt_ms": 50_000,
        "t_max_predict_ms": 30_000,
        "response_fields": ["content"],
        "id_slot": 0,
    }
    assert infill(editor, **more).json["content"] == WRITTEN


def test_llama_vim_as_it_is_set_up_by_default(editor):
    """It sends an empty model and key, and asks for no tokens before what it will ask for."""
    default = {"model": "", "id_slot": 0, "cache_prompt": True}
    before = editor.steps
    cached = {"input_extra": [], "prompt": "", "n_predict": 0, "temperature": 0.0, "samplers": []}
    limits = {"t_max_prompt_ms": 1, "t_max_predict_ms": 1, "stream": False, "response_fields": [""]}
    empty = {"input_prefix": "", "input_suffix": "", **cached, **limits, **default}
    sent = post("/infill", empty, Authorization="Bearer ")
    assert ask(editor, sent).json["content"] == ""
    told = {**chat(), **default}
    warm = {**told, "samplers": [], "n_predict": 0, "stream": False, "response_fields": [""]}
    answer = ask(editor, post("/v1/chat/completions", warm, Authorization="Bearer ")).json
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert answer["usage"]["total_tokens"] == 0 and editor.steps == before
    drawn = {"min_p": 0.1, "temperature": 0.1, "samplers": ["min_p", "temperature"], "stream": True}
    events = ask(editor, post("/v1/chat/completions", {**told, **drawn})).events
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert text and editor.steps > before
    steps = editor.steps
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, total, done = ask(editor, post("/v1/chat/completions", warm | fields)).events
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
    assert total["usage"]["completion_tokens"] == 0 and total["choices"] == [] and done == "[DONE]"
    assert editor.steps == steps
    short = ask(editor, post("/v1/chat/completions", {**told, "n_predict": 3})).json
    assert short["usage"]["completion_tokens"] == 3


def test_a_time_limit_gives_the_draft():
    with serving(settings=LONG) as running:
        start = time.monotonic()
        answer = infill(running, n_predict=20, t_max_predict_ms=400)
        assert answer.status == 200 and time.monotonic() - start < 20
        assert answer.json["content"]
        assert eventually(lambda: is_idle(running.engine)) and running.steps < 200
        assert infill(running, t_max_prompt_ms=0.001).json["content"] == ""


def test_a_time_limit_is_that_of_all_proposals():
    """Their prompts are read one after the other; the first one counts."""

    class Slow:
        def __init__(self, number: int) -> None:
            self.number = number

        async def __aiter__(self):
            await asyncio.sleep(0.2 * self.number)
            yield PrefillDone(1, 0, 0.0, 0)
            await asyncio.sleep(PATIENCE)

        def cancel(self) -> None:
            pass

    async def seconds() -> float:
        start, runs = time.monotonic(), [Slow(number) for number in range(10)]
        answers = Answers(State(), None, SimpleNamespace(one_call=False), runs)
        await answers.whole(write_seconds=0.5)
        return time.monotonic() - start

    assert 0.4 < asyncio.run(seconds()) < 1.5


def test_a_text_that_is_cut_is_told():
    with serving(limits=Limits(max_fill_tokens=16)) as running:
        assert infill(running).json["truncated"] is True
        assert infill(running, input_prefix="a ").json["truncated"] is False


@pytest.mark.long
def test_a_client_that_goes_ends_its_gap():
    with serving(settings=LONG) as running:
        with connected(running) as connection:
            body = {"input_prefix": BEFORE, "input_suffix": AFTER}
            connection.sendall(post("/infill", body))
            assert eventually(lambda: running.steps > 0)
        assert eventually(lambda: is_idle(running.engine))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a\n    b", "a\n    b"),
        ("a\n    b\nc\n    d", "a\n    b"),
        ("a\n\n    b", "a\n\n    b"),
        ("a STOP b", "a "),
        ("", ""),
    ],
)
def test_a_gap_ends_at_a_stop_and_at_less_indentation(text, cut):
    asked = AskedFill(
        before="x", after="", prompt="", settings=GenerationSettings(), window=9, indent=4,
        stop=["STOP"],
    )  # fmt: skip
    assert asked.finished(text) == cut


def test_only_text_near_the_cursor_is_shown():
    tokenizer = loaded()[1]
    before = "".join(f"before {i:03}\n" for i in range(100)) + "    x = "
    after = "".join(f"after {i:03}\n" for i in range(100))
    near = _near(tokenizer, before, after, 200)
    assert before.endswith(near[0]) and after.startswith(near[1])
    assert near[0].startswith("before") and near[1].endswith("\n")
    assert 120 < len(near[0]) <= 150 and 30 < len(near[1]) <= 50  # a token is a character here
    assert _near(tokenizer, before, after, 5000) == (before, after)
    assert _near(tokenizer, before, "", 200)[1] == ""


@pytest.mark.parametrize(
    ("text", "between"),
    [("a = 1 + 2", "1 +"), ("= 1 + 2\nend", "1 +"), ("1 +", "1 +"), ("", "")],
)
def test_a_gap_is_found_in_a_draft(text, between):
    assert _between(text, "a = ", " 2\nend") == between


def test_a_gap_without_text_around_it_is_refused(editor):
    answer = infill(editor, input_prefix=" ", input_suffix="\n")
    assert answer.status == 400 and answer.error["param"] == "input_prefix"
    with pytest.raises(ApiError):
        AskedFill(before="", after="", prompt="", settings=GenerationSettings(), window=9)


def test_the_prompt_around_the_code_has_its_places():
    assert FILL_PROMPT.count("{code}") == FILL_PROMPT.count("{files}") == 1


def test_what_files_hold_is_no_place_for_code(monkeypatch):
    told = []

    class Seen(FillTask):
        def job(self, *loaded):
            told.append(self.prompt)
            return super().job(*loaded)

    monkeypatch.setattr(fills, "FillTask", Seen)
    asked = AskedFill(
        before="a",
        after="b",
        prompt="{files}In {code}:",
        settings=GenerationSettings(),
        window=100,
        files=[("x.py", "{code} {files}")],
    )
    asked.task(0, lambda seconds: None).job(*loaded())
    assert told == ["x.py:\n\n{code} {files}\n\nIn a____b:"]


# Inception's edits

FILE = (
    "<|recently_viewed_code_snippets|>\n<|/recently_viewed_code_snippets|>\n\n"
    "<|current_file_content|>\ncurrent_file_path: a.py\ndef add(a, b):\n"
    "<|code_to_edit|>\n    return a<|cursor|> - b\n<|/code_to_edit|>\nprint(1)\n"
    "<|/current_file_content|>\n\n<|edit_diff_history|>\n<|/edit_diff_history|>"
)


def rewrite(running, path: str, content: str, **fields):
    messages = [{"role": "user", "content": content}]
    body = {"model": "bundled", "messages": messages, "presence_penalty": 1.5, "seed": 1, **fields}
    return ask(running, post(path, body))


@pytest.mark.parametrize("stream", first(1, [True, False]))
def test_an_edit_answers_with_the_marked_part_in_a_fence(editor, stream):
    answer = rewrite(editor, "/v1/edit/completions", FILE, stream=stream)
    if stream:
        *told, done = answer.events
        assert done == "[DONE]" and told[-1]["choices"][0]["finish_reason"] == "stop"
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in told)
    else:
        text = answer.json["choices"][0]["message"]["content"]
    assert text.startswith("```\n") and text.endswith("\n```") and "def add" not in text


@pytest.mark.long
def test_an_update_is_applied_to_a_whole_text(editor):
    told = (
        "<|original_code|>\na = 1\n<|/original_code|>\n\n"
        "<|update_snippet|>\na = 2\n<|/update_snippet|>"
    )
    answer = rewrite(editor, "/v1/apply/completions", told, max_tokens=20)
    assert answer.status == 200 and "```" not in answer.json["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", ["/v1/edit/completions", "/v1/apply/completions"])
def test_an_edit_may_begin_from_the_text_that_stands(editor, path):
    told = dict(EDITS)[path]
    with (
        patch("mlx_diffgemma.denoise.warm.keep", side_effect=standing.keep) as keep,
        patch.object(editor.state, "settings", GenerationSettings(warm_start=0.1)),
    ):
        answer = rewrite(editor, path, told, max_tokens=20)
        assert answer.status == 200 and keep.called
        keep.reset_mock()
        assert ask_chat(editor, [{"role": "user", "content": "Count from 12 to 13."}]).status == 200
        assert not keep.called  # nothing stands where a chat is answered


def test_what_stands_may_be_read_where_an_update_is_applied(editor):
    """The bundled model finds any token likely enough, if hardly any likelihood is asked for."""
    settings = GenerationSettings(warm_start=0.1, warm_read=1e-9)
    told = (
        "<|original_code|>\n14 15\n<|/original_code|>\n\n<|update_snippet|>\na\n<|/update_snippet|>"
    )
    with patch.object(editor.state, "settings", settings):
        answer = rewrite(editor, "/v1/apply/completions", told, max_tokens=40)
        edited = rewrite(editor, "/v1/edit/completions", FILE, max_tokens=20)
    choice = answer.json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("14 15", "stop")
    assert edited.status == 200  # its text is pinned, and nothing is read


TOOL = {"type": "function", "function": {"name": "f"}}
UPDATE = (
    "<|original_code|>\na = 1\n<|/original_code|>\n\n<|update_snippet|>\na\n<|/update_snippet|>"
)
EDITS = [("/v1/edit/completions", FILE), ("/v1/apply/completions", UPDATE)]


@pytest.mark.parametrize(("path", "told"), EDITS)
@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("logprobs", {"logprobs": True}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_p", {"top_p": 0.5}),
        ("logit_bias", {"logit_bias": {"1": 2}}),
        ("tools", {"tools": [TOOL]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("constraint", {"constraint": {"regex": "a"}}),
        ("n", {"n": 9}),
        ("diffusing", {"diffusing": True}),  # without stream
        ("stop", {"stop": "x" * 300}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"enable_thinking": True}}),
    ],
)
def test_edits_refuse_by_name_as_chats_do(editor, path, told, param, fields):
    before = editor.steps
    answer = rewrite(editor, path, told, **fields)
    assert answer.status == 400 and answer.error["param"] == param
    assert editor.steps == before


HARMLESS = {
    "logprobs": False,
    "top_p": 1,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "reasoning_effort": "none",
    "frequency_penalty": 0.5,
}


@pytest.mark.parametrize(("path", "told"), EDITS)
def test_edits_honour_what_chats_do(editor, path, told):
    fields = {**HARMLESS, "n": 2, "max_completion_tokens": 1, "temperature": 0}
    whole = rewrite(editor, path, told, **fields).json
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(texts) == 2 and whole["usage"]["completion_tokens"] == 2
    fields |= {"stream": True, "diffusing": True, "stream_options": {"include_usage": True}}
    *told, usage, done = rewrite(editor, path, told, **fields).events
    assert done == "[DONE]" and usage["usage"]["completion_tokens"] == 2
    last: dict[int, str] = {}
    for choice in (event["choices"][0] for event in told):
        last[choice["index"]] = choice["delta"].get("content", last.get(choice["index"], ""))
    assert [last[0], last[1]] == texts  # each draft replaced the one before


@pytest.mark.parametrize("path", ["/v1/edit/completions", "/v1/apply/completions"])
def test_without_its_marks_a_request_is_refused(editor, path):
    answer = rewrite(editor, path, "rewrite this")
    assert answer.status == 400 and answer.error["param"] == "messages"


def test_a_part_that_is_larger_than_a_canvas_is_refused(editor):
    told = f"x\n<|code_to_edit|>\n{'x' * 100}\n<|/code_to_edit|>"
    answer = rewrite(editor, "/v1/edit/completions", told)
    assert answer.status == 400 and "canvas" in answer.error["message"]
