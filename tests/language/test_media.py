"""Images and videos in messages: their places in the ids, and what is refused."""

from __future__ import annotations

import base64
import importlib
from dataclasses import replace

import numpy as np
import pytest

from mlx_diffgemma import (
    ImageSettings,
    PromptOptions,
    bundled_model,
    encode_prompt,
    load_tokenizer,
)
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.errors import ConfigError, ImageError, PromptError
from mlx_diffgemma.language.controls import special_tokens
from mlx_diffgemma.language.encoded import EncodedPrompt, ImageForm
from mlx_diffgemma.language.images import read_image
from mlx_diffgemma.language.prompt import encode
from tests.language.drawn import clip, pattern, saved

TOKENIZER = load_tokenizer(bundled_model())
SPECIALS = special_tokens(TOKENIZER)
FORM = replace(ImageForm.of(ModelConfig.from_folder(bundled_model())), positions=10_240)
BEGIN, IMAGE, END = (SPECIALS[name] for name in ("<|image>", "<|image|>", "<image|>"))
SMALL = PromptOptions(images=ImageSettings(image_tokens=70, video_frames=4))


def picture(array=None, **more) -> dict:
    return {"type": "image", "image": pattern(64, 48) if array is None else array} | more


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def shown(encoded: EncodedPrompt) -> str:
    """The text, with each image's tokens as [n]."""
    out, run = "", 0
    for token in encoded.ids:
        if token == IMAGE:
            run += 1
            continue
        if run:
            out, run = out + f"[{run}]", 0
        out += TOKENIZER.decode([token])
    return out


def test_the_form_is_that_of_the_models_config():
    assert (FORM.begin, FORM.token, FORM.end) == (BEGIN, IMAGE, END)
    config = ModelConfig.from_folder(bundled_model())
    assert ImageForm.of(replace(config, vision=None)) is None
    assert ImageForm.of(replace(config, image_token_ids=())) is None


def test_images_stand_at_their_parts_in_every_turn():
    wide, tall = pattern(90, 30), pattern(30, 90)
    chat = [
        user(picture(wide), text("one"), picture(tall)),
        {"role": "assistant", "content": "yes"},
        user(text("and "), picture(), text("two")),
    ]
    encoded = encode(TOKENIZER, chat, SMALL, FORM)
    expected = [
        read_image(array, soft_tokens=70, patch_size=FORM.patch_size)
        for array in (wide, tall, pattern(64, 48))
    ]
    assert list(encoded.images) == expected
    n, m, k = (image.soft_tokens for image in expected)
    assert encoded.image_tokens == n + m + k == encoded.ids.count(IMAGE)
    assert shown(encoded) == (
        f"<bos><|turn>user\n<|image>[{n}]<image|>one<|image>[{m}]<image|><turn|>\n"
        f"<|turn>model\nyes<turn|>\n<|turn>user\nand<|image>[{k}]<image|>two<turn|>\n"
        "<|turn>model\n"
    )


def test_every_spelling_of_a_part_is_the_same_image(tmp_path):
    data = saved(__import__("PIL.Image").Image.fromarray(pattern(64, 48)))
    (path := tmp_path / "a.png").write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts = [
        picture(),
        picture(path),
        picture(str(path)),
        picture(data),
        picture(url),
        {"type": "image", "path": str(path)},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
    ]
    encoded = [encode(TOKENIZER, [user(part)], SMALL, FORM) for part in parts]
    assert len({tuple(each.ids) for each in encoded}) == 1
    assert len({each.images for each in encoded}) == 1


@pytest.mark.parametrize("name", ["<|image|>", "<|image>", "<image|>", "<|video|>"])
@pytest.mark.parametrize("where", ["text", "prefix", "system"])
def test_typed_image_tokens_stay_text_beside_images(name, where):
    options = SMALL
    if where == "prefix":
        options = replace(SMALL, response_prefix=name)
    if where == "system":
        options = replace(SMALL, system_prompt=f"a {name}")
    typed = f"a {name} b" if where == "text" else "b"
    encoded = encode(TOKENIZER, [user(text(typed), picture())], options, FORM)
    assert encoded.ids.count(BEGIN) == encoded.ids.count(END) == len(encoded.images) == 1
    assert encoded.ids.count(IMAGE) == encoded.image_tokens
    assert SPECIALS["<|video|>"] not in encoded.ids
    assert name in TOKENIZER.decode([t for t in encoded.ids if t not in (BEGIN, IMAGE, END)])


def test_a_token_that_takes_effect_is_a_place_and_counts():
    allowed = replace(SMALL, allow_special_tokens=True)
    two = [user(picture(), text("<|image|>"))]
    with pytest.raises(PromptError, match=r"^the prompt holds 1 image, and .* 2 places for it$"):
        encode(TOKENIZER, two, allowed, FORM)
    with pytest.raises(PromptError, match=r"holds <\|image\|> and no image"):
        encode(TOKENIZER, [user(text("<|image|>"))], allowed, FORM)
    one = encode(TOKENIZER, [user(picture(), text("x"))], allowed, FORM)
    assert one.ids == encode(TOKENIZER, [user(picture(), text("x"))], SMALL, FORM).ids


def test_a_template_that_drops_images_is_said_with_both_counts():
    tokenizer = load_tokenizer(bundled_model())
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}x{% endfor %}"
    with pytest.raises(PromptError, match=r"holds 2 images, and .* 0 places for them"):
        encode(tokenizer, [user(picture(), picture())], SMALL, FORM)


def test_an_encoded_prompt_is_a_prompt():
    encoded = encode(TOKENIZER, [user(picture(), text("x"))], SMALL, FORM)
    assert encode(TOKENIZER, encoded) is encoded
    assert encode_prompt(TOKENIZER, encoded) == encoded.ids
    assert encode(TOKENIZER, "x").images == ()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image"}, "has none of its sources"),
        ({"type": "image", "image": b"x", "url": "y"}, "has 'image' and 'url' of its sources"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "must be a data: URL, got a.png"),
        ({"type": "image_url", "image_url": {"url": "http://a/b.png"}}, "must be a data: URL"),
        ({"type": "image_url", "image_url": {}}, "must be a data: URL, got NoneType"),
        ({"type": "image", "url": "/etc/passwd"}, "must be a data: URL"),
        ({"type": "input_image", "image_url": "file:///x"}, "must be a data: URL"),
        (picture("none.png"), "^none.png does not exist"),
        (picture(b"no picture at all"), "^image 2 is not an image"),
        (picture(5), "an image is a path, bytes"),
        ({"type": "video"}, "has none of its sources"),
        ({"type": "video", "video": 5}, "a video is a path, bytes or a data: URL, got int"),
        ({"type": "video", "video": b"none"}, "^video 1 is no video that can be read"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(part, said):
    with pytest.raises(PromptError, match=said) as raised:
        encode(TOKENIZER, [user(picture(), part)], SMALL, FORM)
    assert "\n" not in str(raised.value)


def test_a_model_without_a_tower_refuses_images():
    with pytest.raises(PromptError, match="holds an image, and this model reads none"):
        encode(TOKENIZER, [user(picture())], SMALL, None)


def test_an_image_longer_than_the_positions_is_refused():
    with pytest.raises(ImageError, match=r"is 210 patches long at this budget, and .* tells 32"):
        encode(TOKENIZER, [user(picture(pattern(1, 900)))], SMALL, replace(FORM, positions=32))


# --- settings ---


def test_the_budget_is_the_settings_else_the_models():
    chat = [user(picture())]
    for budget in (70, 140, 560):
        options = PromptOptions(images=ImageSettings(image_tokens=budget))
        by_settings = encode(TOKENIZER, chat, options, FORM)
        by_model = encode(TOKENIZER, chat, PromptOptions(), replace(FORM, soft_tokens=budget))
        assert by_settings.ids == by_model.ids
        assert budget * 0.8 < by_settings.image_tokens <= budget


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image_tokens": 100}, "image_tokens must be one of 70, 140, 280, 560, 1120, got 100"),
        ({"image_tokens": "70"}, "image_tokens must be a whole number, got '70'"),
        ({"max_image_pixels": 0}, "max_image_pixels must be a whole number at least 1"),
        ({"video_frames": 0}, "video_frames must be a whole number at least 1"),
    ],
)
def test_settings_out_of_bounds_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        ImageSettings(**given)


def test_too_many_pixels_are_refused_by_the_setting():
    options = PromptOptions(images=ImageSettings(max_image_pixels=100))
    with pytest.raises(ImageError, match="3,072 in all; at most 100 are read"):
        encode(TOKENIZER, [user(picture(saved(pil())))], options, FORM)
    with pytest.raises(ImageError, match=r"at most 100 are read"):
        encode(TOKENIZER, [user(picture())], options, FORM)


def pil():
    from PIL import Image

    return Image.fromarray(pattern(64, 48))


@pytest.mark.parametrize(
    ("name", "content", "budget"),
    [
        ("preprocessor_config.json", '{"max_soft_tokens": 140}', 140),
        ("processor_config.json", '{"image_processor": {"max_soft_tokens": 560}}', 560),
        ("processor_config.json", '{"image_seq_length": 70}', 70),
        ("processor_config.json", '{"image_processor": null}', 280),
        ("other.json", "", 280),
    ],
)
def test_the_default_budget_is_the_checkpoints(tmp_path, name, content, budget):
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((bundled_model() / file).read_bytes())
    (tmp_path / name).write_text(content)
    assert ModelConfig.from_folder(tmp_path).image_tokens == budget
    assert ImageForm.of(ModelConfig.from_folder(tmp_path)).soft_tokens == budget


def test_a_processors_file_with_another_budget_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes((bundled_model() / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"max_soft_tokens": 99}')
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: max_soft_tokens must be one"):
        ModelConfig.from_folder(tmp_path)


# --- video ---


def test_frames_stand_behind_their_times():
    chat = [user(text("see"), {"type": "video", "video": clip(48, rate=8)}, text("now"))]
    encoded = encode(TOKENIZER, chat, SMALL, FORM)
    n = encoded.images[0].soft_tokens
    assert len(encoded.images) == 4 and encoded.image_tokens == 4 * n
    frames = " ".join(
        f"{time} <|image>[{n}]<image|>" for time in ("00:00", "00:01", "00:03", "00:04")
    )
    assert f"user\nsee{frames}now<turn|>" in shown(encoded)
    # The text beside the times is tokenized with them.
    start = encoded.ids.index(BEGIN)
    before = TOKENIZER.encode("see00:00 ", add_special_tokens=False)
    assert encoded.ids[start - len(before) : start] == before


def test_images_and_videos_stand_together():
    chat = [user({"type": "video", "video": clip(3)}, picture(), text("x"))]
    encoded = encode(TOKENIZER, chat, SMALL, FORM)
    still = read_image(pattern(64, 48), soft_tokens=70, patch_size=FORM.patch_size)
    assert len(encoded.images) == 4 and encoded.images[3] == still


def test_without_pyav_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImageError, match=r"need PyAV; run: pip install 'mlx-diffgemma\[video\]'"):
        encode(TOKENIZER, [user({"type": "video", "video": b"x"})], SMALL, FORM)


def test_the_module_of_videos_needs_no_pyav(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    importlib.reload(importlib.import_module("mlx_diffgemma.language.video"))
    assert np.array(encode(TOKENIZER, "x").ids).size
