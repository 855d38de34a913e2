"""The `quantization` block of config.json: how MLX packs each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from .reading import Raw, integer

# mode -> the bits and group sizes that MLX packs
QUANTIZATION_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How one module is packed."""

    group_size: int
    bits: int
    mode: str = "affine"

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> Quantization:
        """Read one block. `{"group_size": 64, "bits": 4}` is affine: a missing mode never means the
        file's global one."""
        mode = raw.get("mode", "affine")
        if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
            raise ConfigError(
                f"{where}: quantization mode {mode!r} is not one of {', '.join(QUANTIZATION_MODES)}"
            )
        bits, group_size = integer(raw, "bits", where), integer(raw, "group_size", where)
        legal_bits, legal_groups = QUANTIZATION_MODES[mode]
        if bits not in legal_bits or group_size not in legal_groups:
            raise ConfigError(
                f"{where}: {mode} cannot pack {bits} bits in groups of {group_size}; "
                f"bits {list(legal_bits)} and groups {list(legal_groups)} exist"
            )
        return cls(group_size, bits, mode)


@dataclass(frozen=True)
class QuantizationConfig:
    """The `quantization` block: a setting for every module, and overrides by module path."""

    default: Quantization
    overrides: Mapping[str, Quantization | None]  # None: the module is not packed

    def for_module(self, *paths: str) -> Quantization | None:
        """Return the setting of a module whose weights come with scales, under any of its names."""
        named = next((path for path in paths if path in self.overrides), None)
        return self.default if named is None else self.overrides[named]

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> QuantizationConfig:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: quantization must be an object, got {raw!r}")
        overrides: dict[str, Quantization | None] = {}
        for path, value in raw.items():
            if isinstance(value, Mapping):
                overrides[path] = Quantization.from_dict(
                    value, where=f"{where}: quantization of {path}"
                )
            elif isinstance(value, bool):
                overrides[path] = Quantization.from_dict(raw, where=where) if value else None
        return cls(Quantization.from_dict(raw, where=f"{where}: quantization"), overrides)
