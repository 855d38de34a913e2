"""A small random checkpoint with a tokenizer, and data to train it on. Not a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_diffgemma import bundled_model
from mlx_diffgemma.train.data import Example, read_split
from tests.checkpoints import draw_config, write_checkpoint

TEXT = {
    "vocab_size": 384,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "top_k_experts": 2,
    "sliding_window": 8,
    "canvas_length": 8,
    "per_layer": False,
}
LINES = [{"prompt": f"Say {n}.", "completion": " ".join(str(n) * (n % 5 + 1))} for n in range(24)]


def small_model(folder: Path, seed: int = 5, **text: Any) -> Path:
    """A checkpoint that learns in milliseconds, with the bundled tokenizer."""
    write_checkpoint(folder, draw_config(seed, **TEXT | text), seed)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bundled_model() / name, folder / name)
    return folder


def write_lines(folder: Path, split: str = "train", lines: list[Any] | None = None) -> Path:
    """A data folder with one more split: objects, or lines as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [line if isinstance(line, str) else json.dumps(line) for line in (lines or LINES)]
    (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def split_of(folder: Path, tokenizer: Any, **changes: int) -> list[Example]:
    """The training examples of a data folder, for the model above."""
    limits = {"vocab_size": 384, "canvas_length": 8, "max_seq_length": 256} | changes
    return read_split(folder, "train", tokenizer, **limits)
