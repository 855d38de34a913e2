"""A training run from its settings: loads model and data, trains, tests, and records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..checkpoint.adapters import load_adapters
from ..checkpoint.files import resolve
from ..checkpoint.headers import read_header, read_headers
from ..checkpoint.load import build_model
from ..config.model import ModelConfig
from ..config.training import TrainSettings
from ..errors import ConfigError, SourceError
from ..language.encoded import ImageForm
from ..language.tokenizer import load_tokenizer
from ..model import DiffusionGemma
from .checkpoint import STATE, trained_weights
from .curves import Metrics, draw
from .data import Example, fill_token, read_split
from .trainer import Event, Saved, Trainer, prepare

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer


@dataclass
class Session:
    """One run of the train command."""

    model: DiffusionGemma
    trainer: Trainer
    test_set: list[Example]
    folder: Path
    metrics: Metrics | None

    @classmethod
    def open(
        cls,
        model: str,
        data: str,
        folder: Path,
        settings: TrainSettings,
        *,
        revision: str | None = None,
        trains: bool = True,
        tests: bool = False,
        resumes: bool = False,
        start_file: str | None = None,
        tests_adapters: bool = True,
    ) -> Session:
        """Load everything, with quick checks and likely failures first.

        Args:
          model: folder or repo id.
          data: folder of examples.
          folder: of the run.
          settings: of the run.
          revision: of a repository.
          trains: whether to train; else the adapters in `folder` are tested.
          tests: whether test.jsonl is needed.
          resumes: continue the run in `folder`.
          start_file: weights to begin with.
          tests_adapters: False tests the model without adapters.

        Raises:
          DiffGemmaError: one line that says what is wrong with model, data or folder.
        """
        _check_folder(folder, trains=trains, resumes=resumes)
        source = resolve(model, revision)
        config = ModelConfig.from_folder(source)
        tokenizer = load_tokenizer(source)
        splits = _read_splits(data, tokenizer, config, settings, trains=trains, tests=tests)
        has_images = any(example.pictures for split in splits.values() for example in split)
        if settings.train_vision and trains and not any(e.pictures for e in splits["train"]):
            raise ConfigError(f"train_vision needs images, and {data}/train.jsonl has none")
        vision = True if has_images or settings.train_vision else None
        loaded = build_model(source, config, fused=False, vision=vision)
        if trains:
            prepare(loaded, settings)
            if start_file is not None:
                _start_from(loaded, Path(start_file))
        elif tests_adapters:
            load_adapters(loaded, folder)
        trainer = Trainer(
            loaded,
            splits["train"],
            splits["valid"],
            settings,
            folder,
            eos_token_id=fill_token(tokenizer),
            facts=_facts(model, source, splits["train"]),
        )
        if resumes and trains:
            trainer.resume()
        metrics = None
        if trains and trainer.is_first:
            try:
                metrics = Metrics(folder, iteration=trainer.iteration)
            except OSError as error:
                raise SourceError(f"{folder} cannot be written to: {error.strerror}") from error
        return cls(loaded, trainer, splits["test"], folder, metrics)

    def train(self) -> Iterator[Event]:
        """Yield the events of the run, and record each."""
        for event in self.trainer.run():
            if self.metrics is not None:
                try:
                    self.metrics.add(event)
                except OSError as error:
                    self.trainer.save()
                    raise SourceError(
                        f"{self.metrics.path} cannot be written to: {error.strerror}"
                    ) from error
            yield event

    def interrupted(self) -> Saved | None:
        """Save the state of an interrupted run. Return None in the middle of an update, when the
        last checkpoint stays."""
        return self.trainer.save() if self.trainer.is_whole else None

    def draw(self) -> Path | None:
        """Draw the run so far; return None if nothing was measured.

        Raises:
          SourceError: if the picture cannot be made.
        """
        return None if self.metrics is None else draw(self.folder)

    def test(self) -> tuple[float, float, float]:
        """Return losses on the test set: sum, canvas, causal; nats."""
        return self.trainer.losses_on(self.test_set, self.trainer.settings.test_batches)

    @property
    def trainable(self) -> int:
        return sum(array.size for array in trained_weights(self.model).values())

    @property
    def parameters(self) -> int:
        """Return the number of all weights, packed ones counted one by one."""
        total = 0
        for _, module in self.model.named_modules():
            own = {name: a for name, a in module.items() if isinstance(a, mx.array)}
            if "scales" in own:
                total += own["weight"].size * 32 // module.bits
                own = {n: a for n, a in own.items() if n not in ("weight", "scales", "biases")}
            total += sum(array.size for array in own.values())
        return total


def _check_folder(folder: Path, *, trains: bool, resumes: bool) -> None:
    if trains and not resumes and (folder / STATE).exists():
        raise SourceError(
            f"{folder} has a run in it; go on with --resume, or name another --adapter-path"
        )
    if resumes and not (folder / STATE).is_file():
        raise SourceError(f"{folder} has no {STATE} to go on from")


def _read_splits(
    data: str,
    tokenizer: AnyTokenizer,
    config: ModelConfig,
    settings: TrainSettings,
    *,
    trains: bool,
    tests: bool,
) -> dict[str, list[Example]]:
    """Return the examples of each split that is needed, and none of the others."""
    form = ImageForm.of(config)
    if form is not None and settings.image_tokens is not None:
        form = replace(form, soft_tokens=settings.image_tokens)
    has_valid = trains and (Path(data) / "valid.jsonl").is_file()
    needed = {"train": trains, "valid": has_valid, "test": tests}
    return {
        split: read_split(
            data,
            split,
            tokenizer,
            vocab_size=config.text.vocab_size,
            canvas_length=settings.canvas_length or config.canvas_length,
            max_seq_length=settings.max_seq_length,
            form=form,
        )
        if is_needed
        else []
        for split, is_needed in needed.items()
    }


def _facts(model: str, source: Path, examples: list[Example]) -> dict[str, Any]:
    """Return the facts that must be the same on resume: the checkpoint's config and headers, and
    the data. Adapters are shared, so they name a repository or a folder without its path."""
    headers = sorted((n, i.dtype, i.shape) for n, i in read_headers(source).items())
    checkpoint = hashlib.sha256((source / "config.json").read_bytes() + repr(headers).encode())
    data = hashlib.sha256()
    for example in examples:
        data.update(example.prompt.tobytes() + b"|" + example.answer.tobytes())
        for picture in example.pictures:  # the name and size of a file stand for its bytes
            data.update(f"|{picture.path.name} {picture.path.stat().st_size}".encode())
    return {
        "model": Path(model).resolve().name if Path(model).exists() else model,
        "checkpoint": checkpoint.hexdigest()[:16],
        "train_data": data.hexdigest()[:16],
    }


def _start_from(model: DiffusionGemma, path: Path) -> None:
    if not path.is_file():
        raise SourceError(f"--resume-adapter-file: {path} is not there")
    own, found = trained_weights(model), read_header(path)
    for name, info in found.items():
        if name not in own or info.shape != tuple(own[name].shape):
            raise SourceError(f"{path}: {name} with shape {list(info.shape)} is not trained here")
    if missing := sorted(set(own) - set(found)):
        raise SourceError(f"{path}: {missing[0]} is missing, which is trained here")
    weights = cast(dict[str, mx.array], mx.load(str(path)))
    model.load_weights([(n, a.astype(own[n].dtype)) for n, a in weights.items()], strict=False)
    mx.eval(model.parameters())
