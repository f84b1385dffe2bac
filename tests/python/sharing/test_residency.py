"""Several models under one cap: who stays, who goes, who may use what is left; with both pagers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from penstock import (
    Candidate,
    CapExceededError,
    MemoryManager,
    ModelError,
    NothingToKeepWarning,
    Priority,
)
from python.support import KIB, PAGERS, build, pinned_pages, same_bits, state_of

PAGE = 64 * KIB  # a frame of the host device
WIDTH = 128
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


def stack(layers: int) -> nn.Module:
    """Build layers of one page each."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))).eval()


class House:
    """A manager with models of so many pages, by name, under a cap of so many."""

    def __init__(self, pager: str, cap: int, policy: Any = None, **pages: int) -> None:
        self.manager = MemoryManager(
            cap=cap * PAGE, device="cpu", pager=pager, page_size=PAGE, policy=policy
        )
        self.plain = {}
        for seed, (name, count) in enumerate(pages.items()):
            self.plain[name] = build(lambda count=count: stack(count), seed)
            self.manager.register(
                name, lambda count=count: stack(count), state_of(self.plain[name])
            )

    def held(self, name: str) -> int:
        """Count the pages that a model holds."""
        self.manager.pager.synchronize()
        nbytes = self.manager.stats().models[name].memory.resident_bytes
        assert nbytes % PAGE == 0
        return nbytes // PAGE

    def loaded(self, name: str) -> int:
        """Count the pages that were loaded so far."""
        return self.manager.stats().models[name].memory.loaded_bytes // PAGE

    def check(self, name: str, module: nn.Module, passes: int = 1) -> None:
        with torch.no_grad():
            for _ in range(passes):
                assert same_bits(module(X), self.plain[name](X))

    def run(self, name: str, passes: int = 1) -> None:
        """Run a model and leave it where it is."""
        module = self.manager.acquire(name)
        try:
            self.check(name, module, passes)
        finally:
            self.manager.release(name)

    def end(self) -> None:
        """Let everything go; nothing is left, and the cap was kept."""
        for name in self.manager.stats().models:
            self.manager.release_reservation(name)
            self.manager.acquire(name)
            self.manager.release(name, evict=True)
        stats = self.manager.stats()
        assert stats.used == 0
        assert stats.peak <= stats.cap
        assert pinned_pages(self.manager) == 0


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- keeping -------------------------------------------------------------------------------------


def test_a_kept_model_is_loaded_once(pager: str) -> None:
    house = House(pager, 8, encoder=3, big=12)
    with house.manager.keep_resident("encoder"):
        for _ in range(4):
            with house.manager.use("encoder") as module:
                house.check("encoder", module)
            assert house.held("encoder") == 3
            with house.manager.use("big") as module:
                house.check("big", module, 3)
                assert house.held("encoder") == 3
                assert house.held("big") <= 5
        assert house.loaded("encoder") == 3
        assert house.manager.stats().models["encoder"].kept
        assert "kept resident" in house.manager.report()
    with house.manager.use("big") as module:
        house.check("big", module, 2)
        assert house.held("encoder") < 3, "the block has ended"
    house.end()


def test_an_error_ends_the_keeping(pager: str) -> None:
    house = House(pager, 6, a=3, b=6)
    for error in (ValueError, KeyboardInterrupt):
        house.run("a")
        with pytest.raises(error), house.manager.keep_resident("a"):
            raise error
        assert not house.manager.stats().models["a"].kept
        house.run("b", 2)
        assert house.held("a") == 0
    house.end()


def test_keeping_nests(pager: str) -> None:
    house = House(pager, 6, a=3, b=6)
    house.run("a")
    with house.manager.keep_resident("a"):
        with house.manager.keep_resident("a", "b"):
            pass
        house.run("b", 2)
        assert house.held("a") == 3
    house.end()


def test_keeping_without_names_keeps_what_is_acquired(pager: str) -> None:
    house = House(pager, 6, a=2, b=2, c=6)
    house.run("b")
    module = house.manager.acquire("a")
    house.check("a", module)
    with house.manager.keep_resident():
        house.run("c", 2)
        assert (house.held("a"), house.held("b")) == (2, 0)
    house.manager.release("a")
    house.end()


def test_keeping_nothing_is_a_warning(pager: str) -> None:
    house = House(pager, 6, a=2)
    house.manager.register("empty", nn.Identity, {})
    for names in ((), ("empty",)):
        with (
            pytest.warns(NothingToKeepWarning, match="nothing to keep"),
            house.manager.keep_resident(*names),
        ):
            house.run("a")
    with pytest.raises(ModelError, match="no model 'x'"), house.manager.keep_resident("x"):
        pass
    house.end()


def test_who_cannot_run_beside_what_is_kept_is_told(pager: str) -> None:
    house = House(pager, 4, a=4, b=6)
    house.run("a")
    with house.manager.keep_resident("a"):
        with pytest.raises(CapExceededError, match=r"'b' needs 64.*'a' \(256.*kept resident") as e:
            house.manager.acquire("b")
        assert e.value.cap == 4 * PAGE
        assert house.held("a") == 4
        assert house.manager.stats().models["b"].acquired == 0
    house.run("b", 2)
    house.end()


# ---- reserving -----------------------------------------------------------------------------------


def test_a_primary_is_never_evicted(pager: str) -> None:
    house = House(pager, 8, main=5, a=4, b=12)
    house.manager.reserve("main")
    assert house.held("main") == 5
    for _ in range(3):
        for name in ("a", "b"):
            with house.manager.use(name) as module:
                house.check(name, module, 2)
                assert house.held("main") == 5
        with house.manager.use("main") as module:
            house.check("main", module, 2)
    assert house.held("main") == house.loaded("main") == 5
    assert house.manager.stats().models["main"].reserved is Priority.PRIMARY
    assert "reserved as primary" in house.manager.report()
    house.end()


def test_reserving_again_is_nothing_or_an_error(pager: str) -> None:
    house = House(pager, 8, a=5)
    for _ in range(2):
        house.manager.reserve("a", priority=Priority.SECONDARY)
    with pytest.raises(ModelError, match="reserved as secondary: release that first"):
        house.manager.reserve("a")
    for _ in range(2):
        house.manager.release_reservation("a")
    house.manager.reserve("a")
    with pytest.raises(ModelError, match="no model 'x'"):
        house.manager.reserve("x")
    with pytest.raises(ModelError, match="no model 'x'"):
        house.manager.release_reservation("x")
    house.end()


def test_a_reservation_that_does_not_fit_is_refused_and_changes_nothing(pager: str) -> None:
    house = House(pager, 8, a=5, b=4, c=9)
    house.run("b")
    house.manager.reserve("a")
    before = house.manager.stats()
    with pytest.raises(CapExceededError, match=r"'b' cannot be reserved: it takes 256.*192.00 Ki"):
        house.manager.reserve("b")
    with pytest.raises(CapExceededError, match=r"'c' cannot be reserved") as caught:
        house.manager.reserve("c", priority=Priority.SECONDARY)
    assert (caught.value.requested, caught.value.cap) == (9 * PAGE, 8 * PAGE)
    assert house.manager.stats() == before
    house.end()


def test_a_secondary_goes_when_nothing_else_is_left_and_that_is_said(pager: str) -> None:
    house = House(pager, 6, main=3, second=3, other=4)
    house.manager.reserve("main")
    house.manager.reserve("second", priority=Priority.SECONDARY)
    assert house.manager.stats().models["second"].pushed_out_bytes == 0
    house.run("other", 2)
    assert house.held("main") == 3
    stats = house.manager.stats().models["second"]
    assert stats.pushed_out_bytes >= PAGE
    assert stats.memory.resident_bytes < 3 * PAGE
    assert f"{stats.pushed_out_bytes // KIB}.00 KiB pushed out" in house.manager.report()
    house.run("second", 2)
    house.end()


def test_a_secondary_stays_where_there_is_something_else(pager: str) -> None:
    house = House(pager, 6, second=3, idle=2, other=6)
    house.manager.reserve("second", priority=Priority.SECONDARY)
    house.run("idle")
    house.run("other", 2)
    assert (house.held("second"), house.held("idle")) == (3, 0)
    assert house.manager.stats().models["second"].pushed_out_bytes == 0
    house.end()


def test_cap_is_not_lowered_beneath_primaries(pager: str) -> None:
    house = House(pager, 8, main=3, second=2, a=3)
    house.manager.reserve("main")
    house.manager.reserve("second", priority=Priority.SECONDARY)
    house.run("a")
    with pytest.raises(CapExceededError, match="reserved as primary"):
        house.manager.set_cap(2 * PAGE)
    assert house.manager.stats().cap == 8 * PAGE
    house.manager.set_cap(5 * PAGE)
    assert [house.held(name) for name in ("main", "second", "a")] == [3, 2, 0]
    house.manager.set_cap(4 * PAGE)
    assert house.held("main") == 3
    assert house.manager.stats().models["second"].pushed_out_bytes >= PAGE
    house.manager.set_cap(8 * PAGE)
    house.end()


# ---- guests --------------------------------------------------------------------------------------


def test_a_guest_has_what_is_not_reserved_and_goes(pager: str) -> None:
    house = House(pager, 8, main=4, second=2, upscaler=10)
    house.manager.reserve("main")
    house.manager.reserve("second", priority=Priority.SECONDARY)
    with house.manager.guest("upscaler") as module:
        for _ in range(4):
            house.check("upscaler", module)
            assert house.held("upscaler") <= 2
            assert (house.held("main"), house.held("second")) == (4, 2)
            house.run("main")
    assert house.held("upscaler") == 0
    assert house.manager.stats().models["second"].pushed_out_bytes == 0
    house.end()


def test_a_guest_without_room_for_a_step_is_told(pager: str) -> None:
    house = House(pager, 6, main=4, second=2, upscaler=3)
    house.manager.reserve("main")
    house.manager.reserve("second", priority=Priority.SECONDARY)
    with (
        pytest.raises(CapExceededError, match=r"'upscaler' needs 64\.00 KiB.*'main' \(256"),
        house.manager.guest("upscaler"),
    ):
        pass
    assert (house.held("main"), house.held("second")) == (4, 2)
    with (
        pytest.raises(ModelError, match="'main' is reserved, so it is at home"),
        house.manager.guest("main"),
    ):
        pass
    assert all(model.acquired == 0 for model in house.manager.stats().models.values())
    house.end()


def test_a_guest_goes_after_an_error(pager: str) -> None:
    house = House(pager, 6, main=4, upscaler=3)
    house.manager.reserve("main")
    with pytest.raises(KeyboardInterrupt), house.manager.guest("upscaler") as module:
        house.check("upscaler", module)
        raise KeyboardInterrupt
    assert (house.held("main"), house.held("upscaler")) == (4, 0)
    house.end()


# ---- policies ------------------------------------------------------------------------------------


def test_a_policy_of_ones_own_is_asked(pager: str) -> None:
    asked: list[Sequence[Candidate]] = []

    class Largest:
        def order(self, candidates: Sequence[Candidate]) -> list[str]:
            asked.append(candidates)
            movable = [each for each in candidates if not each.protected]
            return [each.name for each in sorted(movable, key=lambda each: -each.nbytes)]

    house = House(pager, 8, policy=Largest(), small=2, large=4, other=5)
    house.run("large")
    house.run("small")
    house.run("other")
    assert (house.held("small"), house.held("large")) == (2, 1), "and no more than is needed"
    seen = {each.name: each for each in asked[-1]}
    assert seen["small"].nbytes == 2 * PAGE
    house.end()


def test_a_policy_that_breaks_a_promise_is_an_error_and_nothing_else(pager: str) -> None:
    class Wrong:
        names: Sequence[str] = ()

        def order(self, candidates: Sequence[Candidate]) -> Sequence[str]:
            return self.names

    policy = Wrong()
    house = House(pager, 6, policy=policy, main=4, a=2)
    house.manager.reserve("main")
    policy.names = ["main"]
    with pytest.raises(ModelError, match="the policy Wrong names 'main', which is protected"):
        house.manager.acquire("a")
    policy.names = []
    house.run("a")
    house.end()


def test_a_cycle_of_models_moves_the_optimum_once_it_is_known(pager: str) -> None:
    """Where each model fits, and two of three: half of what recency would move."""
    house = House(pager, 8, a=4, b=4, c=4)
    for _ in range(3):
        for name in "abc":
            house.run(name)
    before = sum(house.loaded(name) for name in "abc")
    for _ in range(4):
        for name in "abc":
            house.run(name)
    assert sum(house.loaded(name) for name in "abc") - before == 6 * 4
    house.end()


def test_no_warning_without_a_reason(pager: str) -> None:
    house = House(pager, 6, a=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with house.manager.use("a"), house.manager.keep_resident():
            pass
        with house.manager.keep_resident("a"):
            pass
    house.end()
