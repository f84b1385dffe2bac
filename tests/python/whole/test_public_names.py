"""The names that users have, where they have them, whatever moves inside."""

from __future__ import annotations

import importlib

import pytest

import penstock

TOP = {
    "Candidate",
    "CapExceededError",
    "CapStats",
    "CappedScope",
    "CheckpointError",
    "DeviceError",
    "Estimate",
    "FarthestUse",
    "Holder",
    "Kernel",
    "LayerStreamer",
    "LazyModule",
    "ManagerStats",
    "MemoryManager",
    "ModelError",
    "ModelStats",
    "NothingToKeepWarning",
    "Pager",
    "ParameterMovedWarning",
    "PenstockError",
    "Policy",
    "PressureEvent",
    "PressureHandle",
    "Priority",
    "Region",
    "ScheduleError",
    "Trial",
    "Tuned",
    "__version__",
    "capped",
    "estimate",
    "manager_of",
    "memory_stats",
    "memory_summary",
    "offload",
    "on_pressure",
    "record_stacks",
    "restore",
    "set_cap",
    "training",
    "tune",
}
ELSEWHERE = {
    "penstock.checkpoint": {"Checkpoint", "Header", "TensorEntry", "open_checkpoint"},
    "penstock.cli": {"main"},
    "penstock.errors": {name for name in TOP if name.endswith("Error")},
    "penstock.integrations.diffusers": {"load", "register"},
    "penstock.integrations.transformers": {"load", "register"},
    "penstock.training": {"prepare"},
}
METHODS = {
    "LayerStreamer": (
        "block close device layer load_static manager one_pass report run_pass stats"
    ),
    "MemoryManager": (
        "acquire acquire_on_call adopt capture device give_back guest hold keep_resident module "
        "one_pass pager prefetch register register_kernel release release_reservation report "
        "require_room reserve schedule set_cap settings stats timeline unregister use"
    ),
    "Pager": "budget cap device evict page_size prefetch reserve synchronize",
    "Region": "address nbytes tensor",
}


def test_the_package_has_its_names() -> None:
    assert set(penstock.__all__) == TOP
    assert all(hasattr(penstock, name) for name in TOP)
    # A room of that name, or a module in it, must not stand where the function is.
    assert callable(penstock.offload) and callable(penstock.capped)


@pytest.mark.parametrize("module", ELSEWHERE)
def test_modules_that_users_import_have_theirs(module: str) -> None:
    found = importlib.import_module(module)
    assert ELSEWHERE[module] <= set(found.__all__)
    assert all(hasattr(found, name) for name in found.__all__)


@pytest.mark.parametrize("name", METHODS)
def test_classes_have_their_methods(name: str) -> None:
    wanted = set(METHODS[name].split())
    made = penstock.Pager(cap="1MiB", device="cpu", page_size="64KiB")
    found = made if name == "Pager" else getattr(penstock, name)
    assert not {each for each in wanted if not hasattr(found, each)}
