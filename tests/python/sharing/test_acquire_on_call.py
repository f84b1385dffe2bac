"""Models that are acquired on call: whichever is called is in use, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from penstock import CapExceededError, MemoryManager, ModelError
from python.support import KIB, PAGERS, build, mlp, same_bits, state_of

PAGE = 64 * KIB
X = torch.ones(2, 160)


def builder() -> nn.Sequential:
    return mlp(160, 160, 160, 160, 160)


def manager_of_parts(pager: str, pages: int) -> tuple[MemoryManager, dict[str, Any]]:
    manager = MemoryManager(cap=pages * PAGE, device="cpu", pager=pager, page_size=PAGE)
    parts = {}
    for seed, name in enumerate("abc"):
        manager.register(name, builder, state_of(build(builder, seed)))
        with manager.use(name) as parts[name]:
            pass
    return manager, parts


def users(manager: MemoryManager) -> list[str]:
    return [name for name, stats in manager.stats().models.items() if stats.acquired]


@pytest.mark.parametrize("pages", (5, 8, 30))
@pytest.mark.parametrize("pager", PAGERS)
def test_a_call_acquires_and_releases_the_one_before(pager: str, pages: int) -> None:
    manager, parts = manager_of_parts(pager, pages)
    wanted = [build(builder, seed)(X) for seed in range(3)]
    on_call = manager.acquire_on_call(*parts)
    assert users(manager) == []
    for _ in range(2):
        for name in "abbbc":
            assert same_bits(parts[name](X), wanted["abc".index(name)])
            assert users(manager) == [name]
    on_call.end()
    assert users(manager) == []
    assert manager.stats().peak <= manager.stats().cap
    assert same_bits(parts["b"][2](X), build(builder, 1)[2](X))  # a part of it alone
    if pages < 30:  # else it is in place as a whole, and nobody needs to know
        assert users(manager) == ["b"]
    manager.unregister("b")
    assert users(manager) == []


def test_a_call_inside_of_another_ones() -> None:
    manager, parts = manager_of_parts("frames", 16)
    manager.acquire_on_call(*parts)
    parts["a"](X)
    inner = parts["c"]
    handle = parts["a"][1].register_forward_pre_hook(lambda module, args: (args[0] + inner(X),))
    wanted = build(builder, 0)
    wanted[1].register_forward_pre_hook(lambda module, args: (args[0] + build(builder, 2)(X),))
    for _ in range(3):
        assert same_bits(parts["a"](X), wanted(X))
    handle.remove()
    parts["b"](X)
    assert users(manager) == ["b"]


@pytest.mark.parametrize("pager", PAGERS)
def test_a_model_too_large_leaves_the_others_usable(pager: str) -> None:
    manager, parts = manager_of_parts(pager, 6)
    manager.register("large", lambda: mlp(400, 400), state_of(build(lambda: mlp(400, 400))))
    with_large = manager.module("large")
    manager.acquire_on_call(*parts, "large")
    parts["a"](X)
    with pytest.raises(CapExceededError):
        with_large(torch.ones(1, 400))
    assert same_bits(parts["a"](X), build(builder, 0)(X))
    with pytest.raises(ModelError, match="no model 'other'"):
        manager.acquire_on_call("other")
