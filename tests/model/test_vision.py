"""The vision tower and images in a text, without a reference. Parity is in
`tests/parity/test_images.py`."""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffgemma.model import Context, DiffusionGemma, vision
from mlx_diffgemma.model.backend import as_on_gpu, training
from mlx_diffgemma.model.images import piece_ends, seen_at
from mlx_diffgemma.model.masks import causal_mask
from mlx_diffgemma.model.vision import by_soft_token
from tests.checkpoints import draw_vision_config, load_drawn
from tests.denoise.pictures import draw_picture, ids_of
from tests.sampled import first


@functools.cache
def model_of(seed: int) -> DiffusionGemma:
    return load_drawn(seed, vision=True, config=draw_vision_config(seed))


def picture_of(model: DiffusionGemma, seed: int = 0) -> tuple[mx.array, mx.array]:
    picture = draw_picture(model, np.random.default_rng(seed))
    return mx.array(picture.patches), mx.array(picture.positions)


def far(one: mx.array, two: mx.array) -> float:
    return float(mx.abs(one - two).max())


@pytest.mark.parametrize("seed", first(3, range(12)))
def test_patches_may_come_in_any_order(seed):
    model = model_of(seed)
    patches, positions = picture_of(model)
    order = mx.array(np.random.default_rng(1).permutation(len(positions)))
    assert mx.array_equal(
        model.see(patches, positions), model.see(patches[order], positions[order])
    ).item()


@pytest.mark.parametrize("seed", first(3, range(12)))
def test_the_graph_of_gpus_with_wider_heads_gives_the_same_features(seed):
    model = model_of(seed)
    picture = picture_of(model)
    with as_on_gpu():
        theirs = model.see(*picture)
    assert far(model.see(*picture), theirs) < 2e-4


def test_queries_in_pieces_give_the_same_features(monkeypatch):
    model = model_of(1)
    picture = picture_of(model)
    whole = model.see(*picture)
    monkeypatch.setattr(vision, "_SCORES_BYTES", 1000)
    assert far(whole, model.see(*picture)) < 1e-4


def test_images_of_one_size_are_seen_together():
    model = model_of(2)
    (one, places), (two, _) = picture_of(model, 0), picture_of(model, 0)
    two = mx.random.uniform(shape=two.shape)
    order = mx.array(by_soft_token(np.array(places), model.config.vision))
    both = model.features(mx.stack([one[order], two[order]]), mx.stack([places[order]] * 2))
    for mine, alone in zip(both, (one, two), strict=True):
        assert far(mine, model.see(alone, places)) < 1e-4


def test_bfloat16_stays_near_float32():
    model = load_drawn(0, vision=True, config=draw_vision_config(0))
    picture = picture_of(model)
    exact = model.see(*picture)
    model.set_dtype(mx.bfloat16)
    rough = model.see(*picture)
    assert rough.dtype == mx.bfloat16
    assert float(mx.sqrt(((rough - exact) ** 2).mean() / (exact**2).mean())) < 0.1


POSITIONS = {
    "no patch": (np.zeros((0, 2)), "P >= 1"),
    "below 0": (np.array([[0, -1], [0, 0]]), "from 0 to 63, got -1 to 0"),
    "too far": (np.array([[64, 0]]), "from 0 to 63, got 0 to 64"),
    "twice": (np.array([[0, 0]] * 9), "9 patches up to column 0 and row 0 are no whole picture"),
    "odd side": (np.array([[x, y] for x in range(3) for y in range(4)]), "multiples of 3"),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_patches_that_are_no_picture_are_refused(case):
    model = model_of(0)
    positions, message = POSITIONS[case]
    assert model.config.vision.pooling_kernel_size == 3
    patches = mx.zeros((len(positions), model.config.vision.patch_width))
    with pytest.raises(ValueError, match=message):
        model.see(patches, mx.array(positions.astype(np.int32)))


def test_patches_of_another_width_are_refused():
    model = model_of(0)
    patches, positions = picture_of(model)
    with pytest.raises(ValueError, match="patches must be"):
        model.see(patches[:, :-1], positions)


# --- gradients


def weights_of(model: DiffusionGemma) -> dict[str, nn.Module]:
    tower = model.model.encoder.vision_tower
    layer = tower.encoder.layers[0]
    return {
        "patches": tower.patch_embedder.input_proj,
        "queries": layer.self_attn.q_proj.linear,
        "gate": layer.mlp.gate_proj.linear,
        "norm": layer.post_attention_layernorm,
        "projection": model.model.encoder.embed_vision.embedding_projection,
    }


@pytest.mark.parametrize("part", ["patches", "queries", "gate", "norm", "projection"])
def test_gradients_pass_from_the_texts_states_through_the_tower(part):
    """Against the difference of the loss along the gradient. The losses without gradients come
    last, of arrays of the tower's shapes and of the text's: traces of the first must not be theirs.
    All experts are used, or a near tie between them would make a jump."""
    config = draw_vision_config(4)
    config["vision_config"] |= {"use_clipped_linears": False}
    config["text_config"] |= {"num_experts": 2, "top_k_experts": 2}
    model = load_drawn(4, vision=True, config=config)
    module = weights_of(model)[part]
    picture = draw_picture(model, np.random.default_rng(2))
    tokens = np.concatenate([[7, 8], ids_of(model, picture), [9, 10, 11]])[None]
    places = tokens == model.config.image_token_id
    order = by_soft_token(picture.positions, model.config.vision)
    patches = mx.array(picture.patches[order])[None]
    positions = mx.array(picture.positions[order])[None]

    def loss(weight: mx.array) -> mx.array:
        module.weight = weight
        seen = seen_at(places, list(model.features(patches, positions)))
        with training():
            states, _ = model.encode([mx.array(tokens)], [Context((), 0, 1)], [seen])
        return (states * mx.cos(mx.arange(states.size)).reshape(states.shape)).mean()

    start = module.weight
    with training():
        slope = mx.grad(loss)(start)
        size = float(mx.sqrt((slope**2).sum()))
        step = 1e-3 / size
        up, down = loss(start + step * slope), loss(start - step * slope)
    assert size > 1e-5
    assert float((up - down) / (2 * step)) == pytest.approx(size**2, rel=0.02)


# --- places


def test_an_images_tokens_see_each_other_and_text_stays_causal():
    blocks = mx.array([[-1, 0, 0, 0, -1, 1, 1]])
    allowed = np.array(
        causal_mask(2, 7, first_key=0, window=3, padding=None, blocks=blocks)[0, 0]
    )  # keys 0 and 1 were kept from before
    expected = np.array(
        [
            [1, 1, 1, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 1, 1, 1],
        ]
    )
    assert np.array_equal(allowed, expected)


def test_images_are_causal_where_the_config_says_so():
    config = draw_vision_config(0)
    config["text_config"] |= {"use_bidirectional_attention": None}
    model = load_drawn(0, vision=True, config=config)
    picture = draw_picture(model, np.random.default_rng(1), most=3)
    assert picture.soft_tokens > 1
    feature = model.see(mx.array(picture.patches), mx.array(picture.positions))
    ids = ids_of(model, picture)[None]
    whole = model.prefill(mx.array(ids), images=[feature])
    parts = model.prefill(mx.array(ids[:, :2]), images=[feature[:1]])
    parts = model.prefill(mx.array(ids[:, 2:]), parts, images=[feature[1:]])
    for one, two in zip(whole.arrays, parts.arrays, strict=True):
        assert far(one, two) < 1e-3


PLACES = np.array([[0, 1, 1, 1, 0, 1, 1, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("size", "ends"),
    [(1, [1, 4, 5, 7, 8, 9, 10]), (2, [1, 4, 5, 7, 9, 10]), (3, [1, 4, 7, 10]), (99, [10])],
)
def test_pieces_end_at_the_borders_of_images(size, ends):
    assert list(piece_ends(PLACES, size)) == ends


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3], r"has 5 image tokens, and 1 images give 3 of them"),
        ([3, 2, 2], r"has 5 image tokens, and 3 images give 3 \+ 2 \+ 2 of them"),
        ([], "has 5 image tokens, and 0 images give 0 of them"),
        ([2, 3], "end at 3, inside of an image; the images have 2, 3"),
    ],
)
def test_features_and_tokens_that_do_not_match_are_counted(counts, message):
    with pytest.raises(ValueError, match=message):
        seen_at(PLACES, [mx.zeros((n, 4)) for n in counts])


def test_features_stand_at_their_places_row_by_row():
    places = np.array([[0, 1, 1], [1, 0, 1]], bool)
    features = [mx.full((n, 2), 10 + i) for i, n in enumerate((2, 1, 1))]
    x = seen_at(places, features).embedded(mx.zeros((2, 3, 2)))
    assert x[..., 0].tolist() == [[0, 10, 10], [11, 0, 12]]
    part = seen_at(places, features).within(1, 3)
    assert part.embedded(mx.zeros((2, 2, 2)))[..., 0].tolist() == [[10, 10], [0, 12]]
