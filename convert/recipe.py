"""Recipes as data: the packing of each module. The first rule that matches a module's path
decides."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_diffgemma.config.quantization import QUANTIZATION_MODES, Quantization
from mlx_diffgemma.errors import ConfigError

MIXED, UNIFORM = "mixed", "uniform"
RECIPES = (MIXED, UNIFORM)
DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 64
DEFAULT_MODE = "affine"
# Outside the experts, 8 bits cost little size and save many denoise steps.
REST = Quantization(64, 8, "affine")


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules whose path matches `pattern`, as in a shell; None does not pack them.

    A setting from the user must fit every module; a default is skipped where it does not fit.
    """

    pattern: str
    setting: Quantization | None
    named: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """The packing of every module."""

    name: str
    rules: tuple[Rule, ...]

    def rule(self, path: str) -> Rule | None:
        """Return the rule for a module, such as `model.decoder.layers.0.mlp.up_proj`."""
        return next((rule for rule in self.rules if fnmatchcase(path, rule.pattern)), None)

    def as_object(self) -> dict[str, Any]:
        """Return the recipe as JSON, for the record of a conversion."""
        return {
            "name": self.name,
            "rules": [
                {
                    "pattern": rule.pattern,
                    **(
                        {
                            "bits": rule.setting.bits,
                            "group_size": rule.setting.group_size,
                            "mode": rule.setting.mode,
                        }
                        if rule.setting
                        else {"quantize": False}
                    ),
                }
                for rule in self.rules
            ],
        }


def choose(name: str, *, bits: int | None, group_size: int | None, mode: str | None) -> Recipe:
    """Return the recipe called `mixed` or `uniform`, or the one in a TOML file.

    Bits, group size and mode set the experts under `mixed` and everything under `uniform`; a TOML
    file sets all by itself.

    Raises:
      ConfigError: if the settings do not exist, or the file cannot be read.
    """
    given = bits is not None or group_size is not None or mode is not None
    if name not in RECIPES:
        if given:
            raise ConfigError(
                f"recipe {name} sets bits, group size and mode itself; leave out the --q options"
            )
        return _from_toml(Path(name))
    mode = mode or DEFAULT_MODE
    if mode not in QUANTIZATION_MODES:
        raise ConfigError(
            f"quantization mode {mode!r} is not one of {', '.join(QUANTIZATION_MODES)}"
        )
    legal_bits, legal_groups = QUANTIZATION_MODES[mode]
    wanted = Quantization.from_dict(
        {
            "bits": (DEFAULT_BITS if DEFAULT_BITS in legal_bits else legal_bits[0])
            if bits is None
            else bits,
            "group_size": (
                DEFAULT_GROUP_SIZE if DEFAULT_GROUP_SIZE in legal_groups else legal_groups[0]
            )
            if group_size is None
            else group_size,
            "mode": mode,
        },
        where="recipe",
    )
    named = group_size is not None
    if name == UNIFORM:
        return Recipe(UNIFORM, (Rule("*", wanted, named),))
    return Recipe(MIXED, (Rule("*.experts.*", wanted, named), Rule("*", REST)))


def _from_toml(path: Path) -> Recipe:
    """Read [[rule]] tables with `pattern`, and either `bits`, `group_size`, `mode` or `quantize =
    false`."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"recipe {str(path)!r} is neither {' nor '.join(RECIPES)} nor a file"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {_first_line(error)}") from error
    tables = raw.get("rule")
    if set(raw) != {"rule"} or not isinstance(tables, list) or not tables:
        raise ConfigError(f"recipe {path}: expected [[rule]] tables and nothing else")
    rules = []
    for number, table in enumerate(tables, start=1):
        where = f"recipe {path}, rule {number}"
        known = {"pattern", "bits", "group_size", "mode", "quantize"}
        if not isinstance(table, dict) or not isinstance(table.get("pattern"), str):
            raise ConfigError(f"{where}: pattern is missing")
        if unknown := sorted(set(table) - known):
            raise ConfigError(f"{where}: unknown keys {unknown}; known keys are {sorted(known)}")
        if not isinstance(quantize := table.get("quantize", True), bool):
            raise ConfigError(f"{where}: quantize must be true or false, got {quantize!r}")
        if not quantize:
            if idle := sorted(set(table) - {"pattern", "quantize"}):
                raise ConfigError(f"{where}: {idle} have no effect where quantize is false")
            rules.append(Rule(table["pattern"], None))
        else:
            setting = Quantization.from_dict(table, where=where)
            rules.append(Rule(table["pattern"], setting, named=True))
    return Recipe(path.stem, tuple(rules))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
