"""The model card of a converted checkpoint. It claims only what the source's card says."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from .origin import folder_name, repository
from .plan import Plan

_PUBLISHER, _LICENSE = (
    "google",
    "apache-2.0",
)  # of the checkpoints that the publisher put on the Hub
_LICENSE_KEYS = ("license", "license_name", "license_link")


def model_card(plan: Plan) -> str:
    """Return Markdown with the front matter that the Hub reads."""
    parts: dict[str, set[str]] = defaultdict(set)
    for move in plan.moves:
        parts[move.part].add(move.describe())
    rows = "\n".join(f"| {part} | {', '.join(sorted(kinds))} |" for part, kinds in parts.items())
    folder, layout = plan.checkpoint.folder, plan.checkpoint.layout
    said = _front_matter(folder / "README.md")
    bases, terms = _base_models(folder, said), _license(folder, said)
    front: dict[str, Any] = {**terms, "library_name": "mlx", "pipeline_tag": "text-generation"}
    if bases:
        front["base_model"] = bases[0] if len(bases) == 1 else bases
    front["tags"] = ["mlx", "diffusion"]
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()
    if found := repository(folder):
        source = f"`{found[0]}` at revision {found[1]}"
    else:
        source = f"the local folder `{folder_name(folder)}`"
    silent = [word for word, known in (("base model", bases), ("license", terms)) if not known]
    gap = f"\nThe source has no card that names its {' or its '.join(silent)}." if silent else ""
    return f"""---
{header}
---

# DiffusionGemma for MLX

Converted by mlx-diffgemma from {source} ({layout} layout).{gap}
Google publishes DiffusionGemma under the Apache License 2.0; a fine-tune may have other terms.

| part | stored as |
|---|---|
{rows}

{plan.tensor_bytes:,} bytes of tensors. `conversion.json` holds the recipe, the versions and a
checksum of every tensor; `mlx_diffgemma.convert --mlx-path . --verify` checks them.
"""


def _base_models(folder: Path, said: dict[str, Any]) -> list[str]:
    """Return the repository that was converted; of a local folder, what its own card names."""
    if found := repository(folder):
        return [found[0]]
    named = said.get("base_model")
    names = named if isinstance(named, list) else [named]
    # Some tools write a local path here.
    return [n for n in names if isinstance(n, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", n)]


def _license(folder: Path, said: dict[str, Any]) -> dict[str, str]:
    """Return the terms of the source's card; a card is not downloaded with the publisher's own."""
    if isinstance(said.get("license"), str):
        return {key: said[key] for key in _LICENSE_KEYS if isinstance(said.get(key), str)}
    found = repository(folder)
    return {"license": _LICENSE} if found and found[0].startswith(f"{_PUBLISHER}/") else {}


def _front_matter(card: Path) -> dict[str, Any]:
    """Return the YAML between the two lines of dashes at the start; {} where there is none."""
    try:
        text = card.read_text("utf-8-sig")
        match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
        front = yaml.safe_load(match[1]) if match else None
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ):  # a damaged card must not stop a conversion
        return {}
    return front if isinstance(front, dict) else {}
