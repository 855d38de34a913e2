"""The settings of a training run: defaults, checks, YAML files; imports no mlx. Names are mlx-lm's
where it has the same setting, so that its YAML files can be used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .entry import Entry, check, entries, setting
from .images import check_budget
from .learning_rate import check_schedule

FineTuneType = Literal["lora", "full"]
Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]

ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
DENSE = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
SELF_CONDITIONING = tuple(
    f"model.decoder.self_conditioning.{part}_proj" for part in ("gate", "up", "down")
)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# Paths within a layer, or from the root of the model. By default router and experts get none.
DEFAULT_KEYS = (*ATTENTION, *DENSE, *SELF_CONDITIONING)
# mlx-lm's keys without a meaning here, and the values that they may have.
_INERT: dict[str, tuple[Any, ...]] = {
    "report_to": (None,),
    "project_name": (None,),
    "trust_remote_code": (None, False),
}
# This one may have any value: the cache of freed memory is bounded anyway.
_IGNORED = frozenset({"clear_cache_threshold"})

_TRAIN = ("train",)  # the command that has the settings as options


@dataclass(frozen=True, kw_only=True)
class LoraParameters:
    """The form of adapters; the keys are those of mlx-lm's `lora_parameters`."""

    rank: int = setting(Entry(help="Columns of each factor.", default=8, at_least=1))
    scale: float = setting(
        Entry(help="Factor on the product of the two factors.", default=20.0, above=0)
    )
    dropout: float = setting(
        Entry(
            help="Share of the inputs that training leaves out.", default=0.0, at_least=0, below=1
        )
    )
    keys: tuple[str, ...] = setting(
        Entry(help="Modules that get an adapter.", default=DEFAULT_KEYS)
    )

    def __post_init__(self) -> None:
        try:
            check(self)
        except ConfigError as error:
            raise ConfigError(f"lora_parameters: {error}") from error
        if not self.keys or not all(isinstance(key, str) for key in self.keys):
            raise ConfigError(f"lora_parameters: keys must name modules, got {self.keys!r}")

    @classmethod
    def from_dict(cls, raw: Any) -> LoraParameters:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"lora_parameters must be an object, got {raw!r}")
        if "alpha" in raw:
            raise ConfigError("lora_parameters: alpha is not a key; scale is alpha / rank")
        known = set(entries(cls))
        if unknown := sorted(map(str, set(raw) - known)):
            raise ConfigError(
                f"lora_parameters: unknown keys {', '.join(unknown)}; "
                f"there are {', '.join(sorted(known))}"
            )
        values = {key: value for key, value in raw.items() if value is not None}
        if "keys" in values:
            if not isinstance(values["keys"], (list, tuple)):
                raise ConfigError(f"lora_parameters: keys must be a list, got {values['keys']!r}")
            values["keys"] = tuple(values["keys"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. An iteration is a batch, as in mlx-lm."""

    fine_tune_type: FineTuneType = setting(
        Entry(help="Train adapters, or all weights.", default="lora", commands=_TRAIN)
    )
    num_layers: int = setting(
        Entry(
            help="Train only the last N layers, and nothing outside of layers; -1 for everything.",
            default=-1,
            at_least=1,
            all_is=-1,
            commands=_TRAIN,
        )
    )
    lora_parameters: LoraParameters = setting(
        Entry(help="Rank, scale, dropout and keys of adapters.", default=LoraParameters())
    )
    batch_size: int = setting(
        Entry(help="Examples per batch.", default=4, at_least=1, commands=_TRAIN)
    )
    pool_batches: int = setting(
        Entry(
            help="Batches cut from one pool of examples, sorted by length; "
            "1: any lengths together.",
            default=32,
            at_least=1,
        )
    )
    iters: int = setting(
        Entry(help="Batches to train on.", default=1000, at_least=1, commands=_TRAIN)
    )
    grad_accumulation_steps: int = setting(
        Entry(help="Batches per update of the weights.", default=1, at_least=1, commands=_TRAIN)
    )
    learning_rate: float = setting(
        Entry(
            help="Learning rate, where no schedule is given.",
            default=1e-5,
            above=0,
            commands=_TRAIN,
        )
    )
    lr_schedule: Mapping[str, Any] | None = setting(
        Entry(help="name, arguments, warmup and warmup_init, as in mlx-lm.")
    )
    optimizer: Optimizer = setting(
        Entry(help="adam, adamw, muon, sgd or adafactor.", default="adam", commands=_TRAIN)
    )
    optimizer_config: Mapping[str, Any] | None = setting(
        Entry(help="More arguments, by optimizer.")
    )
    max_grad_norm: float = setting(
        Entry(
            help="Largest norm of the gradient; a larger one is scaled down. 0: no limit.",
            default=1.0,
            at_least=0,
            commands=_TRAIN,
        )
    )
    max_seq_length: int = setting(
        Entry(
            help="Most tokens of an example, its canvases included.",
            default=2048,
            at_least=2,
            commands=_TRAIN,
        )
    )
    canvas_length: int | None = setting(
        Entry(
            help="Tokens per canvas.", at_least=1, shown_default="the checkpoint's", commands=_TRAIN
        )
    )
    train_vision: bool = setting(
        Entry(
            help="Train the vision tower too, on examples with images.",
            default=False,
            flags=("--train-vision",),
            commands=_TRAIN,
        )
    )
    image_tokens: int | None = setting(
        Entry(
            help="Most tokens of an image: 70, 140, 280, 560 or 1120.",
            shown_default="the checkpoint's",
            commands=_TRAIN,
        )
    )
    mask_prompt: bool = setting(
        Entry(
            help="Leave the prompt out of the causal loss.",
            default=False,
            flags=("--mask-prompt",),
            commands=_TRAIN,
        )
    )
    noise_min: float = setting(
        Entry(
            help="Smallest share of a canvas that is replaced by noise.",
            default=1e-4,
            at_least=0,
            at_most=1,
            commands=_TRAIN,
        )
    )
    noise_max: float = setting(
        Entry(
            help="Largest share of a canvas that is replaced by noise.",
            default=1 - 1e-4,
            at_least=0,
            at_most=1,
            commands=_TRAIN,
        )
    )
    causal_weight: float = setting(
        Entry(
            help="Weight of the causal loss on the clean text; 0: none.",
            default=1.0,
            at_least=0,
            commands=_TRAIN,
        )
    )
    self_conditioning_probability: float = setting(
        Entry(
            help="Share of examples with self-conditioning from a first forward pass.",
            default=0.5,
            at_least=0,
            at_most=1,
            commands=_TRAIN,
        )
    )
    free_start_probability: float = setting(
        Entry(
            help="Share of canvases that start anywhere in an answer, as they do behind a "
            "committed part, and not at a multiple of their length.",
            default=0.0,
            at_least=0,
            at_most=1,
            commands=_TRAIN,
        )
    )
    gradients_through_context: bool = setting(
        Entry(
            help="Whether the canvas loss also trains through the text's keys and values.",
            default=True,
            commands=_TRAIN,
        )
    )
    val_batches: int = setting(
        Entry(
            help="Batches of a validation; -1: all of them.",
            default=25,
            at_least=1,
            all_is=-1,
            commands=_TRAIN,
        )
    )
    test_batches: int = setting(
        Entry(
            help="Batches of a test; -1: all of them.",
            default=500,
            at_least=1,
            all_is=-1,
            commands=_TRAIN,
        )
    )
    steps_per_report: int = setting(
        Entry(help="Batches between reports.", default=10, at_least=1, commands=_TRAIN)
    )
    steps_per_eval: int = setting(
        Entry(help="Batches between validations.", default=200, at_least=1, commands=_TRAIN)
    )
    save_every: int = setting(
        Entry(help="Batches between checkpoints.", default=100, at_least=1, commands=_TRAIN)
    )
    grad_checkpoint: bool = setting(
        Entry(
            help="Compute layers twice to save memory.",
            default=False,
            flags=("--grad-checkpoint",),
            commands=_TRAIN,
        )
    )
    seed: int = setting(
        Entry(
            help="Seed of the data's order and of all draws.",
            default=0,
            at_least=0,
            at_most=2**31 - 1,
            commands=_TRAIN,
        )
    )

    def __post_init__(self) -> None:
        check(self)
        if self.noise_min > self.noise_max:
            raise ConfigError(
                f"noise_min of {self.noise_min} is above noise_max of {self.noise_max}"
            )
        if self.mask_prompt and not self.causal_weight:
            raise ConfigError("mask_prompt has no effect without a causal loss")
        if self.image_tokens is not None:
            check_budget(self.image_tokens, "image_tokens")
        if self.lr_schedule is not None:
            check_schedule(self.lr_schedule)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrainSettings:
        """Return settings from a YAML file's keys or a command's flags; None means the default."""
        values = {key: value for key, value in raw.items() if value is not None}
        if "lora_parameters" in values:
            values["lora_parameters"] = LoraParameters.from_dict(values["lora_parameters"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as adapter_config.json and checkpoints hold them."""
        raw = asdict(self)
        raw["lora_parameters"]["keys"] = list(raw["lora_parameters"]["keys"])
        if self.fine_tune_type == "full":
            raw["lora_parameters"] = None
        return raw


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a run does, with which model, data and folder: the part of a recipe beside the
    settings."""

    model: str | None = setting(
        Entry(help="Local folder or Hub repo id.", shown_default="", commands=_TRAIN)
    )
    train: bool = setting(
        Entry(help="Train.", default=False, flags=("--train",), shown_default="", commands=_TRAIN)
    )
    test: bool = setting(
        Entry(
            help="Measure the loss on test.jsonl.",
            default=False,
            flags=("--test",),
            shown_default="",
            commands=_TRAIN,
        )
    )
    data: str | None = setting(
        Entry(
            help="Folder with train.jsonl, and valid.jsonl and test.jsonl if there are.",
            shown_default="",
            commands=_TRAIN,
        )
    )
    adapter_path: str = setting(
        Entry(help="Folder of the run.", default="adapters", commands=_TRAIN)
    )
    resume: bool = setting(
        Entry(
            help="Continue the run in --adapter-path.",
            default=False,
            flags=("--resume",),
            shown_default="",
            commands=_TRAIN,
        )
    )
    resume_adapter_file: str | None = setting(
        Entry(
            help="Start from these weights, with a fresh optimizer.",
            shown_default="",
            commands=_TRAIN,
        )
    )
    revision: str | None = setting(
        Entry(help="Branch, tag or commit of a Hub repository.", shown_default="", commands=_TRAIN)
    )

    def __post_init__(self) -> None:
        check(self)
        if not (self.train or self.test):
            raise ConfigError("nothing to do: give --train, --test, or both")
        for name in ("model", "data"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} is missing")
        if self.resume and self.resume_adapter_file is not None:
            raise ConfigError("--resume has its own weights; drop --resume-adapter-file")


def job_and_settings(given: Mapping[str, Any]) -> tuple[TrainJob, TrainSettings]:
    """Split the keys of a recipe and a command's options into job and settings; None means the
    default.

    Raises:
      ConfigError: if a value is impossible, or something is missing.
    """
    settings, job = (
        {name: given[name] for name in entries(cls) if given.get(name) is not None}
        for cls in (TrainSettings, TrainJob)
    )
    made = TrainSettings.from_dict(settings)
    return TrainJob(**job), made


def read_recipe(path: str) -> dict[str, Any]:
    """Return the keys of a YAML file.

    Raises:
      ConfigError: if it cannot be read, or has a key that is not a setting.
    """
    import yaml

    try:
        raw = yaml.load(Path(path).read_text("utf-8"), Loader=_loader())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} must hold keys and values, got {type(raw).__name__}")
    known = {*entries(TrainSettings), *entries(TrainJob), "config"}
    for key, value in raw.items():
        if key in _IGNORED or (key in _INERT and value in _INERT[key]):
            continue
        if key in _INERT:
            raise ConfigError(f"{path}: {key} is not supported, got {value!r}")
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {key!r}; known keys are {', '.join(sorted(known))}"
            )
    return {k: v for k, v in raw.items() if k not in _INERT and k not in _IGNORED}


def _loader() -> Any:
    """Return a YAML loader that reads 1e-5 as a number; YAML 1.1 reads a string."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{number})$"), list("-+0123456789.")
    )
    return Loader
