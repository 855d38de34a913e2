"""mlx_diffgemma.train: adapters or all weights, from a folder of examples."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.training import (
    FineTuneType,
    Optimizer,
    TrainSettings,
    default_of,
    help_of,
    read_recipe,
)
from ..errors import ConfigError
from .interrupt import stopping
from .options import REVISION_HELP, friendly_errors, run


def option(name: str, *flags: str) -> Any:
    """An option for a field of TrainSettings; what is not given is the recipe's, else the
    default."""
    return typer.Option(*flags, help=help_of(name), show_default=str(default_of(name)))


def train(
    model: Annotated[
        str | None, typer.Option(help="Local folder or Hub repo id.", show_default=False)
    ] = None,
    do_train: Annotated[bool | None, typer.Option("--train", help="Train.")] = None,
    do_test: Annotated[
        bool | None, typer.Option("--test", help="Measure the loss on test.jsonl.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder with train.jsonl, and valid.jsonl and test.jsonl if there are."),
    ] = None,
    adapter_path: Annotated[
        str | None, typer.Option(help="Folder of the run.", show_default="adapters")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("-c", "--config", help="YAML file with these options; flags win over it."),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume", help="Go on where the run in --adapter-path stands."),
    ] = None,
    resume_adapter_file: Annotated[
        str | None, typer.Option(help="Start from these weights, with a fresh optimizer.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    fine_tune_type: Annotated[FineTuneType | None, option("fine_tune_type")] = None,
    num_layers: Annotated[int | None, option("num_layers")] = None,
    batch_size: Annotated[int | None, option("batch_size")] = None,
    iters: Annotated[int | None, option("iters")] = None,
    grad_accumulation_steps: Annotated[int | None, option("grad_accumulation_steps")] = None,
    learning_rate: Annotated[float | None, option("learning_rate")] = None,
    optimizer: Annotated[Optimizer | None, option("optimizer")] = None,
    max_grad_norm: Annotated[float | None, option("max_grad_norm")] = None,
    max_seq_length: Annotated[int | None, option("max_seq_length")] = None,
    canvas_length: Annotated[int | None, option("canvas_length")] = None,
    mask_prompt: Annotated[bool | None, option("mask_prompt", "--mask-prompt")] = None,
    noise_min: Annotated[float | None, option("noise_min")] = None,
    noise_max: Annotated[float | None, option("noise_max")] = None,
    causal_weight: Annotated[float | None, option("causal_weight")] = None,
    self_conditioning_probability: Annotated[
        float | None, option("self_conditioning_probability")
    ] = None,
    gradients_through_context: Annotated[
        bool | None,
        option(
            "gradients_through_context",
            "--gradients-through-context/--no-gradients-through-context",
        ),
    ] = None,
    val_batches: Annotated[int | None, option("val_batches")] = None,
    test_batches: Annotated[int | None, option("test_batches")] = None,
    steps_per_report: Annotated[int | None, option("steps_per_report")] = None,
    steps_per_eval: Annotated[int | None, option("steps_per_eval")] = None,
    save_every: Annotated[int | None, option("save_every")] = None,
    grad_checkpoint: Annotated[bool | None, option("grad_checkpoint", "--grad-checkpoint")] = None,
    seed: Annotated[int | None, option("seed")] = None,
) -> None:
    """Train adapters or all weights on examples; Ctrl-C saves, and --resume goes on to the bit."""
    given = dict(locals())
    with friendly_errors():
        recipe = {} if config is None else read_recipe(config)
        given["train"], given["test"] = given.pop("do_train"), given.pop("do_test")
        given = recipe | {key: value for key, value in given.items() if value is not None}
        names = {f.name for f in fields(TrainSettings)}
        settings = TrainSettings.from_dict({k: v for k, v in given.items() if k in names})
        if not (given.get("train") or given.get("test")):
            raise ConfigError("nothing to do: give --train, --test, or both")
        for name in ("model", "data"):
            if not isinstance(given.get(name), str):
                raise ConfigError(f"--{name} is missing")
        if given.get("resume") and given.get("resume_adapter_file"):
            raise ConfigError("--resume has its own weights; drop --resume-adapter-file")
        given.setdefault("adapter_path", "adapters")
        folder = Path(given["adapter_path"])
        from ..train.session import Session
        from .render_train import TrainView

        view = TrainView()
        session = Session.open(
            given["model"],
            given["data"],
            folder,
            settings,
            revision=given.get("revision"),
            trains=bool(given.get("train")),
            tests=bool(given.get("test")),
            resumes=bool(given.get("resume")),
            start_file=given.get("resume_adapter_file"),
            tests_adapters=given["adapter_path"] != "",
        )
        view.start(session)
        if given.get("train"):
            try:
                with stopping(session.trainer.stop):
                    for event in session.train():
                        view.show(event)
            except KeyboardInterrupt:
                view.interrupted(session)
                raise
            finally:
                view.picture(session)
        if given.get("test"):
            view.tested(session.test())


def main() -> None:
    run(train)
