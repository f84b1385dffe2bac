"""Kernels of one's own: weights in place and plain inside, the model as it was afterwards."""

from __future__ import annotations

import copy
import ctypes
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from penstock import CapExceededError, Kernel, MemoryManager, ModelError
from python.support import KIB, PAGERS, build, pinned_pages, same_bits, state_of

PAGE = 64 * KIB
WIDTH = 128
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def model() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(5)))


def raw_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Read a tensor by its address, as a kernel does and no dispatch mode sees."""
    assert type(tensor) is nn.Parameter
    made = torch.empty(tensor.shape)
    ctypes.memmove(made.data_ptr(), tensor.data_ptr(), made.numel() * 4)
    return made


class Rig:
    def __init__(self, pager: str, cap: int) -> None:
        self.plain = build(model)
        self.manager = MemoryManager(
            cap=cap * PAGE, device="cpu", pager=pager, page_size=PAGE, verify=pager == "frames"
        )
        self.manager.register("m", lambda: model().eval(), state_of(self.plain))
        self.calls = 0

    def linear(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.linear(x, raw_copy(module.weight))

    def block(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        up, down = raw_copy(module.up.weight), raw_copy(module.down.weight)
        return nn.functional.linear(nn.functional.linear(x, up), down)

    def check(self, module: nn.Module, passes: int = 1) -> None:
        with torch.no_grad():
            for _ in range(passes):
                assert same_bits(module(X), self.plain(X))


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("cap", [2, 4, 10])
@pytest.mark.parametrize("passes", [0, 3])
def test_a_kernel_finds_the_weights_of_its_module(pager: str, cap: int, passes: int) -> None:
    rig = Rig(pager, cap)
    with rig.manager.use("m") as module:
        rig.check(module, passes)
        kernel = rig.manager.register_kernel(nn.Linear, rig.linear)
        assert len(kernel.names) == 10
        rig.check(module, 5)
        assert rig.calls == 50
        kernel.remove()
        rig.check(module, 5)
        assert rig.calls == 50
        kernel.remove()
    assert pinned_pages(rig.manager) == 0
    assert rig.manager.stats().used == 0


@pytest.mark.parametrize("cap", [2, 5])
def test_a_kernel_finds_the_weights_of_the_parts_too(pager: str, cap: int) -> None:
    rig = Rig(pager, cap)
    with rig.manager.use("m") as module:
        with rig.manager.register_kernel("[024]", rig.block, model="m") as kernel:
            assert kernel.names == ("m: 0", "m: 2", "m: 4")
            rig.check(module, 5)
        assert rig.calls == 15
        rig.check(module, 3)
    assert rig.manager.stats().used == 0


def test_a_kernel_may_call_the_parts(pager: str) -> None:
    rig = Rig(pager, 3)
    with (
        rig.manager.use("m") as module,
        rig.manager.register_kernel("1", lambda m, x: m.down(m.up(x))),
    ):
        rig.check(module, 4)


def test_kernels_of_several_models(pager: str) -> None:
    rig = Rig(pager, 6)
    other = build(model, 1)
    rig.manager.register("n", lambda: model().eval(), state_of(other))
    with rig.manager.register_kernel("*.up", rig.linear) as kernel, torch.no_grad():
        assert len(kernel.names) == 10
        with rig.manager.use("m") as m, rig.manager.use("n") as n:
            rig.check(m, 3)
            assert same_bits(n(X), other(X))
    assert rig.calls == 20


def test_what_cannot_be_is_refused(pager: str) -> None:
    rig = Rig(pager, 4)
    with pytest.raises(ModelError, match=r"'\*.gate' matches no module of 'm'"):
        rig.manager.register_kernel("*.gate", rig.linear)
    with pytest.raises(ModelError, match="no model 'x'"):
        rig.manager.register_kernel("*", rig.linear, model="x")
    with rig.manager.register_kernel("0.up", rig.linear):
        with pytest.raises(ModelError, match=r"'m: 0.up' has a kernel already"):
            rig.manager.register_kernel("*.up", rig.linear)
        assert not isinstance(rig.manager._models["m"].binding.module[1].up.forward, Kernel)

    with rig.manager.use("m") as module:
        rig.check(module, 3)


def test_kernels_come_and_go_while_the_model_is_called(pager: str) -> None:
    rig = Rig(pager, 4)
    later: list[Kernel] = []

    def register(module: Any, x: torch.Tensor) -> torch.Tensor:
        later.append(rig.manager.register_kernel("1.up", rig.linear))
        return rig.linear(module, x)

    def remove(module: Any, x: torch.Tensor) -> torch.Tensor:
        later.pop().remove()
        return rig.linear(module, x)

    with (
        rig.manager.use("m") as module,
        rig.manager.register_kernel("0.up", register),
        rig.manager.register_kernel("2.up", remove),
    ):
        for calls in (3, 6):
            rig.check(module)
            assert rig.calls == calls
            assert not later
    with rig.manager.use("m") as module:
        rig.check(module, 3)
    assert rig.calls == 6


def test_a_kernel_whose_weights_do_not_fit_together_is_told(pager: str) -> None:
    rig = Rig(pager, 1)
    with (
        rig.manager.register_kernel("0", rig.block),
        pytest.raises(CapExceededError),
        rig.manager.use("m") as module,
    ):
        rig.check(module, 3)
    with rig.manager.use("m") as module:
        rig.check(module, 3)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_of_a_kernel_spoil_nothing(pager: str, error: type[BaseException]) -> None:
    rig = Rig(pager, 3)

    def fail(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise error

    with rig.manager.use("m") as module:
        for passes in (0, 3):
            rig.check(module, passes)
            with (
                rig.manager.register_kernel("2.up", fail),
                pytest.raises(error),
            ):
                module(X)
            rig.check(module, 3)
    assert pinned_pages(rig.manager) == 0


def test_copies_have_their_own_forward(pager: str) -> None:
    rig = Rig(pager, 4)
    with rig.manager.use("m") as module, rig.manager.register_kernel("0*", rig.block):
        copied = copy.deepcopy(module)
        loaded = pickle.loads(pickle.dumps(module))
        for made in (copied, loaded):
            assert same_bits(made(X), rig.plain(X))
            assert not rig.calls


def test_a_kernel_can_be_removed_when_its_model_is_gone(pager: str) -> None:
    rig = Rig(pager, 12)
    kernel = rig.manager.register_kernel("0.up", rig.linear)
    with rig.manager.use("m") as module:
        rig.check(module)
    rig.manager.unregister("m")
    assert "forward" in module[0].up.__dict__
    kernel.remove()
    assert "forward" not in module[0].up.__dict__
