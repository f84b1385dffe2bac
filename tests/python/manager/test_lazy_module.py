"""A module that has a manager's model do its work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock import LazyModule, MemoryManager, ModelError
from python.support import KIB, PAGERS, build, mlp, same_bits, state_of

X = torch.linspace(-1, 1, 3 * 128).view(3, 128)


def layers() -> nn.Module:
    return mlp(128, 128, 128).eval()


@pytest.fixture(params=PAGERS)
def manager(request: pytest.FixtureRequest) -> MemoryManager:
    return MemoryManager(cap=256 * KIB, device="cpu", pager=request.param, page_size=64 * KIB)


def test_it_is_loaded_by_its_first_call_and_let_go_of_after_each(manager: MemoryManager) -> None:
    plain = build(layers)
    lazy = LazyModule(manager, "m", layers, state_of(plain), pin=["1"])
    assert not manager.stats().models
    assert not list(lazy.parameters())
    with torch.no_grad():
        for _ in range(3):
            assert same_bits(lazy(X), plain(X))
            model = manager.stats().models["m"]
            assert model.acquired == 0
            assert model.memory.resident_bytes > 0, "until others need the room"


def test_lazy_modules_are_parts_of_others(manager: MemoryManager) -> None:
    first, second = build(layers), build(layers, 1)
    manager.register("first", layers, state_of(first))
    both = nn.Sequential(
        LazyModule(manager, "first"), LazyModule(manager, "second", layers, state_of(second))
    )
    with torch.no_grad():
        for _ in range(3):
            assert same_bits(both(X), second(first(X)))


def test_an_error_releases_too(manager: MemoryManager) -> None:
    lazy = LazyModule(manager, "m", layers, state_of(build(layers)))
    with pytest.raises(RuntimeError):
        lazy(torch.ones(1, 3))
    assert manager.stats().models["m"].acquired == 0


def test_what_is_missing_is_said(manager: MemoryManager) -> None:
    with pytest.raises(ValueError, match="both a builder and its weights"):
        LazyModule(manager, "m", layers)
    with pytest.raises(ModelError, match="no model 'm'"):
        LazyModule(manager, "m")(X)
