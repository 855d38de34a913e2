"""DiffusionGemma on MLX: text that settles out of noise, 256 tokens at a time.

Names are resolved on first use, so that `--help` and `import mlx_diffgemma` need neither mlx nor
transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edit import edit as edit
    from .errors import DiffGemmaError as DiffGemmaError
    from .files import bundled_model as bundled_model
    from .fill import fill as fill
    from .generate import batch_generate as batch_generate
    from .generate import generate as generate
    from .generate import stream_generate as stream_generate
    from .load import load as load
    from .prompt import PromptOptions as PromptOptions
    from .settings import GenerationSettings as GenerationSettings
    from .template import Template as Template

_HOME = {
    "DiffGemmaError": "errors",
    "GenerationSettings": "settings",
    "Template": "template",
    "PromptOptions": "prompt",
    "batch_generate": "generate",
    "edit": "edit",
    "fill": "fill",
    "bundled_model": "files",
    "generate": "generate",
    "load": "load",
    "stream_generate": "generate",
}
__all__ = sorted(_HOME)


class _Package(ModuleType):
    """`generate`, `fill` and others are functions here, although files bear the same names."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the file `generate.py` binds it as `mlx_diffgemma.generate`, before or over the
        # function.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
