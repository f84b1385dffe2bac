"""One ledger for weights and everything else: room is made for tensors, and given back."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import penstock
from penstock import CapExceededError, DeviceError, _core
from penstock import built_libraries as built
from penstock.cap import out_of_memory, process, torch_allocator
from penstock.cap.hard_cap import HardCap
from penstock.cap.torch_hook import nested_stats
from python.support import eventually, same_bits

KIB = 1 << 10
MIB = 1 << 20
PAGE = 64 * KIB
WIDTH = 128  # a layer's weight is one page


class Hungry(nn.Module):
    """Layers, with memory for something else taken before each and given back after the last."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))
        self.take: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            self.take()
            x = layer(x).tanh()
        return x


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> HardCap:
    cap = HardCap(20 * PAGE, device=_core.HostDevice(), page_size=PAGE)
    monkeypatch.setattr("penstock.cap.process.current_cap", lambda _: cap)
    return cap


def register(depth: int) -> tuple[penstock.MemoryManager, Hungry]:
    torch.manual_seed(0)
    model = Hungry(depth)
    manager = penstock.MemoryManager(pager="frames", progress=False)
    manager.register("m", lambda: Hungry(depth), model.state_dict())
    return manager, model


def held(manager: penstock.MemoryManager) -> int:
    return manager.stats().models["m"].memory.resident_bytes // PAGE


def test_weights_make_room_for_tensors_within_a_pass(shared: HardCap) -> None:
    manager, model = register(16)
    x = torch.randn(3, WIDTH)
    taken: list[int] = []

    def take() -> None:
        if len(taken) < 16:
            taken.append(shared.allocator.allocate(PAGE - KIB, 0))

    with torch.no_grad(), manager.use("m") as bound:
        assert isinstance(bound, Hungry)
        for _ in range(3):
            assert same_bits(bound(x), model(x))
        before = held(manager)
        assert before == 16
        bound.take = take
        for _ in range(4):
            assert same_bits(bound(x), model(x))
        assert len(taken) == 16
        assert held(manager) <= 20 - 16 + 1
        assert manager.stats().peak <= manager.stats().cap
        with pytest.raises(CapExceededError, match="cap"):
            shared.allocator.allocate(8 * PAGE, 0)
        assert same_bits(bound(x), model(x))
        for address in taken:
            shared.allocator.free(address)
    manager.unregister("m")
    shared.allocator.empty_cache()
    assert shared.pager.budget.stats().used == 0


def test_weights_grow_again_when_the_pressure_ends(shared: HardCap) -> None:
    manager, model = register(30)
    x = torch.randn(3, WIDTH)
    with torch.no_grad(), manager.use("m") as bound:
        for _ in range(3):
            bound(x)
        most = held(manager)
        assert most >= 19
        blocks = [shared.allocator.allocate(PAGE, 0) for _ in range(10)]
        for _ in range(3):
            assert same_bits(bound(x), model(x))
        assert held(manager) <= 10
        for block in blocks:
            shared.allocator.free(block)
        few = manager.stats().models["m"].memory.planned_bytes
        for _ in range(20):
            assert same_bits(bound(x), model(x))
        assert held(manager) >= most - 1
        assert manager.stats().models["m"].memory.planned_bytes < few


def test_memory_that_each_pass_needs_is_not_taken_back_and_forth(shared: HardCap) -> None:
    manager, model = register(30)
    x = torch.randn(3, WIDTH)
    blocks: list[int] = []

    def take() -> None:
        blocks.append(shared.allocator.allocate(PAGE // 4, 0))

    with torch.no_grad(), manager.use("m") as bound:
        assert isinstance(bound, Hungry)
        bound.take = take
        for passed in range(24):
            assert same_bits(bound(x), model(x))
            for block in blocks:
                shared.allocator.free(block)
            blocks.clear()
            if passed == 10:
                frames = shared.allocator.stats()["num_device_alloc"]
        assert shared.allocator.stats()["num_device_alloc"] == frames


def test_idle_models_go_before_residents_of_one_in_use(shared: HardCap) -> None:
    manager, _ = register(8)
    other = Hungry(8)
    manager.register("other", lambda: Hungry(8), other.state_dict())
    x = torch.randn(1, WIDTH)
    with torch.no_grad():
        for name in ("other", "m"):
            with manager.use(name) as bound:
                for _ in range(3):
                    bound(x)
        with manager.use("m") as bound:
            manager.prefetch("other")
            shared.allocator.allocate(8 * PAGE, 0)
            assert held(manager) == 8
            assert same_bits(bound(x), bound(x))


def test_cap_is_shared_and_cannot_be_given_twice(shared: HardCap) -> None:
    with pytest.raises(ValueError, match="leave the cap out"):
        penstock.MemoryManager(cap="1MiB")
    with pytest.raises(ValueError, match='pager="frames"'):
        penstock.MemoryManager(pager="managed")
    manager, _ = register(2)
    assert manager.stats().cap == shared.pager.cap == 20 * PAGE


def test_lowering_the_cap_makes_room_or_says_what_is_held(shared: HardCap) -> None:
    manager, model = register(16)
    x = torch.randn(1, WIDTH)
    with torch.no_grad(), manager.use("m") as bound:
        bound(x)
        shared.set_cap(8 * PAGE)
        assert manager.stats().used <= 8 * PAGE
        assert same_bits(bound(x), model(x))
        block = shared.allocator.allocate(4 * PAGE, 0)
        with pytest.raises(CapExceededError, match="in use"):
            shared.set_cap(3 * PAGE)
        assert shared.pager.cap == 8 * PAGE
        assert same_bits(bound(x), model(x))
        shared.allocator.free(block)
        shared.set_cap("2MiB")
        assert same_bits(bound(x), model(x))


def test_without_a_hard_cap_a_manager_needs_one_of_its_own() -> None:
    with pytest.raises(ValueError, match="set_cap"):
        penstock.MemoryManager(device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_hard_cap_needs_a_gpu() -> None:
    with pytest.raises(DeviceError, match="MemoryManager"):
        penstock.set_cap("1GiB")
    with pytest.raises(DeviceError, match="'cpu'"):
        penstock.set_cap("1GiB", device="cpu")
    assert process.current_cap("cuda") is None


def test_an_allocator_chosen_by_the_environment_contradicts_a_hard_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = "backend:cudaMallocAsync"
    monkeypatch.setattr("penstock.cap.set_cap.require_cuda", lambda *_: None)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", chosen)
    with pytest.raises(DeviceError, match=f"'cudaMallocAsync', chosen by .*{chosen}: take it out"):
        penstock.set_cap("1GiB")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    with pytest.raises(DeviceError, match="'cudaMallocAsync': do not change it"):
        penstock.set_cap("1GiB")
    assert process.current_cap("cuda:0") is None


def test_figures_are_those_that_torch_prints(
    shared: HardCap, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = shared.allocator.allocate(100 * KIB, 0)
    monkeypatch.setattr(
        torch.cuda.memory, "memory_stats_as_nested_dict", lambda **_: nested_stats(shared.allocator)
    )
    monkeypatch.setattr(torch.cuda.memory, "_get_device_index", lambda *_, **__: 0)
    stats = torch.cuda.memory_stats(0)
    assert stats["allocated_bytes.all.current"] == 100 * KIB
    assert stats["reserved_bytes.all.current"] == 2 * PAGE
    assert torch.cuda.memory_allocated(0) == 100 * KIB
    assert torch.cuda.max_memory_reserved(0) == 2 * PAGE
    assert "102400 B" in torch.cuda.memory_summary(0)
    shared.allocator.free(block)


# ---- overflow ----------------------------------------------------------------------------------


def test_tensors_overflow_to_the_host_after_weights_have_given_way(shared: HardCap) -> None:
    manager, model = register(16)
    x = torch.randn(3, WIDTH)
    shared.set_overflow("managed", 8 * MIB)
    with torch.no_grad(), manager.use("m") as bound:
        for _ in range(3):
            assert same_bits(bound(x), model(x))
        inside = shared.allocator.allocate(8 * PAGE, 0)
        assert shared.allocator.overflow_stats().live == 0
        assert held(manager) <= 12
        address = shared.allocator.allocate(3 * MIB, 0)
        assert shared.allocator.overflow_stats().live == 3 * MIB
        ctypes.memset(address, 7, 3 * MIB)
        assert same_bits(bound(x), model(x))
        assert ctypes.string_at(address, 3 * MIB) == bytes([7]) * (3 * MIB)
        assert manager.stats().peak <= manager.stats().cap
        assert shared.allocator.stats()["allocated_bytes.all.current"] == 8 * PAGE + 3 * MIB
        with pytest.raises(CapExceededError, match=r"host's memory 3\.00 MiB .* of 8\.00 MiB"):
            shared.allocator.allocate(6 * MIB, 0)
        shared.allocator.free(address)
        shared.allocator.free(inside)
    assert shared.allocator.overflow_stats().live == 0
    shared.allocator.empty_cache()
    assert shared.allocator.overflow_stats().held == 0


def test_overflow_is_refused_unless_it_was_chosen(shared: HardCap) -> None:
    with pytest.raises(CapExceededError):
        shared.allocator.allocate(2 * MIB, 0)
    shared.set_overflow("managed")
    limit = shared.allocator.overflow_stats().limit
    assert 0 < limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    shared.allocator.free(shared.allocator.allocate(2 * MIB, 0))
    shared.set_overflow("refuse")
    with pytest.raises(CapExceededError):
        shared.allocator.allocate(2 * MIB, 0)


def test_set_cap_passes_the_choice_on(shared: HardCap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "current_cap", lambda _: shared)
    penstock.set_cap(20 * PAGE, overflow="managed", overflow_limit="4MiB")
    assert shared.allocator.overflow_stats().limit == 4 * MIB
    penstock.set_cap(20 * PAGE)
    assert shared.allocator.overflow_stats().limit == 4 * MIB
    penstock.set_cap(20 * PAGE, overflow="refuse")
    assert shared.allocator.overflow_stats().limit == 0
    with pytest.raises(ValueError, match="overflow_limit"):
        penstock.set_cap(20 * PAGE, overflow_limit="4MiB")
    with pytest.raises(ValueError, match="overflow_limit"):
        penstock.set_cap(20 * PAGE, overflow="refuse", overflow_limit="4MiB")
    with pytest.raises(ValueError, match="sideways"):
        penstock.set_cap(20 * PAGE, overflow="sideways")  # type: ignore[arg-type]


# ---- torch.OutOfMemoryError --------------------------------------------------------------------


def test_thrower_is_built_once_and_throws_what_torch_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert out_of_memory.find_thrower() != 0  # which has tried it
    (built,) = (tmp_path / "penstock").iterdir()
    made = built.stat().st_mtime_ns
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert out_of_memory.find_thrower() != 0
    assert built.stat().st_mtime_ns == made


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_it_says_what_is_raised_instead(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if compiler != "false":
        monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING):
        assert out_of_memory.find_thrower() == 0
    assert "RuntimeError" in caplog.text
    assert not any((tmp_path / "penstock").iterdir())


@pytest.mark.parametrize("missing", ["libtorch_cuda", "headers"])
def test_what_cannot_be_built_for_torchs_allocator_changes_nothing(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lib").mkdir()
    if missing == "headers":
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(built, "_HEADER", "missing_cuda_runtime_api.h")
    with caplog.at_level(logging.WARNING):
        reason = torch_allocator.change_to_own(_core.__file__)
    assert reason in caplog.text
    assert "MemPool and torch.compile's reduce-overhead mode stay off" in caplog.text
    assert (
        "without CUDA" if missing == "libtorch_cuda" else "missing_cuda_runtime_api.h"
    ) in reason


def test_core_has_the_functions_that_torchs_allocator_calls() -> None:
    core = ctypes.CDLL(_core.__file__)
    names = [torch_allocator._ALLOCATE, torch_allocator._FREE, *torch_allocator._BEYOND]
    assert all(hasattr(core, name) for name in (*names, *torch_allocator._HOOKS.values()))


def test_functions_are_handed_over_in_the_order_in_which_they_are_taken() -> None:
    source = torch_allocator._SOURCE.read_text()
    struct = source.split("struct PenstockFunctions {")[1].split("};")[0]
    taken = re.findall(r"\(\*(\w+)\)\(", struct)
    given = [torch_allocator._ALLOCATE, torch_allocator._FREE, *torch_allocator._BEYOND]
    given += torch_allocator._HOOKS.values()
    assert [name.removeprefix("penstock_") for name in given] == [
        {"allocate": "malloc", "delete_block": "delete"}.get(name, name) for name in taken
    ]


REFUSED_WITHOUT_THE_SUBCLASS = """
import torch, penstock
from penstock.cap import torch_hook
for name in ("getCheckpointState", "setCheckpointPoolState", "checkPoolLiveAllocations"):
    setattr(torch._C, f"_cuda_{name}", None)
class MemPool:
    def __init__(self, allocator=None, use_on_oom=False):
        self.made = (allocator, use_on_oom)
torch.cuda.MemPool = MemPool
def refused(call, *arguments):
    try:
        call(*arguments)
    except penstock.DeviceError as error:
        return str(error)
    raise AssertionError("it went through")
torch_hook._limit_pools("")
assert MemPool(use_on_oom=True).made == (None, True)
assert "allocator of its own" in refused(MemPool, object())
torch_hook._limit_pools("no compiler")
assert "no compiler" in refused(MemPool)
torch_hook._refuse_checkpoints("no compiler")
text = refused(torch._C._cuda_checkPoolLiveAllocations, 0, (0, 1), set())
assert "reduce-overhead" in text and "no compiler" in text
"""


def test_what_cannot_be_had_is_refused_where_it_is_asked_for() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REFUSED_WITHOUT_THE_SUBCLASS], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


SENT = """
import multiprocessing, pickle, torch, penstock
from multiprocessing.reduction import ForkingPickler
from penstock.cap import processes
processes.refuse_sharing(lambda device: device.type == "cpu")
tensor = torch.ones(3)
def refused(call, *arguments):
    try:
        call(*arguments)
    except penstock.DeviceError as error:
        assert "'cpu'" in str(error) and "tensor.cpu()" in str(error), error
    else:
        raise AssertionError("it went through")
context = multiprocessing.get_context("spawn")
loop = []
loop.append(loop)
for queue in (context.Queue(), context.JoinableQueue()):
    nested = [loop, {"a": (tensor,)}]
    for value in (tensor, nested, torch.nn.Parameter(tensor), tensor.untyped_storage()):
        refused(queue.put, value)
    queue.put([loop, "a", torch.ones(3, device="meta")])
    assert queue.get(timeout=60)[1] == "a"
refused(tensor.untyped_storage()._share_cuda_)
assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
"""


def test_tensors_whose_memory_cannot_be_shared_are_refused_where_they_are_sent() -> None:
    ran = subprocess.run([sys.executable, "-c", SENT], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_cache_that_others_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "penstock").mkdir(mode=0o777)
    (tmp_path / "penstock").chmod(0o777)
    assert out_of_memory.find_thrower() == 0
    assert "others can write" in caplog.text


# ---- memory outside of the ledger ---------------------------------------------------------------


def with_outside(
    nbytes: int, *, whole_device: bool = True, cap: int = 20 * PAGE, reserve: int | None = None
) -> tuple[_core.FaultyDevice, HardCap]:
    device = _core.FaultyDevice(_core.HostDevice())
    device.set_outside(nbytes, whole_device)
    return device, HardCap(cap, device=device, page_size=PAGE, reserve=reserve)


def outside_of(cap: HardCap) -> int:
    return cap.pager.budget.stats().used_by_tag["outside"]


def test_what_the_process_holds_besides_counts_with_a_reserve() -> None:
    device, cap = with_outside(3 * PAGE)
    assert outside_of(cap) == 3 * PAGE + 20 * PAGE // 48
    device.set_outside(4 * PAGE, True)
    assert eventually(lambda: outside_of(cap) == 4 * PAGE + 20 * PAGE // 48)
    cap.set_reserve(0)
    assert outside_of(cap) == 4 * PAGE
    assert with_outside(0, cap=1 << 40)[1].pager.budget.stats().used == 128 << 20


def test_a_cap_below_what_the_process_holds_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapExceededError, match=r"1\.31 MiB.*reserve.*1\.25 MiB") as caught:
        with_outside(21 * PAGE)
    assert caught.value.cap == 20 * PAGE
    with pytest.raises(CapExceededError, match="Raise the cap"):
        with_outside(19 * PAGE, reserve=2 * PAGE)


def test_weights_give_way_to_what_grows_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cap = with_outside(0, reserve=0)
    monkeypatch.setattr("penstock.cap.process.current_cap", lambda _: cap)
    manager, model = register(16)
    x = torch.randn(3, WIDTH)
    with torch.no_grad(), manager.use("m") as bound:
        for _ in range(3):
            assert same_bits(bound(x), model(x))
        cap.allocator.allocate(4 * PAGE, 0)
        assert held(manager) == 16
        device.set_outside(10 * PAGE)
        assert eventually(lambda: outside_of(cap) == 10 * PAGE)
        assert held(manager) <= 6
        for _ in range(3):
            assert same_bits(bound(x), model(x))
        assert manager.stats().peak <= manager.stats().cap
    assert device.suppressed_count == 0


def test_measuring_the_link_is_charged_and_not_taken_for_memory_outside() -> None:
    device, cap = with_outside(3 * PAGE, cap=40 * PAGE, reserve=0)
    created = device.calls()["frame_create"]
    peaks = cap.pager.budget.stats().peak_by_tag
    assert peaks["workspace"] == 16 * PAGE
    assert peaks["outside"] == 3 * PAGE
    assert cap.pager.budget.stats().used_by_tag["workspace"] == 0
    rate = penstock.Pager(cap=cap.pager, kind="frames").link_rate
    assert rate == cap.pager.link_rate
    assert device.calls()["frame_create"] == created


def test_tables_of_pinned_memory_are_not_counted_twice() -> None:
    device, cap = with_outside(PAGE, reserve=0)
    device.set_outside(2 * PAGE, True)
    assert cap.count_page_tables()
    assert outside_of(cap) == 2 * PAGE  # at once
    device.set_outside(21 * PAGE, True)
    with pytest.raises(CapExceededError, match="pinned"):
        cap.count_page_tables()
    assert not with_outside(PAGE, whole_device=False)[1].count_page_tables()
    assert not HardCap(PAGE, device=_core.HostDevice(), page_size=PAGE).count_page_tables()


def test_watch_ends_with_its_cap_and_with_the_interpreter() -> None:
    device, cap = with_outside(PAGE)
    budget = cap.pager.budget
    del cap
    gc.collect()
    assert budget.stats().used == 0
    looks = device.calls()["process_memory"]
    time.sleep(0.03)
    assert device.calls()["process_memory"] == looks
    code = (
        "from penstock import _core\n"
        "from penstock.cap.hard_cap import HardCap\n"
        "device = _core.FaultyDevice(_core.HostDevice())\n"
        "device.set_outside(1)\n"
        "cap = HardCap('1MiB', device=device, page_size=65536)\n"
        "kept = [cap]; kept.append(kept)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
