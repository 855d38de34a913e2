"""A run from its names: loads model and data, trains, tests, and keeps its records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from transformers import PreTrainedTokenizerBase

from ..adapters import WEIGHTS, load_adapters
from ..config import ModelConfig
from ..errors import SourceError
from ..files import resolve
from ..headers import read_header
from ..load import load_model, load_tokenizer
from ..model import DiffusionGemma
from ..recipe import TrainSettings
from .checkpoint import STATE, trained_weights
from .curves import Metrics, draw
from .data import Example, fill_token, read_split
from .trainer import Event, Saved, Trainer, prepare


@dataclass
class Session:
    """One run of the command."""

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
    ) -> Session:
        """Loads everything, the quick and the likely to fail first.

        Args:
          model: folder or repo id.
          data: folder of examples.
          folder: of the run.
          settings: of the run.
          revision: of a repository.
          trains: whether to train; else the adapters in `folder`, if there are any, are tested.
          tests: whether test.jsonl is needed.
          resumes: go on where `folder` stands.
          start_file: weights to begin with.

        Raises:
          DiffGemmaError: one line that says what is wrong with model, data or folder.
        """
        source = resolve(model, revision)
        config = ModelConfig.from_folder(source)
        width = settings.canvas_length or config.canvas_length
        if trains and not resumes and (folder / STATE).exists():
            raise SourceError(
                f"{folder} has a run in it; go on with --resume, or name another --adapter-path"
            )
        if resumes and not (folder / STATE).is_file():
            raise SourceError(f"{folder} has no {STATE} to go on from")
        tokenizer = load_tokenizer(source)

        def examples(split: str) -> list[Example]:
            return read_split(
                data,
                split,
                tokenizer,
                vocab_size=config.text.vocab_size,
                canvas_length=width,
                max_seq_length=settings.max_seq_length,
            )

        train_set = examples("train") if trains else []
        has_valid = trains and (Path(data) / "valid.jsonl").is_file()
        valid_set = examples("valid") if has_valid else []
        test_set = examples("test") if tests else []
        loaded = load_model(source, fused=False)
        if trains:
            prepare(loaded, settings)
            if start_file is not None:
                _start_from(loaded, Path(start_file))
        elif (folder / WEIGHTS).exists():
            load_adapters(loaded, folder)
        trainer = Trainer(
            loaded,
            train_set,
            valid_set,
            settings,
            folder,
            eos_token_id=fill_token(tokenizer),
            facts=_facts(source, loaded, tokenizer),
        )
        metrics = None
        if trains and resumes:
            trainer.resume()
        if trains and trainer.is_first:
            try:
                metrics = Metrics(folder, iteration=trainer.iteration)
            except OSError as error:
                raise SourceError(f"{folder} cannot be written to: {error.strerror}") from error
        return cls(loaded, trainer, test_set, folder, metrics)

    def train(self) -> Iterator[Event]:
        """The events of the run, each recorded."""
        for event in self.trainer.run():
            if self.metrics is not None:
                self.metrics.add(event)
            yield event

    def interrupted(self) -> Saved:
        """Saves where an interrupted run stands."""
        return self.trainer.save()

    def draw(self) -> Path | None:
        """The picture of the run so far."""
        if self.metrics is None:
            return None
        with suppress(OSError):
            return draw(self.folder)
        return None

    def test(self) -> tuple[float, float, float]:
        """Losses on the test set: sum, canvas, causal; nats."""
        return self.trainer.losses_on(self.test_set, self.trainer.settings.test_batches)

    @property
    def trainable(self) -> int:
        return sum(array.size for array in trained_weights(self.model).values())

    @property
    def parameters(self) -> int:
        flat = cast(list[tuple[str, mx.array]], tree_flatten(self.model.parameters()))
        return sum(array.size for _, array in flat)


def _facts(
    source: Path, model: DiffusionGemma, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a run that is taken up must share."""
    return {
        "model": str(source),
        "layers": len(model.layers),
        "vocab_size": model.config.text.vocab_size,
        "tokenizer_size": len(tokenizer),
    }


def _start_from(model: DiffusionGemma, path: Path) -> None:
    if not path.is_file():
        raise SourceError(f"--resume-adapter-file: {path} is not there")
    own = trained_weights(model)
    for name, info in read_header(path).items():
        if name not in own or info.shape != tuple(own[name].shape):
            raise SourceError(f"{path}: {name} with shape {list(info.shape)} is not trained here")
    model.load_weights(str(path), strict=False)
    mx.eval(model.parameters())
