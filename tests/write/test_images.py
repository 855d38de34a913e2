"""Answers about pictures: every way in, and conversations whose images are seen once."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import (
    Chat,
    Engine,
    GenerationSettings,
    ImageSettings,
    PromptOptions,
    Question,
    Store,
    batch_generate,
    bundled_model,
    decide,
    fill,
    generate,
    load,
)
from mlx_diffgemma.errors import ChatError, ImageError, PromptError, PromptLengthError
from mlx_diffgemma.language.encoded import EncodedPrompt, ImageForm
from mlx_diffgemma.language.prompt import encode
from mlx_diffgemma.model import DiffusionGemma
from tests.language.drawn import pattern, smooth

IMAGES = ImageSettings(image_tokens=70)
OPTIONS = PromptOptions(images=IMAGES)
ONE, OTHER = pattern(64, 64), smooth(50, 64)
SETTINGS = GenerationSettings(seed=7, max_new_tokens=64, max_denoising_steps=12)


@cache
def loaded():
    return load(bundled_model())


def asked(*arrays, text: str = "Sort: 5 2 4 1") -> list[dict]:
    parts = [{"type": "image", "image": array} for array in arrays]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture
def seen(monkeypatch):
    """How many images the tower saw."""
    counts = [0]
    see = DiffusionGemma.see

    def counted(self, patches, positions):
        counts[0] += 1
        return see(self, patches, positions)

    monkeypatch.setattr(DiffusionGemma, "see", counted)
    return counts


def test_generate_reads_features_where_the_image_tokens_are():
    """The first step's numbers are those of a prefill by hand."""
    from mlx_diffgemma import SeededNoise, stream_generate
    from mlx_diffgemma.events import StepDone

    model, tokenizer = loaded()
    encoded = encode(tokenizer, asked(ONE, OTHER), OPTIONS, ImageForm.of(model.config))
    tokens = mx.array([encoded.ids])
    features = [model.see(mx.array(i.patches), mx.array(i.positions)) for i in encoded.images]
    context = model.prefill(tokens, images=features)
    start = SeededNoise(7).start(0, (1, model.config.canvas_length), model.config.vocab_size)
    logits = np.array(model.denoise(start, context))[0]
    events = stream_generate(
        model, tokenizer, asked(ONE, OTHER), settings=SETTINGS, prompt_options=OPTIONS
    )
    step = next(event for event in events if isinstance(event, StepDone))
    events.close()
    assert np.array(step.draft)[0].tolist() == logits.argmax(-1).tolist()
    blind = np.array(model.denoise(start, model.prefill(tokens)))[0]
    assert np.abs(blind - logits).max() > 0.1, "the images make a difference"


def test_every_way_in_gives_the_same_answer():
    model, tokenizer = loaded()
    text = generate(model, tokenizer, asked(ONE), settings=SETTINGS, prompt_options=OPTIONS)
    encoded = encode(tokenizer, asked(ONE), OPTIONS, ImageForm.of(model.config))
    assert generate(model, tokenizer, encoded, settings=SETTINGS) == text
    prompts = [asked(ONE), "Sort: 3 1", encoded]
    for number, expected in ((0, text), (2, text)):
        seeded = replace(SETTINGS, seed=7 - number)
        batch = batch_generate(model, tokenizer, prompts, settings=seeded, prompt_options=OPTIONS)
        assert batch.texts[number] == expected
    with Engine(model, tokenizer) as engine:
        assert engine.encode(asked(ONE), OPTIONS) == encoded.ids


def test_a_prompt_whose_images_do_not_fit_says_so():
    model, tokenizer = loaded()
    with pytest.raises(
        PromptLengthError, match=r"2560 of them of 40 images; with a canvas of 64, at most 1984"
    ):
        generate(model, tokenizer, asked(*[ONE] * 40), prompt_options=OPTIONS)


def test_image_tokens_and_images_must_match():
    model, tokenizer = loaded()
    encoded = encode(tokenizer, asked(ONE), OPTIONS, ImageForm.of(model.config))
    for wrong in (EncodedPrompt(encoded.ids), EncodedPrompt(encoded.ids, encoded.images * 2)):
        with pytest.raises(PromptError, match="64"):
            generate(model, tokenizer, wrong, settings=SETTINGS)


def test_fill_and_decide_take_images(seen):
    model, tokenizer = loaded()
    filled = fill(
        model,
        tokenizer,
        "{{one of: 1 | 2}}",
        prompt=asked(ONE),
        settings=SETTINGS,
        prompt_options=OPTIONS,
    )
    assert filled.text in ("1", "2") and seen == [1]
    questions = [Question.predicate("Is it red?"), Question.choice("Which?", ["a", "b"])]
    both = decide(model, tokenizer, asked(OTHER), questions, prompt_options=OPTIONS)
    assert seen == [2], "what the questions share is read once"
    alone = [
        decide(model, tokenizer, asked(OTHER), [question], prompt_options=OPTIONS)
        for question in questions
    ]
    for together, single in zip(both.answers, alone, strict=True):
        np.testing.assert_allclose(
            together.probabilities, single.answers[0].probabilities, atol=1e-5
        )


# --- chat ---


def chat(**more) -> Chat:
    return Chat(*loaded(), settings=SETTINGS, image_settings=IMAGES, **more)


def say(talk: Chat, text: str, **more) -> str:
    from mlx_diffgemma.events import Text

    return "".join(e.piece for e in talk.send(text, **more) if isinstance(e, Text))


def test_a_second_question_about_a_picture_sees_nothing(seen):
    talk = chat()
    say(talk, "Sort: 5 2", images=[ONE])
    assert seen == [1]
    say(talk, "Sort: 4 3")
    say(talk, "Sort: 1 3", images=[ONE])
    assert seen == [1]
    say(talk, "Sort: 1 3", images=[OTHER])
    assert seen == [2]
    assert talk.turns == ["Sort: 5 2", "Sort: 4 3", "Sort: 1 3", "Sort: 1 3"]


def test_a_saved_chat_holds_its_pictures(tmp_path):
    talk = chat(store=Store(1))  # a kept context rounds otherwise
    (path := tmp_path / "a.png").write_bytes(png())
    say(talk, "Sort: 5 2", images=[path, ONE])
    path.unlink()
    talk.save(tmp_path / "chat.json")
    again = chat(store=Store(1))
    again.load(tmp_path / "chat.json")
    assert again.messages == talk.messages and again.turns == ["Sort: 5 2"]
    assert say(again, "Sort: 4 3") == say(talk, "Sort: 4 3")
    content = json.loads((tmp_path / "chat.json").read_text())
    content["messages"][0]["content"][0]["image"] = "/etc/passwd"
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(ChatError, match="damaged chat"):
        again.load(tmp_path / "bad.json")


def png() -> bytes:
    from PIL import Image

    from tests.language.drawn import saved

    return saved(Image.fromarray(ONE))


def test_an_edit_keeps_the_pictures_and_undo_gives_the_text():
    talk = chat()
    say(talk, "Sort: 5 2", images=[ONE])
    list(talk.edit(1, "Sort: 6 2"))
    parts = talk.messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"]
    assert parts[1]["text"] == "Sort: 6 2" == talk.undo()
    say(talk, "Sort: 5 2", images=[talk.image(ONE)])
    assert talk.messages[0]["content"][0] == parts[0]


def test_a_bad_picture_leaves_the_conversation_as_it_was():
    talk = chat()
    with pytest.raises(ImageError, match=r"^none\.png does not exist"):
        list(talk.send("x", images=["none.png"]))
    assert talk.messages == [] and talk.unsent is None
