"""Reads a checkpoint's own settings of a run, those of generation_config.json. Imports no mlx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .entry import entries
from .generation import GenerationSettings
from .reading import Raw, warn_unknown

# Keys without a meaning here.
_INERT = frozenset(
    "max_length pad_token_id bos_token_id eos_token_id transformers_version sampler_config "
    "_from_model_config return_dict_in_generate cache_implementation cache_config "
    "disable_compile _commit_hash".split()
)


def read_settings(raw: Raw, *, where: str) -> GenerationSettings:
    """Return the settings in generation_config.json, open where it has none. A sampler other than
    the entropy-bound one is refused.

    Raises:
      ConfigError: names the file, `where`, and what is wrong.
    """
    sampler = raw.get("sampler_config") or {}
    if not isinstance(sampler, Mapping):
        raise ConfigError(f"{where}: sampler_config must be an object, got {sampler!r}")
    name = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
    if name != "EntropyBoundSamplerConfig":
        raise ConfigError(
            f"{where}: sampler {name!r} is not supported, only EntropyBoundSamplerConfig is"
        )
    values: dict[str, Any] = {}
    known: set[str] = set()
    for setting_name, entry in entries(GenerationSettings).items():
        if entry.checkpoint is not None:
            first, _, second = entry.checkpoint.partition(".")
            known.add(first)
            values[setting_name] = sampler.get(second) if second else raw.get(first)
    warn_unknown(raw, _INERT | known, where)
    try:
        return GenerationSettings(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
