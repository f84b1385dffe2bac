"""What a hard cap says of itself: figures that add up, who made what, and events."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import penstock
from penstock import CapExceededError, PressureEvent, _core
from penstock.cap import process
from penstock.cap.hard_cap import HardCap
from penstock.cap.stacks import StackRecorder
from python.support import eventually

KIB = 1 << 10
PAGE = 64 * KIB
MIB = 1 << 20
PARTS = ("weights", "ring", "activations", "cached", "workspace", "outside", "reserve")


def hard_cap(pages: int, outside: int | None = None) -> HardCap:
    device = _core.FaultyDevice(_core.HostDevice())
    device.set_outside(outside)
    return HardCap(pages * PAGE, device=device, page_size=PAGE, reserve=PAGE)


@pytest.fixture
def cap(monkeypatch: pytest.MonkeyPatch) -> HardCap:
    made = hard_cap(64, 2 * PAGE)
    monkeypatch.setattr(process, "current_cap", lambda _: made)
    return made


# ---- figures ------------------------------------------------------------------------------------


def test_what_overflows_is_told_beside_the_cap(cap: HardCap) -> None:
    before = penstock.memory_stats()
    assert before.overflow == 0
    assert "on the host" not in str(before)
    cap.set_overflow("managed", "16MiB")
    address = cap.allocator.allocate(6 * MIB, 0)
    stats = penstock.memory_stats()
    assert stats.overflow == 6 * MIB
    assert (stats.activations, stats.used) == (before.activations, before.used)
    assert sum(getattr(stats, part) for part in PARTS) == stats.used
    assert "on the host" in str(stats)
    assert stats.largest[0].nbytes == 6 * MIB
    cap.allocator.free(address)
    assert penstock.memory_stats().overflow == 0


def test_parts_add_up_and_are_told_apart(cap: HardCap) -> None:
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(30)))
    manager = penstock.MemoryManager(pager="frames", progress=False)
    state = model.state_dict()
    manager.register(
        "m", lambda: nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(30))), state
    )
    small = cap.allocator.allocate(100 * KIB, 0)
    cap.allocator.allocate(35 * PAGE, 0)
    cap.allocator.free(cap.allocator.allocate(PAGE // 2, 0))
    with torch.no_grad(), manager.use("m") as bound:
        for _ in range(3):
            bound(torch.ones(1, 128))
        stats = penstock.memory_stats()
        assert sum(getattr(stats, part) for part in PARTS) == stats.used <= stats.cap == 64 * PAGE
        assert (stats.outside, stats.reserve) == (2 * PAGE, PAGE)
        assert stats.activations == 35 * PAGE + 100 * KIB
        assert stats.cached > 0
        assert stats.ring == stats.models["m"].memory.ring_bytes > 0
        assert stats.weights + stats.ring == stats.models["m"].memory.resident_bytes
        assert [block.requested for block in stats.largest] == [35 * PAGE, 100 * KIB]
        assert stats.largest[1].address == small
        with pytest.raises(CapExceededError):
            cap.allocator.allocate(64 * PAGE, 0)
    after = penstock.memory_stats()
    assert (after.out_of_memory, after.room_made > 0) == (1, True)
    assert stats.peak_by_tag["weights"] >= stats.weights + stats.ring
    assert stats.peak_by_tag["activations"] >= stats.activations + stats.cached
    assert stats.peak_by_tag["outside"] == 3 * PAGE
    assert f"outside {3 * PAGE // KIB}.00 KiB" in str(stats)
    text = penstock.memory_summary()
    assert text == str(after)
    assert all(part in text for part in (*PARTS, "model m", "1 requests refused", "2.19 MiB"))


@given(sizes=st.lists(st.integers(1, 6 * PAGE), max_size=12), kept=st.integers(0, 12))
def test_parts_add_up_whatever_is_taken(sizes: list[int], kept: int) -> None:
    cap = hard_cap(40, PAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "current_cap", lambda _: cap)
        blocks = []
        for nbytes in sizes:
            try:
                blocks.append(cap.allocator.allocate(nbytes, 0))
            except CapExceededError:
                break
        for block in blocks[kept:]:
            cap.allocator.free(block)
        stats = penstock.memory_stats()
        assert sum(getattr(stats, part) for part in PARTS) == stats.used
        assert stats.used == cap.pager.budget.stats().used
        assert len(stats.largest) == min(len(blocks[:kept]), 10)


def test_without_a_hard_cap_there_are_none() -> None:
    with pytest.raises(ValueError, match="set_cap"):
        penstock.memory_stats("cpu")
    with pytest.raises(ValueError, match="set_cap"):
        penstock.on_pressure(print, device="cpu")


# ---- stacks -------------------------------------------------------------------------------------


@pytest.fixture
def recorder() -> Iterator[StackRecorder]:
    penstock.record_stacks()
    assert process.STATE.recorder is not None
    yield process.STATE.recorder
    penstock.record_stacks(False)
    penstock.record_stacks(False)


def make_large() -> torch.Tensor:
    return torch.ones(1 << 18)


def test_stacks_are_those_of_who_made_the_memory(recorder: StackRecorder) -> None:
    tensor = make_large()
    first, *_ = recorder.stack_of(tensor.data_ptr())
    assert first.endswith("in make_large")
    assert "test_cap_stats.py" in first
    tensor.add_(1)
    tensor.view(2, -1).mul_(2)
    assert recorder.stack_of(tensor.data_ptr())[0] == first
    assert not recorder.stack_of(torch.ones(1000).data_ptr())
    assert not recorder.stack_of(torch.empty(1 << 20, device="meta").numel())
    product = tensor.view(512, 512) @ tensor.view(512, 512)
    assert "test_stacks_are_those" in recorder.stack_of(product.data_ptr())[0]


def test_stacks_end_when_they_are_told_to() -> None:
    penstock.record_stacks()
    recorder = process.STATE.recorder
    assert recorder is not None
    penstock.record_stacks(False)
    assert not recorder.stack_of(make_large().data_ptr())


def test_old_stacks_go(recorder: StackRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.cap.stacks._MOST", 2)
    tensors = [make_large() for _ in range(4)]
    kept = [bool(recorder.stack_of(tensor.data_ptr())) for tensor in tensors]
    assert kept == [False, False, True, True]


def test_error_says_who_made_the_largest_blocks(
    cap: HardCap, recorder: StackRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = cap.allocator.allocate(2 << 20, 0)
    monkeypatch.setitem(recorder._stacks, address, ("model.py:7 in forward",))
    assert "model.py:7 in forward" in penstock.memory_summary()

    class Full:
        def __call__(self, *_: object, **__: object) -> object:
            raise torch.OutOfMemoryError("cannot allocate")

    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)cannot allocate.*model\.py:7"):
        recorder.__torch_dispatch__(Full(), ())
    penstock.record_stacks(False)
    assert "model.py:7" not in penstock.memory_summary()


# ---- pressure -----------------------------------------------------------------------------------


def test_events_are_told_in_order_on_a_thread_of_their_own(cap: HardCap) -> None:
    told: list[tuple[PressureEvent, str]] = []
    handle = penstock.on_pressure(
        lambda event: told.append((event, threading.current_thread().name))
    )
    block = cap.allocator.allocate(60 * PAGE, 0)
    with pytest.raises(CapExceededError):
        cap.allocator.allocate(64 * PAGE, 0)
    assert eventually(lambda: len(told) == 2)
    assert [event.kind for event, _ in told] == ["near", "refused"]
    assert {name for _, name in told} == {"penstock-pressure"}
    near, refused = (event for event, _ in told)
    assert (near.asked, near.cap, near.used) == (60 * PAGE, 64 * PAGE, 63 * PAGE)
    assert (refused.asked, refused.available, refused.given) == (64 * PAGE, PAGE, 0)
    handle.remove()
    handle.remove()
    cap.allocator.free(block)
    with pytest.raises(CapExceededError):
        cap.allocator.allocate(65 * PAGE, 0)
    time.sleep(0.01)
    assert len(told) == 2
    assert eventually(lambda: "penstock-pressure" not in {t.name for t in threading.enumerate()})


def test_room_that_others_gave_is_told(cap: HardCap) -> None:
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(30)))
    manager = penstock.MemoryManager(pager="frames", progress=False)
    manager.register(
        "m",
        lambda: nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(30))),
        model.state_dict(),
    )
    manager.prefetch("m")
    told: list[PressureEvent] = []
    handle = penstock.on_pressure(told.append)
    cap.allocator.allocate(50 * PAGE, 0)
    assert eventually(lambda: any(event.kind == "made_room" for event in told))
    handle.remove()
    room = next(event for event in told if event.kind == "made_room")
    assert room.given >= PAGE
    assert penstock.memory_stats().room_made == sum(e.given for e in told if e.kind == "made_room")


def test_a_callback_that_fails_is_logged_and_others_are_called(
    cap: HardCap, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def fail(_: PressureEvent) -> None:
        raise KeyError("broken")

    handles = [penstock.on_pressure(fail), penstock.on_pressure(lambda e: told.append(e.kind))]
    for _ in range(2):
        with pytest.raises(CapExceededError):
            cap.allocator.allocate(65 * PAGE, 0)
    assert eventually(lambda: len(told) == 2)
    for handle in handles:
        handle.remove()
    assert "broken" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


def test_who_allocates_does_not_wait_for_a_callback(cap: HardCap) -> None:
    gate = threading.Event()
    handle = penstock.on_pressure(lambda _: gate.wait(60))
    for _ in range(1000):
        with pytest.raises(CapExceededError):
            cap.allocator.allocate(65 * PAGE, 0)
    assert cap.allocator.dropped_events > 0
    gate.set()
    handle.remove()


def test_callbacks_can_be_removed_and_added_by_themselves(cap: HardCap) -> None:
    told: list[int] = []
    handles: list[penstock.PressureHandle] = []

    def once(_: PressureEvent) -> None:
        told.append(1)
        handles.pop().remove()

    for _ in range(3):
        handles.append(penstock.on_pressure(once))
        with pytest.raises(CapExceededError):
            cap.allocator.allocate(65 * PAGE, 0)
        assert eventually(lambda: not handles)
    assert len(told) == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_leaves_and_may_listen_itself(cap: HardCap) -> None:
    handle = penstock.on_pressure(lambda _: None)
    gc.collect()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        handle.remove()
        penstock.on_pressure(lambda _: os._exit(7))
        try:
            cap.allocator.allocate(65 * PAGE, 0)
        except CapExceededError:
            time.sleep(20)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    handle.remove()


def test_interpreter_ends_while_somebody_listens() -> None:
    code = (
        "from penstock import _core\n"
        "from penstock.cap import hard_cap, pressure, process\n"
        "cap = hard_cap.HardCap('1MiB', device=_core.HostDevice(), page_size=65536)\n"
        "process.current_cap = lambda _: cap\n"
        "pressure.on_pressure(print)\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - start < 50
