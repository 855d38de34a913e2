"""Tokenizer files as checkpoints have them, and drawn texts and chats. Not a test."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

CONTROLS = (
    "<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
    '<|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <|audio> <|image|> <|audio|> '
    "<image|> <audio|> <|video|>"
).split()
STANDARD = "<pad> <eos> <bos> <unk> <mask>".split()
# As the published checkpoint names them.
NAMED = {
    "audio_token": "<|audio|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "eot_token": "<turn|>",
    "escape_token": '<|"|>',
    "image_token": "<|image|>",
    "sot_token": "<|turn>",
    "think_token": "<|think|>",
}
GEMMA = {
    "tokenizer_class": "GemmaTokenizer",
    "backend": "tokenizers",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_special_tokens": ["<|video|>"],
    "model_max_length": 1000000000000000019884624838656,
    "padding_side": "left",
    "processor_class": "Gemma4Processor",
    "response_schema": {"type": "object"},
    "model_specific_special_tokens": NAMED,
}
WORDS = "the of and a to in is that it was for on are with as I his they be at one have".split()
PIECES = [
    *(
        *WORDS,
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "▁",
        "é",
        "ß",
        "日本",
        "🙂",
        "👩‍👩‍👧",
        "\u200b",
    ),
    *("\0", "\x1b", "<0x0A>", "<0xFF>", "ﬁ", "é", "مرحبا", "ŉ", "\ufeff", "\U0010ffff", "1234"),
    *("<bos", "bos>", "<unused0>", "<|", "|>", "<", ">", "'s", "...", "{}", "\\", '"', " ,", " ."),
]


@cache
def trained() -> dict[str, Any]:
    """A small tokenizer.json in the form of the published one."""
    draw = random.Random(0)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    spelled = [*STANDARD, *CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), "<unused0>"]
    alphabet = [*map(chr, range(0x21, 0x7F)), "▁", "é", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=spelled, initial_alphabet=alphabet, show_progress=False
    )
    texts = [" ".join(draw.choices(WORDS, k=9)) + ".\n\n" for _ in range(300)]
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    marked = {*STANDARD, *CONTROLS}
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in marked]
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    return content


def _content(**parts: Any) -> Callable[[dict, dict], None]:
    return lambda content, config: content.update(parts)


def _model(**parts: Any) -> Callable[[dict, dict], None]:
    return lambda content, config: content["model"].update(parts)


def _config(**entries: Any) -> Callable[[dict, dict], None]:
    return lambda content, config: config.update(entries)


def _without(*entries: str) -> Callable[[dict, dict], None]:
    return lambda content, config: [config.pop(entry) for entry in entries] and None


def _token(name: str, **flags: Any) -> Callable[[dict, dict], None]:
    def change(content: dict, config: dict) -> None:
        (token,) = (t for t in content["added_tokens"] if t["content"] == name)
        token.update(flags)

    return change


def _more_tokens(content: dict, config: dict) -> None:
    first = len(content["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i, name in enumerate(("<more>", "<most>")):
        token = {"id": first + i, "content": name, "special": not i, **flags}
        content["added_tokens"].append(token)


def _not_controls(content: dict, config: dict) -> None:
    for token in content["added_tokens"]:
        token["special"] = token["content"] in STANDARD
    for name in ("model_specific_special_tokens", "extra_special_tokens"):
        del config[name]


def _by_number(content: dict, config: dict) -> None:
    """As transformers 4 saved it."""
    config["added_tokens_decoder"] = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"}
        for token in content["added_tokens"]
    }
    config["extra_special_tokens"] = {"video_token": "<|video|>"}
    del config["model_specific_special_tokens"]
    config |= {"add_bos_token": True, "add_eos_token": False, "sp_model_kwargs": None}
    config |= {"spaces_between_special_tokens": False, "use_default_system_prompt": False}


def _by_number_otherwise(content: dict, config: dict) -> None:
    _by_number(content, config)
    config["added_tokens_decoder"]["4"]["lstrip"] = True


def _old_merges(content: dict, config: dict) -> None:
    merges = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) for pair in merges]


def _as_the_file_is(content: dict, config: dict) -> None:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"


def _as_the_file_is_with_more(content: dict, config: dict) -> None:
    _as_the_file_is(content, config)
    _more_tokens(content, config)
    content["normalizer"] = {"type": "Lowercase"}
    content["pre_tokenizer"] = None


Change = Callable[[dict, dict], None]
# What changes the files, and transformers still gives what they say.
KNOWN: dict[str, Change] = {
    "as published": lambda content, config: None,
    "as transformers 4 saved it": _by_number,
    "another name of the class": _config(tokenizer_class="GemmaTokenizerFast"),
    "a switch that transformers drops": _config(add_bos_token=False, add_eos_token=True),
    "no post-processor": _content(post_processor=None),
    "names that mean nothing": _config(sep_token=None, cls_token=None),
    "a name more": _config(cls_token="<bos>"),
    "names in the file itself": lambda content, config: config.update(
        config.pop("model_specific_special_tokens")
    ),
    "tokens in a list": _config(extra_special_tokens=["<|video|>", "<|tool>", "<|tool>"]),
    "tokens in a list of an older name": lambda content, config: config.update(
        additional_special_tokens=config.pop("extra_special_tokens")
    ),
    "default names": _without("bos_token", "pad_token", "unk_token", "mask_token"),
    "control tokens not marked": _not_controls,
    "a template in the config": _config(chat_template="{{ bos_token }}{{ messages | length }}"),
    "merges as texts": _old_merges,
    "spaces around a token": _token("<|turn>", lstrip=True, rstrip=True),
    "the file as it is": _as_the_file_is,
    "the file as it is, with more tokens": _as_the_file_is_with_more,
    "a short limit": _config(model_max_length=5),
}
# What transformers changes, or may change in a later version.
UNKNOWN: dict[str, Change] = {
    "another normalizer": _content(normalizer={"type": "Lowercase"}),
    "no normalizer": _content(normalizer=None),
    "another pre-tokenizer": _content(pre_tokenizer={"type": "Whitespace"}),
    "no pre-tokenizer": _content(pre_tokenizer=None),
    "another decoder": _content(decoder={"type": "Fuse"}),
    "another unknown token": _model(unk_token="<pad>"),
    "no fusion of unknown tokens": _model(fuse_unk=False),
    "no bytes": _model(byte_fallback=False),
    "merges that are passed over": _model(ignore_merges=True),
    "more tokens": _more_tokens,
    "a named token that is not special": _token("<|image|>", special=False),
    "a token that does not exist": _config(sep_token="<none>"),
    "no name": _config(mask_token=None),
    "another token for unknown ones": _config(unk_token="<pad>"),
    "tokens by number, with other flags": _by_number_otherwise,
    "names in two places": _config(new_token="<mask>"),
    "several templates": _config(chat_template=[{"name": "default", "template": "x"}]),
    "an unknown entry": _config(fix_mistral_regex=False),
    "special tokens are split": _config(split_special_tokens=True),
    "spaces are cleaned up": _config(clean_up_tokenization_spaces=True),
    "a file that truncates": _content(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    ),
    "no class": _without("tokenizer_class"),
}


def drawn(seed: int) -> Change:
    """Several changes at once, and flags and entries at random."""
    draw = random.Random(seed)
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    entries = ("bos_token", "new_token", "image_token", "extra_special_tokens", "padding_side")
    values = ("<mask>", None, "<none>", ["<|tool>"], {"new_token": "<mask>"}, False, "right")

    def change(content: dict, config: dict) -> None:
        names = draw.sample([*KNOWN], draw.randrange(4))
        for name in [*names, *draw.sample([*UNKNOWN], draw.random() < 0.25)]:
            with suppress(KeyError, ValueError):  # of two that change the same
                (KNOWN | UNKNOWN)[name](content, config)
        added = content["added_tokens"]
        for token in draw.sample(added, draw.randrange(4)):
            token[draw.choice(flags)] = draw.random() < 0.5
        if draw.random() < 0.3:
            draw.shuffle(added)
        if draw.random() < 0.2:
            del added[draw.randrange(len(added))]
        if draw.random() < 0.2:
            config[draw.choice(entries)] = draw.choice(values)

    return change


def write(folder: Path, change: Change, template: str | None = None) -> Path:
    """Write a changed tokenizer into a folder."""
    content, config = json.loads(json.dumps(trained())), json.loads(json.dumps(GEMMA))
    change(content, config)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Draw texts of all kinds."""
    draw = random.Random(seed)
    pieces = [*PIECES, *STANDARD, *CONTROLS]
    made = ["", " ", "▁", *pieces]
    while len(made) < count:
        joint = draw.choice(["", "", " "])
        text = joint.join(draw.choices(pieces, k=draw.randrange(1, 12)))
        if draw.random() < 0.3:
            text += "".join(chr(draw.choice((0x250, 0xD7FF, 0x1FFFF)) - n) for n in range(3))
        made.append(text)
    return made[:count]


def chats(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Draw chats, as JSON has them."""
    draw = random.Random(seed)
    said = texts(200, seed)

    def content() -> Any:
        kind = draw.randrange(6)
        if kind == 0:
            return [{"type": "image"}, {"type": "text", "text": draw.choice(said)}]
        if kind == 1:
            return ({"type": "text", "text": draw.choice(said)},)
        return None if kind == 2 else draw.choice(said)

    def message() -> dict[str, Any]:
        role = draw.choice(["system", "user", "assistant", "tool"])
        made: dict[str, Any] = {"role": role, "content": content()}
        if draw.random() < 0.3:
            made[draw.choice(["reasoning", "thinking", "reasoning_content"])] = draw.choice(
                [None, "", "so", "a <b> & c"]
            )
        if draw.random() < 0.3:
            arguments = {"b": [1, 2.5, None, True], "a": {"é": draw.choice(said)}}
            call = {"name": "f", "arguments": arguments}
            made["tool_calls"] = [{"type": "function", "function": call}]
        return made

    return [[message() for _ in range(draw.randrange(1, 5))] for _ in range(count)]
