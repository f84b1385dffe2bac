"""Several threads and several models under one cap: nobody hangs, nothing is lost, any order."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from penstock import CapExceededError, MemoryManager, ModelError, Priority
from python.support import KIB, PAGERS, build, pinned_pages, run_threads, same_bits, state_of

PAGE = 64 * KIB
WIDTH = 128
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


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


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- one model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [3, 4, 9])
def test_threads_run_a_model_at_the_same_time(pager: str, cap: int) -> None:
    rig = Rig(pager, cap, a=6)
    all_inside = threading.Barrier(3)

    def between(step: int) -> None:
        if step == 3:
            all_inside.wait(20)  # nobody is kept from it until another one has ended
        time.sleep(0.0002)

    rig.modules["a"].between = between

    def work() -> None:
        for _ in range(8):
            rig.use("a", 2)

    run_threads(work, work, work)
    assert rig.manager.stats().peak <= cap * PAGE
    rig.modules["a"].between = lambda step: None
    rig.end()


@pytest.mark.parametrize("error", [ValueError, Interrupt])
@pytest.mark.parametrize("passes", [0, 1, 4])
def test_an_error_in_one_thread_is_nothing_to_the_next(
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

    run_threads(start, wait)
    for _ in range(2):
        rig.manager.release("a", evict=True)
    rig.end()


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_an_interrupt_at_any_step_spoils_nothing(pager: str, step: int) -> None:
    """It may come before anything was learned of a pass, in its midst, and when all is settled."""
    rig = Rig(pager, 3, a=6)

    def interrupt(at: int) -> None:
        if at == step:
            raise Interrupt

    for passes in (0, 1, 3, 8):
        with rig.manager.use("a") as module:
            for _ in range(passes):
                rig.check("a")
            module.between = interrupt
            for _ in range(2):
                with pytest.raises(Interrupt):
                    rig.check("a")
                rig.manager.pager.synchronize()
                assert pinned_pages(rig.manager) == 0
            module.between = lambda at: None
            rig.check("a")
        for _ in range(2):
            rig.use("a", 3)
        assert pinned_pages(rig.manager) == 0
        assert rig.manager.stats().used == 0
    rig.end()


@pytest.fixture
def collecting_is_paused() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collecting_is_paused")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(4))
def test_an_interrupt_from_outside_spoils_nothing(pager: str, seed: int) -> None:
    """It comes between two bytecodes: in an operation's hold, a hook, or while it is planned.

    Python drops one that comes in a callback of its own (of the garbage collector, of a weak
    reference). So collecting is paused, and a thread that was not reached is interrupted again.
    """
    rig = Rig(pager, 3, a=6)
    chance = random.Random(seed)
    number = ctypes.c_ulong()
    interrupted = 0

    def work() -> None:
        nonlocal interrupted
        number.value = threading.get_ident()
        with suppress(Interrupt), torch.no_grad():
            running.set()
            while not stop.is_set():
                rig.modules["a"](X)
            return
        interrupted += 1

    for _ in range(8):
        running, stop = threading.Event(), threading.Event()
        rig.manager.acquire("a")
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert running.wait(20)
        time.sleep(0.004 * chance.random())
        for _ in range(4):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(Interrupt))
            thread.join(5)
            if not thread.is_alive():
                break
        stop.set()
        assert not thread.is_alive(), "a thread hangs"
        rig.manager.release("a", evict=True)
        rig.manager.pager.synchronize()
        assert pinned_pages(rig.manager) == 0
        assert rig.manager.stats().used == 0
        rig.use("a", 3)
    assert interrupted == 8
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
        run_threads(die)
        rig.modules["a"].between = lambda step: None
        run_threads(lambda: rig.check("a"))
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
            rig.check("outer")  # with a cap of 6, in place as a whole
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

    run_threads(work("a"), work("b"), work("inner"))
    for name in "ab":
        rig.modules[name].between = lambda step: None
    rig.end()


def test_models_that_call_each_other_in_two_threads_go_on(pager: str) -> None:
    rig = Rig(pager, 12, a=3, b=3)
    both = threading.Barrier(2)
    mine = threading.local()
    nested: list[str] = []

    def nest(other: str) -> Callable[[int], None]:
        def between(step: int) -> None:
            if step != 1 or getattr(mine, "inside", False):
                return
            mine.inside = True
            both.wait(10)  # each is in the midst of its own model
            rig.check(other)
            nested.append(other)
            mine.inside = False

        return between

    rig.modules["a"].between, rig.modules["b"].between = nest("b"), nest("a")
    run_threads(lambda: rig.use("a", 3), lambda: rig.use("b", 3))
    assert sorted(nested) == ["a"] * 3 + ["b"] * 3
    for name in "ab":
        rig.modules[name].between = lambda step: None
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
        with suppress(CapExceededError, ModelError):  # refused: that is an answer
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

        run_threads(work(0), work(1))
        rig.manager.pager.synchronize()
        ledger = rig.manager.stats()
        assert ledger.used <= ledger.cap
        assert pinned_pages(rig.manager) == 0
        held = sum(model.memory.resident_bytes for model in ledger.models.values())
        assert ledger.used == held
        assert all(model.acquired == 0 and not model.kept for model in ledger.models.values())
    rig.manager.set_cap(9 * PAGE)
    rig.end()
