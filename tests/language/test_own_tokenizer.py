"""Our tokenizer held against transformers' own, on tokenizer files of many kinds."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from mlx_diffgemma import PromptOptions, Tokenizer, bundled_model, encode_prompt, load_tokenizer
from mlx_diffgemma.errors import SourceError
from mlx_diffgemma.language.known_tokenizer import read_known
from mlx_diffgemma.language.prompt import encode_text
from tests.language import test_prompt
from tests.language.tokenizer_files import (
    CONTROLS,
    KNOWN,
    NAMED,
    UNKNOWN,
    chats,
    drawn,
    texts,
    write,
)
from tests.malloc import malloc_state
from tests.sampled import first

# Uses what a template may use of jinja2 and of transformers.
RICH = """
{%- macro shown(value) -%}{{ value | tojson }}{%- endmacro -%}
{%- set kept = namespace(last='', count=0) -%}
{{ bos_token }}{{ image_token | default('none') }}{{ eos_token }}{{ dict(a=1) }}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% set kept.count = kept.count + 1 %}
    {% if kept.count > 3 %}{% break %}{% endif %}
    {% generation %}{% set kept.last = message.role %}
    {{ message | tojson(indent=1, sort_keys=true) }}{% endgeneration %}
    {{ message.reasoning_content }}|{{ message.thinking }}|{{ message.reasoning is defined }}
    {% if message.content is string %}{{ message.content | trim }}{% endif %}
    {% for call in message.tool_calls or [] %}{{ shown(call.function.arguments) }}{% endfor %}
{% endfor %}
{{ kept.last }} {{ kept.count }} {{ strftime_now('%Y') }} {{ add_generation_prompt }} {{ tools }}
{{ documents | tojson }} {{ enable_thinking }} {{ dict.fromkeys(['a'], 1) }} {{ '<&>' | tojson }}
"""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
LONG = [pytest.param(name, marks=pytest.mark.long) for name in list(KNOWN)[6:]]


def reference_of(folder: Path) -> Any:
    """transformers' tokenizer, in which Gemma's control tokens are special."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    known = tokenizer.get_vocab()
    missing = sorted(token for token in {*CONTROLS} - special if token in known)
    tokens = [AddedToken(token, special=True, normalized=False) for token in missing]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def is_lean(tokenizer: Tokenizer) -> bool:
    return tokenizer._lean is not None


def outcome(call: Any, *arguments: Any, **options: Any) -> Any:
    """What a call returns, or its error."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error)


def check_same(ours: Tokenizer, reference: Any, count: int) -> None:
    """Compare all that our tokenizer does by itself."""
    assert is_lean(ours)
    assert ours.get_vocab() == reference.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(reference), reference.vocab_size)
    added = [
        {i: token.__getstate__() for i, token in tokenizer.added_tokens_decoder.items()}
        for tokenizer in (ours, reference)
    ]
    assert added[0] == added[1]
    for name in ("special_tokens_map", "all_special_tokens", "all_special_ids", "chat_template"):
        assert getattr(ours, name) == getattr(reference, name), name
    for kind in "bos eos unk sep pad cls mask".split():
        for name in (f"{kind}_token", f"{kind}_token_id"):
            assert getattr(ours, name) == getattr(reference, name), name
    for name in set(NAMED) & set(ours.special_tokens_map):
        assert getattr(ours, name) == getattr(reference, name), name
        assert getattr(ours, f"{name}_id") == getattr(reference, f"{name}_id"), name
    draw = np.random.default_rng(0)
    longest = ours._known.longest
    for text in texts(count):
        for splits in (False, True):
            for adds in (False, True):
                options = {"add_special_tokens": adds, "split_special_tokens": splits}
                ids = reference.encode(text, **options)
                if len(ids) <= longest:
                    assert ours.encode(text, **options) == ids, (text, options)
        drawn = [*ids, *draw.integers(0, len(reference), 9).tolist()]
        for skips in (False, True):
            for some in (ids, drawn, drawn[-1]):
                expected = reference.decode(some, skip_special_tokens=skips)
                assert ours.decode(some, skip_special_tokens=skips) == expected
                named = [t.convert_ids_to_tokens(some, skips) for t in (ours, reference)]
                assert named[0] == named[1]
        pieces = reference.tokenize(text)
        assert ours.convert_tokens_to_ids(pieces) == reference.convert_tokens_to_ids(pieces)
        assert ours.convert_tokens_to_ids(text) == reference.convert_tokens_to_ids(text)
    beyond = len(reference) + 5
    assert ours.convert_ids_to_tokens(beyond) == reference.convert_ids_to_tokens(beyond)
    assert ours.decode([beyond, 2]) == reference.decode([beyond, 2])
    assert is_lean(ours), "something was left to transformers"


@pytest.mark.parametrize("name", [*list(KNOWN)[:6], *LONG])
def test_a_known_tokenizer_is_that_of_transformers(name, tmp_path):
    write(tmp_path, KNOWN[name])
    count = 3000 if name == "as published" else 400
    check_same(load_tokenizer(tmp_path), reference_of(tmp_path), count)


@pytest.mark.parametrize("name", KNOWN)
def test_known_files_are_read_without_transformers(name, tmp_path):
    ours = load_tokenizer(write(tmp_path, KNOWN[name]))
    assert is_lean(ours)


def test_the_bundled_tokenizer_is_that_of_transformers():
    check_same(load_tokenizer(bundled_model()), reference_of(bundled_model()), 3000)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_transformers_may_change_is_left_to_it(name, tmp_path):
    write(tmp_path, UNKNOWN[name])
    ours = outcome(load_tokenizer, tmp_path)
    if not isinstance(ours, Tokenizer):
        assert ours[0] == "SourceError"
        reason = outcome(AutoTokenizer.from_pretrained, tmp_path)
        assert ours[1] == f"the tokenizer in {tmp_path} cannot be read: {reason[1].splitlines()[0]}"
        return
    assert not is_lean(ours)
    if name in list(UNKNOWN)[:3]:
        reference = reference_of(tmp_path)
        for text in texts(200):
            assert ours.encode(text) == reference.encode(text)


@pytest.mark.parametrize("seed", first(6, range(60)))
def test_drawn_files_give_what_transformers_gives(seed, tmp_path):
    write(tmp_path, drawn(seed), RICH if seed % 2 else None)
    ours, reference = outcome(load_tokenizer, tmp_path), outcome(reference_of, tmp_path)
    assert isinstance(ours, Tokenizer) != isinstance(reference, tuple)
    if isinstance(ours, Tokenizer) and is_lean(ours):
        check_same(ours, reference, 100)


def test_a_part_of_the_drawn_files_is_known(tmp_path):
    folders = [write(tmp_path / str(seed), drawn(seed)) for seed in range(30)]
    known = [read_known(folder) is not None for folder in folders]
    assert 8 < sum(known) < 25


OLDER = {
    "special_tokens_map.json": {"bos_token": "<eos>"},
    "added_tokens.json": {"<more>": 700},
    "additional_chat_templates": {"default.jinja": "one", "other.jinja": "another"},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_files_beside_it_are_left_to_transformers(name, tmp_path):
    write(tmp_path, KNOWN["as published"])
    path = tmp_path / name
    if path.suffix:
        path.write_text(json.dumps(OLDER[name]))
    else:
        path.mkdir()
        for file, template in OLDER[name].items():
            (path / file).write_text(template)
    ours, reference = load_tokenizer(tmp_path), reference_of(tmp_path)
    assert not is_lean(ours)
    assert ours.bos_token == reference.bos_token
    assert ours.chat_template == reference.chat_template
    assert len(ours) == len(reference)


# --- chats ---


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Tokenizer, Any]:
    folder = write(tmp_path_factory.mktemp("own"), KNOWN["as published"], "never\r\nread")
    ours, reference = load_tokenizer(folder), reference_of(folder)
    assert ours.chat_template == reference.chat_template == "never\nread"
    return ours, reference


def published() -> dict[str, str]:
    return {
        "rich": RICH,
        "published": test_prompt.TEMPLATE,
        "bundled": (bundled_model() / "chat_template.jinja").read_text(),
    }


@pytest.mark.parametrize("template", published())
def test_chats_are_written_as_transformers_writes_them(pair, template):
    ours, reference = pair
    ours.chat_template = reference.chat_template = published()[template]
    variants = [
        {"tokenize": False},
        {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True},
        {"tokenize": False, "tools": [TOOL], "documents": [{"title": "t", "text": "<x>"}]},
        {"tokenize": False, "bos_token": "b", "template": "t", "self_": 1, "extra": (1, [2.5])},
        {"tokenize": True, "return_dict": False, "tools": None},
    ]
    written = 0
    for chat in chats(300):
        for options in variants:
            found, wanted = (
                outcome(t.apply_chat_template, copy.deepcopy(chat), **options)
                for t in (ours, reference)
            )
            assert found == wanted, (chat, options)
            written += not isinstance(found, tuple)
    assert written > 500 and is_lean(ours)


REFUSED = {
    "a template that refuses": "{{ raise_exception('no ' + messages[0].role) }}",
    "no such filter": "{{ messages | nonsense }}",
    "no such attribute": "{{ messages[0].content.nothing.at_all }}",
    "no syntax": "{% for %}",
    "a private attribute": "{{ ''.__class__.__mro__ }}",
    "a change of a list": "{{ messages.append(1) }}",
    "a private name": "{% set kept = namespace() %}{% set kept._x = 1 %}",
    "a private name at first": "{% set kept = namespace(_x=1) %}",
    "an endless range": "{{ range(10 ** 9) | list }}",
    "division by zero": "{{ 1 // 0 }}",
    "a sum of two kinds": "{{ messages[0].role + 1 }}",
    "an open generation": "{% generation %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_may_not_do_is_refused_as_in_transformers(pair, name):
    (ours, reference), template = pair, REFUSED[name]
    chat = [{"role": "user", "content": "x"}]
    found, wanted = (
        outcome(t.apply_chat_template, chat, chat_template=template, tokenize=False)
        for t in (ours, reference)
    )
    assert found == wanted and isinstance(found, tuple)
    assert is_lean(ours)


@dataclasses.dataclass
class Said:
    role: str
    content: str


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
      a: one
      b: another
    """
    return a + b


USER = [{"role": "user", "content": "a"}]
LEFT_TO_IT = {
    "objects": lambda t: t.apply_chat_template([Said("user", "a")], tokenize=False),
    "numbers of numpy": lambda t: t.apply_chat_template(USER, tokenize=False, n=np.float32(2)),
    "several chats": lambda t: t.apply_chat_template([USER, USER], tokenize=False),
    "functions": lambda t: t.apply_chat_template(USER, tools=[add], tokenize=False),
    "no message": lambda t: t.apply_chat_template([], tokenize=False),
    "a text": lambda t: t.apply_chat_template("a", tokenize=False),
    "an open message": lambda t: t.apply_chat_template(
        USER, tokenize=False, continue_final_message=True
    ),
    "an object of ids": lambda t: t.apply_chat_template(USER),
    "an array": lambda t: t.apply_chat_template(USER, return_tensors="np")["input_ids"].tolist(),
    "sanitized": lambda t: t.apply_chat_template(USER, sanitize_control_tokens=True),
    "a call": lambda t: dict(t(["a", "b c"], padding=True)),
    "a batch": lambda t: t.batch_decode([[5], [6, 7]]),
    "an array of ids": lambda t: t.decode(np.array([300, 301])),
    "rows of ids": lambda t: t.decode([[300], [301]]),
    "a pair": lambda t: t.encode("a", "b"),
    "a cut text": lambda t: t.encode("a b c d", truncation=True, max_length=2),
    "half a character": lambda t: t.encode("\ud800"),
    "no text": lambda t: t.encode(5),
    "a number that is no id": lambda t: t.decode([-1]),
    "a template by name": lambda t: t.apply_chat_template(USER, chat_template=5, tokenize=False),
    "an attribute": lambda t: (t.padding_side, t.model_max_length, t.extra_special_tokens),
    "no attribute": lambda t: t.nonsense,
    "pieces": lambda t: t.tokenize("the of"),
    "its backend": lambda t: len(t._tokenizer.get_vocab()) + len(t.backend_tokenizer.to_str()),
}


@pytest.mark.parametrize("name", LEFT_TO_IT)
def test_what_is_rare_is_done_by_transformers(name, tmp_path):
    folder = write(tmp_path, KNOWN["as published"], RICH)
    ours, reference = load_tokenizer(folder), reference_of(folder)
    call = LEFT_TO_IT[name]
    found, wanted = outcome(call, ours), outcome(call, reference)
    assert found == wanted
    assert isinstance(found, tuple) or not is_lean(ours)


def test_a_template_that_is_missing_is_missed_as_in_transformers(tmp_path):
    folder = write(tmp_path, KNOWN["as published"])
    found, wanted = (
        outcome(t.apply_chat_template, USER, tokenize=False)
        for t in (load_tokenizer(folder), reference_of(folder))
    )
    assert found == wanted and found[0] == "ValueError"


# --- changes ---


def test_changes_take_effect(tmp_path):
    ours = load_tokenizer(write(tmp_path, KNOWN["as published"], RICH))
    ours.chat_template = "{{ messages[0].content }}"
    assert ours.apply_chat_template(USER, tokenize=False) == "a"
    assert is_lean(ours)
    ours.add_special_tokens({"cls_token": "<new>"})
    assert not is_lean(ours)
    number = len(ours) - 1
    assert ours.cls_token == "<new>" and ours.cls_token_id == number
    assert ours.encode("<new>", add_special_tokens=False) == [number]
    assert ours.convert_ids_to_tokens(number) == "<new>"
    assert ours.decode([number], skip_special_tokens=True) == ""
    assert ours.apply_chat_template(USER, tokenize=False) == "a"
    ours.chat_template = "b"
    assert ours.transformers.chat_template == "b" == ours.apply_chat_template(USER, tokenize=False)
    ours.eos_token = "<pad>"
    assert ours.eos_token_id == ours.pad_token_id == ours.transformers.eos_token_id


@pytest.mark.parametrize("name", ["as published", "more tokens"])
def test_it_can_be_copied_and_pickled(name, tmp_path):
    ours = load_tokenizer(write(tmp_path, (KNOWN | UNKNOWN)[name], RICH))
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.encode("the <|turn> of") == ours.encode("the <|turn> of")
        assert other.chat_template == ours.chat_template and len(other) == len(ours)
        assert is_lean(other) == is_lean(ours)


def test_files_that_are_gone_are_named(tmp_path):
    ours = load_tokenizer(write(tmp_path / "gone", KNOWN["as published"]))
    shutil.rmtree(tmp_path / "gone")
    assert ours.decode(ours.encode("the of")) == "<bos>the of"
    with pytest.raises(SourceError, match="gone cannot be read"):
        ours.tokenize("the of")


def test_threads_that_ask_transformers_at_once_get_one_tokenizer(tmp_path):
    ours = load_tokenizer(write(tmp_path, KNOWN["as published"]))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(ours.transformers)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(each) for each in found}) == 1 and len(found) == 4


def test_a_tokenizer_of_transformers_does_as_well(tmp_path):
    folder = write(tmp_path, KNOWN["as published"], test_prompt.TEMPLATE)
    ours, theirs = load_tokenizer(folder), reference_of(folder)
    for chat in chats(60):
        chat = [m | {"content": m["content"] or "x"} for m in chat if m["role"] != "tool"]
        if any(isinstance(m["content"], list) for m in chat) or not chat:
            continue
        options = PromptOptions(allow_special_tokens=len(chat) % 2 == 0)
        found, wanted = (
            outcome(encode_prompt, tokenizer, chat, options) for tokenizer in (ours, theirs)
        )
        assert found == wanted
    for text in texts(500, seed=1):
        assert encode_text(ours, text) == encode_text(theirs, text)
    assert is_lean(ours)


@pytest.mark.skipif(sys.platform != "linux", reason="mallinfo2 is glibc's")
@pytest.mark.parametrize("is_whole", [False, True])
def test_texts_are_not_kept(is_whole: bool) -> None:
    """The library would keep 10,000 texts for each thread: 5 MB for these 1,000."""
    tokenizer = load_tokenizer(bundled_model())
    backend = tokenizer.transformers.backend_tokenizer if is_whole else tokenizer._lean.backend
    texts = [f"{number:06d}" * 20 for number in range(1000)]
    grown = []

    def encode_all() -> None:
        before = malloc_state().in_use
        for text in texts:
            backend.encode(text)
        grown.append(malloc_state().in_use - before)

    encode_all()
    thread = threading.Thread(target=encode_all)
    thread.start()
    thread.join()
    assert max(grown) < 1 << 20
