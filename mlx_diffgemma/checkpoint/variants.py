"""One model with several adapters: variants that share every weight that the adapters leave."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..model import DiffusionGemma
from ..model.fused import fuse
from .adapters import changes_vision, load_adapters
from .load import load

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer


def load_variants(
    path_or_repo: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]],
    *,
    revision: str | None = None,
    vision: bool | None = None,
) -> tuple[DiffusionGemma, dict[str, DiffusionGemma], AnyTokenizer]:
    """Load a checkpoint once, and variants of it with adapters. A variant takes the memory of its
    adapter alone; products whose weights some adapter changes are fused in no variant.

    Args:
      path_or_repo: as for `load`.
      adapters: folders of adapters, or of weights trained in full, by the variants' names.
      revision: as for `load`.
      vision: as for `load`.

    Returns:
      The model without adapters, the variants by name, and the tokenizer of all.

    Raises:
      DiffGemmaError: as `load`; SourceError names the folder of an adapter that does not fit.
    """
    if not adapters:
        model, tokenizer = load(path_or_repo, revision=revision, vision=vision)
        return model, {}, tokenizer
    model, tokenizer = load(path_or_repo, revision=revision, vision=vision, fused=False)
    return model, variants_of(model, adapters), tokenizer


def variants_of(
    model: DiffusionGemma, adapters: Mapping[str, str | os.PathLike[str]]
) -> dict[str, DiffusionGemma]:
    """Return variants of a model, and fuse it and them; see `load_variants`.

    Args:
      model: not fused.
      adapters: folders by name, at least one.

    Raises:
      SourceError: if an adapter does not fit.
    """
    if not model.has_vision and any(map(changes_vision, adapters.values())):
        model.take_vision(model.vision_source.bring())
    variants = {name: cast(DiffusionGemma, _copied(model)) for name in adapters}
    for name, folder in adapters.items():
        load_adapters(variants[name], folder)
    changed = set[str]().union(*(_changed(model, variant) for variant in variants.values()))
    fuse(model, but=changed)
    for variant in variants.values():
        _share(model, variant, changed)
        fuse(variant, but=changed)  # the scales of norms that it has for itself
        variant.eval()
    return variants


def _copied(value: Any) -> Any:
    """Return a copy of a tree of modules; its arrays are the same."""
    if isinstance(value, nn.Module):
        module = copy.copy(value)
        module._no_grad = set(value._no_grad)
        for name, child in value.items():
            dict.__setitem__(module, name, _copied(child))
        return module
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(child) for child in value)
    return value


def _changed(model: nn.Module, variant: nn.Module) -> set[str]:
    """Return the paths of modules in which the variant differs, and of those that hold them."""
    own = dict(model.named_modules())
    changed = set()
    for path, module in variant.named_modules():
        same = own.get(path)
        if same is None or type(same) is not type(module) or _differ(same, module):
            parts = path.split(".") if path else []
            changed |= {".".join(parts[:depth]) for depth in range(len(parts) + 1)}
    return changed


def _differ(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules have other arrays of their own."""
    arrays, others = (
        {name: id(value) for name, value in module.items() if isinstance(value, mx.array)}
        for module in (one, other)
    )
    return arrays != others


def _share(model: Any, variant: Any, changed: set[str], path: str = "") -> None:
    """Put the model's own modules in the place of a variant's copies of them."""
    children = model.items() if isinstance(model, nn.Module) else enumerate(model)
    for name, child in children:
        below = f"{path}.{name}" if path else str(name)
        if isinstance(child, nn.Module) and below not in changed:
            variant[name] = child
        elif isinstance(child, (nn.Module, list)):
            _share(child, variant[name], changed, below)
