"""The facts about a checkpoint that `info` shows, from its config and headers. Reads no tensor;
imports no mlx."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.formats import source_of
from ..config.model import ModelConfig, TextConfig
from .files import is_temporary
from .headers import TYPES, TensorInfo
from .memory import needed_bytes
from .names import FOREIGN_VISION, VISION, part_of
from .tied import read_assigned

CONTEXTS = (4096, 32768)  # tokens of context for which the needed memory is shown


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the model, such as all attention projections."""

    name: str
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True, slots=True)
class Info:
    """The result of `describe`."""

    name: str  # folder, or repo id on the Hub
    folder: Path | None  # None where only headers were fetched from the Hub
    parameters: int  # everything on disk, vision included
    active_parameters: int  # used for one token in the text path
    parts: tuple[Part, ...]
    disk_bytes: int  # weight files
    tensors: int
    files: int
    loaded_bytes: int  # of the tensors that a text run loads
    needed_bytes: dict[int, int]  # context tokens -> bytes, an estimate
    vision: str  # "absent", what it takes, or why it is never loaded
    vision_bytes: int  # of its tensors, which the first image loads
    config: ModelConfig


def describe(folder: Path) -> Info:
    """Count a checkpoint in any layout that loads.

    Raises:
      DiffGemmaError: if config or weight files are missing or damaged.
    """
    config = ModelConfig.from_folder(folder)
    tensors, assigned = read_assigned(folder)
    ours = {stored: name for name, stored in assigned.sources.items()}
    parameters: dict[str, int] = defaultdict(int)
    nbytes: dict[str, int] = defaultdict(int)
    for name, info in tensors.items():
        part = part_of(name)
        nbytes[part] += info.nbytes
        # A tied weight counts once, and scales of activations do not count.
        if (
            name not in assigned.copies
            and assigned.ignored.get(name, FOREIGN_VISION) == FOREIGN_VISION
        ):
            parameters[part] += _parameters(name, ours.get(name, name), tensors, config)
    loaded = sum(info.nbytes for info in assigned.used.values())
    vision_bytes = sum(info.nbytes for info in assigned.vision.values())
    if vision_bytes:
        vision = f"{vision_bytes:,} bytes, loaded with the first image"
    else:
        vision = FOREIGN_VISION if nbytes[VISION] else "absent"
    text = config.text
    idle_experts = parameters["experts"] * (text.num_experts - text.top_k_experts)
    files = {info.file for info in tensors.values()}
    return Info(
        name=source_of(folder),
        folder=None if is_temporary(folder) else folder,
        parameters=sum(parameters.values()),
        active_parameters=sum(parameters.values())
        - parameters[VISION]
        - idle_experts // text.num_experts,
        parts=tuple(
            Part(name, parameters[name], nbytes[name])
            for name in sorted(parameters, key=lambda name: -parameters[name])
            if parameters[name]
        ),
        disk_bytes=sum(file.stat().st_size for file in files),
        tensors=len(tensors),
        files=len(files),
        loaded_bytes=loaded,
        needed_bytes={
            n: needed_bytes(text, loaded, n, config.canvas_length) for n in contexts_of(text)
        },
        vision=vision,
        vision_bytes=vision_bytes,
        config=config,
    )


def contexts_of(text: TextConfig) -> tuple[int, ...]:
    """Return the tokens of context for which the needed memory is shown: those of `CONTEXTS` that
    a model has positions for, or all of its positions."""
    return tuple(n for n in CONTEXTS if n <= text.max_position_embeddings) or (
        text.max_position_embeddings,
    )


def _parameters(stored: str, name: str, tensors: dict[str, TensorInfo], config: ModelConfig) -> int:
    """Return the number of weights in a tensor: unpacked ones for packed tensors, none for scales.
    `name` is ours."""
    info = tensors[stored]
    module, _, leaf = stored.rpartition(".")
    if f"{module}.scales" not in tensors:
        return info.elements
    paths = module, name.rpartition(".")[0]
    setting = config.quantization.for_module(*paths) if config.quantization else None
    if leaf != "weight" or setting is None:
        return 0
    return info.elements * TYPES[info.dtype] // setting.bits


def as_object(info: Info) -> dict[str, Any]:
    """Return the facts as an object for JSON."""
    text = info.config.text
    return {
        "model": info.name,
        "folder": None if info.folder is None else str(info.folder),
        "parameters": info.parameters,
        "active_parameters": info.active_parameters,
        "disk_bytes": info.disk_bytes,
        "tensors": info.tensors,
        "files": info.files,
        "loaded_bytes": info.loaded_bytes,
        "needed_bytes": {str(tokens): nbytes for tokens, nbytes in info.needed_bytes.items()},
        "vision": info.vision,
        "vision_bytes": info.vision_bytes,
        "layers": text.num_hidden_layers,
        "experts": text.num_experts,
        "experts_per_token": text.top_k_experts,
        "vocabulary": text.vocab_size,
        "canvas_length": info.config.canvas_length,
        "max_positions": text.max_position_embeddings,
        "parts": [
            {
                "part": part.name,
                "parameters": part.parameters,
                "bytes": part.nbytes,
                "bits_per_weight": round(part.bits_per_weight, 3),
            }
            for part in info.parts
        ],
    }
