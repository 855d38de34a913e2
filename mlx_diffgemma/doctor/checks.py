"""All checks of the device, in the order of a report."""

from __future__ import annotations

from . import attention, experts, kernels, products, sampling, whole, writes
from .outcome import Check


def all_checks() -> list[Check]:
    """Return the checks that exist on this machine's device."""
    files = products, experts, attention, kernels, sampling, writes, whole
    return [check for file in files for check in file.checks()]
