"""The packed formats of weights that a config.json may declare.

MLX's own packing is read by `QuantizationConfig`. All others are written by tools for other
runtimes; the converter reads two of them.

Sources of the keys: transformers, utils/quantization_config.py; compressed-tensors,
quantization/quant_config.py and quant_args.py; vLLM, docs/features/quantization/modelopt.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Raw = Mapping[str, Any]

NVFP4, FP8 = "nvfp4", "fp8"  # the converter's names for the layouts that it reads
SUPPORTED = (
    "bfloat16, float16, float32 and MLX packing load; "
    "ModelOpt NVFP4 and FP8 with one scale per channel convert"
)
_BLOCKS = ("quantization", "quantization_config", "compression_config")
_OTHERS = {"quant_algo", "config_groups", "producer"}  # keys that MLX's own blocks do not have
_TITLES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "bitsandbytes": "bitsandbytes",
    "quark": "AMD Quark",
    "gguf": "GGUF",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "transformers' NVFP4",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
    "metal": "transformers' Metal packing",
}
_MODELOPT = {
    "NVFP4": ("ModelOpt NVFP4", (NVFP4,)),
    "W4A16_NVFP4": ("ModelOpt NVFP4", (NVFP4,)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("ModelOpt FP8 with one scale per channel", (FP8,)),
    "FP8": ("ModelOpt FP8 with one scale per tensor", ()),
    "FP8_PB_WO": ("ModelOpt FP8 in blocks", ()),
    "MIXED_PRECISION": ("ModelOpt mixed precision", (NVFP4, FP8)),
}
_STRATEGIES = {
    "channel": "one scale per channel",
    "tensor": "one scale per tensor",
    "block": "scales in blocks",
    "group": "scales in groups",
    "tensor_group": "scales in groups",
}


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """A format that does not load directly."""

    name: str
    layouts: tuple[str, ...]  # the converter's layouts that this may be; empty: it reads none


def foreign_format(config: Raw) -> PackedFormat | None:
    """Return the format that config.json declares; None for plain weights and for MLX's packing."""
    if mlx_block(config) is not None:
        return None
    text = config.get("text_config")
    for raw in (config, text if isinstance(text, Mapping) else {}):
        for key in _BLOCKS:
            if isinstance(block := raw.get(key), Mapping) and block:
                return _name(block)
    return None


def mlx_block(config: Raw) -> Any:
    """Return the unchecked block that says how MLX packed the weights, or None.

    `quantization_config` is a copy of `quantization` in files that mlx-lm wrote, and another tool's
    block in others. GPTQ's and AWQ's have `bits` and `group_size` too.
    """
    block = config.get("quantization") or config.get("quantization_config")
    if isinstance(block, Mapping) and (_method(block) not in ("", "mlx") or _OTHERS & set(block)):
        return None
    return block or None


def without_packing(config: Raw) -> dict[str, Any]:
    """Return a config.json without the keys about packing."""
    plain = {key: value for key, value in config.items() if key not in _BLOCKS}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key not in _BLOCKS}
    return plain


def refusal(found: PackedFormat, source: str) -> str:
    """Say that a format does not load, and what to do instead. `source` is a folder or repo id."""
    if not found.layouts:
        return f"the weights are packed as {found.name}, which is not supported: {SUPPORTED}"
    return (
        f"the weights are packed as {found.name}, which does not load directly; convert them "
        f"first: mlx_diffgemma.convert --hf-path {source} --mlx-path NEW_FOLDER -q"
    )


def source_of(folder: Path) -> str:
    """Return a user's name for a folder: the repo id of a snapshot in the Hub's cache, else the
    path."""
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/", 1)
    return str(folder)


def _method(block: Raw) -> str:
    return str(block.get("quant_method") or "").lower().replace("_", "-")


def _name(block: Raw) -> PackedFormat | None:
    method = _method(block)
    producer = block.get("producer")
    nested = block.get("quantization")
    settings = nested if isinstance(nested, Mapping) else block  # as in hf_quant_config.json
    if (
        "modelopt" in method
        or "quant_algo" in settings
        or (isinstance(producer, Mapping) and producer.get("name") == "modelopt")
    ):
        return _modelopt(settings)
    if method == "compressed-tensors" or "config_groups" in block or "format" in block:
        return _compressed_tensors(block)
    if method == "fp8":
        size = block.get("weight_block_size")
        how = "in blocks" if size else "with one scale per tensor"
        return PackedFormat(f"FP8 {how}", ())
    if method == "fbgemm-fp8":
        return PackedFormat("FBGEMM FP8 with one scale per channel", (FP8,))
    if method == "bitsandbytes":
        bits = "8-bit" if block.get("load_in_8bit") else "4-bit"
        return PackedFormat(f"bitsandbytes {bits}", ())
    title = _TITLES.get(method.removeprefix("intel/").replace("autoround", "auto-round"))
    bits = f" {block['bits']}-bit" if isinstance(block.get("bits"), int) else ""
    return PackedFormat((title or f"quant_method {block.get('quant_method')!r}") + bits, ())


def _modelopt(settings: Raw) -> PackedFormat:
    algorithm = str(settings.get("quant_algo") or "").upper()
    if not algorithm:
        return PackedFormat("ModelOpt", (NVFP4, FP8))
    name, layouts = _MODELOPT.get(algorithm, (f"ModelOpt {algorithm}", ()))
    return PackedFormat(name, layouts)


def _compressed_tensors(block: Raw) -> PackedFormat | None:
    """Name the schemes of all groups of modules; a file may also quantize only its KV cache."""
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping):
        is_plain = block.get("format") == "dense"
        return None if is_plain else PackedFormat("compressed-tensors", (FP8,))
    found = [
        _scheme(group["weights"], str(group.get("format") or block.get("format")))
        for group in groups.values()
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]
    if not found:
        return None
    names = sorted({name for name, _ in found})
    is_readable = all(layout is not None for _, layout in found)
    return PackedFormat(f"compressed-tensors {' and '.join(names)}", (FP8,) if is_readable else ())


def _scheme(weights: Raw, form: str) -> tuple[str, str | None]:
    """Name one group's scheme, with the converter's layout for it."""
    for word in ("nvfp4", "mxfp4", "mxfp8"):
        if form.startswith(word):
            return f"{word.upper()} ({form})", None
    strategy = str(weights.get("strategy"))
    how = _STRATEGIES.get(strategy, f"strategy {strategy}")
    kind = f"{'FP' if weights.get('type') == 'float' else 'INT'}{weights.get('num_bits', 8)}"
    if kind == "FP8" and strategy == "channel":
        return f"FP8 with {how}", FP8
    return f"{kind} with {how} ({form})", None
