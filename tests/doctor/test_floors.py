"""The cost model, against cells worked out by hand, and the chips it has rates for."""

from __future__ import annotations

import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.doctor.floors import CHIPS, Chip, Model, known_chip, parameters
from mlx_diffgemma.doctor.made_up import kinds_of_layers
from mlx_diffgemma.doctor.published import published_model, with_layers
from mlx_diffgemma.model import DiffusionGemma

CONFIG = published_model()
MODEL = Model(CONFIG)
BY_NAME = {chip.name: chip for chip in CHIPS}
CLOSE = 0.03  # the cells are rounded


@pytest.mark.parametrize(
    ("context", "gflop", "gigabytes"), [(1024, 2532, 26.5), (8192, 2832, 28.4), (32768, 3863, 35.0)]
)
def test_work_of_a_step_is_that_counted_by_hand(context, gflop, gigabytes):
    parts = MODEL.step(256, context, Chip("any", 1, 1, 1), "MLX")
    assert sum(part.flops for part in parts) / 1e9 == pytest.approx(gflop, rel=CLOSE)
    assert sum(part.bytes for part in parts) / 1e9 == pytest.approx(gigabytes, rel=CLOSE)


@pytest.mark.parametrize(
    ("chip", "floor", "mlx"),
    [("M3 Ultra", 91, 176), ("M4 Max", 151, 247), ("M5", 205, 282), ("H100 bf16", 6.3, 11.6)],
)
def test_time_of_a_step_is_that_worked_out_by_hand(chip, floor, mlx):
    found = [MODEL.step_ms(256, 1024, BY_NAME[chip], kind) for kind in ("floor", "MLX")]
    assert found == pytest.approx([floor, mlx], rel=CLOSE)


@pytest.mark.parametrize(
    ("chip", "by_steps"),
    [
        ("M3 Ultra", {8: (323, 167), 20: (136, 70)}),
        ("H200 fp8", {8: (4696, 2819), 20: (1997, 1192)}),
    ],
)
def test_tokens_per_second_are_those_worked_out_by_hand(chip, by_steps):
    for steps, cells in by_steps.items():
        found = [
            MODEL.tokens_per_second(steps, 256, 1024, BY_NAME[chip], kind)
            for kind in ("floor", "MLX")
        ]
        assert found == pytest.approx(list(cells), rel=CLOSE)


def test_parameters_are_those_of_the_model():
    """Counted over the model's own arrays, which are never computed."""
    counted = dict.fromkeys(parameters(CONFIG.text), 0)
    for name, array in tree_flatten(DiffusionGemma(CONFIG).parameters()):
        for part in counted:
            if f".{part}." in name and array.ndim > 1:
                counted[part] += array.size
    assert counted == parameters(CONFIG.text)


def test_single_layers_add_up_to_the_whole():
    chip, whole = BY_NAME["M3 Ultra"], MODEL.commit_ms(256, 1024, BY_NAME["M3 Ultra"], "floor")
    layers = kinds_of_layers(CONFIG).values()
    assert [count for _, count in layers] == [25, 5]
    ones = [
        count * Model(with_layers(CONFIG, layer)).commit_ms(256, 1024, chip, "floor")
        for layer, count in layers
    ]
    assert sum(ones) == pytest.approx(whole, rel=1e-9)


def test_more_rows_and_a_longer_context_never_cost_less():
    for chip in CHIPS:
        for kind in ("floor", "MLX"):
            by_rows = [MODEL.step_ms(rows, 1024, chip, kind) for rows in (64, 128, 256)]
            by_context = [MODEL.step_ms(256, n, chip, kind) for n in (0, 1024, 8192, 32768)]
            assert by_rows == sorted(by_rows) and by_context == sorted(by_context)
            assert MODEL.step_ms(256, 1024, chip, "floor") <= MODEL.step_ms(256, 1024, chip, "MLX")


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("Apple M3 Ultra", "M3 Ultra"),
        ("Apple M5", "M5"),
        ("Apple M5 Max", "M5 Max"),
        ("Apple M1 Ultra", "M1 Ultra"),
        ("NVIDIA H100 80GB HBM3", "H100 bf16"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090 bf16"),
        # Relatives with other rates.
        ("Apple M5 Ultra", None),
        ("Apple M4 Pro", None),
        ("Apple M4", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("Apple Paravirtual device", None),
        ("AMD EPYC", None),
        ("", None),
    ],
)
def test_a_chip_is_found_by_its_name_and_a_relative_is_not(device, chip):
    found = known_chip(device)
    assert (found and found.name) == chip
