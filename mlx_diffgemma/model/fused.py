"""Fusion of products on the same input after loading: queries, keys and values; gate and up. Norms'
scales become float32, in which they are used. Names on disk do not change, and modules with
adapters are not fused."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .experts import Router
from .layers import MLP, RMSNorm


def fuse(model: nn.Module, *, but: Collection[str] = ()) -> None:
    """Fuse products with equal packing and no adapter, in place, module by module.

    Args:
      model: any module.
      but: paths of modules whose products stay apart.
    """
    # Only the owners are listed: a list of all modules would keep the replaced ones in memory.
    kinds = (Attention, MLP, RMSNorm, Router)
    owners = [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]
    for path, module in owners:
        if path in but and isinstance(module, (Attention, MLP)):
            continue
        if isinstance(module, Attention):
            names = [name for name in ("q_proj", "k_proj", "v_proj") if name in module]
            if _fuse(module, names, "qkv_proj"):
                module.qk_scale = module.norm_scale().astype(mx.float32)
                mx.eval(module.qk_scale)
                del module.q_norm, module.k_norm
        elif isinstance(module, MLP):
            _fuse(module, ["gate_proj", "up_proj"], "gate_up_proj")
        elif isinstance(module, RMSNorm):
            module.weight = module.weight.astype(mx.float32)
        elif isinstance(module, Router):
            module.per_expert_scale = module.per_expert_scale.astype(mx.float32)
    mx.eval(model.parameters())


def _fuse(owner: nn.Module, names: Sequence[str], fused: str) -> bool:
    """Replace linear modules of equal packing by one with their rows concatenated."""
    if fused in owner:
        return False
    parts = [owner[name] for name in names]
    first = parts[0]
    # Possibly only some of them have an adapter.
    are_plain = all(type(part) in (nn.Linear, nn.QuantizedLinear) for part in parts)
    if not are_plain or len({_kind(part) for part in parts}) > 1:
        return False
    arrays = {
        name: mx.concatenate([part[name] for part in parts], axis=0) for name in first.parameters()
    }
    mx.eval(arrays)  # so that the parts can be freed
    first.update(arrays)  # keeps its packing
    owner[fused] = first
    for name in names:
        owner.pop(name)
    return True


def _kind(module: nn.Module) -> tuple[object, ...]:
    packing = tuple(getattr(module, name, None) for name in ("group_size", "bits", "mode"))
    return type(module), packing, tuple((n, a.dtype) for n, a in module.parameters().items())
