"""Which chat template a tokenizer gets, held against transformers where it reads the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlx_diffgemma import PromptOptions, bundled_model, encode_prompt, load_tokenizer
from mlx_diffgemma.errors import SourceError

NAMED = {"default": "of json", "tool_use": "with tools"}
LISTED = [{"name": name, "template": template} for name, template in NAMED.items()]


def folder_with(
    folder: Path, *, jinja: str | None = None, config: str | None = None, processor: object = None
) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_model() / name, folder / name)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    if config is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": config}))
    if processor is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor}))
    return folder


@pytest.mark.parametrize("jinja", [None, "of jinja"])
@pytest.mark.parametrize("config", [None, "of config"])
@pytest.mark.parametrize("processor", [None, "of json"])
def test_a_processors_template_is_used_where_the_tokenizer_has_none(
    tmp_path, jinja, config, processor
):
    folder = folder_with(tmp_path, jinja=jinja, config=config, processor=processor)
    template = load_tokenizer(folder).chat_template
    assert template == (jinja or config or processor)
    if jinja or config:
        assert template == AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("templates", [NAMED, LISTED])
def test_named_templates_are_chosen_as_transformers_chooses_them(tmp_path, templates):
    tokenizer = load_tokenizer(folder_with(tmp_path, processor=templates))
    assert tokenizer.chat_template == NAMED
    for variables, said in (({}, "of json"), ({"tools": [{"name": "f"}]}, "with tools")):
        ids = encode_prompt(tokenizer, "x", PromptOptions(chat_template_config=variables))
        assert tokenizer.decode(ids) == said


def test_a_byte_order_mark_before_a_processors_template_is_no_part_of_it(tmp_path):
    folder = folder_with(tmp_path)
    content = json.dumps({"chat_template": "of json"})
    (folder / "chat_template.json").write_text(content, encoding="utf-8-sig")
    assert load_tokenizer(folder).chat_template == "of json"


WRONG = ["", "{", "[]", "5", "{}", "[" * 100_000]
WRONG += [f'{{"chat_template": {value}}}' for value in ("5", "{}", "[]", "[1]", '{"default": 5}')]
WRONG += ['{"chat_template": [{"name": "default"}]}', '{"chat_template": [{"template": "x"}]}']


@pytest.mark.parametrize("content", WRONG)
def test_a_processors_template_that_cannot_be_read_is_named(tmp_path, content):
    folder = folder_with(tmp_path)
    (folder / "chat_template.json").write_text(content)
    with pytest.raises(SourceError, match=r"chat_template\.json (cannot be read|must be)"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("of jinja")
    assert load_tokenizer(folder).chat_template == "of jinja", "it is not asked"
