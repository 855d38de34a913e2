"""What can go wrong in a way that a user can put right. Everything else is a bug and keeps its
traceback."""


class DiffGemmaError(Exception):
    """A mistake in what was given: one line that says what was given, what was expected, and what
    to do."""

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


class TemplateError(DiffGemmaError):
    """A template, selection or constraint that cannot be read or cannot be met."""


class DataError(DiffGemmaError):
    """A data file that cannot be read, or a line in it that is no example."""


class LossError(DiffGemmaError):
    """A loss that is no number."""
