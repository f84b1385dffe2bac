"""Errors: they keep what a program may act on, also across process borders."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from penstock import errors

CASES = [
    (errors.PenstockError, {}),
    (errors.CapExceededError, {"requested": 3, "cap": 2, "used": 1}),
    (errors.DeviceError, {"call": "cuMemCreate", "code": 2}),
    (errors.CheckpointError, {"path": Path("p"), "tensor": "t", "offset": 0}),
    (errors.ScheduleError, {}),
    (errors.ModelError, {}),
]


@pytest.mark.parametrize(("kind", "attributes"), CASES)
def test_attributes_survive_pickling(
    kind: type[errors.PenstockError], attributes: dict[str, object]
) -> None:
    error = kind("m", **attributes)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert type(each) is kind
        assert isinstance(each, errors.PenstockError)
        assert str(each) == "m"
        assert vars(each) == attributes


@pytest.mark.parametrize(("kind", "attributes"), CASES)
def test_attributes_are_optional(
    kind: type[errors.PenstockError], attributes: dict[str, object]
) -> None:
    assert vars(kind("m")) == dict.fromkeys(attributes)


def test_cap_error_is_a_memory_error() -> None:
    assert issubclass(errors.CapExceededError, MemoryError)
