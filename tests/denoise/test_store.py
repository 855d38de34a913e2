"""Contexts kept across requests. `make long` runs more of `tests.denoise.conversations`."""

from __future__ import annotations

import gc
import inspect
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import Store
from mlx_diffgemma.denoise.store import snapshots
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.model import Context
from mlx_diffgemma.model.context import LayerContext
from tests.checkpoints import load_drawn
from tests.denoise import conversations
from tests.denoise.conversations import answer, held_bytes, many_turns, run
from tests.denoise.mixtures import model_of

MODEL = 2  # one sliding layer, two full ones
TEXT = np.random.default_rng(5).integers(6, 70, 400).astype(np.int32)


def read(tokens: np.ndarray) -> Context:
    context = model_of(MODEL).prefill(mx.array(tokens[None]))
    mx.eval(context.arrays)
    return context


def keep(store: Store, *texts: np.ndarray) -> None:
    for text in texts:
        store.keep(text, read(text), model_of(MODEL).config.text)


def found(store: Store, tokens: np.ndarray) -> int:
    """How many tokens of a text, and of what may follow it, the store knows."""
    context = store.find(np.append(tokens, np.int32(2)), model_of(MODEL).config.text)
    return 0 if context is None else context.length


def size(tokens: np.ndarray) -> int:
    return read(tokens).nbytes


def test_a_text_that_differs_22_tokens_before_its_end_reads_no_more_than_a_piece():
    model, store, text = model_of(MODEL), Store(1 << 30, every=64), TEXT.copy()
    assert answer(model, text, 1, store)[0] == [400, 0]
    text[-22] += 1
    counts, canvases = answer(model, text, 1, store)
    assert counts == [400, 320]
    assert [c.tolist() for c in canvases] == [c.tolist() for c in answer(model, text, 1, None)[1]]
    assert answer(model, text, 1, store)[0] == [400, 384]  # again: the last token is always read


def test_a_context_is_that_of_the_longest_beginning():
    store = Store(1 << 30)
    keep(store, TEXT[:10], TEXT[:30], TEXT[:20], np.append(TEXT[:20], TEXT[:5]))
    assert [found(store, TEXT[:n]) for n in (9, 10, 19, 20, 29, 30, 31)] == [
        0, 10, 10, 20, 20, 30, 30,
    ]  # fmt: skip
    context = store.find(TEXT[:40], model_of(MODEL).config.text)
    for mine, expected in zip(context.arrays, read(TEXT[:30]).arrays, strict=True):
        assert mine.shape == expected.shape
        assert np.allclose(mine, expected, atol=1e-5)


def test_one_token_is_left_to_read():
    store = Store(1 << 30)
    keep(store, TEXT[:10])
    assert store.find(TEXT[:10], model_of(MODEL).config.text) is None
    assert store.find(TEXT[:11], model_of(MODEL).config.text).length == 10


def test_full_layers_of_one_conversation_are_shared():
    store = Store(1 << 30)
    keep(store, *(TEXT[:n] for n in range(40, 401, 40)))
    keep(store, np.append(TEXT[:200], TEXT[:40]), TEXT[:200])  # an edit, and what is known already
    sliding = [
        layer for layer, kind in zip(
            read(TEXT[:100]).layers, model_of(MODEL).config.text.layers, strict=True
        ) if kind.is_sliding
    ]  # fmt: skip
    of_one_end = sum(layer.keys.nbytes + layer.values.nbytes for layer in sliding)
    full = size(TEXT) - of_one_end
    assert store.nbytes == pytest.approx(full * 440 / 400 + 11 * of_one_end)


def test_a_text_that_does_not_fit_is_not_kept_and_drops_nothing():
    store = Store(size(TEXT[:100]))
    keep(store, TEXT[:30])
    before = store.nbytes
    keep(store, TEXT[:101], TEXT[50:200])
    assert store.nbytes == before
    assert found(store, TEXT[:150]) == 30
    keep(store, TEXT[:100])  # just fits
    assert found(store, TEXT[:150]) == 100
    assert store.nbytes <= store.max_bytes


def test_what_was_not_used_for_longest_goes_first():
    texts = [np.roll(TEXT, 50 * i)[:50] for i in range(4)]
    store = Store(3 * size(texts[0]))
    keep(store, *texts[:3])
    assert found(store, texts[0]) == 50
    keep(store, texts[3])
    assert [found(store, text) for text in texts] == [50, 0, 50, 50]


def test_snapshots_inside_of_a_conversation_go_before_its_end():
    store = Store(size(TEXT[:120]))
    keep(store, TEXT[:40], TEXT[:80], TEXT[:120])
    assert found(store, TEXT[:120]) == 120
    assert found(store, TEXT[:119]) == 0
    assert store.nbytes == store.max_bytes


def test_a_conversation_is_dropped_whole_once_its_end_is():
    store = Store(size(TEXT[:120]) + size(TEXT[:40]) // 2)
    cached = mx.set_cache_limit(0)  # or MLX reuses larger buffers
    keep(store, TEXT[:40], TEXT[:120])
    keep(store, TEXT[200:320])
    assert (found(store, TEXT[:120]), found(store, TEXT[200:320])) == (0, 120)
    assert store.nbytes == size(TEXT[200:320])
    said, held = held_bytes(store)
    mx.set_cache_limit(cached)
    assert said == held


def test_a_context_that_is_dropped_while_it_is_used_stays_whole():
    store, config = Store(size(TEXT[:100])), model_of(MODEL).config.text
    keep(store, TEXT[:50], TEXT[:100])
    context = store.find(TEXT[:101], config)
    assert context is not None
    keep(store, TEXT[200:300])
    gc.collect()
    assert found(store, TEXT[:100]) == 0
    for mine, expected in zip(context.arrays, read(TEXT[:100]).arrays, strict=True):
        assert np.allclose(mine, expected, atol=1e-5)


def test_very_many_snapshots_of_one_text():
    """More than Python's stack is deep."""
    store, config, context = Store(1 << 30), model_of(MODEL).config.text, read(TEXT[:1])
    text, deepest = np.resize(TEXT, 500), sys.getrecursionlimit()
    whole = read(text[:400])
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    for length in range(1, 400):
        layers = tuple(layer.first(min(length, layer.keys.shape[2])) for layer in whole.layers)
        store.keep(text[:length], Context(layers, length, 1), config)
    assert store.find(text, config).length == 399
    store.max_bytes = store.nbytes // 2
    store.keep(text[:1], context, config)
    store.keep(text[:400], whole, config)
    sys.setrecursionlimit(deepest)
    assert store.nbytes <= store.max_bytes


def test_several_threads_use_a_store():
    store, config = Store(6 * size(TEXT[:60])), model_of(MODEL).config.text
    texts = [np.roll(TEXT, 40 * i)[:60] for i in range(9)]
    contexts = [read(text) for text in texts]
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i in rng.integers(len(texts), size=150):
            store.keep(texts[i], contexts[i], config)
            context = store.find(np.append(texts[i], np.int32(2)), config)
            if context is not None and context.length != 60:
                wrong.append(context.length)
        mx.clear_streams()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    nodes = list(store._all())
    assert store.nbytes == sum(node.nbytes for node in nodes) <= store.max_bytes
    assert len(nodes) == 6


def test_a_store_serves_one_model():
    store = Store(1 << 20)
    store.serve(model_of(2))
    store.serve(model_of(2))
    with pytest.raises(ConfigError, match=r"^a store keeps the contexts of one model, and this"):
        store.serve(model_of(4))


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_bytes": 9, "every": 0}])
def test_a_limit_below_one_is_refused(limits):
    with pytest.raises(ConfigError, match=r"of a store must be at least 1, got 0$"):
        Store(**limits)


def test_snapshots_are_at_turns_and_every_so_many_tokens():
    text = [7] * 100
    text[9] = text[49] = text[89] = 1
    assert snapshots(text, 30, [1, 5]) == [10, 30, 60, 90, 100]
    assert snapshots(text[:20], 30, [1, 5]) == [10, 20]
    assert snapshots([7], 30, [1]) == [1]


def test_answers_are_the_same_and_no_more_is_read_than_is_new():
    told, held = run(8)
    assert told.findings == []
    assert len(told.ties) + len(told.drifts) <= 1
    assert told.found > told.read > 0
    assert all(0.99 < held / said < 1.01 for said, held in held)


def test_a_small_store_changes_no_answer_and_holds_no_more_than_its_budget():
    told, held = run(4, max_bytes=120_000, first=50)
    assert told.findings == []
    assert told.found > 0
    for said, held_by_it in held:
        assert 0 < held_by_it <= 120_000
        assert 0.99 < held_by_it / said < 1.01


@pytest.mark.parametrize(
    "wrong",
    [
        lambda layer: LayerContext(layer.values, layer.keys),
        lambda layer: LayerContext(layer.keys * 1.01, layer.values),
        lambda layer: LayerContext(layer.keys[:, :, ::-1], layer.values),
    ],
    ids=["swapped", "scaled", "turned round"],
)
def test_a_wrong_context_is_no_near_tie(monkeypatch, wrong):
    right = conversations.Watched.find

    def find(store, tokens, config):
        context = right(store, tokens, config)
        if context is None:
            return None
        layers = (*context.layers[:-1], wrong(context.layers[-1]))
        return Context(layers, context.length, 1)

    monkeypatch.setattr(conversations.Watched, "find", find)
    monkeypatch.setattr(conversations, "MODELS", (-1,))
    assert run(2, first=2)[0].findings


def test_after_many_turns_a_store_holds_no_more_than_its_budget():
    told, (said, held) = many_turns(30, 250_000)
    assert told.turns >= 30 and told.findings == []
    assert 0.99 < held / said < 1.01
    assert 150_000 < held <= 250_000


def test_a_long_chat_reads_at_most_a_piece_and_what_is_new():
    model = load_drawn(MODEL, sliding_window=16, max_position_embeddings=8192)
    store, every = Store(1 << 30, every=256), 256
    rng = np.random.default_rng(8)
    history, said = np.zeros(0, np.int32), []
    for turn in range(10):
        new = np.append(rng.integers(6, 70, 450, dtype=np.int32), np.int32(1))
        history = np.concatenate([history, *said, new])
        (asked, cached), said = answer(model, history, turn, store)
        assert asked - cached <= len(new) + sum(map(len, said)) + (every if turn else 0)
    assert asked > 4000
    edited = history.copy()
    edited[-22] = 6 + (edited[-22] + 1) % 64
    asked, cached = answer(model, edited, turn, store)[0]
    assert asked - cached <= every + 22
