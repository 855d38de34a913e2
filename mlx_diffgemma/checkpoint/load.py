"""Folder or repo id -> model and tokenizer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..config.model import ModelConfig
from ..language.tokenizer import load_tokenizer
from ..model import DiffusionGemma
from ..model.fused import fuse
from .adapters import load_adapters
from .blas import slow_blas
from .files import resolve
from .memory import WARN_ABOVE, needed_bytes, recommended_bytes
from .tied import read_assigned
from .weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WARNED_AT_TOKENS = 4096


def load(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    fused: bool = True,
) -> tuple[DiffusionGemma, PreTrainedTokenizerBase]:
    """Load a checkpoint and its tokenizer, as `mlx_lm.load` does.

    Args:
      path_or_repo: a folder, or a Hub repo id or its short name (`4bit`, `8bit`, ...), which is
        downloaded where it is not cached.
      revision: branch, tag or commit of a repository.
      adapter_path: as for `load_model`.
      fused: as for `load_model`.

    Raises:
      DiffGemmaError: one line that says what is wrong with the folder, its config, weights or
      tokenizer.
    """
    folder = resolve(path_or_repo, revision)
    # What is quick to check comes first; the config before transformers looks at it on its own.
    config = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(folder)
    return build_model(folder, config, adapter_path=adapter_path, fused=fused), tokenizer


def load_model(
    folder: str | os.PathLike[str],
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    fused: bool = True,
) -> DiffusionGemma:
    """Load the model alone, from a folder that may have no tokenizer. Warn where memory will be
    short.

    Args:
      folder: a checkpoint's.
      adapter_path: folder of adapters, or of weights trained in full, in mlx-lm's format.
      fused: queries, keys and values become one product after loading, gate and up likewise,
        where no adapter is on them; False leaves every module under its checkpoint's name, as
        training needs.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    return build_model(folder, config, adapter_path=adapter_path, fused=fused)


def build_model(
    folder: Path,
    config: ModelConfig,
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    fused: bool = True,
) -> DiffusionGemma:
    """As `load_model`, from a config that was read already: its warnings come once."""
    used = list(read_assigned(folder)[1].used.values())
    weights, element_bytes = sum(info.nbytes for info in used), 2
    if mx.default_device() == mx.cpu:  # what is not packed becomes float32 there
        weights += sum(info.nbytes for info in used if info.dtype in ("BF16", "F16"))
        element_bytes = 4
        if hint := slow_blas(weights):
            warnings.warn(hint, stacklevel=2)
    needed = needed_bytes(
        config.text, weights, _WARNED_AT_TOKENS, config.canvas_length, element_bytes=element_bytes
    )
    if needed > WARN_ABOVE * (available := recommended_bytes()):
        warnings.warn(
            f"{folder} needs about {needed / 1e9:.1f} GB, "
            f"more than {WARN_ABOVE:.0%} of the {available / 1e9:.1f} GB "
            "that this device recommends; expect it to be slow or to fail",
            stacklevel=2,
        )
    model = DiffusionGemma(config)
    load_weights(model, config, folder)
    if adapter_path is not None:
        load_adapters(model, adapter_path)
    if fused:
        fuse(model)
    model.eval()
    return model
