"""Tokenizer files that the tokenizers library reads as transformers does, without transformers.

transformers rebuilds a Gemma tokenizer from the vocabulary and the merges of tokenizer.json, and
adds what tokenizer_config.json says. Where the files have nothing that it would change, the
tokenizers library alone gives the same tokenizer, in half of the time. Anything else is unknown
here, and what cannot be read too: transformers finds the words for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

CONFIG, FILE, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
# tokenizer_class -> whether transformers rebuilds the parts of tokenizer.json.
_REBUILT = {
    "GemmaTokenizer": True,
    "GemmaTokenizerFast": True,
    "PreTrainedTokenizerFast": False,
    "TokenizersBackend": False,
}
KNOWN_CLASSES = frozenset(_REBUILT)
# The parts that transformers gives a Gemma tokenizer.
_PARTS = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
}
_MODEL = {
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
# Special tokens that every tokenizer has a name for, in transformers' order, and Gemma's own.
NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
_OF_GEMMA = {
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
# Entries of tokenizer_config.json that change nothing in what is done here, whatever they say.
_WITHOUT_EFFECT = frozenset(
    "tokenizer_class name_or_path processor_class is_local local_files_only response_schema "
    "response_template sp_model_kwargs spaces_between_special_tokens use_default_system_prompt "
    # Where there is a tokenizer.json, transformers drops these two.
    "add_bos_token add_eos_token".split()
)
# Entries that only some values are known of.
_SIDES = ("left", "right")
_VALUES: dict[str, tuple[Any, ...]] = {
    "backend": ("tokenizers",),
    "padding_side": _SIDES,
    "truncation_side": _SIDES,
    "clean_up_tokenization_spaces": (False,),
    "split_special_tokens": (False,),
}
# Older files beside it, from which transformers takes tokens or templates.
_OLDER_TOKENS = ("special_tokens_map.json", "added_tokens.json")
_MORE_TEMPLATES = "additional_chat_templates"
_ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')


class _UnknownError(Exception):
    """Files of another kind."""


@dataclass(frozen=True)
class KnownTokenizer:
    """What the files of a tokenizer hold."""

    backend: Tokenizer
    named: Mapping[str, str]  # special tokens by name, such as bos_token
    extra: tuple[str, ...]  # special tokens without a name
    longest: float  # tokens of a text, from which transformers warns
    template: str | None

    @property
    def specials(self) -> list[str]:
        """All special tokens that tokenizer_config.json names, each once."""
        return list(dict.fromkeys([*self.named.values(), *self.extra]))


def read_known(folder: Path) -> KnownTokenizer | None:
    """Return the tokenizer of a folder, or None where only transformers knows what it is."""
    try:
        return _read(folder)
    except Exception:  # the tokenizers library raises nothing more specific
        return None


def _read(folder: Path) -> KnownTokenizer:
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    rebuilt = _REBUILT.get(config["tokenizer_class"])
    _only_if(rebuilt is not None and not (folder / _MORE_TEMPLATES).exists())
    if "added_tokens_decoder" not in config:
        _only_if(not any((folder / name).exists() for name in _OLDER_TOKENS))
    named, extra = _special_tokens(config, _OF_GEMMA if rebuilt else {})
    template, longest = _template(folder, config), config.get("model_max_length")
    _check_entries(config)

    text = (folder / FILE).read_bytes().decode("utf-8")
    _only_if('"#version' not in text)  # a line of old merges that only one of both skips
    backend = Tokenizer.from_str(text)
    keep_no_texts(backend)
    _only_if(backend.truncation is None and backend.padding is None)
    added = backend.get_added_tokens_decoder()
    _only_if(_fields(added) == _fields(_added_in(text)))
    if "added_tokens_decoder" in config:
        given = {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
        _only_if(_fields(added) == _fields(given))
    if rebuilt:
        _check_parts(backend, named["unk_token"])
        vocabulary = backend.model
        _only_if(all(vocabulary.token_to_id(t.content) == i for i, t in added.items()))
    special = {token.content for token in added.values() if token.special}
    _only_if(special.issuperset([*named.values(), *extra]))
    return KnownTokenizer(
        backend, named, extra, float("inf") if longest is None else longest, template
    )


def _only_if(known: bool) -> None:
    if not known:
        raise _UnknownError


def _special_tokens(
    config: Mapping[str, Any], standard: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the special tokens with a name, and those without one."""
    named = {name: config.get(name, standard.get(name)) for name in NAMES}
    # For Gemma, null is not the same as no entry.
    _only_if(all(isinstance(named[name], str) for name in standard))
    more = (key for key in config if key.endswith("_token") and key not in _WITHOUT_EFFECT)
    named |= {key: config[key] for key in more}
    named = {key: value for key, value in named.items() if value is not None}
    lists = [config.get(f"{kind}_special_tokens") or [] for kind in ("extra", "additional")]
    _only_if(not all(lists))
    extra = lists[0] or lists[1]
    maps = [config.get("model_specific_special_tokens"), extra if isinstance(extra, dict) else None]
    for tokens in filter(None, maps):  # one at most, and no other tokens with names of their own
        _only_if(set(named).issubset(NAMES) and not set(tokens) & {*NAMES})
        _only_if(all(key.endswith("_token") for key in tokens))
        named |= tokens
    if isinstance(extra, dict):
        extra = []
    _only_if(isinstance(extra, list))
    _only_if(all(isinstance(token, str) for token in [*named.values(), *extra]))
    return named, tuple(extra)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template; one that is empty is none."""
    file = folder / TEMPLATE
    template = file.read_text("utf-8") if file.exists() else config.get("chat_template")
    _only_if(template is None or isinstance(template, str))
    return template


def _check_entries(config: Mapping[str, Any]) -> None:
    """Check what else a tokenizer_config.json says."""
    seen = {"chat_template", "added_tokens_decoder"}
    seen |= {f"{kind}_special_tokens" for kind in ("extra", "additional", "model_specific")}
    for key, value in config.items():
        if key in _VALUES:
            _only_if(any(value is known or value == known for known in _VALUES[key]))
        elif key == "model_max_length":
            _only_if(value is None or type(value) in (int, float))
        elif key == "model_input_names":
            _only_if(value == ["input_ids", "attention_mask"])
        else:
            _only_if(key in seen or key in _WITHOUT_EFFECT or key.endswith("_token"))


def _added_in(text: str) -> dict[int, AddedToken]:
    """Return the added tokens of a tokenizer.json, as it writes them."""
    (place,) = _ADDED.finditer(text)
    entries, _ = json.JSONDecoder().raw_decode(text, place.end())
    tokens = {entry.pop("id"): AddedToken(**entry) for entry in entries}
    _only_if(len(tokens) == len(entries))
    return tokens


def _fields(tokens: Mapping[int, AddedToken]) -> dict[int, Any]:
    return {i: token.__getstate__() for i, token in tokens.items()}


def _check_parts(backend: Tokenizer, unknown: str) -> None:
    """Check that transformers would rebuild a Gemma tokenizer's parts as they are."""
    model = backend.model
    _only_if(type(model).__name__ == "BPE" and model.unk_token == unknown)
    _only_if(all(getattr(model, name) == value for name, value in _MODEL.items()))
    for name, wanted in _PARTS.items():
        part = getattr(backend, name)
        _only_if(part is not None and json.loads(part.__getstate__()) == wanted)


def add_special(backend: Tokenizer, tokens: Iterable[str]) -> None:
    """Make tokens of the vocabulary special."""
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])


def keep_no_texts(backend: Tokenizer) -> None:
    """Let the tokenizers library keep no text that it has encoded.

    It keeps 10,000 short texts for each thread, which are whole prompts here, since Gemma's
    tokenizer does not split them into words: 5 kB each, so that a server would grow for hours.
    """
    resize = getattr(backend.model, "_resize_cache", None)  # some kinds of models have none
    if resize is not None:
        resize(0)
