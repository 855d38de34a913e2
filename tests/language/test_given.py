"""What is taken as a prompt: each form of text, messages and ids, and no other."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import PromptOptions, bundled_model, encode_prompt, load_tokenizer
from mlx_diffgemma.errors import PromptError

TOKENIZER = load_tokenizer(bundled_model())
MESSAGES = [{"role": "user", "content": "x"}]
ENCODING = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True)
IDS = ENCODING["input_ids"]


def refusal(prompt, options: PromptOptions = PromptOptions()) -> str:
    with pytest.raises(PromptError) as raised:
        encode_prompt(TOKENIZER, prompt, options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- token ids ---


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        [IDS],
        (tuple(IDS),),
        np.array(IDS),
        np.array([IDS], np.int64),
        list(np.array(IDS)),
        [np.array(IDS)],
        mx.array(IDS),
        mx.array([IDS]),
        ENCODING,
        dict(ENCODING),
        {"input_ids": IDS},
        {"input_ids": [IDS], "attention_mask": [[1] * len(IDS)]},
        {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), np.int64)},
        TOKENIZER.apply_chat_template([MESSAGES], add_generation_prompt=True, return_tensors="np"),
    ],
)
def test_ids_are_used_as_they_are_in_each_form_that_libraries_return(prompt):
    ids = encode_prompt(TOKENIZER, prompt)
    assert ids == IDS and {type(token) for token in ids} == {int}


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"abc", "got bytes; decode it first"),
        (bytearray(b"abc"), "got bytearray"),
        (memoryview(b"abc"), "got memoryview"),
        (MESSAGES[0], "got an object with 'role', 'content'; put the message into a list"),
        ({}, "got an object with nothing"),
        ({"prompt": "x"}, "got an object with 'prompt'"),
        ({"input_ids": IDS, "attention_mask": [0] + [1] * (len(IDS) - 1)}, "padded"),
        ({"input_ids": [IDS], "attention_mask": [[0] * len(IDS)]}, "padded"),
        ([IDS, IDS], "got 2 rows of token ids; batch_generate takes several"),
        (np.array([IDS, IDS]), "got 2 rows"),
        ({"input_ids": [IDS, IDS]}, "got 2 rows"),
        (["one", "two"], "got 2 strings; batch_generate takes several"),
        ([1.5], "a token id is a whole number, got 1.5"),
        (mx.array([1.5]), "a token id is a whole number, got 1.5"),
        ([True], "a token id is a whole number, got True"),
        ([1, "a"], "a token id is a whole number, got 'a'"),
        (np.array(3), "a prompt is a string"),
        (np.array([], np.int32), "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ({"input_ids": []}, "the prompt is empty"),
        ({1, 2}, "a prompt is a string"),
        (iter(IDS), "a prompt is a string"),
    ],
)
def test_what_is_no_single_prompt_is_refused_by_name(prompt, said):
    assert said in refusal(prompt)


# --- media ---

PARTS = 'images and videos are parts of the content, as {"type": "image", "image": "a.png"}'
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "audio", "audio": "x.wav"}, "type 'audio'; audio is not supported"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "audio is not supported"),
        ({"type": "file", "file": {}}, "files are not supported"),
        ({"type": "input_text", "text": "x"}, "'input_text'; this type is not known"),
        ({"type": ["text"], "text": "x"}, "this type is not known"),
        ({"type": None, "text": "x"}, "this type is not known"),
        ({"text": "x"}, "must be an object with type and text"),
        ("x", "must be an object with type and text, got 'x'"),
        ({"type": "text"}, "has no text"),
        ({"type": "text", "text": 5}, "has no text"),
    ],
)
def test_a_part_that_is_not_text_is_refused_by_name_in_every_message(role, part, said, allow):
    options = PromptOptions(allow_special_tokens=allow)
    chat = [{"role": role, "content": [{"type": "text", "text": "a"}, part]}, *MESSAGES]
    message = refusal(chat, options)
    assert said in message and role in message


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("images", ["aGk="], PARTS),
        ("image", {"url": "x"}, PARTS),
        ("image_url", "x", PARTS),
        ("audio", {"id": "a"}, "audio is not supported"),
        ("audios", ["x.wav"], "audio is not supported"),
        ("input_audio", {"data": ""}, "audio is not supported"),
        ("videos", np.zeros((2, 2)), PARTS),
        ("files", ["a.pdf"], "files are not supported"),
        ("attachments", [{}], "files are not supported"),
    ],
)
def test_media_beside_the_content_are_refused_by_key(key, value, said, allow):
    chat = [*MESSAGES, {"role": "user", "content": "what is this?", key: value}]
    message = refusal(chat, PromptOptions(allow_special_tokens=allow))
    assert message == f"a user message has {key!r} beside its text; {said}"


@pytest.mark.parametrize("extra", [{"images": []}, {"audio": None}, {"name": "a"}, {"id": 5}])
def test_other_keys_and_empty_ones_are_let_pass(extra):
    plain = encode_prompt(TOKENIZER, MESSAGES)
    assert encode_prompt(TOKENIZER, [dict(message) | extra for message in MESSAGES]) == plain


@pytest.mark.parametrize("content", [5, {"a": 1}, True, 1.5])
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_content_of_another_type_is_refused(role, content):
    assert "must be text or a list of parts" in refusal([{"role": role, "content": content}])


@pytest.mark.parametrize("name", ["<|image|>", "<|audio|>", "<|video|>"])
def test_a_token_that_stands_for_media_is_refused_where_it_takes_effect(name):
    token = TOKENIZER.convert_tokens_to_ids(name)
    said = f"the prompt holds {name}"
    assert said in refusal(f"a {name} b", PromptOptions(allow_special_tokens=True))
    assert said in refusal(f"a {name} b", PromptOptions(use_chat_template=False))
    assert said in refusal([2, token, 30])
    assert token not in encode_prompt(TOKENIZER, f"a {name} b"), "typed, it is text"


def test_text_parts_and_results_of_tools_are_accepted():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = TOKENIZER.chat_template
    TOKENIZER.chat_template = (
        "{% for m in messages %}{% if m.content is string or m.content is mapping %}{{ m.content }}"
        "{% else %}{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}"
    )
    try:
        chat = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": {"a": 1}},
        ]
        assert TOKENIZER.decode(encode_prompt(TOKENIZER, chat)) == "ab;;{'a': 1};"
    finally:
        TOKENIZER.chat_template = template


# --- rendered twice ---


@pytest.mark.parametrize("allow", [False, True])
def test_a_rendered_string_is_warned_of_and_the_ways_out_are_silent(allow):
    rendered = TOKENIZER.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    options = PromptOptions(allow_special_tokens=allow)
    for prompt in (rendered, rendered.removeprefix("<bos>"), "\n" + rendered):
        with pytest.warns(UserWarning, match=r"begins with <\|turn> as if the chat template"):
            encode_prompt(TOKENIZER, prompt, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw = PromptOptions(use_chat_template=False)
        assert encode_prompt(TOKENIZER, rendered, raw) == IDS == encode_prompt(TOKENIZER, ENCODING)
        for text in ("x <bos><|turn>user", "<b>", "<|image|> what", "<tool|>", "<bos> is what?"):
            encode_prompt(TOKENIZER, text)
        encode_prompt(TOKENIZER, [{"role": "user", "content": rendered}])


def test_a_raw_prompt_begins_with_one_bos_whether_it_has_it_or_not():
    """As the published tokenizer does, which adds one."""
    tokenizer = load_tokenizer(bundled_model())
    bos = tokenizer.bos_token_id
    add = tokenizer.encode
    tokenizer.encode = lambda text, add_special_tokens=True, **more: (
        [bos] * add_special_tokens + add(text, add_special_tokens=False, **more)
    )
    raw = PromptOptions(use_chat_template=False)
    for text in ("<bos><|turn>user\nx", "<|turn>user\nx"):
        assert encode_prompt(tokenizer, text, raw).count(bos) == 1
