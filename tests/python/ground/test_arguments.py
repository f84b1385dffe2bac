"""Arguments held against annotations: what is refused, what is not, and by which words."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import TypedDict, Unpack

import penstock
from penstock.arguments import check_call, checked
from penstock.integrations import transformers

if TYPE_CHECKING:
    from nowhere import Unknown


class Orders(Protocol):
    def order(self) -> int: ...


class Less(TypedDict, total=False):
    trace: bool


class Options(Less, total=False):
    cap: int | str | None


@checked
def door(
    count: int,
    share: float = 0.5,
    *names: str,
    path: str | os.PathLike[str] = "",
    orders: Orders | None = None,
    mode: Literal["a", "b"] = "a",
    kind: type[nn.Module] = nn.Module,
    call: Callable[[], int] | None = None,
    shape: Sequence[int] = (),
    unknown: Unknown | None = None,
    **options: Unpack[Options],
) -> tuple[Any, ...]:
    return count, share, names, options


@pytest.mark.parametrize(
    "given",
    [
        {"count": np.int64(3)},
        {"count": 3, "share": 1},
        {"count": 3, "share": np.float32(1)},
        {"count": 3, "shape": torch.Size([1, 2])},
        {"count": 3, "unknown": object()},
        {"count": 3, "cap": "8GiB", "trace": True},
        {"count": 3, "kind": nn.Linear, "call": lambda: 3, "mode": "c"},
        {"count": 3, "orders": penstock.FarthestUse()},
    ],
)
def test_what_fits_is_passed_on(given: dict[str, Any]) -> None:
    assert door(**given)[0] == 3
    check_call(door, **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": True}, "door: count is int, not bool True"),
        ({"count": 3.0}, "door: count is int, not float 3.0"),
        ({"count": torch.tensor(3)}, "door: count is int, not Tensor"),
        ({"count": 3, "share": "half"}, "door: share is float, not str 'half'"),
        ({"count": 3, "path": b"x"}, "door: path is str or PathLike, not bytes b'x'"),
        ({"count": 3, "orders": 1}, r"door: orders is a Orders \(has order\) or None, not int 1"),
        ({"count": 3, "mode": 1}, "door: mode is 'a' or 'b', not int 1"),
        ({"count": 3, "kind": str}, "door: kind is a class of Module, not type"),
        ({"count": 3, "call": 1}, "door: call is a function or None, not int 1"),
        ({"count": 3, "shape": [1, None]}, "door: shape is a list of int, not list"),
        ({"count": 3, "trace": 1}, "door: trace is bool, not int 1"),
        ({"count": 3, "cpa": 1}, "door has no argument 'cpa'; did you mean 'cap'"),
        ({"count": 3, "zzzzz": 1}, "door has no argument 'zzzzz'. It has count, share, path"),
        ({}, "needs count"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        door(**given)


def test_arguments_without_a_name_are_checked_too() -> None:
    assert door(1, 2, "a", "b")[2] == ("a", "b")
    with pytest.raises(TypeError, match="names is str, not int 3"):
        door(1, 2, "a", 3)  # type: ignore[arg-type]


def test_a_block_is_refused_where_it_is_called_not_where_it_begins() -> None:
    @checked
    @contextmanager
    def block(name: str):
        yield name

    with block("a") as found:
        assert found == "a"
    with pytest.raises(TypeError, match="block: name is str"):
        block(3)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_sizes() -> None:
    assert penstock.Pager(cap=np.int64(1 << 20), device="cpu").cap == 1 << 20


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: penstock.MemoryManager(capp=1), "MemoryManager has no argument 'capp'"),
        (lambda: penstock.offload(nn.Linear(2, 2), capp=1), "offload has no argument 'capp'"),
        (lambda: transformers.load("x", capp=1), "load has no argument 'capp'"),
    ],
)
def test_unknown_options_are_of_the_function_that_was_called(
    call: Callable[[], object], told: str
) -> None:
    with pytest.raises(TypeError, match=f"^{told}; did you mean 'cap'"):
        call()


def test_a_lazy_module_refuses_options_when_it_is_made() -> None:
    manager = penstock.MemoryManager(cap="1MiB", device="cpu")
    with pytest.raises(TypeError, match=r"register has no argument 'strickt'; did you mean 'stri"):
        penstock.LazyModule(manager, "m", lambda: nn.Linear(2, 2), {}, strickt=True)


def test_arguments_that_lack_or_are_too_many_are_named() -> None:
    @checked
    def door_of_three(model: str, weights: str, *, cap: int, name: str = "") -> str:
        return model + weights + name + str(cap)

    assert door_of_three("a", weights="b", cap=1) == "ab1"
    with pytest.raises(TypeError, match=r"door_of_three needs cap, weights$"):
        door_of_three("a")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"needs model$"):
        door_of_three(weights="b", cap=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no more than model, weights by place, and .*: cap, name"):
        door_of_three("a", "b", 1)  # type: ignore[misc]
