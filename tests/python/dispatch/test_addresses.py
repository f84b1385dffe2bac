"""Kernels that are given addresses of paged tensors find their bytes there, or are refused."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from penstock import CapExceededError, MemoryManager, manager_of
from penstock.dispatch import torch_dispatch
from penstock.errors import ModelError
from python.support import KIB, PAGERS, pinned_pages, same_bits

WIDTH = 128  # a weight is one page
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


def read(tensor: torch.Tensor, address: int | None = None) -> torch.Tensor:
    """Read a tensor by its address, as a kernel does that no dispatcher sees."""
    made = torch.empty(tensor.shape)
    ctypes.memmove(made.data_ptr(), address or tensor.data_ptr(), made.numel() * 4)
    return made


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    ctypes.memmove(tensor.data_ptr(), value.data_ptr(), value.numel() * 4)


class ByAddress(torch.autograd.Function):
    """A matrix product that reads its weight by its address, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ read(weight).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ read(weight), grad.T @ x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(ByAddress.apply(x, self.weight) + self.bias)


def two(pager: str, cap: int = 5, layers: int = 12, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(*(Layer() for _ in range(layers)))
    paged = penstock.offload(
        copy.deepcopy(plain),
        cap=f"{cap * 64}KiB",
        device="cpu",
        pager=pager,
        page_size="64KiB",
        verify=pager == "frames",
        **options,
    )
    return plain, paged


def held(model: nn.Module) -> int:
    return pinned_pages(manager_of(model))


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    yield
    penstock._core.release_addresses()


def test_a_model_of_kernels_runs_and_trains_under_a_cap(pager: str) -> None:
    plain, paged = two(pager)
    for _ in range(3):
        outputs = []
        for model in (plain, paged):
            model.zero_grad()
            outputs.append(model(X))
            outputs[-1].square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
        assert same_bits(*outputs)
        assert all(map(same_bits, plain.parameters(), paged.parameters()))
    assert held(paged) == 0


def test_what_a_kernel_writes_stays(pager: str) -> None:
    plain, paged = two(pager)
    for model in (plain, paged):
        for parameter in model.parameters():
            write(parameter, 2 * read(parameter))
    with torch.no_grad():
        assert same_bits(plain(X), paged(X))
    penstock.restore(paged)
    assert all(map(same_bits, plain.parameters(), paged.parameters()))


def test_an_address_is_good_until_the_next_operation(pager: str) -> None:
    plain, paged = two(pager)
    weights = [layer.weight for layer in paged[:2]]
    addresses = [weight.data_ptr() for weight in weights]
    for layer, weight, address in zip(plain, weights, addresses, strict=False):
        assert same_bits(read(weight, address), layer.weight)
    assert held(paged) > 2
    paged[7].weight.sum()
    assert held(paged) == 0


@pytest.mark.parametrize("error", [None, ValueError])
def test_nothing_is_held_after_a_call(pager: str, error: type[Exception] | None) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.data_ptr()
            assert held(paged) == 1
            if error is not None:
                raise error("as asked")
            return x

    _, paged = two(pager)
    paged = penstock.offload(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), Last()),
        cap="192KiB",
        device="cpu",
        pager=pager,
        page_size="64KiB",
    )
    if error is None:
        paged(X)
    else:
        with pytest.raises(error, match="as asked"):
            paged(X)
    assert held(paged) == 0


def test_what_one_kernel_reads_has_to_fit(pager: str) -> None:
    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            addresses = [weight.data_ptr() for weight in self.weights]
            return sum(map(read, self.weights, addresses), x.sum())

    plain = All()
    paged = penstock.offload(
        copy.deepcopy(plain), cap="320KiB", device="cpu", pager=pager, page_size="64KiB"
    )
    with pytest.raises(CapExceededError, match=r"takes addresses weights\.\d .* untyped_storage"):
        paged(X)
    assert held(paged) == 0
    manager_of(paged).set_cap("640KiB")
    assert same_bits(plain(X), paged(X))


def test_addresses_tell_tensors_apart(pager: str) -> None:
    plain, paged = two(pager)
    paged[1].weight = paged[0].weight
    assert len({parameter.data_ptr() for parameter in paged.parameters()}) == 23
    moved = manager_of(paged).stats().loaded_bytes
    assert len({p.untyped_storage().data_ptr() for p in paged.parameters()}) == 23
    assert manager_of(paged).stats().loaded_bytes == moved
    paged[1].weight = nn.Parameter(plain[1].weight.detach().clone())
    with torch.no_grad():
        assert same_bits(plain(X), paged(X))


def test_threads_have_addresses_of_their_own(pager: str) -> None:
    plain, paged = two(pager, cap=8)
    with torch.no_grad():
        want = plain(X)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    assert same_bits(paged(X), want)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []
    assert held(paged) == 0


def test_a_thread_that_ends_or_rests_holds_nothing_for_good(pager: str) -> None:
    plain, paged = two(pager)
    rest, taken = threading.Event(), threading.Event()

    def take(weights: list[nn.Parameter], stay: bool) -> None:
        for weight in weights:
            weight.data_ptr()
        taken.set()
        if stay:
            rest.wait(60)

    ends = threading.Thread(target=take, args=([paged[0].weight], False))
    ends.start()
    ends.join(60)
    until = time.monotonic() + 60
    while held(paged) and time.monotonic() < until:  # a thread's own end comes after its join
        time.sleep(0.01)
    assert held(paged) == 0
    taken.clear()
    rests = threading.Thread(target=take, args=([layer.weight for layer in paged[:5]], True))
    rests.start()
    assert taken.wait(60)
    with torch.no_grad():
        assert same_bits(plain(X), paged(X))  # the cap is five pages
    rest.set()
    rests.join(60)


def test_an_operation_around_a_kernel_holds_for_it(pager: str) -> None:
    plain, paged = two(pager)
    inside: list[int] = []

    @torch.library.custom_op("penstock_test::by_address", mutates_args=())
    def by_address(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        made = x @ read(weight).T
        inside.append(held(paged))
        return made

    assert same_bits(by_address(X, plain[3].weight), by_address(X, paged[3].weight))
    assert inside[1] > inside[0] == 0
    assert held(paged) == 0


def test_a_view_holds_its_own_bytes(pager: str) -> None:
    model = nn.Module()
    model.stack = nn.Parameter(torch.randn(16, WIDTH, WIDTH))
    plain = copy.deepcopy(model)
    penstock.offload(model, cap="1088KiB", device="cpu", pager=pager, page_size="64KiB")
    for expert in range(16):
        assert same_bits(read(model.stack[expert]), plain.stack[expert])
        assert held(model) in range(1, 17)


def test_memory_goes_with_a_model_whose_addresses_were_taken(pager: str) -> None:
    _, paged = two(pager)
    manager = manager_of(paged)
    paged[0].weight.data_ptr()
    penstock.restore(paged)
    gc.collect()
    assert manager.stats().used == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_lets_go_of_nothing(pager: str) -> None:
    plain, paged = two(pager)
    address = paged[0].weight.data_ptr()
    child = os.fork()
    if child == 0:
        try:
            penstock._core.release_addresses()
            paged[1].weight.data_ptr()
        except ModelError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert same_bits(read(paged[0].weight, address), plain[0].weight)
    assert held(paged) > 0


def test_a_tier_that_cannot_keep_writes_gives_addresses_to_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    plain = nn.Sequential(*(Layer() for _ in range(6)))
    save_file(plain.state_dict(), tmp_path / "m.safetensors")
    manager = MemoryManager(
        cap=4 * 64 * KIB, device="cpu", pager="frames", page_size=64 * KIB, host="stream"
    )
    manager.register("m", lambda: nn.Sequential(*(Layer() for _ in range(6))), tmp_path)
    with manager.use("m") as model, torch.no_grad():
        for _ in range(3):
            assert same_bits(plain(X), model(X))


def test_undefined_and_ordinary_tensors_have_addresses_as_ever() -> None:
    two("frames")
    ordinary = torch.ones(3)
    assert ordinary.data_ptr() == ordinary.untyped_storage().data_ptr()
    assert torch.empty(0).data_ptr() == 0
    torch_dispatch.hold_address(ordinary, 0, patient=True)
    with pytest.raises(TypeError):
        torch_dispatch.hold_address(3, 0, patient=True)  # type: ignore[arg-type]
