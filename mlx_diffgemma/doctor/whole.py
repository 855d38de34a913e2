"""Checks of whole models, the bundled one and a random one: logits and answers on the device
against the CPU backend in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import mlx.core as mx
import numpy as np

from ..checkpoint.files import bundled_model
from ..checkpoint.load import load_model
from ..config.generation import GenerationSettings
from ..config.policies import Policy
from ..config.quantization import Quantization
from ..denoise.loop import denoise_tokens
from ..events import CanvasCommitted
from ..language.prompt import encode_prompt
from ..language.tokenizer import load_tokenizer
from ..model import DiffusionGemma
from . import device
from .device import TYPES, affordable, computed, expected, has_plain_experts, root_mean_square
from .exact import PUBLISHED, name_of
from .outcome import Check
from .random_models import prepared, random_model

LOGITS, TRAJECTORIES = "logits", "trajectories"
_MAKERS: dict[str, Callable[[], DiffusionGemma]] = {
    "bundled model": lambda: load_model(bundled_model(), fused=False),
    "random model": random_model,
}
_TOGETHER = "kernels that are right alone and wrong together, or in the shapes of a model"
# Answers of which the model is sure, so that rounding does not change them.
_PROMPTS = ("Reverse: kaa", "Fill: Monday _______ Wednesday", "Sort: 6 3 1", "Squares from 4 to 5.")
_WIDTH = 40  # of the canvas


def checks() -> Iterator[Check]:
    """Yield the checks of this file."""
    for type_name, dtype in TYPES.items():
        plain: tuple[Quantization | None, ...] = (None,) if has_plain_experts(dtype) else ()
        some = (*plain, PUBLISHED[0])
        for packing in some:
            yield _logits("bundled model", packing, type_name)
        for packing in (*plain, *affordable(PUBLISHED, dtype, is_long=True)):
            yield _logits("random model", packing, type_name)
        policies: tuple[Policy, ...] = ("reference", "fast")
        # float16 takes MLX's CPU backend a minute for an answer.
        if not device.is_slow(dtype):
            yield from (_answers(p, type_name, policy) for p in some for policy in policies)


def _words(packing: Quantization | None) -> str:
    return "not packed" if packing is None else name_of(packing)


def _logits(model: str, packing: Quantization | None, type_name: str) -> Check:
    return Check(
        f"logits, {model}, {_words(packing)}, {type_name}",
        LOGITS,
        device.logits_tolerance(TYPES[type_name], is_packed=packing is not None),
        _TOGETHER,
        f"checkpoints that are {_words(packing)}, computed in {type_name}",
        partial(_logits_difference, model, packing, type_name),
    )


def _answers(packing: Quantization | None, type_name: str, policy: Policy) -> Check:
    return Check(
        f"answers, policy {policy}, {_words(packing)}, {type_name}",
        TRAJECTORIES,
        # Of all tokens, those that differ. A draw between two likely tokens may go the other way,
        # and then a word of one answer differs; a wrong kernel changes most of them.
        0.1,
        _TOGETHER,
        f"--policy {policy}, with checkpoints that are {_words(packing)}, computed in {type_name}",
        partial(_answers_difference, packing, type_name, policy),
    )


@cache
def _pair(
    model: str, packing: Quantization | None, type_name: str
) -> tuple[DiffusionGemma, DiffusionGemma]:
    """Return a model for the device, and one for the reference with the same values in float32."""
    with device.reference():
        here = prepared(_MAKERS[model](), packing, TYPES[type_name])
        there = prepared(_MAKERS[model](), packing, TYPES[type_name])
        there.set_dtype(mx.float32)
        mx.eval(there.parameters())
    return here, there


def _tokens(model: DiffusionGemma, rows: int, count: int, seed: int) -> mx.array:
    drawn = np.random.default_rng([20, seed]).integers(
        64, model.config.text.vocab_size, (rows, count)
    )
    return mx.array(drawn.astype(np.int32))


def _outputs(model: DiffusionGemma, rows: int, canvas: int) -> list[mx.array]:
    """Return logits of a first step, of a self-conditioned one, and of a first step after a commit.
    With two rows the text is longer than the window and read in two pieces."""
    window = model.config.text.sliding_window
    text = _tokens(model, rows, window + 6 if rows == 2 else 17, 1)
    context = model.prefill(text, step_size=window)
    first, second, third = (_tokens(model, rows, canvas, seed) for seed in (2, 3, 4))
    logits = model.denoise(first, context)
    soft = model.soft_embedding(logits / 0.8)
    conditioned = model.denoise(second, context, self_conditioning=soft)
    behind = model.denoise(third, model.commit(first, context))
    return [logits, conditioned, behind]


def _logits_difference(model: str, packing: Quantization | None, type_name: str) -> float:
    here, there = _pair(model, packing, type_name)
    rows, canvas = (2, 12) if type_name == "float32" else (1, 7)
    found = computed(lambda: _outputs(here, rows, canvas))
    right = expected(lambda: _outputs(there, rows, canvas))
    return float(np.max([root_mean_square(a, b) for a, b in zip(found, right, strict=True)]))


@cache
def _prompts() -> tuple[mx.array, mx.array]:
    """Return the prompts, padded on the left, and their lengths."""
    tokenizer = load_tokenizer(bundled_model())
    ids = [encode_prompt(tokenizer, prompt) for prompt in _PROMPTS]
    widest = max(map(len, ids))
    padded = [[0] * (widest - len(row)) + row for row in ids]
    return mx.array(padded, mx.int32), mx.array([len(row) for row in ids])


def _answers_difference(packing: Quantization | None, type_name: str, policy: Policy) -> float:
    here, there = _pair("bundled model", packing, type_name)
    rows = 1 if device.is_slow(TYPES[type_name], is_long=True) else len(_PROMPTS)
    (found,) = computed(lambda: _answer(here, policy, rows))
    (right,) = expected(lambda: _answer(there, policy, rows))
    width = max(found.shape[1], right.shape[1])
    pad = here.config.pad_token_id
    found, right = (
        np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=pad) for x in (found, right)
    )
    matters = (found != pad) | (right != pad)
    return device.share((found != right)[matters])


def _answer(model: DiffusionGemma, policy: Policy, rows: int) -> mx.array:
    tokens, lengths = _prompts()
    settings = GenerationSettings(
        policy=policy, seed=3, canvas_length=_WIDTH, max_new_tokens=_WIDTH
    )
    committed: dict[int, mx.array] = {}
    for event in denoise_tokens(model, tokens[:rows], settings, lengths=lengths[:rows]):
        if isinstance(event, CanvasCommitted):  # of a part, maybe
            before = [committed[event.row]] if event.row in committed else []
            committed[event.row] = mx.concatenate([*before, event.tokens], axis=1)
    pad = model.config.pad_token_id
    return mx.concatenate(
        [
            mx.pad(canvas, [(0, 0), (0, _WIDTH - canvas.shape[1])], constant_values=pad)
            for _, canvas in sorted(committed.items())
        ]
    )
