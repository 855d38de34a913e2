"""The training loop, its checkpoints and its records. The objective itself is tests/parity's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import load_model, load_tokenizer
from mlx_diffgemma.config.training import EXPERTS, LoraParameters, TrainSettings
from mlx_diffgemma.errors import ConfigError, DataError, LossError, SourceError
from mlx_diffgemma.train.checkpoint import STATE, trained_weights
from mlx_diffgemma.train.curves import METRICS, PICTURE, Metrics, read
from mlx_diffgemma.train.data import fill_token
from mlx_diffgemma.train.optimizer import make_optimizer
from mlx_diffgemma.train.session import Session
from mlx_diffgemma.train.trainer import Saved, Trained, Trainer, Validated, prepare
from tests.sampled import first, one_in
from tests.train.train_cases import LINES, small_model, split_of, write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


def trainer_of(model_folder, tokenizer, folder: Path, data: Path, **changes) -> Trainer:
    settings = TrainSettings(
        **{"batch_size": 4, "learning_rate": 1e-2, "iters": 12, "steps_per_report": 4} | changes
    )
    model = load_model(model_folder, fused=False)
    prepare(model, settings)
    examples = split_of(data, tokenizer)
    return Trainer(
        model, examples, examples[:8], settings, folder, eos_token_id=fill_token(tokenizer)
    )


@pytest.mark.parametrize(
    "changes",
    one_in(
        2,
        [
            {},
            {"lora_parameters": LoraParameters(rank=2, keys=EXPERTS, dropout=0.1)},
            {"fine_tune_type": "full", "learning_rate": 3e-3},
            {
                "fine_tune_type": "full",
                "learning_rate": 3e-3,
                "num_layers": 1,
                "optimizer": "adafactor",
            },
            {"grad_accumulation_steps": 2, "grad_checkpoint": True, "causal_weight": 0.0},
            {"optimizer": "muon"},
        ],
    ),
    ids=["lora", "experts", "full", "last layer", "accumulated", "muon"],
)
def test_it_learns(model_folder, tokenizer, tmp_path, changes):
    data = write_lines(tmp_path / "data")
    trainer = trainer_of(model_folder, tokenizer, tmp_path / "run", data, iters=24, **changes)
    validated = [e.loss for e in trainer.run() if isinstance(e, Validated)]
    assert len(validated) == 2 and validated[1] < 0.9 * validated[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_parameters": LoraParameters(rank=2, keys=EXPERTS)}, "no matrices"),
        ({"optimizer_config": {"muon": 5}}, "optimizer_config: muon"),
        ({"optimizer_config": {"muon": {"speed": 5}}}, "optimizer_config: muon"),
        ({"optimizer_config": {"adamw": {"learning_rate_scale": -1}}}, "at least 0, got -1"),
    ],
)
def test_muon_that_cannot_be_made_is_refused(model_folder, tokenizer, tmp_path, changes, message):
    data = write_lines(tmp_path / "data")
    with pytest.raises(ConfigError, match=message):
        trainer_of(model_folder, tokenizer, tmp_path, data, optimizer="muon", **changes)


def test_muon_leaves_a_matrix_without_a_gradient_alone():
    weights = {"a": mx.random.normal((8, 16))}
    optimizer = make_optimizer(TrainSettings(optimizer="muon", learning_rate=0.1))
    optimizer.init(weights)
    moved = optimizer.apply_gradients({"a": mx.zeros((8, 16))}, weights)["a"]
    assert mx.array_equal(moved, weights["a"])


def test_muon_gets_the_matrices_and_adamw_the_rest(model_folder, tokenizer, tmp_path):
    data = write_lines(tmp_path / "data")
    config = {"muon": {"momentum": 0.9}, "adamw": {"learning_rate_scale": 0.5, "weight_decay": 0}}
    trainer = trainer_of(
        model_folder, tokenizer, tmp_path / "run", data,
        fine_tune_type="full", optimizer="muon", optimizer_config=config, learning_rate=1e-2,
    )  # fmt: skip
    before = {name: np.array(a) for name, a in trained_weights(trainer.model).items()}
    trainer.settings = replace(trainer.settings, iters=1)
    list(trainer.run())
    after = trained_weights(trainer.model)
    moved = {name: np.array(a) - before[name] for name, a in after.items()}
    others = {}
    for name, by in moved.items():
        if by.ndim == 2 and "embed_tokens" not in name and "router" not in name:
            # Five steps of Newton and Schulz leave singular values of about 1.
            values = np.linalg.svd(by, compute_uv=False) / 1e-2
            values /= max(1, by.shape[0] / by.shape[1]) ** 0.5
            assert 0.3 < np.median(values) < 1.5 and values.max() < 1.6, name
        else:
            others[name] = np.median(np.abs(by[by != 0]))
    # The first step of AdamW, of which momentum is 0.1 g and the scale the root of 0.001 g².
    step = pytest.approx(0.5e-2 * 0.1 / 0.001**0.5, rel=0.01)
    assert np.median(list(others.values())) == step
    tables = [by for name, by in others.items() if "embed_tokens" in name or "router.proj" in name]
    assert len(tables) == 3 and all(by == step for by in tables)


def test_only_what_is_asked_for_is_trained(model_folder, tokenizer, tmp_path):
    data = write_lines(tmp_path / "data")
    trainer = trainer_of(model_folder, tokenizer, tmp_path / "run", data)
    names = set(trained_weights(trainer.model))
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"}
    assert not any("router" in name or "experts" in name for name in names)
    assert any("self_conditioning" in name for name in names)
    last = trainer_of(model_folder, tokenizer, tmp_path / "b", data, num_layers=1)
    names = set(trained_weights(last.model))
    assert all(name.startswith("model.decoder.layers.1.") for name in names)


def test_more_layers_than_there_are_is_refused(model_folder):
    with pytest.raises(ConfigError, match="num_layers is 3, but the model has 2 layers"):
        prepare(load_model(model_folder, fused=False), TrainSettings(num_layers=3))


def state_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(folder / STATE)).items()}


KILLED: dict[str, dict[str, Any]] = {
    "dropout": {
        "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.1},
        "grad_checkpoint": True,
    },
    "one layer, in the middle of an update": {
        "lora_parameters": {"rank": 2},
        "num_layers": 1,
        "grad_accumulation_steps": 2,
    },
    "all, in the middle of an update": {
        "fine_tune_type": "full",
        "optimizer": "adamw",
        "grad_accumulation_steps": 2,
    },
    "muon": {"fine_tune_type": "full", "optimizer": "muon", "num_layers": 1},
}


@pytest.mark.parametrize(
    ("name", "half"),
    [("dropout", 5), *(pytest.param(name, 25, marks=pytest.mark.long) for name in KILLED)],
)
def test_a_run_equals_half_of_it_a_kill_and_the_other_half(model_folder, tmp_path, name, half):
    data = write_lines(tmp_path / "data")
    write_lines(data, "valid", LINES[:8])
    recipe = tmp_path / "recipe.yaml"
    schedule = {"name": "cosine_decay", "arguments": [1e-2, 2 * half, 1e-4], "warmup": 5}
    settings = {"batch_size": 4, "lr_schedule": schedule, "steps_per_report": half} | KILLED[name]
    recipe.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "mlx_diffgemma", "train", "--train", "-c", str(recipe)]
    command += ["--model", str(model_folder), "--data", str(data), "--save-every", str(half)]
    command += ["--iters", str(2 * half), "--adapter-path"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, cwd=ROOT, capture_output=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (killed / STATE).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0)
    subprocess.run([*command, str(killed), "--resume"], check=True, cwd=ROOT, capture_output=True)
    whole, resumed = state_of(tmp_path / "whole"), state_of(killed)
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    both = [read(folder / METRICS) for folder in (tmp_path / "whole", killed)]
    kept = [[(r["kind"], r["iteration"], r["loss"]) for r in rows] for rows in both]
    assert kept[0] == kept[1] and len(kept[0]) >= 4


def test_a_run_goes_on_with_its_own_settings_only(model_folder, tokenizer, tmp_path):
    data = write_lines(tmp_path / "data")
    list(trainer_of(model_folder, tokenizer, tmp_path / "run", data).run())
    other = trainer_of(model_folder, tokenizer, tmp_path / "run", data, learning_rate=1e-3)
    with pytest.raises(SourceError, match=r"made with learning_rate 0\.01, and now it is 0\.001"):
        other.resume()
    longer = trainer_of(model_folder, tokenizer, tmp_path / "run", data, iters=16, save_every=2)
    longer.resume()
    assert longer.iteration == 12
    assert [e.iteration for e in longer.run() if isinstance(e, Saved)] == [14, 16]
    with pytest.raises(SourceError, match="to go on from"):
        trainer_of(model_folder, tokenizer, tmp_path / "none", data).resume()
    with pytest.raises(ConfigError, match="is at iteration 16 already"):
        trainer_of(model_folder, tokenizer, tmp_path / "run", data, iters=16).resume()
    (tmp_path / "run" / STATE).write_bytes(b"\x00" * 40)
    with pytest.raises(SourceError, match="cannot be read"):
        trainer_of(model_folder, tokenizer, tmp_path / "run", data, iters=20).resume()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    model_folder, tokenizer, tmp_path
):
    data = write_lines(tmp_path / "data")
    run = trainer_of(
        model_folder, tokenizer, tmp_path / "run", data, iters=60, save_every=1,
        fine_tune_type="full", optimizer="sgd", learning_rate=1e30, max_grad_norm=0.0,
    )  # fmt: skip
    with pytest.raises(
        LossError, match=r"at iteration \d+; no checkpoint was written yet; a smaller"
    ):
        list(run.run())
    assert not (tmp_path / "run" / STATE).exists(), "the first update broke it"
    good = trainer_of(model_folder, tokenizer, tmp_path / "run", data, save_every=2, iters=20)
    look, breaks_at = good._look, 7

    def broken():
        values, grads, tokens = look()
        if good.iteration == breaks_at:
            good.model.load_weights(
                [(n, a + mx.inf) for n, a in trained_weights(good.model).items()], strict=False
            )
            return look()
        return values, grads, tokens

    good._look = broken
    with pytest.raises(LossError, match=r"at iteration 8; the last checkpoint in .* iteration 6;"):
        list(good.run())
    kept = {k: v for k, v in state_of(tmp_path / "run").items() if k.startswith("weights.")}
    assert kept and all(np.isfinite(array).all() for array in kept.values())


@pytest.mark.parametrize("at", first(1, [4, 3]))
def test_an_interrupt_inside_a_batch_is_heeded_behind_it_and_loses_nothing(
    model_folder, tokenizer, tmp_path, at
):
    data = write_lines(tmp_path / "data")
    changes = {"iters": 8, "grad_accumulation_steps": 2, "save_every": 100}
    whole = trainer_of(model_folder, tokenizer, tmp_path / "whole", data, **changes)
    list(whole.run())
    run = trainer_of(model_folder, tokenizer, tmp_path / "run", data, **changes)
    apply = run._apply

    def interrupted(grads, tokens):
        if run.iteration == at:
            run.stop()
            assert run.is_whole
        apply(grads, tokens)

    run._apply = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(run.run())
    assert run.iteration == at + 1 and run.is_whole
    run.save()
    again = trainer_of(model_folder, tokenizer, tmp_path / "run", data, **changes)
    again.resume()
    list(again.run())
    for name, array in state_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(array, state_of(tmp_path / "run")[name], err_msg=name)


def test_tokens_are_counted_on_where_a_run_is_taken_up(model_folder, tokenizer, tmp_path):
    data, whole = write_lines(tmp_path / "data"), tmp_path / "whole"
    counted = [
        [e.trained_tokens for e in run.run() if isinstance(e, Trained)]
        for run in [trainer_of(model_folder, tokenizer, whole, data, iters=12)]
    ]
    parts = tmp_path / "parts"
    list(trainer_of(model_folder, tokenizer, parts, data, iters=4).run())
    for iters in (8, 12):
        run = trainer_of(model_folder, tokenizer, parts, data, iters=iters)
        run.resume()
        counted.append([e.trained_tokens for e in run.run() if isinstance(e, Trained)])
    assert counted[1] + counted[2] == counted[0][1:] and counted[0][0] > 0


def test_a_state_that_counts_no_tokens_can_be_taken_up(model_folder, tokenizer, tmp_path):
    data = write_lines(tmp_path / "data")
    list(trainer_of(model_folder, tokenizer, tmp_path / "run", data, iters=4).run())
    arrays, metadata = mx.load(str(tmp_path / "run" / STATE), return_metadata=True)
    assert int(metadata.pop("trained_tokens")) > 0
    mx.save_safetensors(str(tmp_path / "run" / STATE), arrays, metadata)
    run = trainer_of(model_folder, tokenizer, tmp_path / "run", data, iters=8)
    run.resume()
    assert (run.iteration, run.trained_tokens) == (4, 0)


def test_what_a_run_leaves_names_its_model_and_not_where_it_lies(model_folder, tmp_path):
    data, run = write_lines(tmp_path / "data"), tmp_path / "run"
    settings = TrainSettings(iters=2, batch_size=4, steps_per_report=1)
    session = Session.open(str(model_folder), str(data), run, settings)
    list(session.train())
    session.draw()
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["model"] == model_folder.name
    private = (str(tmp_path), str(model_folder.parent), str(Path.home()))
    for path in run.iterdir():
        content = path.read_bytes()
        assert not any(place.encode() in content for place in private if place != "/"), path


def test_a_session_knows_another_model_and_other_data(model_folder, tmp_path):
    data, run = write_lines(tmp_path / "data"), tmp_path / "run"
    settings = TrainSettings(iters=2, batch_size=4)
    list(Session.open(str(model_folder), str(data), run, settings).train())
    longer = TrainSettings(iters=3, batch_size=4)
    moved = tmp_path / "moved"
    moved.symlink_to(model_folder)
    Session.open(str(moved), str(data), run, longer, resumes=True)
    write_lines(data, lines=[*LINES[1:], LINES[0]])
    with pytest.raises(SourceError, match="made with train_data"):
        Session.open(str(model_folder), str(data), run, longer, resumes=True)
    write_lines(data)
    other = small_model(tmp_path / "other", seed=6)
    with pytest.raises(SourceError, match="made with checkpoint"):
        Session.open(str(other), str(data), run, longer, resumes=True)


def test_testing_needs_adapters_or_to_be_told_that_there_are_none(model_folder, tmp_path):
    data = write_lines(tmp_path / "data")
    write_lines(data, "test", LINES[:8])
    settings, folder = TrainSettings(batch_size=4), tmp_path / "typo"
    only = {"trains": False, "tests": True}
    with pytest.raises(SourceError, match="is not a folder of adapters"):
        Session.open(str(model_folder), str(data), folder, settings, **only)
    base = Session.open(
        str(model_folder), str(data), folder, settings, tests_adapters=False, **only
    )
    assert base.test()[0] > 0


def test_training_on_packed_weights_sees_what_generating_sees(tmp_path):
    from mlx_diffgemma.convert.write import convert

    widths = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    plain = small_model(tmp_path / "plain", **widths)
    packed = convert(plain, tmp_path / "packed", quantize=True, q_group_size=32).folder
    used, trained = load_model(packed, fused=False), load_model(packed, fused=False)
    prepare(trained, TrainSettings())
    trained.eval()
    tokens, canvas = mx.array([[2, 15, 90, 91]]), mx.array([[7, 300, 301, 302, 20, 21, 22, 23]])
    ours, theirs = (m.denoise(canvas, m.prefill(tokens)) for m in (trained, used))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-4)


def test_too_few_examples_for_a_batch_is_one_line(model_folder, tokenizer, tmp_path):
    data = write_lines(tmp_path / "data", lines=LINES[:3])
    with pytest.raises(DataError, match="3 training examples are fewer than batch_size of 4"):
        trainer_of(model_folder, tokenizer, tmp_path / "run", data)


def test_validation_is_the_same_every_time_and_moves_nothing(model_folder, tokenizer, tmp_path):
    data = write_lines(tmp_path / "data")
    run = trainer_of(model_folder, tokenizer, tmp_path / "run", data, iters=4)
    before = run.validate()
    again = run.validate()
    assert (before.loss, before.canvas_loss) == (again.loss, again.canvas_loss)
    with_looks = [e.loss for e in run.run() if isinstance(e, Trained)]
    without = trainer_of(model_folder, tokenizer, tmp_path / "b", data, iters=4)
    without.valid_set = []
    assert [e.loss for e in without.run() if isinstance(e, Trained)] == with_looks


@pytest.mark.long  # three processes
def test_processes_share_a_batch_and_learn_the_same(model_folder, tokenizer, tmp_path):
    data = write_lines(tmp_path / "data")
    write_lines(data, "valid", LINES[:8])
    command = [sys.executable, "-m", "mlx_diffgemma", "train", "--train", "--iters", "6"]
    command += ["--model", str(model_folder), "--data", str(data), "--batch-size", "4"]
    command += ["--learning-rate", "1e-3", "--optimizer", "sgd", "--steps-per-report", "1"]
    command += ["--adapter-path"]
    subprocess.run([*command, str(tmp_path / "one")], check=True, cwd=ROOT, capture_output=True)
    hosts = tmp_path / "hosts.json"
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    running = [
        subprocess.Popen(
            [*command, str(tmp_path / "two")],
            cwd=ROOT,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0] and not said[1], "one of them speaks"
    losses = [[r["loss"] for r in read(tmp_path / n / METRICS)] for n in ("one", "two")]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-4)


# --- records ---


def test_metrics_behind_the_checkpoint_are_dropped_and_a_cut_line_ignored(tmp_path):
    metrics = Metrics(tmp_path, iteration=0)
    for iteration in (10, 20, 30):
        metrics.add(Validated(iteration, 1.0, 1.0, 0.0, 0.1))
    metrics.path.write_text(metrics.path.read_text() + '{"kind": "tr')
    assert [row["iteration"] for row in read(metrics.path)] == [10, 20, 30]
    Metrics(tmp_path, iteration=20)
    assert [row["iteration"] for row in read(metrics.path)] == [10, 20]
    Metrics(tmp_path, iteration=0)
    assert read(metrics.path) == []


def test_a_session_draws_its_curves_and_tests(model_folder, tmp_path):
    data = write_lines(tmp_path / "data")
    write_lines(data, "valid", LINES[:8])
    write_lines(data, "test", LINES[8:16])
    settings = TrainSettings(iters=6, batch_size=4, steps_per_report=2)
    run = tmp_path / "run"
    session = Session.open(str(model_folder), str(data), run, settings, tests=True)
    assert session.draw() is None, "nothing was measured yet"
    kinds = [type(event) for event in session.train()]
    assert kinds == [Validated, Trained, Trained, Trained, Validated, Saved]
    assert session.draw() == run / PICTURE
    assert (run / PICTURE).read_bytes().startswith(b"\x89PNG")
    after = session.test()
    tested = Session.open(str(model_folder), str(data), run, settings, trains=False, tests=True)
    assert tested.test() == pytest.approx(after, rel=1e-5)
    with pytest.raises(SourceError, match="has a run in it; go on with --resume"):
        Session.open(str(model_folder), str(data), run, settings)
