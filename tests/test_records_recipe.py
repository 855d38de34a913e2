"""The recipe of records in JSON: what is drawn is valid, said in words, and the same again."""

import importlib.util
import json
from pathlib import Path

from jsonschema import Draft202012Validator

from mlx_diffgemma import Constraint, bundled_model, load_tokenizer
from mlx_diffgemma.config.training import TrainSettings, read_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "records"
SPEC = importlib.util.spec_from_file_location("records", RECIPE / "draw.py")
records = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(records)


def test_records_fit_their_schema_and_are_said_in_words():
    validator, constraint = (
        Draft202012Validator(records.SCHEMA),
        Constraint.json_schema(records.SCHEMA),
    )
    tokenizer, rows = load_tokenizer(bundled_model()), records.draw(200, seed=5)
    for row in rows:
        value = json.loads(row["completion"])
        assert validator.is_valid(value) and constraint.accepts(row["completion"])
        words = [*map(str, [value["name"], value["age"], value["size"]])]
        words += ["vip" if value["vip"] else "not", *map(str, value["marks"])]
        assert row["prompt"].split() == ["Record:", *words]
        # With its end, one canvas of the bundled model.
        assert len(tokenizer.encode(row["completion"], add_special_tokens=False)) < 64
    assert len({json.loads(row["completion"])["name"] for row in rows}) == 200
    assert len({len(json.loads(row["completion"])["marks"]) for row in rows}) == 3
    assert rows == records.draw(200, seed=5) != records.draw(200, seed=6)


def test_the_sets_have_no_prompt_in_common(tmp_path):
    records.write(tmp_path)
    sets = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid", "test")
    }
    counts = {name: len(rows) for name, rows in sets.items()}
    assert counts == {"train": records.TRAIN, "valid": records.VALID, "test": records.TEST}
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert json.loads((tmp_path / "schema.json").read_text()) == records.SCHEMA


def test_the_settings_can_be_read():
    settings = TrainSettings.from_dict(read_recipe(str(RECIPE / "lora.yaml")))
    assert settings.fine_tune_type == "lora" and settings.lora_parameters.rank == 16
