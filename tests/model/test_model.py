"""The network: rows, pieces and prefixes change nothing; masks, rope and router by hand."""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_diffgemma
from mlx_diffgemma import (
    GenerationSettings,
    PromptOptions,
    denoise_tokens,
    encode_prompt,
    load_model,
)
from mlx_diffgemma.config.model import ModelConfig, RopeConfig
from mlx_diffgemma.denoise.sampler import shortlist, statistics
from mlx_diffgemma.events import CanvasCommitted, Finished
from mlx_diffgemma.model import (
    Context,
    DiffusionGemma,
    OpenContext,
    attention,
    experts,
    products,
)
from mlx_diffgemma.model.attention import attend
from mlx_diffgemma.model.backend import as_on_gpu
from mlx_diffgemma.model.context import LayerContext
from mlx_diffgemma.model.elementary import exp_below_zero, tanh
from mlx_diffgemma.model.experts import Experts, Router
from mlx_diffgemma.model.fused import fuse
from mlx_diffgemma.model.layers import softcap
from mlx_diffgemma.model.masks import canvas_mask, causal_mask
from mlx_diffgemma.model.rope import periods, rotate
from mlx_diffgemma.model.self_conditioning import SelfConditioning
from tests.checkpoints import draw_config, load_drawn

# The same sums in another order: float32 rounding through a few layers, logits up to 30.
TOLERANCE = 2e-4  # of logits; a BLAS adds in another order where a product has other rows
SEEDS = (1, 2, 5, 9, 12, 14)


@functools.cache
def drawn(seed: int) -> DiffusionGemma:
    return load_drawn(seed, sliding_window=(4, 8, 16)[seed % 3])


@functools.cache
def bundled():
    return mlx_diffgemma.load(mlx_diffgemma.bundled_model())


MODELS = [pytest.param(functools.partial(drawn, seed), id=f"drawn{seed}") for seed in SEEDS] + [
    pytest.param(lambda: bundled()[0], id="bundled")
]


def draw_tokens(model: DiffusionGemma, count: int, seed: int, rows: int = 1) -> mx.array:
    rng = np.random.default_rng(seed)
    vocab_size = model.config.text.vocab_size
    return mx.array(rng.integers(0, vocab_size, (rows, count), dtype=np.int32))


def prefill_padded(
    model: DiffusionGemma, tokens: mx.array, lengths: list[int], **pieces: int
) -> Context:
    """Read rows of different lengths, padded on the left, as training does."""
    B, S = tokens.shape
    return model.prefill(tokens, Context((), 0, B, S - mx.array(lengths)), **pieces)


def draw_canvas(model: DiffusionGemma, seed: int, rows: int = 1) -> mx.array:
    return draw_tokens(model, model.config.canvas_length, seed, rows)


def look(model: DiffusionGemma, context: Context, seed: int) -> list[np.ndarray]:
    """Logits of a first step, a self-conditioned one, and a first step behind a commit."""
    B = context.batch
    first, second, committed, third = (draw_canvas(model, seed + i, B) for i in range(4))
    logits = model.denoise(first, context)
    soft = model.soft_embedding(logits / 0.8)
    conditioned = model.denoise(second, context, self_conditioning=soft)
    behind = model.denoise(third, model.commit(committed, context))
    return [np.array(x) for x in (logits, conditioned, behind)]


def assert_close(some: list[np.ndarray], other: list[np.ndarray]) -> None:
    for a, b in zip(some, other, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(a.argmax(-1), b.argmax(-1))


def long_prompt(model: DiffusionGemma) -> mx.array:
    """Longer than the window and than a piece of 64."""
    return draw_tokens(model, max(3 * model.config.text.sliding_window + 5, 71), seed=3)


# Masks


def rows_of(table: str) -> list[list[bool]]:
    return [[cell == "1" for cell in line.split()] for line in table.strip().splitlines()]


@pytest.mark.parametrize(
    ("start", "count", "first_key", "window"),
    [(0, 5, 0, None), (7, 3, 0, None), (0, 4, 0, 4), (2, 1, 0, 3)],
    ids=["whole prompt", "behind others", "as long as the window", "one query, all in its window"],
)
def test_no_mask_is_built_where_causal_says_it_all(start, count, first_key, window):
    mask = causal_mask(start, count, first_key=first_key, window=window, padding=None)
    assert isinstance(mask, str) and mask == "causal"


def test_a_window_counts_the_query_itself():
    mask = causal_mask(0, 5, first_key=0, window=3, padding=None)
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].tolist() == rows_of(
        """
        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        0 1 1 1 0
        0 0 1 1 1
        """
    )


def test_keys_are_counted_from_the_first_one_kept():
    # Places 4 to 6 look at keys 2 to 6; a window of 3 dropped keys 0 and 1 before.
    mask = causal_mask(4, 3, first_key=2, window=3, padding=None)
    assert mask[0, 0].tolist() == rows_of(
        """
        1 1 1 0 0
        0 1 1 1 0
        0 0 1 1 1
        """
    )


def test_padding_is_seen_by_itself_only():
    mask = causal_mask(0, 4, first_key=0, window=None, padding=mx.array([2, 0]))
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].tolist() == rows_of(
        """
        1 0 0 0
        0 1 0 0
        0 0 1 0
        0 0 1 1
        """
    )
    assert mask[1, 0].tolist() == rows_of(
        """
        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
        """
    )


def test_window_and_padding_hold_together():
    mask = causal_mask(3, 2, first_key=1, window=3, padding=mx.array([2, 0]))
    assert mask[0, 0].tolist() == rows_of(
        """
        0 1 1 0
        0 1 1 1
        """
    )
    assert mask[1, 0].tolist() == rows_of(
        """
        1 1 1 0
        0 1 1 1
        """
    )


def test_the_canvas_sees_everything_but_padding_the_same_from_every_position():
    assert canvas_mask(6, first_key=0, padding=None) is None
    mask = canvas_mask(5, first_key=2, padding=mx.array([0, 3, 2]))
    assert mask.shape == (3, 1, 1, 5)
    assert mask[:, 0, 0].tolist() == rows_of(
        """
        1 1 1 1 1
        0 1 1 1 1
        1 1 1 1 1
        """
    )


# Rope


@pytest.mark.parametrize(
    ("rope", "head_dim", "expected"),
    [
        (RopeConfig("default", 10_000.0), 4, [1, 100]),
        (RopeConfig("default", 256.0), 8, [1, 4, 16, 64]),
        (RopeConfig("proportional", 1e6, 0.25), 8, [1, math.inf, math.inf, math.inf]),
        (RopeConfig("proportional", 256.0, 0.5), 8, [1, 4, math.inf, math.inf]),
        (RopeConfig("proportional", 1e6, 0.25), 12, [1, *[math.inf] * 5]),
    ],
    ids=["all of 4", "all of 8", "a quarter of 8", "half of 8", "a quarter of 12, rounded down"],
)
def test_periods_are_powers_over_the_whole_head(rope, head_dim, expected):
    np.testing.assert_allclose(np.array(periods(rope, head_dim)), expected, rtol=1e-6)


def test_pairs_half_a_head_apart_rotate_by_position_over_period():
    x = mx.array([[[[1.0, 1.0, 0.0, 0.0]] * 2]])  # one head, positions 3 and 4
    (turned,) = rotate(x, [(3, 2)], RopeConfig("proportional", 1e6, 0.5))
    out = np.array(turned)[0, 0]
    for row, position in zip(out, (3, 4), strict=True):
        expected = [math.cos(position), 1, math.sin(position), 0]
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_rows_rotate_from_their_own_positions():
    x = mx.array(np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32))
    rope = RopeConfig("default", 100.0)
    (both,) = rotate(x, [(mx.array([5, 9]), 4)], rope)
    for i, position in enumerate((5, 9)):
        (alone,) = rotate(x[i : i + 1], [(position, 4)], rope)
        np.testing.assert_allclose(np.array(both[i : i + 1]), np.array(alone), atol=1e-6)


def test_runs_of_places_rotate_from_their_own_positions():
    x = mx.array(np.random.default_rng(0).normal(size=(1, 3, 7, 8)).astype(np.float32))
    rope = RopeConfig("default", 100.0)
    parts = rotate(x, [(5, 4), (0, 1), (9, 2)], rope)
    for part, position, start, stop in zip(parts, (5, 0, 9), (0, 4, 5), (4, 5, 7), strict=True):
        (alone,) = rotate(x[:, :, start:stop], [(position, stop - start)], rope)
        np.testing.assert_allclose(np.array(part), np.array(alone), atol=1e-6)


# Router and experts


def text_config(**text):
    return ModelConfig.from_dict(draw_config(0, **text), {}).text


def test_router_renormalises_the_chosen_probabilities_and_scales_each_expert():
    router = Router(text_config(hidden_size=4, num_experts=3, top_k_experts=2))
    # Unit rms of (2, -2, 2, 2) is (1, -1, 1, 1); times the scale, times 4^-0.5: (1, -0.5, 0, 0).
    router.scale = mx.array([2.0, 1.0, 0.0, 0.0])
    router.proj = nn.Linear(4, 3, bias=False)
    router.proj.weight = mx.array(
        [[math.log(1), 0, 9, 9], [math.log(6), 0, 9, 9], [0, -2 * math.log(3), 9, 9]]
    )  # logits ln 1, ln 6, ln 3: probabilities 0.1, 0.6, 0.3
    router.per_expert_scale = mx.array([5.0, 1.0, 3.0])
    for size in (1, 10):  # the norm takes the size away
        chosen, weights = router(size * mx.array([[2.0, -2.0, 2.0, 2.0]]))
        found = dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
        assert found == pytest.approx({1: 6 / 9, 2: 3 * 3 / 9}, abs=1e-5)
    assert weights.dtype == mx.float32


def test_experts_sorted_and_unsorted_are_the_same_sum():
    experts = Experts(
        text_config(hidden_size=16, num_experts=5, top_k_experts=2, moe_intermediate_size=8)
    )
    rng = np.random.default_rng(0)
    x = mx.array(rng.normal(size=(40, 16)).astype(np.float32))
    chosen = mx.array(np.stack([rng.permutation(5)[:2] for _ in range(40)]).astype(np.uint32))
    weights = mx.array(rng.random((40, 2)).astype(np.float32))
    together = np.array(experts(x, chosen, weights))  # 80 pairs are sorted, 2 are not
    for i in range(40):
        row = slice(i, i + 1)
        alone = np.array(experts(x[row], chosen[row], weights[row]))
        np.testing.assert_allclose(together[row], alone, atol=1e-6)


def test_an_expert_is_its_gated_block_and_rows_before_the_middle_are_the_gate():
    experts = Experts(
        text_config(hidden_size=1, num_experts=2, top_k_experts=1, moe_intermediate_size=1)
    )
    experts.gate_up_proj.weight = mx.array([[[0.0], [0.0]], [[10.0], [3.0]]])
    experts.down_proj.weight = mx.array([[[0.0]], [[2.0]]])
    # Expert 1 at x = 1: gelu(10) = 10, times up 3, times down 2, times weight 0.5.
    out = experts(mx.array([[1.0]]), mx.array([[1]], dtype=mx.uint32), mx.array([[0.5]]))
    assert out.item() == pytest.approx(30, abs=1e-4)


# Context


@pytest.mark.parametrize("get", [*MODELS[:2], MODELS[-1]])
def test_a_context_is_a_value_that_nothing_changes(get):
    model = get()
    context = model.prefill(long_prompt(model))
    before = [np.array(a) for a in context.arrays]
    logits = look(model, context, 50)
    longer = model.prefill(draw_tokens(model, 9, 6), context)
    mx.eval(longer.arrays)
    assert longer.length == context.length + 9
    for old, array in zip(before, context.arrays, strict=True):
        np.testing.assert_array_equal(old, np.array(array))
    for old, new in zip(logits, look(model, context, 50), strict=True):
        np.testing.assert_array_equal(old, new)


def test_sliding_layers_keep_one_place_less_than_their_window_and_full_ones_all():
    model = drawn(1)
    window = model.config.text.sliding_window
    prompt = long_prompt(model)
    for count in (1, window - 1, window, prompt.shape[1]):
        context = model.prefill(prompt[:, :count])
        for layer, kept in zip(model.config.text.layers, context.layers, strict=True):
            expected = min(count, window - 1) if layer.is_sliding else count
            shape = (1, layer.num_key_value_heads, expected, layer.head_dim)
            assert kept.keys.shape == kept.values.shape == shape
    assert context.nbytes == sum(a.nbytes for a in context.arrays)


def test_places_count_padding_and_positions_do_not():
    model = drawn(1)
    context = prefill_padded(model, draw_tokens(model, 7, 1, rows=2), [4, 7])
    assert context.length == 7 and context.position.tolist() == [4, 7]
    context = model.commit(draw_tokens(model, 5, 1, rows=2), context)
    assert context.length == 12 and context.position.tolist() == [9, 12]
    opened = model.open(context, 3)
    assert opened.text.position.tolist() == opened.closed().position.tolist() == [9, 12]
    assert model.prefill(draw_tokens(model, 7, 1)).position == 7


def test_the_first_step_equals_one_conditioned_on_zeros():
    model = drawn(2)
    context, canvas = model.prefill(long_prompt(model)), draw_canvas(model, 7)
    zeros = mx.zeros((1, model.config.canvas_length, model.config.text.hidden_size))
    some = model.denoise(canvas, context)
    other = model.denoise(canvas, context, self_conditioning=zeros)
    np.testing.assert_array_equal(np.array(some), np.array(other))


def test_self_conditioning_normalises_its_sum_in_the_first_step_too():
    block = SelfConditioning(drawn(2).config.text)
    M = drawn(2).config.text.hidden_size
    x = mx.array(np.random.default_rng(0).normal(0, 7, (1, 3, M)).astype(np.float32))
    for soft in (None, mx.ones((1, 3, M))):
        out = np.array(block(x, soft))
        np.testing.assert_allclose((out**2).mean(axis=-1), 1, atol=1e-4)


def test_logits_are_float32_within_the_softcap():
    model = drawn(1)
    logits = model.denoise(draw_canvas(model, 1), model.prefill(draw_tokens(model, 3, 1)))
    assert logits.dtype == mx.float32
    assert float(mx.abs(logits).max()) <= 30


def test_a_soft_embedding_is_the_mean_of_scaled_embeddings():
    model = drawn(1)
    text = model.config.text
    table = np.array(model.model.decoder.embed_tokens.weight) * math.sqrt(text.hidden_size)
    sure = np.full((1, 1, text.vocab_size), -1e9, np.float32)
    sure[0, 0, 5] = 0
    half = sure.copy()
    half[0, 0, 9] = 0
    flat = np.zeros_like(sure)
    expected = [table[5], (table[5] + table[9]) / 2, table.mean(axis=0)]
    logits = mx.array(np.concatenate([sure, half, flat], axis=1))
    np.testing.assert_allclose(np.array(model.soft_embedding(logits))[0], expected, atol=1e-5)


# What the verbs refuse


def test_shapes_that_cannot_be_are_named():
    model = drawn(1)
    two = model.prefill(draw_tokens(model, 3, 1, rows=2))
    for call, message in (
        (lambda: model.prefill(mx.zeros((3,), mx.int32)), r"\[B, S\] with S >= 1, got \(3,\)"),
        (lambda: model.prefill(mx.zeros((1, 0), mx.int32)), r"S >= 1, got \(1, 0\)"),
        (lambda: model.prefill(draw_tokens(model, 2, 1), two), "1 rows, the context has 2"),
        (lambda: model.prefill(draw_tokens(model, 2, 1), step_size=0), "at least 1, got 0"),
        (lambda: model.denoise(draw_canvas(model, 1), two), r"\[2, L\], got \(1, "),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Rows, pieces, prefixes


@pytest.mark.parametrize("get", MODELS)
def test_a_row_of_a_padded_batch_equals_the_row_alone(get):
    model = get()
    window = model.config.text.sliding_window
    lengths = [2, 3 * window + 5, window, window - 1]
    longest = max(lengths)
    prompts = [draw_tokens(model, length, seed=i) for i, length in enumerate(lengths)]
    # Padding is any token: here one that is not the pad token.
    padded = [mx.pad(p, [(0, 0), (longest - p.shape[1], 0)], constant_values=7) for p in prompts]
    together = prefill_padded(model, mx.concatenate(padded), lengths)
    first, second, committed, third = (draw_canvas(model, 10 + i, len(lengths)) for i in range(4))

    def steps(context, row):
        logits = model.denoise(first[row], context)
        conditioned = model.denoise(
            second[row], context, self_conditioning=model.soft_embedding(logits / 0.8)
        )
        behind = model.denoise(third[row], model.commit(committed[row], context))
        return [np.array(x) for x in (logits, conditioned, behind)]

    in_batch = steps(together, slice(None))
    for i, prompt in enumerate(prompts):
        alone = steps(model.prefill(prompt), slice(i, i + 1))
        assert_close([x[i : i + 1] for x in in_batch], alone)


@pytest.mark.parametrize("step_size", [1, 7, 64])
@pytest.mark.parametrize("get", MODELS)
def test_prefill_in_pieces_equals_one_piece(get, step_size):
    model = get()
    prompt = long_prompt(model)
    pieces = model.prefill(prompt, step_size=step_size)
    assert_close(look(model, pieces, 20), look(model, model.prefill(prompt), 20))


@pytest.mark.parametrize("step_size", [1, 7])
@pytest.mark.parametrize("get", MODELS[:3])
def test_padded_rows_prefilled_in_pieces_equal_one_piece(get, step_size):
    model = get()
    prompt = mx.concatenate([long_prompt(model)] * 2)
    lengths = [5, prompt.shape[1]]
    pieces = prefill_padded(model, prompt, lengths, step_size=step_size)
    assert_close(look(model, pieces, 25), look(model, prefill_padded(model, prompt, lengths), 25))


BACKENDS = [pytest.param(nullcontext, id="cpu"), pytest.param(as_on_gpu, id="gpu")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("get", MODELS)
def test_texts_read_in_one_pass_are_those_read_alone(get, backend):
    model = get()
    window = model.config.text.sliding_window
    lengths = [2, 3 * window + 5, 1, window, window - 1]
    texts = [draw_tokens(model, length, seed=i) for i, length in enumerate(lengths)]
    pieces = [draw_tokens(model, 1 + 4 * i, seed=10 + i) for i in range(len(texts))]
    with backend():
        states, first = model.encode(texts, [Context((), 0, 1) for _ in texts])
        assert states.shape == (1, sum(lengths), model.config.text.hidden_size)
        _, both = model.encode(pieces, first)
        for text, piece, short, long in zip(texts, pieces, first, both, strict=True):
            alone = model.prefill(text)
            assert (short.length, short.position) == (text.shape[1], text.shape[1])
            assert_close(look(model, short, 27), look(model, alone, 27))
            longer = model.prefill(piece, alone)
            assert long.length == longer.length
            assert_close(look(model, long, 27), look(model, longer, 27))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("get", MODELS)
def test_a_row_beside_others_equals_the_row_alone(get, backend):
    """Lengths, widths, self-conditioning and shared contexts mixed, for two steps."""
    model = get()
    window, cap = model.config.text.sliding_window, model.config.text.final_logit_softcapping
    lengths = [2, 3 * window + 5, window, window - 1]
    L = max(2, model.config.canvas_length)
    widths = [L, max(1, L // 3), L - 1, 1, L, 2]
    with backend():
        contexts = [
            model.prefill(draw_tokens(model, length, seed=i)) for i, length in enumerate(lengths)
        ]
        contexts += [contexts[1]] * 2  # two rows share this one with a third
        canvases = [draw_tokens(model, width, 20 + i) for i, width in enumerate(widths)]
        opened = [
            OpenContext.beside(context) if i > 3 else model.open(context, L)
            for i, context in enumerate(contexts)
        ]
        soft = mx.random.normal(
            (1, sum(widths), model.config.text.hidden_size), key=mx.random.key(3)
        ).astype(model.dtype)
        first, opened = model.canvas_states(canvases, opened)
        second, opened = model.canvas_states(canvases, opened, self_conditioning=soft)
        start = 0
        for i, (context, canvas) in enumerate(zip(contexts, canvases, strict=True)):
            own = slice(start, start + widths[i])
            start = own.stop
            expected = [
                model.denoise(canvas, context),
                model.denoise(canvas, context, self_conditioning=soft[:, own]),
            ]
            together = [softcap(model.outputs(states[:, own]), cap) for states in (first, second)]
            assert_close([np.array(x) for x in together], [np.array(x) for x in expected])
            assert opened[i].text.length == context.length and opened[i].is_shared == (i > 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("get", MODELS)
def test_text_read_in_the_pass_of_its_canvas_equals_text_read_before(get, backend):
    """Rows with and without such text beside each other, behind shared and own contexts."""
    model = get()
    window, cap = model.config.text.sliding_window, model.config.text.final_logit_softcapping
    lengths, counts = [2, 2 * window + 5, window, window - 1, 9], [3, window + 2, 0, 1, 2]
    L = max(2, model.config.canvas_length)
    widths = [L, max(1, L // 3), L - 1, 1, L]
    with backend():
        contexts = [model.prefill(draw_tokens(model, n, seed=i)) for i, n in enumerate(lengths)]
        contexts[4] = Context.behind(contexts[4])
        texts = [draw_tokens(model, n, 40 + i) if n else None for i, n in enumerate(counts)]
        canvases = [draw_tokens(model, width, 20 + i) for i, width in enumerate(widths)]
        pairs = list(zip(contexts, texts, strict=True))
        opened = [model.open(context, L, unread=text) for context, text in pairs]
        longer = [c if text is None else model.prefill(text, c) for c, text in pairs]
        soft = mx.random.normal(
            (1, sum(widths), model.config.text.hidden_size), key=mx.random.key(3)
        ).astype(model.dtype)
        first, opened = model.canvas_states(canvases, opened, self_conditioning=soft)
        second, opened = model.canvas_states(canvases, opened)
        start = 0
        for i, (context, canvas) in enumerate(zip(longer, canvases, strict=True)):
            own = slice(start, start + widths[i])
            start = own.stop
            expected = [
                model.denoise(canvas, context, self_conditioning=soft[:, own]),
                model.denoise(canvas, context),
            ]
            together = [softcap(model.outputs(states[:, own]), cap) for states in (first, second)]
            assert_close([np.array(x) for x in together], [np.array(x) for x in expected])
            closed = opened[i].closed()
            assert (opened[i].unread, closed.length) == (None, context.length)
            assert_close(
                [np.array(x, np.float32) for x in closed.arrays],
                [np.array(x, np.float32) for x in context.arrays],
            )


def test_text_that_no_pass_has_read_is_not_in_the_closed_context():
    model = drawn(1)
    context = model.prefill(draw_tokens(model, 9, 1))
    opened = model.open(context, 4, unread=draw_tokens(model, 3, 2))
    assert opened.closed().length == 9
    assert all(a is b for a, b in zip(opened.closed().arrays, context.arrays, strict=True))


def test_a_context_that_rows_share_is_neither_copied_nor_written():
    model = drawn(1)
    context = model.prefill(long_prompt(model))
    mx.eval(context.arrays)
    before = [np.array(array) for array in context.arrays]
    opened = [OpenContext.beside(context) for _ in range(3)]
    states, opened = model.canvas_states([draw_canvas(model, i) for i in range(3)], opened)
    mx.eval(states)
    for row in opened:
        for layer, kept in zip(row.layers, context.layers, strict=True):
            assert layer.keys is kept.keys and layer.values is kept.values
        assert row.closed().length == context.length
    for old, array in zip(before, context.arrays, strict=True):
        np.testing.assert_array_equal(old, np.array(array))


def test_without_its_output_the_last_layer_computes_keys_and_values_alone(monkeypatch):
    model, fed = drawn(2), []
    tokens = draw_tokens(model, 9, 3)
    _, (whole,) = model.encode([tokens], [Context((), 0, 1)])
    monkeypatch.setattr(Router, "__call__", _noted(fed, Router.__call__))
    alone = model.prefill(tokens)
    routers = [layer.router for layer in model.layers]
    assert list(map(id, fed)) == list(map(id, routers[:-1]))
    for one, other in zip(whole.layers, alone.layers, strict=True):
        assert mx.array_equal(one.keys, other.keys) and mx.array_equal(one.values, other.values)


def _noted(seen: list, function):
    def call(self, *arguments):
        seen.append(self)
        return function(self, *arguments)

    return call


@pytest.mark.parametrize("get", MODELS)
def test_a_prefix_continued_equals_the_whole(get):
    model = get()
    prompt = long_prompt(model)
    whole = look(model, model.prefill(prompt), 30)
    for cut in (1, model.config.text.sliding_window, prompt.shape[1] - 1):
        context = model.prefill(prompt[:, cut:], model.prefill(prompt[:, :cut]))
        assert_close(look(model, context, 30), whole)


@pytest.mark.parametrize("get", MODELS)
def test_a_commit_equals_a_prompt_that_held_the_canvas(get):
    model = get()
    prompt, canvas = long_prompt(model), draw_canvas(model, 5)
    committed = model.commit(canvas, model.prefill(prompt))
    whole = model.prefill(mx.concatenate([prompt, canvas], axis=1))
    assert_close(look(model, committed, 40), look(model, whole, 40))


def test_batch_generate_writes_what_generate_writes_under_seed_plus_row():
    model, tokenizer = bundled()
    prompts = ["Squares from 2 to 3.", "Sudoku:\n..13\n.3.4\n413.\n3241", "Count from 12 to 36."]
    batch = mlx_diffgemma.batch_generate(
        model, tokenizer, prompts, settings=GenerationSettings(seed=40)
    )
    alone = [
        mlx_diffgemma.generate(model, tokenizer, p, settings=GenerationSettings(seed=40 + i))
        for i, p in enumerate(prompts)
    ]
    assert batch.texts == alone and all(alone)


def test_a_batch_runs_to_the_ids_steps_and_ends_of_its_rows_alone():
    model, tokenizer = bundled()
    prompts = ["Count from 12 to 36.", "Squares from 2 to 3.", "Sort: 3 1 2"]
    rows = [encode_prompt(tokenizer, p, PromptOptions()) for p in prompts]
    longest = max(map(len, rows))

    def run(tokens, lengths, seed):
        settings = GenerationSettings(seed=seed, max_new_tokens=128, max_denoising_steps=16)
        ids, ends = [[] for _ in tokens], [None] * len(tokens)
        for event in denoise_tokens(
            model, mx.array(tokens, dtype=mx.int32), settings, lengths=lengths
        ):
            if isinstance(event, CanvasCommitted):
                ids[event.row] += event.tokens[0].tolist()
            elif isinstance(event, Finished):
                ends[event.row] = (
                    event.reason,
                    event.new_tokens,
                    event.steps,
                    event.canvases,
                    event.positions,
                )
        assert None not in ends
        return ids, ends

    padded = [[0] * (longest - len(ids)) + ids for ids in rows]
    together = run(padded, mx.array([len(ids) for ids in rows]), seed=9)
    alone = [run([ids], None, seed=9 + i) for i, ids in enumerate(rows)]
    assert together == ([ids for (ids,), _ in alone], [end for _, (end,) in alone])


# Fused products, unpacked ones, and the graph that GPUs get


def copies_of_the_bundled_model(fused: bool) -> DiffusionGemma:
    return load_model(mlx_diffgemma.bundled_model(), fused=fused)


def test_a_fused_model_has_other_modules_and_the_same_logits():
    apart, together = (copies_of_the_bundled_model(fused) for fused in (False, True))
    names = dict(tree_flatten(apart.parameters()))
    assert "model.decoder.layers.0.self_attn.q_proj.weight" in names
    fused = dict(tree_flatten(together.parameters()))
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert f"model.decoder.layers.0.{name}.weight" in fused
    assert "model.decoder.self_conditioning.gate_up_proj.weight" in fused
    assert not any("q_proj" in name or ".up_proj" in name for name in fused)
    context = [model.prefill(long_prompt(model)) for model in (apart, together)]
    assert_close(look(apart, context[0], 3), look(together, context[1], 3))


def test_fusing_twice_is_fusing_once():
    model = copies_of_the_bundled_model(fused=True)
    before = dict(tree_flatten(model.parameters()))
    fuse(model)
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)


def test_modules_that_are_packed_differently_stay_apart():
    model = copies_of_the_bundled_model(fused=False)
    attention = model.model.decoder.layers[0].self_attn
    attention.q_proj = attention.q_proj.to_quantized(group_size=64, bits=8)
    fuse(model)
    assert "q_proj" in attention and "qkv_proj" not in attention
    assert "qkv_proj" in model.model.decoder.layers[1].self_attn
    model.prefill(draw_tokens(model, 5, 1))


PACKINGS = [("affine", 64, 4), ("affine", 32, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8)]


@pytest.mark.parametrize(("mode", "group_size", "bits"), PACKINGS)
def test_unpacked_slices_and_packed_kernels_give_the_same_logits(
    mode, group_size, bits, monkeypatch
):
    model = copies_of_the_bundled_model(fused=False)
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    fuse(model)
    monkeypatch.setattr(products, "SLICE_BYTES", 20_000)  # so that every matrix is several slices
    monkeypatch.setattr(experts, "_PRODUCT_PER_EXPERT_FROM", 0)
    results = []
    for scope in (nullcontext, as_on_gpu):
        with scope():
            results.append(look(model, model.prefill(long_prompt(model)), 3))
    assert_close(*results)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_agree_however_they_are_multiplied(tokens, monkeypatch):
    layer, x = float32_layer(), mx.random.normal((tokens, 128), key=mx.random.key(1))
    chosen, weights = layer.router(x)
    with as_on_gpu():
        grouped = layer.experts(x, chosen, weights)
    together = layer.experts(x, chosen, weights)
    monkeypatch.setattr(experts, "_PRODUCT_PER_EXPERT_FROM", 0)
    apart = layer.experts(x, chosen, weights)
    for other in (together, apart):
        np.testing.assert_allclose(np.array(grouped), np.array(other), atol=1e-5)


def test_an_expert_that_was_not_chosen_adds_nothing_even_if_it_overflows():
    layer, x = float32_layer(), mx.random.normal((9, 128), key=mx.random.key(1))
    chosen, weights = mx.array([[0, 1]] * 9), mx.full((9, 2), 0.5)
    expected = np.array(layer.experts(x, chosen, weights))
    sound = layer.experts.gate_up_proj.weight
    layer.experts.gate_up_proj.weight = mx.concatenate([sound[:7], mx.full_like(sound[7:], 1e38)])
    np.testing.assert_array_equal(expected, np.array(layer.experts(x, chosen, weights)))


def float32_layer():
    model = copies_of_the_bundled_model(fused=True)
    model.set_dtype(mx.float32)
    return model.model.decoder.layers[0]


def test_elementary_functions_are_right_to_the_last_bits():
    x = np.linspace(-100, 0, 200_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(np.array(exp_below_zero(mx.array(x))), exact, rtol=2e-7, atol=1e-37)
    assert exp_below_zero(mx.array([0.0, -mx.inf])).tolist() == [1, 0]
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)
    out = np.array(tanh(mx.array(x)))
    np.testing.assert_allclose(out, np.tanh(x.astype(np.float64)), rtol=4e-7, atol=0)
    assert np.abs(out).max() <= 1 and np.isnan(tanh(mx.array(mx.nan)).item())


@pytest.mark.parametrize("mask", ["none", "causal", "keys", "window"])
def test_attention_on_the_cpu_is_the_kernel_of_gpus(mask, monkeypatch):
    draw = np.random.default_rng(3).normal
    B, N, K, L, S, H = 2, 4, 2, 5, 11, 16
    queries, keys, values = (
        mx.array(draw(size=(B, heads, places, H)).astype(np.float32))
        for heads, places in ((N, L), (K, S), (K, S))
    )
    allowed = {
        "none": None,
        "causal": "causal",
        "keys": mx.arange(S)[None, None, None] >= mx.array([0, 3])[:, None, None, None],
        "window": causal_mask(S - L, L, first_key=0, window=4, padding=mx.array([0, 2])),
    }[mask]
    seen = LayerContext(keys, values)
    here = attend(queries, [seen], allowed)
    with as_on_gpu():
        there = attend(queries, [seen], allowed)
    np.testing.assert_allclose(np.array(here), np.array(there), atol=1e-5)
    for most in (1, 2 * B * L * S):  # heads one by one, and both of a group at once
        monkeypatch.setattr(attention, "_SCORES", most)
        np.testing.assert_allclose(np.array(attend(queries, [seen], allowed)), here, atol=1e-6)
    if mask == "none":  # keys in two parts, one of which other rows use too
        parts = [
            LayerContext(keys[:, :, places], values[:, :, places])
            for places in (slice(0, 4), slice(4, S))
        ]
        for backend in (nullcontext, as_on_gpu):
            with backend():
                apart = attend(queries, parts, None)
            np.testing.assert_allclose(np.array(here), np.array(apart), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_canvas_is_written_where_the_last_step_had_it(rows):
    model = drawn(1)
    contexts = [model.prefill(draw_tokens(model, 20 + i, i)) for i in range(rows)]
    opened = [model.open(context, 8) for context in contexts]
    canvases = [draw_tokens(model, 8 - i, 10 + i) for i in range(rows)]

    def arrays(some: list[OpenContext]) -> list[mx.array]:
        return [array for one in some for layer in one.layers for array in (layer.keys,)]

    mx.eval(arrays(opened))
    first = [np.asarray(keys).ctypes.data for keys in arrays(opened)]
    states, opened = model.canvas_states(canvases, opened)
    mx.eval(states, arrays(opened))
    assert [np.asarray(keys).ctypes.data for keys in arrays(opened)] == first
    before, held = [np.array(keys) for keys in arrays(opened)], list(opened)
    other = [draw_tokens(model, 8, 20 + i) for i in range(rows)]
    _, later = model.canvas_states(other, opened)  # while the others are held: a copy
    mx.eval(arrays(later))
    for old, keys in zip(before, arrays(held), strict=True):
        np.testing.assert_array_equal(old, np.array(keys))
    for context, after in zip(contexts, later, strict=True):
        for old, new in zip(context.arrays, after.closed().arrays, strict=True):
            np.testing.assert_array_equal(np.array(old), np.array(new))


def test_the_list_of_open_contexts_is_emptied_so_that_nobody_holds_them():
    model = drawn(1)
    opened = [model.open(model.prefill(draw_tokens(model, 5, 1)), 4)]
    model.canvas_states([draw_tokens(model, 4, 2)], opened)
    assert opened == []


def test_an_open_context_may_hold_a_canvas_narrower_than_its_room():
    model = drawn(2)
    context, canvas = model.prefill(long_prompt(model)), draw_tokens(model, 16, 4)
    # What a wider step wrote behind it is not seen.
    _, opened = model.canvas_states([canvas], [model.open(context, 16)])
    states, _ = model.canvas_states([canvas[:, :6]], opened)
    cap = model.config.text.final_logit_softcapping
    expected = model.denoise(canvas[:, :6], context)
    assert_close([np.array(softcap(model.outputs(states), cap))], [np.array(expected)])


def test_a_sparse_embedding_gives_what_its_list_leaves_out_to_the_mean_of_all_embeddings():
    model = drawn(1)
    vocab_size = model.config.text.vocab_size
    table = np.array(model.model.decoder.embed_tokens.weight)
    np.testing.assert_allclose(np.array(model.mean_row()), table.mean(axis=0), atol=1e-6)
    ids, p = mx.array([[[3, 9]]]), mx.array([[[0.5, 0.2]]])
    expected = 0.5 * table[3] + 0.2 * table[9] + 0.3 * table.mean(axis=0)
    expected *= model.config.text.hidden_size**0.5
    soft = model.sparse_embedding(ids, p, model.mean_row())
    np.testing.assert_allclose(np.array(soft)[0, 0], expected, atol=1e-4)
    logits = 4 * mx.random.normal((1, 6, vocab_size), key=mx.random.key(0))
    seen = statistics(logits)
    whole = model.sparse_embedding(
        *shortlist(seen.weights, seen.total, vocab_size), model.mean_row()
    )
    dense = model.soft_embedding(logits)
    np.testing.assert_allclose(np.array(whole), np.array(dense), atol=1e-4)
    folded = model.mean_embedding(seen.weights, seen.total)
    np.testing.assert_allclose(np.array(folded), np.array(dense), atol=1e-5)
