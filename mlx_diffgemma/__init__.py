"""DiffusionGemma on MLX: text that settles out of noise, 256 tokens at a time.

Names are imported on first use, so that `--help` and `import mlx_diffgemma` need neither mlx nor
transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.files import bundled_model as bundled_model
    from .checkpoint.load import load as load
    from .checkpoint.load import load_model as load_model
    from .config.generation import GenerationSettings as GenerationSettings
    from .config.images import ImageSettings as ImageSettings
    from .constraint.constraint import Constraint as Constraint
    from .denoise.loop import denoise_tokens as denoise_tokens
    from .denoise.noise import SeededNoise as SeededNoise
    from .denoise.store import Store as Store
    from .engine.engine import Engine as Engine
    from .errors import DiffGemmaError as DiffGemmaError
    from .language.prompt import PromptOptions as PromptOptions
    from .language.prompt import encode_prompt as encode_prompt
    from .language.template import Template as Template
    from .language.tokenizer import Tokenizer as Tokenizer
    from .language.tokenizer import load_tokenizer as load_tokenizer
    from .write.chat import Chat as Chat
    from .write.decide import DecisionTask as DecisionTask
    from .write.decide import decide as decide
    from .write.edit import Selection as Selection
    from .write.edit import edit as edit
    from .write.fill import fill as fill
    from .write.generate import Request as Request
    from .write.generate import batch_generate as batch_generate
    from .write.generate import generate as generate
    from .write.generate import stream_generate as stream_generate
    from .write.questions import Question as Question

    __version__: str

# Public name -> the file that defines it.
_HOME = {
    "Chat": "write.chat",
    "Constraint": "constraint.constraint",
    "DecisionTask": "write.decide",
    "DiffGemmaError": "errors",
    "Engine": "engine.engine",
    "GenerationSettings": "config.generation",
    "ImageSettings": "config.images",
    "PromptOptions": "language.prompt",
    "SeededNoise": "denoise.noise",
    "Question": "write.questions",
    "Request": "write.generate",
    "Selection": "write.edit",
    "Store": "denoise.store",
    "Template": "language.template",
    "Tokenizer": "language.tokenizer",
    "batch_generate": "write.generate",
    "bundled_model": "checkpoint.files",
    "decide": "write.decide",
    "denoise_tokens": "denoise.loop",
    "edit": "write.edit",
    "encode_prompt": "language.prompt",
    "fill": "write.fill",
    "generate": "write.generate",
    "load": "checkpoint.load",
    "load_model": "checkpoint.load",
    "load_tokenizer": "language.tokenizer",
    "stream_generate": "write.generate",
}
__all__ = sorted(_HOME)


# `python -m mlx_diffgemma.generate` and similar commands find their files here.
__path__.append(f"{__path__[0]}/cli/as_module")


class _Package(ModuleType):
    """The package's class: `generate`, `fill` and `edit` stay functions, although modules of the
    same names exist for `python -m`."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a module binds it in its package, before or over the function.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlx-diffgemma")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(f".{_HOME[name]}", __name__)
    except ImportError as error:
        from .errors import backend_error

        if (explained := backend_error(error)) is None:
            raise
        raise explained from None
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
