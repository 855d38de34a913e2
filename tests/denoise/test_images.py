"""Rows whose text holds pictures."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import GenerationSettings, Store
from mlx_diffgemma.denoise import images
from mlx_diffgemma.denoise.images import Features, Placed, as_text, outside, place_images
from mlx_diffgemma.denoise.loop import RowFailed, Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.events import CanvasCommitted, PrefillDone
from mlx_diffgemma.language.images import ImagePatches
from tests.checkpoints import load_drawn
from tests.denoise.conversations import run
from tests.denoise.mixtures import model_of
from tests.denoise.pictures import counting, draw_picture, ids_of

MODEL = -1  # the bundled one
WORDS = np.random.default_rng(5).integers(30, 60, 40).astype(np.int32)


def pictures(count: int) -> list[ImagePatches]:
    """Pictures of one size, so that their tokens are the same."""
    model, rng = model_of(MODEL), np.random.default_rng(3)
    first = draw_picture(model, rng)
    others = [rng.integers(0, 256, first.pixels.shape, np.uint8) for _ in range(count - 1)]
    return [first, *(ImagePatches(p, first.positions, first.soft_tokens) for p in others)]


def text_with(*shown: ImagePatches, words: np.ndarray = WORDS) -> np.ndarray:
    parts = [part for picture in shown for part in (words[:3], ids_of(model_of(MODEL), picture))]
    return np.concatenate([*parts, words[3:]])


def answer(
    tokens: np.ndarray,
    shown: list[ImagePatches],
    store: Store | None = None,
    *,
    number: int = MODEL,
    **settings,
) -> tuple[list[list[int]], PrefillDone]:
    """The canvases of a row, and what it read."""
    model, canvases, read = model_of(number), [], None
    resolved = GenerationSettings(
        seed=4, max_denoising_steps=2, max_new_tokens=9, **settings
    ).resolve(model.config)
    rows = Rows(model, store)
    rows.add(Row(model, resolved, tokens, images=shown))
    for event in rows.run():
        if isinstance(event, PrefillDone):
            read = event
        elif isinstance(event, CanvasCommitted):
            canvases.append(event.tokens[0].tolist())
    assert read is not None
    return canvases, read


def test_pieces_of_any_size_give_the_answer_of_one_piece():
    shown = pictures(2)
    tokens = text_with(*shown)
    whole, _ = answer(tokens, shown)
    for size in (1, 5, 17):
        assert answer(tokens, shown, prefill_step_size=size)[0] == whole


def test_an_images_token_may_be_the_first_of_the_vocabulary():
    (picture,) = pictures(1)
    config = replace(model_of(MODEL).config, image_token_id=0)
    tokens = np.array([5, *[0] * picture.soft_tokens, 6], np.int32)
    assert [placed.start for placed in place_images(tokens, [picture], config)] == [1]
    with pytest.raises(PromptError, match="has 1 place for images"):
        place_images(tokens, [], config)


def test_other_pixels_give_another_context_behind_the_same_tokens():
    one, two = pictures(2)
    tokens = text_with(one)
    assert np.array_equal(tokens, text_with(two))
    store = Store(1 << 30)
    answer(tokens, [one], store)
    asked = np.append(tokens, WORDS[:1])
    assert answer(asked, [two], store)[1].cached_tokens == 0
    assert answer(asked, [one], store)[1].cached_tokens == len(tokens)


def test_a_second_question_about_a_picture_computes_no_vision():
    (picture,), store = pictures(1), Store(1 << 30)
    first = text_with(picture)
    with counting() as seen:
        answer(first, [picture], store)
        assert len(seen) == 1
        second = np.concatenate([first, WORDS[:9]])
        mine, read = answer(second, [picture], store)
        assert len(seen) == 1 and read.cached_tokens >= len(first) - 1
        # Behind other words too: its features are kept by its content.
        other = np.concatenate([WORDS[::-1], first])
        answer(other, [picture], store)
        assert len(seen) == 1
    assert mine == answer(second, [picture])[0]


def test_a_later_process_computes_no_vision_for_a_picture_that_it_finds(tmp_path):
    one, two = pictures(2)
    tokens = text_with(one)

    def disk() -> Store:
        return Store(1 << 30, folder=tmp_path)

    store, asked = disk(), np.append(tokens, WORDS[:1])
    answer(tokens, [one], store)
    store.flush()
    with counting() as seen:
        mine, read = answer(asked, [one], disk())
        assert not seen and read.cached_tokens == len(tokens)
        _, read = answer(asked, [two], disk())
        assert len(seen) == 1 and read.cached_tokens == 0
    assert mine == answer(asked, [one])[0]


def test_another_tower_does_not_use_contexts_that_this_one_has_written(tmp_path):
    number, shown = 2, []
    model = model_of(number)
    shown = [draw_picture(model, np.random.default_rng(1))]
    tokens = np.concatenate([WORDS, ids_of(model, shown[0]), WORDS[:5]])

    def read(model, tokens) -> int:
        settings = GenerationSettings(seed=4, max_denoising_steps=1, max_new_tokens=1)
        store = Store(1 << 30, folder=tmp_path)
        rows = Rows(model, store)
        rows.add(Row(model, settings.resolve(model.config), tokens, images=shown))
        cached = [e.cached_tokens for e in rows.run() if isinstance(e, PrefillDone)]
        store.flush()
        return cached[0]

    twin = load_drawn(number, vision=True, sliding_window=16)
    asked = np.append(tokens, WORDS[:1])
    assert read(model, tokens) == 0 and read(twin, asked) == len(tokens)
    projection = twin.model.encoder.embed_vision.embedding_projection
    projection.weight = projection.weight + 0.5
    assert read(twin, asked) == 0


def test_features_are_kept_within_a_bound_and_the_last_used_ones_stay():
    model, (one, two, three) = model_of(MODEL), pictures(3)
    size = Features().of(model, one).nbytes
    kept = Features(2 * size)
    with counting() as seen:
        for picture, computed in ((one, 1), (two, 2), (one, 2), (three, 3), (one, 3), (two, 4)):
            kept.of(model, picture)
            assert len(seen) == computed and kept.nbytes <= 2 * size


def test_a_row_whose_picture_cannot_be_seen_fails_alone(monkeypatch):
    model, (picture,) = model_of(MODEL), pictures(1)
    settings = GenerationSettings(seed=4, max_denoising_steps=2, max_new_tokens=9)
    resolved = settings.resolve(model.config)
    alone, _ = answer(WORDS, [])

    def damaged(*_):
        raise PromptError("the tower's file is gone")

    monkeypatch.setattr(images.Features, "of", damaged)
    rows, said = Rows(model), []
    rows.add(Row(model, resolved, text_with(picture), images=[picture], number=0))
    rows.add(Row(model, resolved, WORDS, number=1))
    while rows.rows:
        said += list(rows.advance())
    failed = [row.number for row, event in said if isinstance(event, RowFailed)]
    written = [e.tokens[0].tolist() for _, e in said if isinstance(e, CanvasCommitted)]
    assert failed == [0] and written == alone


@pytest.mark.parametrize(
    ("shown", "tokens", "message"),
    [
        (0, 1, "1 place for images, of {n} image tokens, and 0 images of 0"),
        (2, 1, r"1 place for images, of {n} image tokens, and 2 images of {n} \+ {n}"),
        (1, 2, r"2 places for images, of {n} \+ {n} image tokens, and 1 image of {n}"),
        (1, 0, "0 places for images, of 0 image tokens, and 1 image of {n}"),
    ],
)
def test_images_and_places_that_do_not_match_are_counted(shown, tokens, message):
    (picture,) = pictures(1)
    config = model_of(MODEL).config
    with pytest.raises(PromptError, match=message.format(n=picture.soft_tokens)):
        place_images(text_with(*[picture] * tokens), [picture] * shown, config)


def test_an_image_of_other_patches_is_refused():
    (picture,) = pictures(1)
    odd = ImagePatches(picture.pixels[:, :-3], picture.positions, picture.soft_tokens)
    with pytest.raises(PromptError, match="patches of 765 numbers, and this model's have 768"):
        place_images(text_with(odd), [odd], model_of(MODEL).config)


def test_a_text_is_told_apart_by_its_pictures_alone_at_their_places():
    one, two = pictures(2)
    tokens = text_with(one)
    (placed,) = place_images(tokens, [one], model_of(MODEL).config)
    mine, other = (as_text(tokens, [Placed(placed.start, each)]) for each in (one, two))
    inside = np.zeros(len(tokens), bool)
    inside[placed.start : placed.stop] = True
    assert np.array_equal(mine[~inside], tokens[~inside])
    assert (mine[inside] < 0).all() and (mine != other).sum() >= inside.sum() - 1
    assert not np.array_equal(mine, as_text(tokens, [placed], b"another tower"))


def test_no_border_is_inside_of_an_image():
    (picture,) = pictures(1)
    placed = [Placed(10, picture)]
    stop = 10 + picture.soft_tokens
    assert [outside(n, placed) for n in (9, 10, stop, stop + 1)] == [9, 10, stop, stop + 1]
    assert outside(11, placed) == 10 and outside(11, placed, after=10) == stop


def test_conversations_with_pictures_are_answered_alike_with_and_without_the_store():
    told, _ = run(8, pictures=3)
    assert told.turns > 12 and told.found > told.read / 2
    assert not told.findings, told.findings


def test_a_committed_soft_token_is_a_token_like_others():
    model = model_of(MODEL)
    soft = mx.array([[7, model.config.image_token_id, 8]])
    context = model.prefill(mx.array(WORDS[None]))
    longer = model.commit(soft, context)
    pieces = model.prefill(soft[:, :2], context)
    pieces = model.prefill(soft[:, 2:], pieces)
    for one, two in zip(longer.arrays, pieces.arrays, strict=True):
        assert mx.allclose(one, two, atol=1e-4).item()
