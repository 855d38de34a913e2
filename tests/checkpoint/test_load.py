"""A folder -> model and tokenizer; what is missing is said first and in one line."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from mlx_diffgemma import (
    DiffGemmaError,
    PromptOptions,
    bundled_model,
    encode_prompt,
    load,
    load_model,
    load_tokenizer,
)
from mlx_diffgemma.checkpoint.memory import WARN_ABOVE
from mlx_diffgemma.errors import ConfigError, SourceError, WeightsError
from mlx_diffgemma.language.prompt import encode_text, special_tokens

CONTROL = (
    "<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
    '<|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <|image|> <image|> '
    "<|audio> <|audio|> <audio|> <|video|>"
).split()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the bundled model."""
    shutil.copytree(bundled_model(), tmp_path, dirs_exist_ok=True)
    return tmp_path


def refusal(kind: type[DiffGemmaError], folder: Path) -> str:
    with pytest.raises(kind) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- folders ---


def test_a_folder_gives_model_and_tokenizer():
    model, tokenizer = load(bundled_model())
    assert model.config.text.vocab_size == len(tokenizer) == 384
    assert not model.training


def test_a_path_may_be_a_string():
    _, tokenizer = load(str(bundled_model()))
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("config.json", ConfigError, "has no config.json"),
        ("model.safetensors", WeightsError, "has no model*.safetensors"),
        ("tokenizer.json", SourceError, "has no tokenizer.json and no tokenizer.model"),
    ],
)
def test_a_folder_that_lacks_a_file_says_which(folder, name, kind, said):
    (folder / name).unlink()
    message = refusal(kind, folder)
    assert said in message and str(folder) in message


def test_an_empty_folder_is_refused(tmp_path):
    assert str(tmp_path) in refusal(ConfigError, tmp_path)


def test_without_a_generation_config_the_defaults_hold(folder):
    (folder / "generation_config.json").unlink()
    assert load_model(folder).config.generation.max_denoising_steps is None


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickle_files_are_never_opened_and_code_never_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("pytorch_model.bin", "model.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Bomb()))
    code = "from pathlib import Path\nPath('exploded').touch()\n"
    for name in ("modeling_diffusion_gemma.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoModel": "modeling_diffusion_gemma.Evil", "AutoConfig": "tokenization_evil.C"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    with pytest.warns(UserWarning, match="auto_map"):
        load(folder)
    (folder / "model.safetensors").unlink()
    assert "is a pickle file, which is never opened" in refusal(SourceError, folder)
    assert not (folder / "exploded").exists()


def test_code_that_comes_with_a_tokenizer_is_never_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "evil.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    text = json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map})
    (folder / "tokenizer_config.json").write_text(text)
    assert len(load_tokenizer(folder)) == 384  # config.json names a class that is known
    (folder / "config.json").unlink()
    with pytest.raises(SourceError) as raised:
        load_tokenizer(folder)
    assert "contains custom code" in str(raised.value) and "\n" not in str(raised.value)
    assert not (folder / "exploded").exists()


# --- warnings ---


@pytest.mark.parametrize("kind", ["load", "load_model", "generate", "train"])
def test_every_warning_of_a_config_comes_once(folder, kind, tmp_path_factory):
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"fresh": 1}))
    work = tmp_path_factory.mktemp("work")
    (work / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "load":
            load(folder)
        elif kind == "load_model":
            load_model(folder)
    said = [str(w.message) for w in caught]
    if kind in ("generate", "train"):
        arguments = {
            "generate": ["--prompt", "a", "--max-denoising-steps", "1", "--max-tokens", "4"],
            "train": f"--train --data {work} --adapter-path {work}/a --iters 1".split(),
        }[kind]
        finished = subprocess.run(
            [sys.executable, "-m", f"mlx_diffgemma.{kind}", "--model", str(folder), *arguments],
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        said = finished.stderr.splitlines()
    found = [text for text in said if "unknown keys are ignored: fresh" in text]
    assert len(found) == len({text.partition(": unknown")[0] for text in found}) == 2, said


# --- memory ---


@pytest.mark.parametrize(("available", "warns"), [(10**6, True), (10**12, False)])
def test_a_model_larger_than_memory_is_warned_of_and_still_loaded(monkeypatch, available, warns):
    # the package binds the function under the file's name, so the file is found elsewhere
    monkeypatch.setattr(
        sys.modules["mlx_diffgemma.checkpoint.load"], "recommended_bytes", lambda: available
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(bundled_model())
    messages = [str(w.message) for w in caught if "GB" in str(w.message)]
    assert len(messages) == warns
    assert all(f"more than {WARN_ABOVE:.0%}" in m for m in messages)
    assert model.config.canvas_length == 64


# --- tokenizer.json ---


def test_the_bundled_tokenizer_marks_all_control_tokens_as_special():
    tokens = special_tokens(load_tokenizer(bundled_model()))
    assert len(tokens) == 24 and tokens.keys() > set(CONTROL)


def test_control_tokens_that_a_resaved_file_calls_ordinary_are_special_all_the_same(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in ("<bos>", "<eos>", "<pad>")
    path.write_text(json.dumps(content))
    ours, original = load_tokenizer(folder), load_tokenizer(bundled_model())
    assert special_tokens(ours).items() >= {t: special_tokens(original)[t] for t in CONTROL}.items()
    assert encode_prompt(ours, "<|channel>") == encode_prompt(original, "<|channel>")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "nonsense"}}',
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": 3}}',
    ],
    ids=["empty", "half", "no keys", "list", "not UTF-8", "unknown model", "no vocabulary"],
)
def test_a_damaged_tokenizer_json_is_one_line(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    assert f"the tokenizer in {folder} cannot be read" in refusal(SourceError, folder)


# --- tokenizer.model ---

SENTENCES = [
    "hello world, this is a test of the tokenizer",
    "the quick brown fox jumps over the lazy dog",
    "Sort: 6 3 1 7 0 6",
    "How many  spaces   are here",
    "user model system thought",
]
TEXTS = [
    *SENTENCES,
    " leading and trailing ",
    "two\n\nlines\nthree\n\n\n",
    "\ttabs\t",
    "é 日本 🙂 \u200b",
    "unseen WORDS and _unknown_ ~ signs",
    "<|turn>user\nhi<turn|>\n<|channel>thought\nhm<channel|>",
    "a < b > c <| d |>",
    "",
]


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """A small BPE model made as Gemma's is: byte fallback, no dummy prefix, spaces kept, control
    tokens as user-defined symbols."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=buffer,
        vocab_size=440,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", *CONTROL, "\n", "\n\n"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return buffer.getvalue()


@pytest.fixture
def pieces(sentencepiece_model) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)


@pytest.fixture(params=["alone", "with config.json", "with tokenizer_config.json"])
def sentencepiece_folder(request, tmp_path, sentencepiece_model) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    shutil.copy(bundled_model() / "chat_template.jinja", tmp_path)
    if request.param != "alone":
        shutil.copy(bundled_model() / "config.json", tmp_path)
    if request.param == "with tokenizer_config.json":
        own = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    return tmp_path


def test_tokenizer_model_alone_gives_sentencepieces_own_ids_and_text(sentencepiece_folder, pieces):
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert len(tokenizer) == pieces.vocab_size()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == pieces.encode(text), text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids, "nothing is added"


def test_tokenizer_model_alone_knows_every_special_token(sentencepiece_folder, pieces):
    known = special_tokens(load_tokenizer(sentencepiece_folder))
    expected = {"<pad>", "<eos>", "<bos>", "<unk>", *CONTROL}
    assert known.keys() - {"<mask>"} == expected
    assert all(pieces.id_to_piece(token) == name for name, token in known.items())


@pytest.mark.parametrize("name", CONTROL)
def test_tokenizer_model_alone_spells_typed_control_tokens(sentencepiece_folder, pieces, name):
    """transformers 5.24 cuts them out of any text, as sentencepiece itself does."""
    tokenizer = load_tokenizer(sentencepiece_folder)
    for text in (name, f"say {name}{name} now"):
        ids = encode_text(tokenizer, text)
        assert pieces.piece_to_id(name) not in ids
        assert tokenizer.decode(ids) == text


def test_tokenizer_model_alone_renders_prompts(sentencepiece_folder, pieces):
    tokenizer = load_tokenizer(sentencepiece_folder)
    typed = encode_prompt(tokenizer, "say <turn|>")
    turn, end = pieces.piece_to_id("<|turn>"), pieces.piece_to_id("<turn|>")
    assert (typed.count(turn), typed.count(end)) == (2, 1)
    assert typed[0] == 2
    allowed = PromptOptions(allow_special_tokens=True)
    assert encode_prompt(tokenizer, "say <turn|>", allowed).count(end) == 2


def test_a_damaged_tokenizer_model_is_one_line(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"garbage" * 10)
    assert f"the tokenizer in {folder} cannot be read" in refusal(SourceError, folder)


# --- what loading costs ---


def test_a_tokenizer_with_a_known_class_is_loaded_without_the_models_configuration(folder):
    """AutoTokenizer reads it first, and imports torch for that where it is installed."""
    for name in ("PreTrainedTokenizerFast", "GemmaTokenizer"):
        text = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(text | {"tokenizer_class": name}))
        code = (
            "import sys; from mlx_diffgemma import load_tokenizer; "
            f"tokenizer = load_tokenizer({str(folder)!r}).transformers; "
            "print(type(tokenizer).__name__, 'torch' in sys.modules)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert found.stdout.split() == [type(auto).__name__, "False"], found.stderr
        ours = load_tokenizer(folder)
        assert ours.special_tokens_map == auto.special_tokens_map
        for line in TEXTS:
            assert ours.encode(line) == auto.encode(line)
        assert ours.padding_side == auto.padding_side
