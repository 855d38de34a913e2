"""Whether the deliberate faults of `faults.py` still have a place; `make long` puts them there."""

import re

import pytest

from tests.faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_one_place_and_a_test(fault):
    source = (ROOT / "mlx_diffgemma" / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.before) == 1
    for test in fault.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name.partition('[')[0] or 'test_'}", text, re.MULTILINE)


def test_names_are_apart():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
