"""Joint commits: committed text is read in the pass of the next canvas's first step. That a row
writes the same is in test_rows.py, in float64, over drawn mixtures."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import GenerationSettings, Store
from mlx_diffgemma.denoise import loop
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.pinned import FREE, Pinned
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.events import CanvasCommitted, Finished
from mlx_diffgemma.model import DiffusionGemma
from tests.checkpoints import load_drawn

L, CANVASES = 8, 4
PROMPT = np.array([5, 9, 12, 7, 3], np.int32)


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return load_drawn(3, canvas_length=L, sliding_window=8)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[str, int]]:
    """The passes of the model: what they were for, and how many columns each read or denoised."""
    seen: list[tuple[str, int]] = []
    encode, steps = DiffusionGemma.encode, DiffusionGemma.canvas_states

    def reads(self, pieces, *given, **more):
        seen.append(("read", sum(piece.shape[1] for piece in pieces)))
        return encode(self, pieces, *given, **more)

    def step(self, canvases, opened, **more):
        unread = sum(each.unread.shape[1] for each in opened if each.unread is not None)
        seen.append(("joint" if unread else "step", unread))
        return steps(self, canvases, opened, **more)

    monkeypatch.setattr(DiffusionGemma, "encode", reads)
    monkeypatch.setattr(DiffusionGemma, "canvas_states", step)
    return seen


def written(model, pinned=None, store=None, tokens=PROMPT, **settings) -> list:
    chosen = {"seed": 4, "max_new_tokens": CANVASES * L, "max_denoising_steps": 2}
    resolved = GenerationSettings(**(chosen | settings)).resolve(
        model.config, is_free=pinned is None
    )
    rows = Rows(model, store)
    rows.add(Row(model, resolved, tokens, pinned=pinned))
    return list(rows.run())


def ids(events) -> list[int]:
    found: list[int] = []
    for event in events:
        if isinstance(event, CanvasCommitted):
            found += event.tokens[0].tolist()
    return found


def test_no_pass_is_for_committed_text_alone(model, passes):
    written(model, commit_pass="joint")
    assert [kind for kind, _ in passes] == ["read", "step", "step"] + ["joint", "step"] * 3
    assert [count for kind, count in passes if kind != "step"] == [len(PROMPT), L, L, L]
    passes.clear()
    written(model)
    assert [kind for kind, _ in passes] == ["read", "step", "step"] * 4


def test_the_last_canvas_is_never_read(model, passes):
    """Neither way: nothing comes behind it."""
    written(model, commit_pass="joint", max_new_tokens=L)
    assert [kind for kind, _ in passes] == ["read", "step", "step"]


def test_canvases_that_are_given_whole_are_read_with_what_came_before(model, passes):
    given = np.full(4 * L, FREE, np.int32)
    given[L : 2 * L] = np.arange(20, 20 + L)
    run = partial(written, model, Pinned(given))
    joint = run(commit_pass="joint")
    # Two canvases are more than one first step reads.
    assert [count for kind, count in passes if kind == "read"] == [len(PROMPT), 2 * L]
    assert ids(joint) == ids(run(commit_pass="own"))
    assert ids(joint)[L : 2 * L] == list(range(20, 20 + L))


def test_a_store_holds_what_a_joint_pass_has_read(model):
    kept = {}
    for way in ("own", "joint"):
        store = Store(1 << 20)
        text = np.array(ids(written(model, store=store, commit_pass=way)), np.int32)
        whole = np.concatenate([PROMPT, text, [3]])
        context = store.find(whole, model.config.text)
        kept[way] = context
        assert context.length == len(PROMPT) + 3 * L  # the last canvas is never read
    for a, b in zip(kept["own"].arrays, kept["joint"].arrays, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


def test_a_row_that_leaves_before_its_joint_pass_leaves_nothing(model):
    resolved = GenerationSettings(
        seed=4, max_new_tokens=4 * L, max_denoising_steps=1, commit_pass="joint"
    ).resolve(model.config)
    rows, row = Rows(model), Row(model, resolved, PROMPT)
    rows.add(row)
    while not any(isinstance(event, CanvasCommitted) for _, event in rows.advance()):
        pass
    rows.remove(row)
    assert list(rows.advance()) == [] and row.opened == []
    assert row.context is None and row._committed is None


def test_parts_of_a_canvas_are_read_with_the_steps_of_the_rest(model, passes):
    """Under `fast`, whose parts end anywhere, down to a canvas's last columns."""
    settings = {"policy": "fast", "prefix_entropy": 9.0, "prefix_steps": 1, "seed": 2}
    settings["max_denoising_steps"] = 6
    events = written(model, **settings, commit_pass="joint")
    joint = [count for kind, count in passes if kind == "joint"]
    assert len(joint) >= 3 and any(count < L for count in joint)
    assert sum(kind == "read" for kind, _ in passes) == 1
    own = written(model, **settings, commit_pass="own")
    assert ids(events) == ids(own)
    (end,), (other,) = ([e for e in each if isinstance(e, Finished)] for each in (events, own))
    assert (end.steps, end.positions) == (other.steps, other.positions)


def test_memory_of_contexts_before_is_given_back(model, passes, monkeypatch):
    """Each joint pass copies the context; what it was copied from must not fill MLX's cache."""
    clear = mx.clear_cache
    monkeypatch.setattr(mx, "clear_cache", lambda: (passes.append(("cleared", 0)), clear()))
    settings = {"commit_pass": "joint", "max_new_tokens": 6 * L}

    def kinds() -> list[str]:
        passes.clear()
        written(model, **settings)
        return [kind for kind, _ in passes if kind != "step"]

    assert kinds() == ["read", "cleared"] + ["joint"] * 5
    context = model.prefill(mx.array(PROMPT[None])).nbytes
    monkeypatch.setattr(loop, "_COPIED_BYTES", 2 * context)
    assert kinds()[:5] == ["read", "cleared", "joint", "joint", "cleared"]


def test_rows_that_read_nothing_ahead_are_read_jointly_whatever_is_set(model, passes):
    written(model, commit_pass="joint", warm_start=0.1, warm_read=0.5)
    assert [kind for kind, _ in passes].count("joint") == 3
