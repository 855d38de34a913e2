"""The README of a converted checkpoint."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .plan import Plan


def model_card(plan: Plan, source: dict[str, Any]) -> str:
    """Markdown with the front matter that the Hub reads."""
    parts: dict[str, set[str]] = defaultdict(set)
    for move in plan.moves:
        parts[move.part].add(move.describe())
    rows = "\n".join(f"| {part} | {', '.join(sorted(kinds))} |" for part, kinds in parts.items())
    # A path of this machine is nobody else's business.
    name = plan.checkpoint.folder.name if Path(source["path"]).is_absolute() else source["path"]
    at = f" at revision {source['revision']}" if source["revision"] else ""
    return f"""---
license: apache-2.0
library_name: mlx
pipeline_tag: text-generation
base_model: google/diffusiongemma-26B-A4B-it
tags:
- mlx
- diffusion
---

# DiffusionGemma for MLX

Converted by mlx-diffgemma from `{name}`{at} ({source["layout"]} layout). DiffusionGemma is by
Google, under the Apache License 2.0; a source that is a fine-tune of it may say more.

| part | stored as |
|---|---|
{rows}

{plan.tensor_bytes:,} bytes of tensors. `conversion.json` holds the recipe, the versions and a
checksum of every tensor; `mlx_diffgemma.convert --mlx-path . --verify` checks them.
"""
