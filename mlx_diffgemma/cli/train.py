"""mlx_diffgemma.train: train adapters or all weights on a folder of examples."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.choice import MODEL_VARIABLE
from ..config.training import TrainJob, TrainSettings, job_and_settings, read_recipe
from .interrupt import stopping
from .options import command, run


@command
def train(
    job: Annotated[dict, TrainJob],
    config: Annotated[
        str | None,
        typer.Option(
            "-c", "--config", help="YAML file with these options; options on the command line win."
        ),
    ] = None,
    *,
    settings: Annotated[dict, TrainSettings],
) -> None:
    """Train adapters or all weights on examples; Ctrl-C saves, and --resume continues exactly."""
    recipe = {} if config is None else read_recipe(config)
    named = os.environ.get(MODEL_VARIABLE)
    _run(*job_and_settings(({"model": named} if named else {}) | recipe | job | settings))


def _run(job: TrainJob, settings: TrainSettings) -> None:
    from ..train.session import Session
    from .render import View
    from .render_train import TrainView

    assert job.model is not None and job.data is not None
    with View(verbose=True).loading():
        session = Session.open(
            job.model,
            job.data,
            Path(job.adapter_path),
            settings,
            revision=job.revision,
            trains=job.train,
            tests=job.test,
            resumes=job.resume,
            start_file=job.resume_adapter_file,
            tests_adapters=job.adapter_path != "",
        )
    view = TrainView()
    view.start(session)
    if job.train:
        _train(session, view)
    if job.test:
        view.tested(session.test())


def _train(session: Any, view: Any) -> None:
    try:
        with stopping(session.trainer.stop):
            for event in session.train():
                view.show(event)
    except KeyboardInterrupt:
        view.interrupted(session)
        raise
    finally:
        view.picture(session)


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
