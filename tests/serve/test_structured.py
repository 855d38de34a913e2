"""Structured answers of all dialects, under a few drawn schemas; `make long` asks for more of them
with `tests.serve.structured`."""

from __future__ import annotations

import random

import pytest

from mlx_diffgemma import GenerationSettings
from tests.serve.cases import serving
from tests.serve.structured import DIALECTS, STEPS, is_valid, run
from tests.write.constrained_runs import draw_schema


def schemas() -> list[dict]:
    draw, objects = random.Random(20), []
    while len(objects) < 12:
        if (schema := draw_schema(draw)).get("type") == "object":
            objects.append(schema)
    return objects


def test_every_structured_answer_fits_its_schema():
    with serving(settings=GenerationSettings(max_denoising_steps=STEPS)) as running:
        seen = run(running, schemas(), 8, 24, 4)
        assert not seen.findings and not running.bugs
    assert seen.count == 24 and set(seen.answers) == set(DIALECTS) and len(seen.schemas) == 8


@pytest.mark.parametrize(
    ("text", "fits"), [('{"a": 1}', True), ('{"a": "1"}', False), ('{"a": 1', False), ("", False)]
)
def test_the_check_is_one(text, fits):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert is_valid(schema, text) is fits
