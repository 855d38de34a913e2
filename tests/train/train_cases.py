"""A small random checkpoint with a tokenizer, and data to train it on. Not a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

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


def split_of(folder: Path, tokenizer: Any, **changes: Any) -> list[Example]:
    """The training examples of a data folder, for the model above."""
    limits = {"vocab_size": 384, "canvas_length": 8, "max_seq_length": 256} | changes
    return read_split(folder, "train", tokenizer, **limits)


def seeing_model(folder: Path, seed: int = 5) -> Path:
    """A small model whose tower has places for pictures of 70 tokens."""
    small_model(folder, seed)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"boi_token_id": 17, "image_token_id": 18, "eoi_token_id": 19}
    config["vision_config"] |= {"position_embedding_size": 210}
    path.write_text(json.dumps(config))
    (folder / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 70}}')
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.encoder.vision_tower.patch_embedder.position_embedding_table"
    shape = (2, 210, tensors[name].shape[2])
    tensors[name] = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def picture(folder: Path, name: str, size: tuple[int, int], colour: Any) -> dict[str, str]:
    """A part of a message: a picture of one colour, written beside the data."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name)
    return {"type": "image", "image": name}


def asked(*parts: Any, answer: str = "yes") -> dict[str, Any]:
    """A line whose question has these parts: pictures and texts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    question = {"role": "user", "content": content}
    return {"messages": [question, {"role": "assistant", "content": answer}]}
