"""Several threads and several models under one cap: nobody hangs, nothing is lost, any order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from penstock import CapExceededError, MemoryManager, ModelError, Priority, ScheduleError
from python.support import KIB, PAGERS, build, pinned_pages, same_bits, state_of

PAGE = 64 * KIB
WIDTH = 128
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
SECONDS = 60


class Interrupt(BaseException):
    """As KeyboardInterrupt: no exception that always-called hooks would hear of."""


class Stack(nn.Module):
    """Layers of a page each, and something in between."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        self.between: Callable[[int], None] = lambda step: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step, part in enumerate(self.parts):
            self.between(step)
            x = part(x)
        return x


class Rig:
    def __init__(self, pager: str, cap: int, **layers: int) -> None:
        self.manager = MemoryManager(cap=cap * PAGE, device="cpu", pager=pager, page_size=PAGE)
        self.wanted = {}
        self.modules: dict[str, Any] = {}
        for seed, (name, count) in enumerate(layers.items()):
            plain = build(lambda count=count: Stack(count), seed)
            with torch.no_grad():
                self.wanted[name] = plain(X)
            self.manager.register(name, lambda count=count: Stack(count).eval(), state_of(plain))
            self.modules[name] = self.manager._models[name].binding.module

    def check(self, name: str) -> None:
        with torch.no_grad():
            assert same_bits(self.modules[name](X), self.wanted[name])

    def use(self, name: str, passes: int = 1) -> None:
        with self.manager.use(name):
            for _ in range(passes):
                self.check(name)

    def end(self) -> None:
        stats = self.manager.stats()
        assert all(model.acquired == 0 for model in stats.models.values())
        for name in stats.models:
            self.manager.release_reservation(name)
            self.use(name)
        assert pinned_pages(self.manager) == 0
        assert self.manager.stats().used == 0


def run_all(*works: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        torch.set_num_threads(1)
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(w,), daemon=True) for w in works]
    for thread in threads:
        thread.start()
    end = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- one model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [2, 4, 9])
def test_threads_share_a_model(pager: str, cap: int) -> None:
    rig = Rig(pager, cap, a=6)
    inside = 0

    def between(step: int) -> None:
        nonlocal inside
        inside += step == 0
        assert inside == 1, "one call at a time"
        time.sleep(0.0002)
        inside -= step == 5

    rig.modules["a"].between = between

    def work() -> None:
        for _ in range(8):
            rig.use("a", 2)

    run_all(work, work, work)
    rig.end()


@pytest.mark.parametrize("error", [ValueError, Interrupt])
@pytest.mark.parametrize("passes", [0, 1, 4])
def test_an_error_in_one_thread_lets_the_next_have_its_turn(
    pager: str, error: type[BaseException], passes: int
) -> None:
    rig = Rig(pager, 3, a=6)
    waiting, failing = threading.Event(), threading.Event()

    def fail(step: int) -> None:
        if threading.current_thread() is first and step == 3:
            failing.set()
            waiting.wait(10)
            time.sleep(0.01)
            raise error

    def work() -> None:
        rig.manager.acquire("a")  # and never released, as a thread that is killed does not
        for _ in range(passes):
            rig.check("a")
        rig.modules["a"].between = fail
        with pytest.raises(error):
            rig.modules["a"](X)
        for _ in range(2):
            done.wait(10)
            rig.modules["a"].between = lambda step: None
            rig.check("a")

    def wait() -> None:
        failing.wait(10)
        rig.manager.acquire("a")
        waiting.set()
        for _ in range(3):
            rig.check("a")
        done.set()

    done = threading.Event()
    first: threading.Thread | None = None

    def start() -> None:
        nonlocal first
        first = threading.current_thread()
        work()

    run_all(start, wait)
    for _ in range(2):
        rig.manager.release("a", evict=True)
    rig.end()


class Interrupted:
    """A streamer at whose n-th call of one kind an interrupt comes, when the core has done it."""

    def __init__(self, streamer: Any, method: str, after: int) -> None:
        self._streamer = streamer
        self._method = method
        self._left = after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._streamer, name)
        if name != self._method:
            return method

        def call(*arguments: Any) -> Any:
            method(*arguments)
            self._left -= 1
            if self._left == 0:
                raise Interrupt

        return call


@pytest.mark.parametrize("method", ["begin", "end"])
@pytest.mark.parametrize("after", [1, 3, 6, 9])
def test_an_interrupt_between_a_step_and_its_note_spoils_nothing(
    pager: str, method: str, after: int
) -> None:
    rig = Rig(pager, 3, a=6)
    for passes in (0, 1, 3):
        runner = rig.manager._models["a"].runner
        assert runner is not None
        streamer = runner._streamer
        with pytest.raises(Interrupt), rig.manager.use("a"):
            for _ in range(passes):
                rig.check("a")
            runner._streamer = Interrupted(streamer, method, after)  # type: ignore[assignment]
            for _ in range(2):
                rig.check("a")
        runner._streamer = streamer
        for _ in range(2):
            rig.use("a", 3)
        assert pinned_pages(rig.manager) == 0
        assert rig.manager.stats().used == 0
    rig.end()


def test_a_thread_that_died_inside_a_call_stops_nobody(pager: str) -> None:
    """Also where the next thread has its number, as often happens."""
    rig = Rig(pager, 3, a=6)

    def die() -> None:
        rig.manager.acquire("a")

        def fail(step: int) -> None:
            if step == 3:
                raise Interrupt

        rig.modules["a"].between = fail
        with pytest.raises(Interrupt):
            rig.modules["a"](X)

    for _ in range(3):
        run_all(die)
        rig.modules["a"].between = lambda step: None
        run_all(lambda: rig.check("a"))
        rig.check("a")
    for _ in range(3):
        rig.manager.release("a", evict=True)
    rig.end()


# ---- a model inside another's call ---------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("cap", [2, 3, 6, 7])
def test_a_model_can_be_used_inside_the_call_of_another(pager: str, cap: int, before: int) -> None:
    rig = Rig(pager, cap, outer=6, inner=6)
    with rig.manager.use("outer"):
        for _ in range(before):
            rig.check("outer")  # with a cap of 6, freely
        rig.modules["outer"].between = lambda step: rig.use("inner", 2) if step % 2 else None
        for _ in range(3):
            rig.check("outer")
        rig.modules["outer"].between = lambda step: None
        for _ in range(3):
            rig.check("outer")
    assert rig.manager.stats().peak <= cap * PAGE
    rig.end()


def test_threads_nest_models_under_one_cap(pager: str) -> None:
    rig = Rig(pager, 5, a=6, b=6, inner=4)
    for name in "ab":
        rig.modules[name].between = lambda step: rig.use("inner") if step == 2 else None

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(6):
                rig.use(name, 2)

        return run

    run_all(work("a"), work("b"), work("inner"))
    for name in "ab":
        rig.modules[name].between = lambda step: None
    rig.end()


def test_models_that_call_each_other_are_an_error_and_not_a_hang(pager: str) -> None:
    rig = Rig(pager, 12, a=3, b=3)
    both = threading.Barrier(2)
    errors: list[ScheduleError] = []

    def nest(other: str) -> Callable[[int], None]:
        def between(step: int) -> None:
            if step != 1 or rig.modules[other].between is None:
                return
            both.wait(10)
            try:
                rig.modules[other].between = lambda step: None
                rig.check(other)
            except ScheduleError as error:
                errors.append(error)

        return between

    rig.modules["a"].between, rig.modules["b"].between = nest("b"), nest("a")
    run_all(lambda: rig.use("a"), lambda: rig.use("b"))
    assert len(errors) == 1
    assert "is being run by a thread that waits for this one" in str(errors[0])
    rig.end()


# ---- any order -----------------------------------------------------------------------------------


class Chaos:
    """One thread's random deeds."""

    def __init__(self, rig: Rig, seed: int, depth: int = 0) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.depth = depth

    def name(self) -> str:
        return self.random.choice(list(self.rig.wanted))

    def act(self) -> None:
        deeds = [self.use, self.hold, self.keep, self.reserve, self.guest, self.fail, self.prefetch]
        deeds += [self.set_cap] if self.depth == 0 else []
        with suppress(CapExceededError, ScheduleError, ModelError):  # refused: that is an answer
            self.random.choice(deeds)()

    def inside(self) -> None:
        if self.depth < 2 and self.random.random() < 0.5:
            Chaos(self.rig, self.random.randrange(1 << 30), self.depth + 1).act()

    def use(self) -> None:
        name = self.name()
        with self.rig.manager.use(name):
            self.rig.check(name)
            self.inside()

    def hold(self) -> None:
        name = self.name()
        self.rig.manager.acquire(name)
        try:
            self.inside()
            self.rig.check(name)
        finally:
            self.rig.manager.release(name)

    def keep(self) -> None:
        name = self.name()
        with self.rig.manager.keep_resident(name):
            self.inside()
            self.rig.check(name) if self.random.random() < 0.3 else self.use()

    def reserve(self) -> None:
        name = self.name()
        self.rig.manager.reserve(name, priority=self.random.choice(list(Priority)))
        try:
            self.inside()
            self.use()
        finally:
            self.rig.manager.release_reservation(name)

    def guest(self) -> None:
        name = self.name()
        with self.rig.manager.guest(name):
            self.inside()
            self.rig.check(name)

    def fail(self) -> None:
        name = self.name()
        error = self.random.choice([ValueError, Interrupt])
        me, at = threading.get_ident(), self.random.randrange(3)
        inner = Chaos(self.rig, self.random.randrange(1 << 30), self.depth + 1)

        def between(module: nn.Module, args: object) -> None:
            if threading.get_ident() == me:
                inner.inside()
                raise error

        with self.rig.manager.use(name) as module:
            handle = module.parts[at].register_forward_pre_hook(between)
            try:
                with torch.no_grad():
                    module(X)
            except error:
                pass
            finally:
                handle.remove()
            if self.random.random() < 0.5:
                self.rig.check(name)

    def prefetch(self) -> None:
        self.rig.manager.prefetch(self.name())

    def set_cap(self) -> None:
        self.rig.manager.set_cap(self.random.randrange(3, 14) * PAGE)


@pytest.mark.parametrize("seed", range(100))
def test_any_interleaving_leaves_everything_usable(pager: str, seed: int) -> None:
    """Five times two threads, for each of 100 seeds and two pagers: 1,000 interleavings."""
    rig = Rig(pager, 9, a=3, b=5, c=4)
    for turn in range(5):

        def work(number: int, turn: int = turn) -> Callable[[], None]:
            chaos = Chaos(rig, seed * 1000 + turn * 10 + number)
            return lambda: [chaos.act() for _ in range(3)] and None

        run_all(work(0), work(1))
        rig.manager.pager.synchronize()
        ledger = rig.manager.stats()
        assert ledger.used <= ledger.cap
        assert pinned_pages(rig.manager) == sum(
            len(runner._in_place.pages)
            for model in rig.manager._models.values()
            if (runner := model.runner) is not None and runner._in_place is not None
        )
        held = sum(model.memory.resident_bytes for model in ledger.models.values())
        assert ledger.used == held
        assert all(model.acquired == 0 and not model.kept for model in ledger.models.values())
    rig.manager.set_cap(9 * PAGE)
    rig.end()
