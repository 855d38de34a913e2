"""The vision tower: the patches of an image become the embeddings of its tokens. Its weights are
under their names on disk. It knows neither pixels' files nor the text around an image.

Shapes beside those of the folder: I images of one size, P patches of each, n = P / k^2 soft tokens,
W the tower's width.

Source: transformers 5.24, models/gemma4/modeling_gemma4.py, Gemma4VisionModel; its
Gemma4MultimodalEmbedder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config.vision import VisionConfig
from .attention import attend
from .backend import is_cpu
from .context import LayerContext
from .layers import RMSNorm, geglu, unit_rms
from .products import linear
from .rope import turned

_FUSED = (64, 80, 128)  # head sizes of MLX's fused kernels; heads are padded with zeros to the next
_SCORES_BYTES = 64 << 20  # where no kernel is fused, queries go in pieces of so many scores


class VisionSource(Protocol):
    """Where a model's vision comes from, once it is needed."""

    @property
    def nbytes(self) -> int:
        """What it takes in memory; 0 if there is none."""

    def check(self) -> None:
        """Raise DiffGemmaError, which says why, if there is none."""

    def bring(self) -> Vision:
        """Load it, or return it if it is loaded.

        Raises:
          DiffGemmaError: if there is none, or it cannot be loaded.
        """

    def fingerprint(self) -> bytes:
        """Return a hash of its weights; nothing is loaded for it."""


class Bounded(nn.Module):
    """A linear module, whose inputs and outputs some checkpoints bound."""

    def __init__(self, inputs: int, outputs: int, config: VisionConfig):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        if config.use_clipped_linears:
            self.input_min = self.output_min = mx.array(-mx.inf)
            self.input_max = self.output_max = mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] -> [..., outputs]."""
        if "input_min" not in self:
            return linear(self.linear, x)
        x = mx.clip(x, *(self[name].astype(x.dtype) for name in ("input_min", "input_max")))
        y = linear(self.linear, x)
        return mx.clip(y, *(self[name].astype(y.dtype) for name in ("output_min", "output_max")))


class VisionAttention(nn.Module):
    """Attention of all patches of an image to each other."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        W, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim, self.eps = H, config.rms_norm_eps
        self.q_proj, self.o_proj = Bounded(W, N * H, config), Bounded(N * H, W, config)
        self.k_proj, self.v_proj = Bounded(W, K * H, config), Bounded(W, K * H, config)
        self.q_norm, self.k_norm = RMSNorm(H, eps=self.eps), RMSNorm(H, eps=self.eps)

    def __call__(self, x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
        """x [I, P, W]; cosines and sines float32 [I, 1, P, H] -> [I, P, W]."""
        images, patches, _ = x.shape

        def heads(projection: Bounded) -> mx.array:
            return projection(x).reshape(images, patches, -1, self.head_dim)

        q, k = self.q_norm(heads(self.q_proj)), self.k_norm(heads(self.k_proj))
        v = unit_rms(heads(self.v_proj), self.eps).swapaxes(1, 2)  # [I, K, P, H]
        q, k = (_rotate(each.swapaxes(1, 2), cosines, sines) for each in (q, k))
        joined = _attend_all(q, k, v).swapaxes(1, 2).reshape(images, patches, -1)
        return self.o_proj(joined)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        W, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Bounded(W, inner, config), Bounded(W, inner, config)
        self.down_proj = Bounded(inner, W, config)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """Attention, then a dense block."""

    def __init__(self, config: VisionConfig):
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.self_attn, self.mlp = VisionAttention(config), VisionMLP(config)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), cosines, sines)
        h = self.post_attention_layernorm.added_to(x, attended)
        mixed = self.mlp(self.pre_feedforward_layernorm(h))
        return self.post_feedforward_layernorm.added_to(h, mixed)


class PatchEmbedder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(config.patch_width, config.hidden_size, bias=False)
        self.position_embedding_table = mx.zeros(
            (2, config.position_embedding_size, config.hidden_size)
        )

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        table = self.position_embedding_table
        x = (2 * (patches.astype(mx.float32) - 0.5)).astype(table.dtype)  # pixels from -1 to 1
        places = table[0][positions[..., 0]] + table[1][positions[..., 1]]
        return linear(self.input_proj, x).astype(table.dtype) + places


class VisionLayers(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """Patches, then the mean over each k by k of them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionLayers(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))
        # How a layer is run, as the model's `run_layer`.
        self.run_layer: Callable[..., mx.array] = _as_it_is

    @property
    def dtype(self) -> mx.Dtype:
        """The type of computation, outside the parts that are always float32."""
        return self.patch_embedder.position_embedding_table.dtype

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        """Return the soft tokens, [I, n, W] in the tower's type.

        Args:
          patches: float32 [I, P, 3 p p] from 0 to 1; the k^2 of a soft token are neighbours, as
            `by_soft_token` orders them.
          positions: int32 [I, P, 2], column and row of each patch.
        """
        config = self.config
        x = self.patch_embedder(patches, positions)
        cosines, sines = _waves(positions, config)
        for layer in self.encoder.layers:
            x = self.run_layer(layer, x, cosines, sines)
        images, _, width = x.shape
        pooled = x.astype(mx.float32).reshape(images, -1, config.pooling_kernel_size**2, width)
        # The mean is rounded to the tower's type, and what follows is float32 again, as in the
        # reference.
        out = pooled.mean(axis=2).astype(x.dtype).astype(mx.float32) * width**0.5
        if config.standardize:
            out = (out - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return out.astype(x.dtype)


class VisionEmbedder(nn.Module):
    """From the tower's width to the text's. These are embeddings as they are: not scaled, as those
    of tokens are."""

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embedding_projection = nn.Linear(config.hidden_size, hidden_size, bias=False)

    def __call__(self, soft: mx.array) -> mx.array:
        """[..., W] -> [..., M]."""
        return linear(self.embedding_projection, unit_rms(soft, self.eps))


class Vision(nn.Module):
    """The part of the encoder that reads images, under its names on disk."""

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.embed_vision = VisionEmbedder(config, hidden_size)


def by_soft_token(positions: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Return the order of an image's patches in which those of a soft token are neighbours, and
    soft tokens go from left to right and from the top down: int [P].

    Args:
      positions: [P, 2], column and row of each patch, in any order.
      config: of the tower.

    Raises:
      ValueError: if the patches are no whole picture, or one that the tower has no positions for.
    """
    k, most = config.pooling_kernel_size, config.position_embedding_size
    if positions.ndim != 2 or positions.shape[1] != 2 or not len(positions):
        raise ValueError(f"positions must be [P, 2] with P >= 1, got {positions.shape}")
    columns, rows = positions[:, 0].astype(np.int64), positions[:, 1].astype(np.int64)
    width, height = int(columns.max()) + 1, int(rows.max()) + 1
    if min(columns.min(), rows.min()) < 0 or max(width, height) > most:
        raise ValueError(
            f"positions must be from 0 to {most - 1}, got {int(positions.min())} to "
            f"{int(positions.max())}"
        )
    is_whole = len(np.unique(rows * width + columns)) == width * height == len(positions)
    if width % k or height % k or not is_whole:
        raise ValueError(
            f"{len(positions)} patches up to column {width - 1} and row {height - 1} are no whole "
            f"picture, whose sides are multiples of {k} patches"
        )
    token = columns // k + width // k * (rows // k)
    return np.lexsort((columns, rows, token))


def _waves(positions: mx.array, config: VisionConfig) -> tuple[mx.array, mx.array]:
    """Return cosines and sines, float32 [I, 1, P, H]: the first half of a head turns by the column,
    the second by the row; sines of each half's first part are negative, as `_rotate` needs."""
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    rates = mx.array(1 / np.float32(config.rope_theta) ** exponents)  # [H / 4]
    angles = positions.astype(mx.float32)[..., None] * rates  # [I, P, 2, H / 4]
    cosines, sines = mx.cos(angles), mx.sin(angles)
    wide = [
        mx.concatenate([cosines, cosines], axis=-1),
        mx.concatenate([-sines, sines], axis=-1),
    ]
    cosines, sines = (each.flatten(-2)[:, None] for each in wide)
    return cosines, sines


def _rotate(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Turn pairs (i, i + H / 4) of each half of heads, [I, heads, P, H]."""
    a, b, c, d = mx.split(x, 4, axis=-1)
    return turned(x, mx.concatenate([b, a, d, c], axis=-1), cosines, sines)


def _attend_all(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Return softmax(q k) v, [I, N, P, H]."""
    images, N, patches, H = q.shape
    if not is_cpu():
        room = next((size for size in _FUSED if H <= size), H) - H
        if room:
            q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, room)]) for x in (q, k, v))
        return attend(q, [LayerContext(k, v)], None)[..., :H]
    step = max(1, _SCORES_BYTES // (4 * images * N * patches))
    seen = [LayerContext(k, v)]
    parts = [attend(q[:, :, i : i + step], seen, None) for i in range(0, patches, step)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _as_it_is(layer: VisionLayer, *arguments: Any) -> mx.array:
    return layer(*arguments)
