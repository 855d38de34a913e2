"""Loading of model and tokenizer from a folder or repo id."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..config.model import ModelConfig
from ..errors import DiffGemmaError, PromptError
from ..language.tokenizer import load_tokenizer
from ..model import DiffusionGemma
from ..model.fused import fuse
from ..model.vision import Vision
from .adapters import load_adapters
from .blas import slow_blas
from .files import resolve
from .headers import TensorInfo, sampled_hash
from .memory import WARN_ABOVE, needed_bytes, recommended_bytes
from .tied import read_assigned
from .weights import load_vision, load_weights, vision_tensors

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

_WARNED_AT_TOKENS = 4096


def load(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    fused: bool = True,
    vision: bool | None = None,
) -> tuple[DiffusionGemma, AnyTokenizer]:
    """Load a checkpoint and its tokenizer, as `mlx_lm.load` does.

    Args:
      path_or_repo: a folder, or a Hub repo id or its short name (`4bit`, `8bit`, ...), which is
        downloaded where it is not cached.
      revision: branch, tag or commit of a repository.
      adapter_path: as for `load_model`.
      fused: as for `load_model`.
      vision: as for `load_model`.

    Raises:
      DiffGemmaError: one line that says what is wrong with the folder, its config, weights or
      tokenizer.
    """
    folder = resolve(path_or_repo, revision)
    # Quick checks come first, and our check of the config before transformers' own.
    config = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(folder)
    model = build_model(folder, config, adapter_path=adapter_path, fused=fused, vision=vision)
    return model, tokenizer


def load_model(
    folder: str | os.PathLike[str],
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    fused: bool = True,
    vision: bool | None = None,
) -> DiffusionGemma:
    """Load only the model, from a folder that may have no tokenizer. Warn if memory is short.

    Args:
      folder: a checkpoint's.
      adapter_path: folder of adapters, or of weights trained in full, in mlx-lm's format.
      fused: fuse queries, keys and values into one product after loading, and gate and up, unless
        they have an adapter; False keeps every module under its checkpoint's name, as training
        needs.
      vision: True loads what reads images with the model, so that it can be trained; False never
        does, and images are refused; by default the first image loads it.

    Raises:
      DiffGemmaError: as `load`; with vision True, also if the folder has no vision tower.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    return build_model(folder, config, adapter_path=adapter_path, fused=fused, vision=vision)


def build_model(
    folder: Path,
    config: ModelConfig,
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    fused: bool = True,
    vision: bool | None = None,
) -> DiffusionGemma:
    """Run `load_model` on a config that was read already, so that its warnings come once."""
    if mx.default_device() == mx.cpu and (hint := slow_blas(_in_memory(folder)[0])):
        warnings.warn(hint, stacklevel=2)
    needed = loading_bytes(folder, config, _WARNED_AT_TOKENS, vision=bool(vision))
    if needed > WARN_ABOVE * (available := recommended_bytes()):
        warnings.warn(
            f"{folder} needs about {needed / 1e9:.1f} GB, "
            f"more than {WARN_ABOVE:.0%} of the {available / 1e9:.1f} GB "
            "that this device recommends; expect it to be slow or to fail",
            stacklevel=2,
        )
    model = DiffusionGemma(config)
    source = _Vision(config, folder, is_off=vision is False)
    model.vision_source = source
    if vision:
        model.take_vision(source.empty())
    load_weights(model, config, folder)
    if adapter_path is not None:
        load_adapters(model, adapter_path)
    if fused:
        fuse(model)
    model.eval()
    return model


class _Vision:
    """Vision from a checkpoint's files, loaded once for all variants of a model."""

    def __init__(self, config: ModelConfig, folder: Path, *, is_off: bool) -> None:
        self._config, self._folder, self._is_off = config, folder, is_off
        self._loaded: Vision | None = None

    @cached_property
    def _tensors(self) -> dict[str, TensorInfo]:
        return vision_tensors(self._config, self._folder)

    @property
    def nbytes(self) -> int:
        try:
            self.check()
        except DiffGemmaError:
            return 0
        return _bytes_in_memory(self._tensors.values())

    def check(self) -> None:
        reason = None
        if self._is_off:
            reason = "was loaded without its vision tower (vision=False, --no-vision)"
        elif self._config.vision is None:
            reason = "has no vision tower: its config.json has no vision_config"
        if reason is not None:
            raise PromptError(f"{self._folder} {reason}, so that it reads no images")
        assert self._tensors

    def bring(self) -> Vision:
        if self._loaded is None:
            self.check()
            self._loaded = load_vision(self._config, self._folder)
        return self._loaded

    def empty(self) -> Vision:
        """Return it without weights."""
        self.check()
        assert self._config.vision is not None
        return Vision(self._config.vision, self._config.text.hidden_size)

    def fingerprint(self) -> bytes:
        return sampled_hash(self._tensors)


def loading_bytes(folder: Path, config: ModelConfig, tokens: int, *, vision: bool = False) -> int:
    """Return an estimate of the bytes that a folder's model needs on this device, with a context of
    `tokens`, and with what reads images or without. Reads only headers."""
    weights, element_bytes = _in_memory(folder, vision=vision)
    return needed_bytes(
        config.text, weights, tokens, config.canvas_length, element_bytes=element_bytes
    )


def _in_memory(folder: Path, *, vision: bool = False) -> tuple[int, int]:
    """Return the bytes of a folder's weights after loading, and of a number in computation."""
    assigned = read_assigned(folder)[1]
    used = [*assigned.used.values(), *(assigned.vision.values() if vision else ())]
    return _bytes_in_memory(used), 4 if mx.default_device() == mx.cpu else 2


def _bytes_in_memory(tensors: Iterable[TensorInfo]) -> int:
    """Return the bytes of tensors after loading. On the CPU backend those that are not packed
    become float32."""
    listed = list(tensors)
    weights = sum(info.nbytes for info in listed)
    if mx.default_device() != mx.cpu:
        return weights
    return weights + sum(info.nbytes for info in listed if info.dtype in ("BF16", "F16"))
