"""Pictures sent by real clients: they are read, counted and kept as in Python; other sources, too
many, and pictures that are not what they say are refused in the dialect's form."""

from __future__ import annotations

import base64
import io
import time

import anthropic
import openai
import pytest
from PIL import Image, ImageDraw

from mlx_diffgemma import GenerationSettings, encode_prompt, generate
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.language.encoded import ImageForm
from mlx_diffgemma.serve.images import joined
from tests.engine.cases import loaded
from tests.serve.cases import ask_chat, serving

QUESTION = "What is in the picture?"
SETTINGS = {"temperature": 0, "seed": 5, "max_tokens": 64}


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 64), colour: str = "red") -> bytes:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=colour)
    written = io.BytesIO()
    image.save(written, kind)
    return written.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def asked(url: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def server():
    with serving(limits=Limits(max_images=2, max_image_pixels=1_000_000)) as running:
        yield running
        assert not running.bugs


@pytest.fixture
def client(server):
    base = f"http://127.0.0.1:{server.port}"
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(server):
    base = f"http://127.0.0.1:{server.port}"
    return anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_openais_client_gets_the_answer_of_python(client, kind):
    url = data_url(picture(kind), f"image/{kind.lower()}")
    model, tokenizer = loaded()
    expected = generate(
        model,
        tokenizer,
        asked(url),
        settings=GenerationSettings(seed=5, temperature=0, max_new_tokens=64),
    )
    chat = client.chat.completions.create(model="bundled", messages=asked(url), **SETTINGS)
    assert (chat.choices[0].message.content or "") == expected
    tokens = encode_prompt(tokenizer, asked(url), form=ImageForm.of(model.config))
    assert chat.usage.prompt_tokens == len(tokens) > 40


def test_every_dialect_reads_the_same_picture(client, claude, server):
    url = data_url(picture())
    chat = client.chat.completions.create(model="bundled", messages=asked(url), **SETTINGS)
    streamed = client.chat.completions.create(
        model="bundled", messages=asked(url), stream=True, **SETTINGS
    )
    text = "".join(part.choices[0].delta.content or "" for part in streamed if part.choices)
    assert text == (chat.choices[0].message.content or "")
    parts = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    response = client.responses.create(
        model="bundled",
        input=[{"role": "user", "content": parts}],
        temperature=0,
        max_output_tokens=64,
        extra_body={"seed": 5},
    )
    assert response.usage.input_tokens >= chat.usage.prompt_tokens
    source = {"type": "base64", "media_type": "image/png"}
    source |= {"data": base64.b64encode(picture()).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    message = claude.messages.create(
        model="bundled",
        messages=[{"role": "user", "content": content}],
        max_tokens=64,
        extra_body={"temperature": 0, "seed": 5},
    )
    count = claude.messages.count_tokens(
        model="bundled", messages=[{"role": "user", "content": content}]
    )
    cached = message.usage.cache_read_input_tokens or 0
    assert count.input_tokens == message.usage.input_tokens + cached == chat.usage.prompt_tokens
    assert "".join(block.text for block in message.content) == text
    answers = client.post(
        "/decisions",
        body={
            "model": "bundled",
            "input": [{"role": "user", "content": parts}],
            "questions": [{"type": "predicate", "instructions": "Is it red?"}],
        },
        cast_to=object,
    )
    assert 0 <= answers["answers"][0]["probability"] <= 1 or answers["answers"]
    assert answers["usage"]["input_tokens"] > 40


def test_pictures_in_the_results_of_tools_stand_behind_them(claude):
    source = {"type": "base64", "media_type": "image/png"}
    source |= {"data": base64.b64encode(picture()).decode()}
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    parts = [{"type": "text", "text": "read"}, {"type": "image", "source": source}]
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [call]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": parts}],
        },
    ]
    counted = claude.messages.count_tokens(model="bundled", messages=messages).input_tokens
    messages[2]["content"][0]["content"] = parts[:1]
    without = claude.messages.count_tokens(model="bundled", messages=messages).input_tokens
    assert counted > without + 40


REFUSED = {
    "https://example.com/a.png": "must be a data: URL",
    "http://127.0.0.1/a.png": "must be a data: URL",
    "file:///etc/passwd": "must be a data: URL",
    "/etc/passwd": "must be a data: URL",
    "data:image/png;base64,????": "is not valid base64",
    "data:image/png,abc": "must be of the form data:image/png;base64",
    "data:image/png;base64,": "is empty",
    data_url(b"GIF89a"): "is damaged, cut off or without pixels",
    data_url(b"hello"): "is not an image",
    data_url(picture("JPEG")): "is declared as image/png, but it is JPEG",
    data_url(picture(size=(1001, 1000))): "at most 1,000,000 are read",
    data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"): "SVG drawing; convert it to PNG",
    data_url(picture(), "text/html"): "is declared as text/html",
}


@pytest.mark.parametrize("url", REFUSED, ids=lambda url: url[:24])
def test_other_sources_and_damaged_pictures_are_refused(client, url):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="bundled", messages=asked(url), **SETTINGS)
    assert REFUSED[url] in raised.value.message
    assert raised.value.param.startswith("messages")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"type": "url", "url": "https://example.com/a.png"}, "source is of type 'url'"),
        ({"type": "file", "file_id": "f"}, "source is of type 'file'"),
        ({"type": "base64", "media_type": "image/jpeg", "data": "aGk="}, "is not an image"),
    ],
)
def test_anthropics_client_is_told_too(claude, source, said):
    content = [{"type": "image", "source": source}]
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(
            model="bundled", messages=[{"role": "user", "content": content}], max_tokens=8
        )
    assert raised.value.body["type"] == "error"
    assert said in raised.value.body["error"]["message"]


def test_images_are_bounded_in_number_and_stand_in_the_users_messages(server):
    part = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    many = ask_chat(server, [{"role": "user", "content": [part] * 3}])
    assert many.status == 400 and "at most 2 are read" in many.json["error"]["message"]
    other = ask_chat(server, [{"role": "system", "content": [part]}, *asked(data_url(picture()))])
    assert other.status == 400 and "user's messages" in other.json["error"]["message"]


def test_an_edit_reads_no_image(client):
    with pytest.raises(openai.BadRequestError, match="reads no images"):
        client.post(
            "/edit/completions",
            body={"model": "bundled", "messages": asked(data_url(picture()))},
            cast_to=object,
        )


def test_pieces_are_joined_in_time_that_grows_with_their_length():
    start = time.process_time()
    assert len(joined(["x" * 1000] * 8000, "")) == 8_000_000
    assert time.process_time() - start < 1


def test_texts_between_images_are_joined():
    one, other = ({"type": "image_url", "image_url": {"url": url}} for url in "xy")
    a, b, c = ({"type": "text", "text": text} for text in ("a", "b-c", "d"))
    assert joined(["", "a", one, "b", "", "c", other, "d"], "-") == [a, one, b, other, c]
    assert (joined(["", "a", "b"], "-"), joined([], "-"), joined([""], "-")) == ("a-b", "", "")
