"""What pytest-benchmark records about the machine: nothing that identifies it."""

from typing import Any

import pytest

from bench.measure import machine


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["node"] = machine.name("cpu")
    for name in ("cpu", "release"):
        machine_info.pop(name, None)
