"""A device whose calls fail or are slow: typed errors, right output, nothing leaked, no hang."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import penstock
from penstock import CapExceededError, DeviceError, MemoryManager, PenstockError, _core
from python.support import KIB, build, mlp, pinned_pages, same_bits, state_of, within

PAGE = 4 * KIB
CAP = 40 * KIB  # two steps and what straddles them
X = torch.linspace(-1, 1, 128).view(2, 64)


class Borrowing(nn.Module):
    """Steps of several pages, one of which is read by the root too, outside the first schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(64, 64, 64, 64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.body[0].bias


class Rig:
    """A manager on a device that fails on demand, and a model that does not fit under its cap."""

    def __init__(self, weights: object = None, cap: int = CAP) -> None:
        self.device = _core.FaultyDevice(_core.HostDevice())
        model = build(Borrowing)
        self.weights = weights or state_of(model)
        self.wanted = model(X).detach()
        self.cap = cap
        self.manager = self.new_manager()
        self.outputs: list[torch.Tensor] = []

    def new_manager(self) -> MemoryManager:
        manager = MemoryManager(cap=self.cap, device=self.device, page_size=PAGE)
        assert manager.pager.link_rate > 0  # measured now, and not in the cycles
        return manager

    def cycle(self) -> None:
        """Register, use for two passes, run once more outside, unregister."""
        self.manager.register("m", Borrowing, self.weights)
        with torch.no_grad():
            with self.manager.use("m") as module:
                for _ in range(2):
                    self.outputs.append(module(X))
            self.manager.prefetch("m")
            self.outputs.append(module(X))
        self.manager.pager.synchronize()
        self.manager.unregister("m")

    def check_balance(self) -> None:
        """Look at what is held after an error, with the model still there or not."""
        self.device.reset()
        self.manager.pager.synchronize()
        stats = self.manager.stats()
        assert stats.used <= stats.peak <= stats.cap
        assert all(model.acquired == 0 for model in stats.models.values())
        assert sum(m.memory.resident_bytes for m in stats.models.values()) == stats.used
        assert pinned_pages(self.manager) == 0

    def check_output(self) -> None:
        assert all(same_bits(output, self.wanted) for output in self.outputs), "wrong output"
        self.outputs.clear()

    def recover(self) -> None:
        """Take leave of the model, and see to it that the manager works as on its first day."""
        self.device.reset()
        if "m" in self.manager.stats().models:
            with torch.no_grad(), self.manager.use("m") as module:
                self.outputs.append(module(X))
                assert self.manager.stats().used > 0, "it still runs under the cap"
            assert self.manager.stats().used == 0
            self.manager.unregister("m")
        assert self.manager.stats().used == 0
        self.cycle()
        assert len(self.outputs) >= 3
        assert self.device.calls()["managed_release"] >= 1, "its region is still there"
        self.check_output()
        self.check_balance()
        assert self.manager.stats().used == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "model.safetensors"
    save_file(state_of(build(Borrowing)), path)
    return path


@pytest.fixture(params=["mapping", "file"])
def rig(request: pytest.FixtureRequest, checkpoint: Path) -> Rig:
    """With weights of either kind: they reach the region through different calls."""
    return Rig(checkpoint if request.param == "file" else None)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Have one pass behind us, with all that the first of a process makes and keeps."""
    rig = Rig()
    rig.cycle()
    rig.check_output()
    del rig
    gc.collect()


def calls_of(device: _core.FaultyDevice, work: Callable[[], object]) -> dict[str, int]:
    device.reset()
    work()
    calls = device.calls()
    device.reset()
    return calls


def try_every_position(rig: Rig, calls: dict[str, int]) -> dict[str, int]:
    """Make each call fail at each of its positions; return how often that raised, by call."""
    raised = dict.fromkeys(calls, 0)
    for name, count in calls.items():
        fired = 0
        for position in range(count + 2):
            rig.device.reset()
            rig.device.fail_nth_call_of(name, position)
            try:
                rig.cycle()
            except PenstockError as error:
                raised[name] += 1
                assert rig.device.fired, f"{name} #{position} did not fail, but: {error}"
                assert name in str(error)
                assert isinstance(error, DeviceError)
                assert (error.call, error.code) == (name, -1)
            fired += rig.device.fired
            try:
                rig.check_output()
                rig.check_balance()
                rig.recover()
            except Exception as error:
                raise AssertionError(f"after {name} #{position} failed: {error!r}") from error
        assert fired >= count / 2, f"{name} failed at {fired} of {count} positions"
    return raised


# Calls whose failure nobody is told of, but the figures: what they give back is gone in any case.
QUIET = {"event_destroy", "event_elapsed", "managed_release", "stream_destroy"}
# Calls whose failure cannot be got over silently. Those of look-ahead, for example, can.
LOUD = {"managed_reserve", "managed_read", "managed_write", "managed_evict"}


def test_every_call_may_fail_at_every_position(rig: Rig) -> None:
    calls = calls_of(rig.device, rig.cycle)
    rig.check_output()
    assert {"managed_reserve", "managed_prefetch", "managed_evict", "event_record"} <= calls.keys()
    assert ("managed_read" in calls) != ("managed_write" in calls)
    assert calls["managed_evict"] > 4, "the cap is too large for this test"
    raised = within(300, lambda: try_every_position(rig, calls))
    for name, count in raised.items():
        assert count == 0 or name not in QUIET, f"{name} raised {count} times"
        assert count > 0 or name not in LOUD, f"{name} raised nothing"


@pytest.mark.parametrize("name", ["event_destroy", "managed_release", "stream_destroy"])
def test_failure_to_give_something_back_is_counted_and_reported(name: str) -> None:
    rig = Rig()
    rig.device.fail_nth_call_of(name, 0)
    if name == "stream_destroy":
        rig.new_manager()
    else:
        rig.cycle()
    assert rig.device.fired
    assert rig.manager.stats().suppressed_errors == 1
    assert name in rig.device.last_suppressed
    assert "1 device errors while giving handles back" in rig.manager.report()
    rig.recover()


def test_manager_that_cannot_be_made_leaves_nothing() -> None:
    rig = Rig()
    rig.device.reset()
    for position in range(2):
        rig.device.fail_nth_call_of("stream_create", position)
        with pytest.raises(DeviceError, match="stream_create"):
            rig.new_manager()
    calls = rig.device.calls()
    assert calls["stream_create"] == 3
    assert calls["stream_destroy"] == 1, "the one that was made"
    rig.recover()


def test_nothing_is_leaked_on_the_device() -> None:
    rig = Rig()
    device = rig.device
    rig.manager = None
    gc.collect()
    device.reset()

    rig.manager = rig.new_manager()
    failed = 0
    for name in ("managed_prefetch", "event_record", "managed_evict", "event_wait"):
        for position in range(8):
            device.fail_nth_call_of(name, position)
            try:
                rig.cycle()
            except DeviceError:
                failed += 1
            device.fail_nth_call_of("no such call", 0)
            if rig.manager.stats().models:
                rig.manager.unregister("m")
    assert failed > 4
    rig.outputs.clear()
    rig.manager = None
    gc.collect()
    calls = device.calls()
    for made, given in (
        ("stream_create", "stream_destroy"),
        ("event_create", "event_destroy"),
        ("managed_reserve", "managed_release"),
    ):
        assert calls[made] == calls[given] > 0, f"{made} and {given}"


def test_look_ahead_that_fails_is_repeated_on_demand() -> None:
    rig = Rig(cap=1024 * KIB)  # room for all
    rig.manager.register("m", Borrowing, rig.weights)
    rig.device.fail_nth_call_of("managed_prefetch", 0)
    rig.manager.prefetch("m")
    rig.manager.pager.synchronize()
    assert rig.device.fired
    assert rig.manager.pager.core.stats().ahead_failed == 1
    with torch.no_grad(), rig.manager.use("m") as module:
        assert same_bits(module(X), rig.wanted)
    assert rig.manager.stats().used == 0


def test_unregister_that_fails_can_be_repeated_and_the_model_stays_under_the_cap() -> None:
    rig = Rig()
    rig.manager.register("m", Borrowing, rig.weights)
    module = rig.manager.acquire("m")
    with torch.no_grad():
        module(X)
    rig.manager.release("m")
    rig.manager.pager.synchronize()
    rig.device.fail_nth_call_of("managed_evict", 0)
    with pytest.raises(DeviceError, match="managed_evict"):
        rig.manager.unregister("m")
    rig.check_balance()
    with torch.no_grad(), rig.manager.use("m") as module:
        before = rig.manager.stats().models["m"].memory
        for _ in range(2):
            assert same_bits(module(X), rig.wanted)
        after = rig.manager.stats().models["m"].memory
        assert after.passes == before.passes + 2
        assert after.steps_run > before.steps_run
        assert module._forward_pre_hooks, "hooks are gone"
    rig.manager.unregister("m")
    assert rig.manager.stats().used == 0
    rig.recover()


def test_release_that_cannot_evict_has_released_all_the_same() -> None:
    rig = Rig()
    rig.manager.register("m", Borrowing, rig.weights)
    with (
        torch.no_grad(),
        pytest.raises(DeviceError, match="managed_evict"),
        rig.manager.use("m") as module,
    ):
        assert same_bits(module(X), rig.wanted)
        rig.manager.pager.synchronize()
        rig.device.fail_nth_call_of("managed_evict", 0)
    assert rig.manager.stats().models["m"].acquired == 0
    rig.check_balance()
    rig.recover()


def test_error_of_the_device_does_not_hide_the_error_of_the_block() -> None:
    rig = Rig()
    rig.manager.register("m", Borrowing, rig.weights)
    with pytest.raises(PenstockError) as caught, rig.manager.use("m") as module:
        module(X)
        rig.manager.pager.synchronize()
        rig.device.fail_nth_call_of("managed_evict", 0)
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    rig.recover()


def test_refusal_and_failure_together_are_still_got_over() -> None:
    """A step that does not fit, on a device that fails while room is made for it."""
    rig = Rig()
    rig.cap = 16 * KIB
    manager = rig.new_manager()
    manager.register("m", lambda: mlp(16, 16, 64, 64), state_of(build(lambda: mlp(16, 16, 64, 64))))
    for position in range(6):
        rig.device.fail_nth_call(position)
        with pytest.raises((CapExceededError, DeviceError)), manager.use("m") as module:
            module(X[:, :16])
        rig.device.reset()
        manager.pager.synchronize()
        assert pinned_pages(manager) == 0
        assert manager.stats().models["m"].memory.resident_bytes == manager.stats().used
        with torch.no_grad(), manager.use("m") as module:
            module[0](X[:, :16])
        assert manager.stats().used == 0


# ---- the pager alone ---------------------------------------------------------------------------


def test_pager_calls_fail_one_by_one_and_keep_the_bytes() -> None:
    device = _core.FaultyDevice(_core.HostDevice())
    pager = penstock.Pager(cap=6 * PAGE, device=device, page_size=PAGE)
    region = pager.reserve(10 * PAGE)
    tensor = region.tensor(0, (10 * PAGE,), torch.uint8)
    noise = torch.randint(0, 256, (10 * PAGE,), dtype=torch.uint8)

    def work() -> None:
        region.core.write(0, noise.numpy())
        for start in (0, 3, 6, 1, 9):
            nbytes = min(4, 10 - start) * PAGE
            pager.prefetch(region, start * PAGE, nbytes)
            part = slice(start * PAGE, start * PAGE + nbytes)
            tensor[part] += 1
        pager.evict(region, PAGE, 2 * PAGE)
        pager.synchronize()
        pager.evict(region)

    calls = calls_of(device, work)
    wanted = tensor.clone()
    for name, count in calls.items():
        for position in range(count):
            device.reset()
            device.fail_nth_call_of(name, position)
            try:
                within(60, work)
            except DeviceError as error:
                assert error.call == name
            device.reset()
            stats = pager.core.region_stats(region.core)
            assert stats.pinned_pages == 0
            assert stats.resident_bytes == pager.budget.stats().used <= 6 * PAGE
            pager.evict(region)
            assert pager.budget.stats().used == 0
            within(60, work)
            assert same_bits(tensor, wanted), f"after {name} #{position}"


# ---- slow devices ------------------------------------------------------------------------------

CALLS = [
    *("event_create", "event_destroy", "event_done", "event_elapsed", "event_record"),
    *("event_synchronize", "event_wait"),
    *("managed_evict", "managed_prefetch", "managed_read", "managed_release", "managed_reserve"),
    *("managed_write", "stream_create", "stream_destroy", "stream_synchronize"),
]


def test_slow_calls_are_all_the_calls(rig: Rig) -> None:
    assert calls_of(rig.device, rig.cycle).keys() <= {*CALLS, "managed_seal", "stream_capturing"}


@pytest.mark.parametrize("name", [*CALLS, "all"])
def test_slow_calls_change_nothing_but_the_time(name: str, checkpoint: Path) -> None:
    for weights in (None, checkpoint):
        rig = Rig(weights)
        for slow in CALLS if name == "all" else [name]:
            rig.device.delay_calls_of(slow, timedelta(microseconds=700))
        within(120, rig.cycle)
        assert len(rig.outputs) == 3
        rig.check_output()
        rig.check_balance()
        assert rig.manager.stats().used == 0
        assert rig.manager.stats().peak <= CAP


def test_figures_are_right_at_any_moment() -> None:
    """However long a page is on its way, what is said to be resident is under the cap."""
    rig = Rig()
    for name in ("managed_evict", "managed_prefetch", "event_synchronize"):
        rig.device.delay_calls_of(name, timedelta(milliseconds=1))
    ended = threading.Event()
    seen: list[int] = []

    def work() -> None:
        try:
            rig.cycle()
        finally:
            ended.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not ended.is_set():
        seen += [model.memory.resident_bytes for model in rig.manager.stats().models.values()]
    thread.join(60)
    assert not thread.is_alive()
    rig.check_output()
    assert 0 < max(seen) <= CAP
