"""Training on pictures: examples, batches, gradients and what is saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_diffgemma import DiffGemmaError, load_model, load_tokenizer
from mlx_diffgemma.checkpoint.adapters import WEIGHTS
from mlx_diffgemma.config.training import TrainSettings
from mlx_diffgemma.errors import ConfigError, DataError
from mlx_diffgemma.language.encoded import ImageForm
from mlx_diffgemma.language.images import read_image
from mlx_diffgemma.model.context import Context
from mlx_diffgemma.train.batches import draw, make_batch
from mlx_diffgemma.train.fuse import fuse_checkpoint
from mlx_diffgemma.train.objective import layers_twice, losses
from mlx_diffgemma.train.session import Session
from mlx_diffgemma.train.trainer import prepare
from tests.train.train_cases import asked, picture, seeing_model, small_model, split_of, write_lines

BEGIN, TOKEN, END = 17, 18, 19  # of the bundled tokenizer
FULL = {"fine_tune_type": "full", "train_vision": True}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return seeing_model(tmp_path_factory.mktemp("model") / "seeing")


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


@pytest.fixture(scope="module")
def form(model_folder):
    return ImageForm.of(load_model(model_folder).config)


@pytest.fixture
def data(tmp_path) -> Path:
    """Lines without a picture, with one, and with two of other sizes."""
    folder = tmp_path / "data"
    square, wide = (
        picture(folder, name, size, colour)
        for name, size, colour in (("a.png", (30, 30), "red"), ("b.png", (90, 30), "blue"))
    )
    lines = [asked("Plain."), asked(square, "Which?"), asked("One", wide, "two", square)]
    return write_lines(folder, lines=[*lines, asked(wide, "Which?", answer="blue " * 3)])


def batch_of(model, examples, settings, seed=0):
    drawn = draw(examples, settings, 8, 384, seed)
    return make_batch(
        examples,
        drawn,
        settings,
        8,
        eos_token_id=1,
        pad_token_id=0,
        image_token_id=model.config.image_token_id,
        vision=model.config.vision,
    ), drawn


# --- examples ---


def test_a_picture_takes_its_tokens_at_its_place(data, tokenizer, form):
    plain, one, two, _ = split_of(data, tokenizer, form=form)
    assert not plain.pictures and TOKEN not in plain.prompt
    shown = list(one.prompt)
    start = shown.index(BEGIN)
    assert shown[start + 1 : start + 66] == [TOKEN] * 64 + [END]
    assert tokenizer.decode(shown[start + 66 :]).startswith("Which?<turn|>")
    assert [p.path.name for p in two.pictures] == ["b.png", "a.png"]
    assert [p.soft_tokens for p in two.pictures] == [56, 64]
    assert list(two.prompt).count(TOKEN) == 120
    larger = replace(form, soft_tokens=140)
    one = split_of(data, tokenizer, form=larger, max_seq_length=300)[1]
    assert one.pictures[0].soft_tokens == 121


def test_a_question_asked_again_has_its_own_picture(tmp_path, tokenizer, form):
    parts = [picture(tmp_path, f"{i}.png", (30 * i, 30), "red") for i in (1, 2, 3)]
    lines = [asked(part, "Which?") for part in (*parts, parts[0])]
    lines += [asked(parts[0], "Why?"), asked("Which?", parts[0])]
    found = split_of(write_lines(tmp_path, lines=lines), tokenizer, form=form)
    assert [e.pictures[0].path.name for e in found] == [f"{i}.png" for i in (1, 2, 3, 1, 1, 1)]
    one, other, _, again, why, behind = (list(e.prompt) for e in found)
    assert one == again and all(one != each for each in (other, why, behind))


def test_a_picture_turned_by_its_camera_is_measured_upright(tmp_path, tokenizer, form):
    tags = Image.Exif()
    tags[0x0112] = 6  # turn right
    folder = write_lines(tmp_path, lines=[asked({"type": "image", "image": "turned.jpg"}, "?")] * 2)
    Image.new("RGB", (90, 20)).save(folder / "turned.jpg", exif=tags)
    (first, _) = split_of(folder, tokenizer, form=form)
    image = first.pictures[0].read()
    assert image == read_image(folder / "turned.jpg", soft_tokens=70, patch_size=4)
    assert image.positions.max(axis=0)[1] > image.positions.max(axis=0)[0]


IMAGE = {"type": "image", "image": "a.png"}
BAD = {
    "missing": ([asked({**IMAGE, "image": "no.png"}, "?")], r"line 1: .*no\.png does not exist"),
    "a URL": ([asked({**IMAGE, "image": "http://x/a.png"}, "?")], r"line 1: .*"),
    "no picture": ([asked({**IMAGE, "image": "train.jsonl"}, "?")], "train.jsonl is not an image"),
    "no path": ([asked({"type": "image"}, "?")], r'line 1: an image must be given as \{"type'),
    "a data URL": (
        [asked({"type": "image_url", "image_url": {"url": "data:,"}}, "?")],
        "line 1: an image must be given as",
    ),
    "a video": ([asked({"type": "video", "video": "a.mp4"}, "?")], "line 1: a video cannot be"),
    "too many tokens": (
        [asked("Plain."), asked(*[IMAGE] * 4, "?")],
        r"line 2: \d+ tokens with its canvases, 256 of them of images, more than max_seq_length",
    ),
}


@pytest.mark.parametrize(("lines", "says"), BAD.values(), ids=BAD)
def test_a_bad_picture_is_named_with_its_line(lines, says, tmp_path, tokenizer, form):
    picture(tmp_path, "a.png", (30, 30), "red")
    with pytest.raises(DataError, match=says):
        split_of(write_lines(tmp_path, lines=lines), tokenizer, form=form)


def test_a_model_without_a_tower_learns_no_pictures(data, tokenizer):
    with pytest.raises(DataError, match="line 2: the prompt holds an image, and this model reads"):
        split_of(data, tokenizer, form=None)


@pytest.mark.parametrize("change", ["cut", "replaced", "removed"])
def test_a_picture_that_cannot_be_read_later_is_named_with_its_line(data, tokenizer, form, change):
    (_, one, *_) = split_of(data, tokenizer, form=form)
    path = data / "a.png"
    if change == "cut":
        path.write_bytes(path.read_bytes()[:60])
    elif change == "replaced":
        Image.new("RGB", (90, 30)).save(path)
    else:
        path.unlink()
    says = {"cut": "damaged or cut off", "replaced": "has changed", "removed": "does not exist"}
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{says[change]}"):
        one.pictures[0].read()


# --- batches ---


def test_training_sees_what_generating_sees(data, model_folder, tokenizer, form):
    """A batch of pictures of two sizes and of none, against each row alone."""
    examples = split_of(data, tokenizer, form=form)
    model = load_model(model_folder, fused=False, vision=True)
    settings = TrainSettings(**FULL, causal_weight=0)
    prepare(model, settings)
    model.eval()
    batch, drawn = batch_of(model, examples, settings)
    assert batch.sight is not None and len(batch.sight.patches) == 2
    start = Context((), 0, len(examples), batch.padding)
    _, (context,) = model.encode([batch.context], [start], [batch.sight.seen(model)])
    logits = np.array(model.denoise(batch.noisy, context))
    for row, example in enumerate(examples):
        ids = np.concatenate([example.prompt, example.answer[: drawn.start[row]]])
        images = [p.read() for p in example.pictures]
        features = [model.see(mx.array(i.patches), mx.array(i.positions)) for i in images]
        alone = model.prefill(mx.array(ids[None]), images=features or None)
        own = np.array(model.denoise(batch.noisy[row : row + 1], alone))
        np.testing.assert_allclose(logits[row], own[0], atol=3e-4)


def test_the_causal_loss_leaves_out_tokens_of_images(data, tokenizer, form, model_folder):
    examples = split_of(data, tokenizer, form=form)
    model = load_model(model_folder)
    batch, _ = batch_of(model, examples, TrainSettings())
    next_tokens, weights = np.array(batch.targets), np.array(batch.weights)
    assert not weights[next_tokens == TOKEN].any() and weights[next_tokens == BEGIN].any()
    np.testing.assert_allclose(weights.sum(axis=1), 1 / len(examples), rtol=1e-5)


# --- what is trained ---


def gradients(model, batch, settings, *, twice=False):
    def objective(arrays):
        return losses(model, arrays, settings, batch.sight)

    value_and_grad = nn.value_and_grad(model, objective)
    if twice:
        with layers_twice(model):
            return dict(tree_flatten(value_and_grad(batch.arrays())[1]))
    return dict(tree_flatten(value_and_grad(batch.arrays())[1]))


def test_gradients_reach_the_whole_tower_and_are_right(data, model_folder, tokenizer, form):
    examples = split_of(data, tokenizer, form=form)
    model = load_model(model_folder, fused=False, vision=True)
    settings = TrainSettings(**FULL, self_conditioning_probability=0)
    prepare(model, settings)
    model.eval()
    batch, _ = batch_of(model, examples, settings)
    found = gradients(model, batch, settings)
    vision = {name: g for name, g in found.items() if "vision" in name}
    weights = dict(tree_flatten(model.parameters()))
    assert vision.keys() == {name for name in weights if "vision" in name}
    assert all(mx.abs(g).max().item() > 0 for g in vision.values())
    again = gradients(model, batch, settings, twice=True)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, again[name], atol=1e-5, err_msg=name)
    for name in ("vision_tower.encoder.layers.0.mlp.up_proj.linear", "embed_vision.embedding_"):
        (name,) = [each for each in vision if name in each]
        way = vision[name] / mx.linalg.norm(vision[name])
        values = []
        for step in (2e-3, -2e-3):
            model.load_weights([(name, weights[name] + step * way)], strict=False)
            values.append(losses(model, batch.arrays(), settings, batch.sight)[0].item())
        model.load_weights([(name, weights[name])], strict=False)
        slope = (values[0] - values[1]) / 4e-3
        assert slope == pytest.approx(mx.linalg.norm(vision[name]).item(), rel=0.05), name


def opened(model_folder, data, folder, **changes) -> Session:
    settings = {"batch_size": 2, "iters": 3, "learning_rate": 1e-2, "steps_per_report": 1}
    return Session.open(str(model_folder), str(data), folder, TrainSettings(**settings | changes))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("vision", [False, True])
def test_the_tower_is_trained_where_that_is_asked_for(kind, vision, data, model_folder, tmp_path):
    """And loaded, fused and used by the other commands as it was trained."""
    run = tmp_path / "run"
    changes = {"optimizer": "adamw"} if kind == "full" else {}
    session = opened(model_folder, data, run, fine_tune_type=kind, train_vision=vision, **changes)
    list(session.train())
    names = set(mx.load(str(run / WEIGHTS)))
    assert any("vision_tower" in name for name in names) is vision
    assert any("embed_vision" in name for name in names) is vision
    image = read_image(data / "a.png", soft_tokens=70, patch_size=4)
    patches, positions = mx.array(image.patches), mx.array(image.positions)
    session.model.eval()
    trained = session.model.see(patches, positions)
    before = load_model(model_folder).see(patches, positions)
    assert mx.allclose(trained, before).item() is not vision
    loaded = load_model(model_folder, adapter_path=run).see(patches, positions)
    np.testing.assert_allclose(trained, loaded, atol=1e-5)
    fused = fuse_checkpoint(model_folder, run, tmp_path / "fused").folder
    np.testing.assert_allclose(trained, load_model(fused).see(patches, positions), atol=1e-5)
    if vision:
        with pytest.raises(DiffGemmaError, match="vision=False"):
            load_model(model_folder, adapter_path=run, vision=False)


def test_a_run_on_pictures_goes_on_as_without_a_break(data, model_folder, tmp_path):
    def finished(folder, iters, **more):
        settings = TrainSettings(**FULL, batch_size=2, iters=iters, learning_rate=1e-3)
        session = Session.open(str(model_folder), str(data), folder, settings, **more)
        list(session.train())
        return mx.load(str(folder / WEIGHTS))

    whole = finished(tmp_path / "whole", 4)
    finished(tmp_path / "halves", 2)
    halves = finished(tmp_path / "halves", 4, resumes=True)
    assert all(mx.array_equal(whole[name], halves[name]) for name in whole)
    Image.new("RGB", (31, 31), "green").save(data / "a.png")
    finished(tmp_path / "third", 2)
    Image.new("RGB", (300, 300), "green").save(data / "a.png")
    with pytest.raises(DiffGemmaError, match="train_data"):
        finished(tmp_path / "third", 4, resumes=True)


def test_training_the_tower_without_pictures_is_refused(model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"train_vision needs images, and .* has none"):
        opened(model_folder, write_lines(tmp_path / "data"), tmp_path / "run", train_vision=True)
    blind = small_model(tmp_path / "blind")
    config = json.loads((blind / "config.json").read_text())
    del config["vision_config"]
    (blind / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="needs a model with its vision tower loaded"):
        prepare(load_model(blind, fused=False), TrainSettings(train_vision=True))


def test_a_budget_of_tokens_that_no_model_has_is_refused():
    with pytest.raises(ConfigError, match=r"image_tokens must be one of 70, 140, .*, got 64"):
        TrainSettings(image_tokens=64)
