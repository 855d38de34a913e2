"""`vision_config` of config.json: its keys and their checks. Imports no mlx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .reading import LARGEST, Raw, integer, positive, refuse_unless

_MOST_LAYERS = 1000  # bounds the lists that a damaged file makes us build
# transformers' class has these, so that a file saved by it may leave them out. They are not the
# published values.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
}
_THETA = 100.0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`vision_config` of config.json. Names are the checkpoint's keys; a key that it lacks has
    transformers' default."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    rope_theta: float
    rms_norm_eps: float
    standardize: bool
    use_clipped_linears: bool

    @property
    def patch_width(self) -> int:
        """The numbers of a patch: its pixels' red, green and blue."""
        return 3 * self.patch_size**2

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> VisionConfig:
        """Read `vision_config`. Keys without an effect, of which there are many, are not looked at.

        Raises:
          ConfigError: if a value is impossible or not supported.
        """
        given = {key: value for key, value in raw.items() if value is not None}
        counts = {key: integer(_DEFAULTS | given, key, where) for key in _DEFAULTS}
        refuse_unless(raw, "model_type", ("gemma4_vision",), where, default="gemma4_vision")
        activation = "gelu_pytorch_tanh"
        refuse_unless(raw, "hidden_activation", (activation,), where, default=activation)
        refuse_unless(raw, "attention_bias", (False, None), where, default=False)
        heads, shared = counts["num_attention_heads"], counts["num_key_value_heads"]
        if counts["num_hidden_layers"] > _MOST_LAYERS:
            raise ConfigError(
                f"{where}: num_hidden_layers is {counts['num_hidden_layers']}, more than "
                f"{_MOST_LAYERS}"
            )
        if heads % shared:
            raise ConfigError(
                f"{where}: {heads} attention heads cannot share {shared} key/value heads; the "
                "first must be a multiple of the second"
            )
        if counts["head_dim"] % 4:
            raise ConfigError(
                f"{where}: head_dim is {counts['head_dim']}; rotary embedding in two directions "
                "needs a multiple of 4"
            )
        widest = max(heads * counts["head_dim"], 3 * counts["patch_size"] ** 2)
        if widest > LARGEST:
            raise ConfigError(
                f"{where}: heads times head size, or the numbers of a patch, is {widest}, more "
                f"than the {LARGEST} that MLX can count"
            )
        return cls(
            **counts,
            rope_theta=_theta(raw, where),
            rms_norm_eps=positive(raw, "rms_norm_eps", where, 1e-6),
            standardize=_flag(raw, "standardize", where),
            use_clipped_linears=_flag(raw, "use_clipped_linears", where),
        )


def _theta(raw: Raw, where: str) -> float:
    rope: Any = raw.get("rope_parameters")
    if rope is None:
        return _THETA
    where = f"{where}, rope_parameters"
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}: an object is expected, got {rope!r}")
    # "default" in the published file, "axial" in one saved by transformers; they are the same.
    refuse_unless(rope, "rope_type", ("default", "axial", None), where, default=None)
    return positive(rope, "rope_theta", where, _THETA)


def _flag(raw: Raw, key: str, where: str) -> bool:
    refuse_unless(raw, key, (True, False, None), where, default=False)
    return bool(raw.get(key))
