"""Errors that a user can correct. Everything else is a bug and keeps its traceback."""

import json
import platform
import re
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path


class DiffGemmaError(Exception):
    """A user's mistake. Its message is one line: what was given, what was expected, and what to
    do."""

    def __init__(self, message: str) -> None:
        # File names and other libraries' messages, which ours quote, may hold line breaks.
        super().__init__(" ".join(message.splitlines()))


class SourceError(DiffGemmaError):
    """A folder or repository that cannot be found, reached or read."""


class ConfigError(DiffGemmaError):
    """A config.json, generation_config.json or setting with a missing, contradictory or impossible
    value."""


class WeightsError(DiffGemmaError):
    """Weight files that are missing, damaged, or do not fit the config."""


class PromptError(DiffGemmaError):
    """A prompt that cannot be turned into tokens the model accepts."""


class PromptLengthError(PromptError):
    """A prompt that has more tokens than the model has positions for."""


class ImageError(PromptError):
    """A picture or video that cannot be read, or not within its limits."""


class TemplateError(DiffGemmaError):
    """A template or selection that cannot be read or cannot be met."""


class ConstraintError(DiffGemmaError):
    """A constraint that cannot be held, or not within the tokens that an answer may have, and where
    in it the reason lies.

    Attributes:
      keyword: the keyword of a JSON Schema that is the reason.
      pointer: the JSON pointer to the schema that holds the keyword.
      position: the index of the character of an expression.
    """

    def __init__(
        self,
        message: str,
        *,
        keyword: str | None = None,
        pointer: str | None = None,
        position: int | None = None,
    ) -> None:
        super().__init__(message)
        self.keyword, self.pointer, self.position = keyword, pointer, position


class LimitError(ConstraintError):
    """A constraint whose automaton has too many states or takes too long to make."""


class QuestionError(DiffGemmaError):
    """A question that cannot be decided in one step."""


class DataError(DiffGemmaError):
    """A data file that cannot be read, or a line in it that is not a valid example."""


class NumbersError(DiffGemmaError):
    """A model that computes numbers that are not finite."""


class ThreadError(DiffGemmaError):
    """A stream that is read in another thread than the one that began it."""


class EngineError(DiffGemmaError):
    """An engine that cannot take a request, or has ended it."""


class QueueFullError(EngineError):
    """An engine whose queue has no room now."""


class EngineClosedError(EngineError):
    """An engine that takes no more requests."""


class EngineFailedError(EngineError):
    """A failure of the model that ended all requests under way."""


class ChatError(DiffGemmaError):
    """A chat that cannot do what is asked, or a file that is no saved chat."""


class LossError(DiffGemmaError):
    """A loss that is not finite."""


class BackendError(DiffGemmaError, ImportError):
    """MLX is not installed, or it has no backend for this machine."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as in "1 token" or "1,200 tokens"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def backend_error(error: ImportError) -> BackendError | None:
    """Return the error for a failed import of MLX, or None if the failed import was another.

    The wheels of MLX for Linux hold no backend: without an extra that brings one, `mlx.core` is
    missing or does not find its library.
    """
    # If a shared library is missing, the name is "core", and the path shows that it is MLX's.
    if "mlx" not in ((error.name or "").split(".")[0], Path(error.path or "").parent.name):
        return None
    where, package = _installed_from()
    if platform.system() == "Linux":
        package = f"'{package}[cpu]' (or '{package}[cuda]' for NVIDIA cards)"
    else:
        where, package = "", "mlx"
    return BackendError(f"MLX cannot be used here ({error.msg}); run{where}: pip install {package}")


def _installed_from() -> tuple[str, str]:
    """Return (where to run pip, what it is to install again), for a message."""
    try:
        origin = Distribution.from_name("mlx-diffgemma").read_text("direct_url.json")
        url = str(json.loads(origin or "{}").get("url", ""))
    except (PackageNotFoundError, ValueError):
        return "", "mlx-diffgemma"
    plain = re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes.fromhex(m[1].decode()), url.encode())
    folder = Path(plain.decode("utf-8", "replace").removeprefix("file://"))
    if url.startswith("file://") and folder.is_dir():
        return f" in {folder}", "."
    return "", "mlx-diffgemma"
