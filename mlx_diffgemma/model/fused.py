"""One product where the checkpoint has several on the same input: queries, keys and values; gate
and up. And norms' scales in the float32 that they are used in. Made after loading; names on disk
stay, and a model under adapters is left alone."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .experts import Router
from .layers import MLP, RMSNorm


def fuse(model: nn.Module) -> None:
    """Fuses what has one packing and no adapter, in place, module by module."""
    # Only the owners are listed: a list of all modules would hold on to what is replaced.
    owners = [m for m in model.modules() if isinstance(m, (Attention, MLP, RMSNorm, Router))]
    for module in owners:
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
    """Replaces linear modules by one with their rows one after the other, where they are alike."""
    if fused in owner:
        return False
    parts = [owner[name] for name in names]
    first = parts[0]
    # An adapter may be on one of them alone.
    are_plain = all(type(part) in (nn.Linear, nn.QuantizedLinear) for part in parts)
    if not are_plain or len({_kind(part) for part in parts}) > 1:
        return False
    arrays = {
        name: mx.concatenate([part[name] for part in parts], axis=0) for name in first.parameters()
    }
    mx.eval(arrays)  # the parts must be able to go
    first.update(arrays)  # keeps its packing
    owner[fused] = first
    for name in names:
        owner.pop(name)
    return True


def _kind(module: nn.Module) -> tuple[object, ...]:
    packing = tuple(getattr(module, name, None) for name in ("group_size", "bits", "mode"))
    return type(module), packing, tuple((n, a.dtype) for n, a in module.parameters().items())
