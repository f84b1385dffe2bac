"""The manager: several models under one cap, through errors, interrupts and threads."""

from __future__ import annotations

import gc
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import penstock
from penstock import CapExceededError, CheckpointError, MemoryManager, ModelError
from python.support import (
    KIB,
    MIB,
    PAGERS,
    build,
    charge_of,
    manager_with,
    mlp,
    pinned_pages,
    region_of,
    run_threads,
    same_bits,
    state_of,
    within,
)

WIDTHS = (128, 128, 128, 128)  # three steps of 64.5 KiB
PAGE = 4 * KIB
STEP = 68 * KIB  # whole pages that a step touches, at most


def layers() -> nn.Module:
    return mlp(*WIDTHS)


X = torch.linspace(-1, 1, 3 * 128).view(3, 128)


class Several:
    """A manager with models "a", "b" and "c" of one shape and different weights."""

    def __init__(self, cap: int, names: str = "abc") -> None:
        self.manager = MemoryManager(cap=cap, device="cpu", page_size=PAGE)
        self.wanted = {}
        for seed, name in enumerate(names):
            model = build(layers, seed)
            self.wanted[name] = model(X).detach()
            self.manager.register(name, layers, state_of(model))
        self.region_bytes = charge_of(region_of(self.manager, names[0]))

    def resident(self) -> dict[str, int]:
        self.manager.pager.synchronize()
        models = self.manager.stats().models
        return {name: model.memory.resident_bytes for name, model in models.items()}

    def run(self, name: str) -> None:
        """Run a model and leave its pages where they are."""
        module = self.manager.acquire(name)
        self.check(name, module)
        self.manager.release(name)

    def check(self, name: str, module: nn.Module) -> None:
        with torch.no_grad():
            assert same_bits(module(X), self.wanted[name])

    def pinned(self) -> int:
        return pinned_pages(self.manager)


@pytest.fixture(autouse=True)
def no_mode_is_left() -> Iterator[None]:
    yield
    assert _get_current_dispatch_mode() is None


# ---- names -------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    manager = Several(MIB, "ab").manager
    calls: list[Callable[[str], object]] = [
        manager.acquire,
        manager.release,
        manager.prefetch,
        manager.unregister,
        lambda name: manager.use(name).__enter__(),
    ]
    for call in calls:
        with pytest.raises(ModelError, match=r"no model 'llm'; registered: a, b"):
            call("llm")
    with pytest.raises(ModelError, match="registered: none"):
        MemoryManager(cap=1, device="cpu").acquire("a")


def test_taken_name_is_refused_and_the_model_stays() -> None:
    several = Several(MIB)
    with pytest.raises(ModelError, match="'a' is registered already; unregister it first"):
        several.manager.register("a", layers, state_of(build(layers, 9)))
    several.run("a")


def test_name_can_be_used_again() -> None:
    several = Several(MIB)
    several.run("a")
    several.manager.unregister("a")
    assert set(several.manager.stats().models) == {"b", "c"}
    model = build(layers, 9)
    several.manager.register("a", layers, state_of(model))
    with several.manager.use("a") as module:
        assert same_bits(module(X), model(X))


def test_unregistered_model_still_answers_and_is_watched_no_more() -> None:
    several = Several(MIB)
    module = several.manager.acquire("a")
    several.manager.release("a")
    several.manager.unregister("a")
    assert several.manager.stats().used == 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    for _ in range(3):
        several.check("a", module)
        several.run("b")
    stats = several.manager.stats()
    assert stats.used <= stats.peak <= stats.cap
    assert stats.models.keys() == {"b", "c"}
    several.manager.unregister("b")
    del module
    gc.collect()
    assert several.manager.stats().used == 0


def test_unregistered_model_pages_under_the_cap_that_it_had() -> None:
    several = Several(STEP, "ab")
    module = several.manager.acquire("a")
    several.manager.release("a")
    several.manager.unregister("a")
    for _ in range(3):
        several.check("a", module)
        several.run("b")
    stats = several.manager.stats()
    assert 0 < stats.used <= stats.peak <= stats.cap == STEP


# ---- one cap for all ---------------------------------------------------------------------------


def test_least_recently_used_model_makes_room() -> None:
    several = Several(2 * Several(MIB).region_bytes)
    whole = several.region_bytes
    several.run("a")
    several.run("b")
    assert several.resident() == {"a": whole, "b": whole, "c": 0}
    several.run("c")
    resident = several.resident()
    assert resident["a"] < whole
    assert (resident["b"], resident["c"]) == (whole, whole)
    several.run("b")
    several.run("a")
    resident = several.resident()
    assert (resident["a"], resident["b"]) == (whole, whole)
    assert resident["c"] < whole
    assert several.manager.stats().peak <= 2 * whole


def test_acquired_models_go_last() -> None:
    several = Several(2 * Several(MIB).region_bytes)
    whole = several.region_bytes
    held = several.manager.acquire("a")
    several.check("a", held)
    several.run("b")  # more recent than "a", but idle
    several.run("c")
    assert several.resident()["a"] == several.resident()["c"] == whole
    several.manager.release("a")  # the latest use, and idle from now on
    several.run("b")
    assert several.resident()["a"] == several.resident()["b"] == whole
    several.run("c")
    assert several.resident()["a"] < whole
    assert several.resident()["b"] == several.resident()["c"] == whole


def test_acquired_model_gives_way_where_nothing_else_can() -> None:
    several = Several(STEP)
    first = several.manager.acquire("a")
    second = several.manager.acquire("b")
    for _ in range(3):
        several.check("a", first)
        several.check("b", second)
    assert several.manager.stats().peak <= STEP


class Sidestepping(nn.Module):
    """Reads weights without a call, but not in its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(2))

    def forward(self, x: torch.Tensor, direct: bool = False) -> torch.Tensor:
        for part in self.parts:
            x = nn.functional.linear(x, part.weight, part.bias) if direct else part(x)
        return x


def test_models_that_fit_one_by_one_stay_under_the_cap_together() -> None:
    """Whatever they read, as the system counts it."""
    model = build(Sidestepping)
    manager = MemoryManager(cap=12 * MIB, device="cpu")
    for name in "ab":  # 8 MiB each
        manager.register(name, Sidestepping, state_of(model))
    modules = {name: manager.acquire(name) for name in "ab"}
    x = torch.linspace(-1, 1, 1024)[None]
    with torch.no_grad():
        for name, direct in (("b", False), ("a", False), ("b", True), ("a", True), ("b", True)):
            assert same_bits(modules[name](x, direct), model(x, direct))
            manager.pager.synchronize()
            models = manager.stats().models.values()
            assert sum(each.memory.system_resident_bytes for each in models) <= 12 * MIB
    for name in "ab":
        manager.release(name, evict=True)
    assert all(m.memory.system_resident_bytes == 0 for m in manager.stats().models.values())


def test_prefetch_brings_a_model_in_without_acquiring_it() -> None:
    several = Several(MIB)
    several.manager.prefetch("b")
    assert several.resident() == {"a": 0, "b": several.region_bytes, "c": 0}
    assert several.manager.stats().models["b"].acquired == 0
    before = several.manager.stats().models["b"].memory
    several.run("b")
    after = several.manager.stats().models["b"].memory
    assert after.loaded_bytes == before.loaded_bytes == several.region_bytes
    assert (after.misses, after.steps_run) == (before.misses, before.steps_run + 3)


def test_prefetch_takes_only_what_there_is_room_for() -> None:
    several = Several(2 * STEP)
    several.manager.prefetch("a")
    assert 0 < several.resident()["a"] <= 2 * STEP
    several.run("a")
    assert several.manager.stats().peak <= 2 * STEP


@pytest.mark.parametrize("pager", ["managed", "frames"])
@pytest.mark.parametrize("how", ["prefetch", "acquire", "reserve"])
def test_a_model_is_brought_in_after_a_use_as_before_the_first(how: str, pager: str) -> None:
    plain = build(layers)
    manager = manager_with(
        layers,
        state_of(plain),
        cap="1MiB",
        pager=pager,
        page_size=PAGE if pager == "managed" else 64 * KIB,
    )

    def brought_in() -> int:
        before = manager.stats().models["m"].memory.loaded_bytes
        getattr(manager, how)("m")
        manager.pager.synchronize()
        loaded = manager.stats().models["m"].memory.loaded_bytes - before
        if how == "acquire":
            manager.release("m", evict=True)
        if how == "reserve":
            manager.release_reservation("m")
        return loaded

    first = brought_in()
    assert first >= region_of(manager).nbytes
    for _ in range(2):
        with torch.no_grad(), manager.use("m") as module:
            assert same_bits(module(X), plain(X))
        assert brought_in() == first


# ---- acquire and release -----------------------------------------------------------------------


def test_acquiring_nests() -> None:
    several = Several(MIB)
    manager = several.manager
    outer, inner = manager.acquire("a"), manager.acquire("a")
    assert outer is inner
    assert manager.stats().models["a"].acquired == 2
    several.check("a", outer)
    manager.release("a", evict=True)
    assert several.resident()["a"] == several.region_bytes, "somebody still has it"
    with pytest.raises(ModelError, match="acquired 1x"):
        manager.unregister("a")
    several.check("a", outer)
    manager.release("a", evict=True)
    assert several.resident()["a"] == 0
    with pytest.raises(ModelError, match="'a' is not acquired"):
        manager.release("a")
    manager.unregister("a")


def test_use_nests_too() -> None:
    several = Several(MIB)
    with several.manager.use("a") as outer:
        with several.manager.use("a") as inner, several.manager.use("b") as other:
            several.check("a", inner)
            several.check("b", other)
        several.check("a", outer)
        assert several.resident()["a"] == several.region_bytes
        assert several.resident()["b"] == 0
    assert several.manager.stats().used == 0


def test_release_keeps_the_pages_unless_asked() -> None:
    several = Several(MIB)
    several.run("a")
    assert several.resident()["a"] == several.region_bytes
    several.manager.acquire("a")
    several.manager.release("a", evict=True)
    assert several.manager.stats().used == 0


def test_models_run_outside_a_use_and_under_the_cap() -> None:
    several = Several(STEP)
    module = several.manager.acquire("a")
    several.manager.release("a", evict=True)
    for _ in range(3):
        several.check("a", module)
    assert several.manager.stats().peak <= STEP
    assert several.pinned() == 0


# ---- errors in a forward -----------------------------------------------------------------------


T = TypeVar("T")


class Breaking(nn.Module):
    """Fails after some of its steps, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layers()
        self.second = nn.Sequential(layers(), nn.Identity())
        self.error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.fail(self.first(x)))

    def fail(self, x: T) -> T:
        if self.error is not None:
            raise self.error
        return x


ERRORS = [ValueError("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("passes_before", [0, 1, 2])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_in_a_forward_gives_everything_back(
    error: BaseException, passes_before: int, deep: bool
) -> None:
    model = build(Breaking)
    wanted = model(X).detach()
    manager = manager_with(Breaking, state_of(model), cap=2 * STEP, page_size=PAGE)

    def run(module: nn.Module) -> None:
        with torch.no_grad():
            assert same_bits(module(X), wanted)

    with pytest.raises(type(error)) as caught, manager.use("m") as module:
        for _ in range(passes_before):
            run(module)
        if deep:  # inside the call of a step, after others in the same pass
            module.second[0][1].register_forward_pre_hook(lambda m, args: module.fail(args))
        module.error = error
        module(X)
    assert caught.value is error
    assert _get_current_dispatch_mode() is None
    assert pinned_pages(manager) == 0
    assert manager.stats().used == 0
    assert manager.stats().models["m"].acquired == 0

    module.error = None
    for _ in range(2):
        with manager.use("m") as module:
            run(module)
            run(module)
        assert manager.stats().used == 0
    assert manager.stats().peak <= 2 * STEP


def test_error_between_uses_of_an_acquired_model_leaves_it_usable() -> None:
    model = build(Breaking)
    manager = manager_with(Breaking, state_of(model), cap=2 * STEP, page_size=PAGE)
    module = manager.acquire("m")
    for error in [*ERRORS, None]:
        module.error = error
        with torch.no_grad():
            if error is None:
                assert same_bits(module(X), model(X))
            else:
                with pytest.raises(type(error)):
                    module(X)
    manager.release("m", evict=True)
    assert manager.stats().used == 0
    assert manager.stats().models["m"].memory.passes >= 1


def test_interrupt_from_outside_ends_a_forward_cleanly(request: pytest.FixtureRequest) -> None:
    """As Ctrl-C does it: at some operation, not at a statement that raises."""
    several = Several(2 * STEP)
    # Where the shell started us in the background, the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt(module: nn.Module, args: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), several.manager.use("a") as module:
        handle = module[1].register_forward_pre_hook(interrupt)
        module(X)
    handle.remove()
    assert several.pinned() == 0
    assert several.manager.stats().used == 0
    several.run("a")


def test_error_of_the_block_is_the_one_that_is_seen() -> None:
    several = Several(MIB)
    with pytest.raises(ZeroDivisionError), several.manager.use("a") as module:
        several.check("a", module)
        raise ZeroDivisionError
    assert several.manager.stats().used == 0


# ---- a step that does not fit ------------------------------------------------------------------


def test_step_larger_than_the_cap_is_refused_by_name_and_a_larger_cap_works() -> None:
    model = build(lambda: mlp(16, 16, 512, 512, 16))
    x = torch.ones(1, 16)
    small = manager_with(lambda: mlp(16, 16, 512, 512, 16), state_of(model), cap="512KiB")
    for _ in range(2):
        with (
            torch.no_grad(),
            pytest.raises(CapExceededError) as caught,
            small.use("m") as module,
        ):
            module(x)
        message = str(caught.value)
        assert "model 'm': aten::addmm 2.bias and 1 more reads 1.06 MiB" in message
        assert "512.00 KiB (524288 bytes)" in message
        assert "Raise the cap" in message
        assert caught.value.cap == 512 * KIB
        assert caught.value.requested > 512 * KIB
        assert small.stats().used == 0
    with torch.no_grad(), small.use("m") as module:
        assert same_bits(module[0](x), model[0](x)), "what fits still runs"

    enough = int(re.search(r"at least .*?(\d+) bytes", message)[1])
    large = manager_with(lambda: mlp(16, 16, 512, 512, 16), state_of(model), cap=enough)
    with torch.no_grad(), large.use("m") as module:
        assert same_bits(module(x), model(x))


def test_operation_of_the_root_is_named() -> None:
    manager = manager_with(
        lambda: nn.Linear(512, 512), state_of(build(lambda: nn.Linear(512, 512))), cap="512KiB"
    )
    with (
        pytest.raises(CapExceededError, match="model 'm': aten::addmm bias and 1 more reads"),
        manager.use("m") as module,
    ):
        module(torch.ones(1, 512))


class Matrices(nn.Module):
    """Eight matrices of its own, a page each, and no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(128, 128) / 12 for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for matrix in self.matrices:
            x = x @ matrix
        return x


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("pages", [1, 2, 3])
def test_what_needs_room_is_one_operation_and_not_the_module(pager: str, pages: int) -> None:
    model = build(Matrices)
    cap = pages * 64 * KIB
    manager = manager_with(Matrices, state_of(model), cap=cap, page_size=64 * KIB, pager=pager)
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(6):
            assert same_bits(module(X), model(X))
        if pages < 2:
            message = r"aten::add matrices\.\d and 1 more reads 128.00 KiB"
            with pytest.raises(CapExceededError, match=message):
                module.matrices[2] + module.matrices[5]
        else:
            assert same_bits(
                module.matrices[2] + module.matrices[5], model.matrices[2] + model.matrices[5]
            )
        assert same_bits(module(X), model(X))
    assert manager.stats().peak <= cap
    assert manager.stats().used == 0


# ---- failed registrations ----------------------------------------------------------------------


def test_failed_register_changes_nothing(tmp_path: Path) -> None:
    several = Several(2 * STEP)
    manager = several.manager
    state = state_of(build(layers))
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not a checkpoint" * 100)

    def failing_builder() -> nn.Module:
        raise RuntimeError("the builder's own")

    failures: list[tuple[type[Exception], object, object]] = [
        (CheckpointError, layers, garbage),
        (CheckpointError, layers, tmp_path / "missing"),
        (CheckpointError, layers, {**state, "more": torch.ones(1)}),
        (CheckpointError, layers, {}),
        (CheckpointError, lambda: mlp(128, 64), state),
        (ModelError, build(layers), state),
        (ModelError, lambda: None, state),
        (RuntimeError, failing_builder, state),
    ]
    before = manager.stats()
    for error, builder, weights in failures:
        with pytest.raises(error):
            manager.register("new", builder, weights)
        assert manager.stats() == before
        with pytest.raises(ModelError, match="no model 'new'"):
            manager.acquire("new")
    several.run("a")
    manager.register("new", layers, state)
    with torch.no_grad(), manager.use("new") as module:
        assert same_bits(module(X), several.wanted["a"])


def test_module_on_meta_can_be_registered_after_a_failure() -> None:
    with torch.device("meta"):
        module = layers()
    manager = MemoryManager(cap="1MiB", device="cpu")
    with pytest.raises(CheckpointError):
        manager.register("m", module, {})
    model = build(layers)
    manager.register("m", module, state_of(model))
    assert manager.acquire("m") is module
    assert same_bits(module(X), model(X))
    with pytest.raises(ModelError, match="6 parameters have memory"):
        manager.register("again", module, state_of(model))


def test_registering_does_not_depend_on_the_cap() -> None:
    model = build(layers)
    manager = manager_with(layers, state_of(model), cap=1, page_size=None)
    assert manager.stats().used == 0
    module = manager.acquire("m")
    assert module.state_dict().keys() == model.state_dict().keys()
    for read in (lambda: module(X), lambda: module[0].weight.clone()):
        with pytest.raises(CapExceededError, match="cap is 1 bytes"):
            read()
    manager.set_cap(4 * MIB)
    assert same_bits(dict(module.state_dict()), state_of(model))
    assert same_bits(module(X).detach(), model(X).detach())


@pytest.mark.parametrize("builder", [nn.Identity, lambda: nn.ParameterList([torch.zeros(0, 3)])])
def test_model_without_weights_is_a_model(builder: Callable[[], nn.Module]) -> None:
    manager = manager_with(builder, state_of(builder()), cap=1, page_size=None)
    manager.prefetch("m")
    with manager.use("m") as module:
        assert type(module) is type(builder())
        assert all(not p.is_meta for p in module.parameters())
    assert manager.stats().models["m"].nbytes == 0
    assert "m: 0 bytes of weights" in manager.report()
    manager.unregister("m")


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="'ring'"):
        MemoryManager(cap=1, device="cpu", pager="ring")
    with pytest.raises(TypeError):
        MemoryManager(1)


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [3 * STEP, 5 * STEP, MIB], ids=["three steps", "five", "all fit"])
def test_threads_run_their_models_under_one_cap(cap: int) -> None:
    several = Several(cap)

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            for number in range(15):
                if number % 3 == 0:
                    several.manager.prefetch(name)
                with several.manager.use(name) as module:
                    several.check(name, module)
                    several.check(name, module)

        return run

    run_threads(*(work(name) for name in "abc"))
    stats = several.manager.stats()
    assert stats.peak <= cap
    assert stats.used == 0
    assert several.pinned() == 0
    passes = [model.memory.passes for model in stats.models.values()]
    assert passes == [30] * 3


def test_models_come_and_go_while_another_runs() -> None:
    several = Several(2 * STEP, "a")
    state = state_of(build(layers, 5))
    wanted = build(layers, 5)(X).detach()
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            with several.manager.use("a") as module:
                several.check("a", module)

    def come_and_go() -> None:
        try:
            for number in range(10):
                several.manager.register(f"guest {number}", layers, state)
                several.manager.prefetch(f"guest {number}")
                if number % 2:
                    module = several.manager.acquire(f"guest {number}")
                    several.manager.release(f"guest {number}")
                    with torch.no_grad():
                        assert same_bits(module(X), wanted)
                several.manager.unregister(f"guest {number}")
        finally:
            ended.set()

    run_threads(run, come_and_go)
    assert several.manager.stats().peak <= 2 * STEP
    assert several.manager.stats().used == 0


def test_prefetch_of_a_running_model_disturbs_nothing() -> None:
    class Varied(nn.Module):
        """Runs other steps each time, so that the order is always new."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

        def forward(self, x: torch.Tensor, seed: int) -> torch.Tensor:
            for i in range(seed % 5 + 1):
                x = self.parts[(seed + i * i) % 6](x)
            return x

    model = build(Varied)
    manager = manager_with(Varied, state_of(model), cap=64 * KIB, page_size=PAGE)
    x = torch.ones(1, 64)
    ended = threading.Event()

    def run() -> None:
        try:
            with torch.no_grad(), manager.use("m") as module:
                for seed in range(150):
                    assert same_bits(module(x, seed), model(x, seed))
        finally:
            ended.set()

    def prefetch() -> None:
        while not ended.is_set():
            manager.prefetch("m")
            manager.report()

    run_threads(run, prefetch)
    with manager.use("m"):
        pass
    assert manager.stats().used == 0
    assert manager.stats().peak <= 64 * KIB


# ---- figures -----------------------------------------------------------------------------------


def test_model_that_fits_is_moved_once() -> None:
    several = Several(MIB, "a")
    with several.manager.use("a") as module:
        for _ in range(5):
            several.check("a", module)
    stats = several.manager.stats()
    assert stats.loaded_bytes == stats.evicted_bytes == several.region_bytes
    memory = stats.models["a"].memory
    assert memory.steps_run == 3 * memory.passes
    assert stats.models["a"].steps == 3
    assert memory.unscheduled == 0


def test_model_that_is_in_place_as_a_whole_runs_as_if_there_were_no_manager() -> None:
    """No hooks but on the entry point, plain parameters, and nothing loaded or foreseen anew."""
    several = Several(MIB, "a")
    with several.manager.use("a") as module:
        for _ in range(3):
            several.check("a", module)
        assert all(not part._forward_pre_hooks and not part._forward_hooks for part in module)
        assert all(type(each) is nn.Parameter for each in module.parameters())
        several.manager.pager.synchronize()
        before = several.manager.stats().models["a"].memory
        for _ in range(3):
            several.check("a", module)
        several.manager.pager.synchronize()
        after = several.manager.stats().models["a"].memory
        assert (after.passes, after.steps_run) == (before.passes + 3, before.steps_run + 9)
        for figure in ("loaded_bytes", "evicted_bytes", "misses", "unscheduled", "planned_bytes"):
            assert getattr(after, figure) == getattr(before, figure), figure


@pytest.mark.parametrize("room", [2, 4, 6])
def test_bytes_moved_are_at_least_what_must_move_and_at_most_all_each_pass(room: int) -> None:
    model = build(lambda: mlp(*[64] * 9))  # 8 steps of 16.25 KiB
    cap = room * 20 * KIB
    manager = manager_with(lambda: mlp(*[64] * 9), state_of(model), cap=cap, page_size=PAGE)
    whole = charge_of(region_of(manager))
    x = torch.ones(1, 64)
    passes = 6
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(passes):
            assert same_bits(module(x), model(x))
        manager.pager.synchronize()
        stats = manager.stats()
        assert stats.loaded_bytes - stats.evicted_bytes == stats.used
    assert stats.loaded_bytes >= whole + (passes - 1) * (whole - cap)
    # A page between two steps may go and come within a pass, and look-ahead is for nothing at the
    # end; but keeping what is used soonest must beat dropping everything, as LRU would.
    assert stats.loaded_bytes <= (passes + 1) * whole + 8 * PAGE * passes
    assert stats.models["m"].memory.steps_run == passes * 8
    after = manager.stats()
    assert after.loaded_bytes == after.evicted_bytes
    assert after.peak <= cap


def test_pages_are_there_before_the_steps_that_read_them() -> None:
    """Given the time, look-ahead leaves nothing to load on demand: in any pass, under any cap."""

    class Steps(nn.Module):
        """Calls its parts in another order than that in which it has them."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in (5, 2, 7, 0, 3, 6, 1, 4):
                x = self.parts[i](x)
            return x

    model = build(Steps)
    manager = manager_with(Steps, state_of(model), cap=6 * 20 * KIB, page_size=PAGE)
    x = torch.ones(1, 64)
    with torch.no_grad(), manager.use("m") as module:
        assert same_bits(module(x), model(x))  # in which the order is learned
        handles = [
            part.register_forward_pre_hook(lambda *_: manager.pager.synchronize())
            for part in module.parts
        ]
        for _ in range(3):  # in which its times are
            assert same_bits(module(x), model(x))
        before = manager.stats().models["m"].memory
        for _ in range(4):
            assert same_bits(module(x), model(x))
        after = manager.stats().models["m"].memory
    for handle in handles:
        handle.remove()
    assert after.steps_run - before.steps_run == 4 * 8
    assert after.misses == before.misses
    assert 0 < after.loaded_bytes - before.loaded_bytes < 4 * charge_of(region_of(manager))


def test_report_says_what_the_figures_say() -> None:
    several = Several(MIB)
    with several.manager.use("a") as module:
        several.check("a", module)
        several.manager.pager.synchronize()
        stats, report = several.manager.stats(), several.manager.report()
        assert stats.used == stats.models["a"].memory.resident_bytes == several.region_bytes
        assert stats.used_by_tag["weights"] == stats.used
        weights = sum(t.numel() * 4 for t in module.state_dict().values())
        assert stats.models["a"].nbytes == weights
        assert "cap 1.00 MiB" in report
        assert "a: 193.50 KiB of weights" in report
        assert "acquired 1x, 3 steps" in report
        assert "1 passes, 196.00 KiB loaded, " in report
        assert "0 unscheduled reads" in report
        # Nothing is known of it yet: its six tensors, one after the other.
        assert "b: 193.50 KiB of weights, 0 bytes on the device, idle, 6 steps" in report
    assert "in use 0 bytes" in several.manager.report()
    assert several.manager.stats().models["a"].memory.system_resident_bytes == 0


class Borrowing(nn.Module):
    """Reads one weight in another module, and another one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.a(x), self.b.weight)


def test_steps_are_what_operations_read_whoever_has_it() -> None:
    model = build(Borrowing)
    manager = manager_with(Borrowing, state_of(model), cap=MIB, page_size=PAGE)
    with torch.no_grad():
        for _ in range(3):
            with manager.use("m") as module:
                for _ in range(2):
                    assert same_bits(module(X), model(X))
    stats = manager.stats().models["m"]
    assert (stats.memory.passes, stats.memory.steps_run, stats.steps) == (6, 12, 2)
    first, second = manager.schedule("m").splitlines()
    assert first.split()[:6] == ["0", "aten::addmm", "a.bias", "and", "1", "more"]
    assert first.endswith("a.bias, a.weight")
    assert second.split()[:3] == ["1", "aten::mm", "b.weight"]
    assert second.endswith("  b.weight")


def test_before_a_pass_was_seen_tensors_are_expected_as_they_lie() -> None:
    manager = manager_with(Borrowing, state_of(build(Borrowing)), cap=MIB, page_size=PAGE)
    lines = [line.split() for line in manager.schedule("m").splitlines()]
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert [line[:3] for line in lines] == [
        [str(number), "weights", name] for number, name in enumerate(names)
    ]
    assert [line[-1] for line in lines] == names


def test_reads_of_other_threads_are_not_foreseen_and_counted() -> None:
    several = Several(MIB, "a")
    inner = several.wanted
    with several.manager.use("a") as module:
        several.check("a", module)
        handle = module[1].register_forward_pre_hook(
            lambda *_: within(20, lambda: inner.update(sum=module[2].bias.detach().sum()))
        )
        several.check("a", module)
        handle.remove()
        assert several.manager.stats().models["a"].memory.unscheduled == 1
        several.check("a", module)
        assert several.manager.stats().models["a"].memory.unscheduled == 1
        assert several.manager.stats().models["a"].steps == 3


def test_progress_is_shown_where_it_is_asked_for(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    save_file(state_of(build(layers)), tmp_path / "m.safetensors")
    with caplog.at_level(logging.DEBUG):
        for progress, shown in ((True, True), (False, False), (None, False)):
            manager = MemoryManager(cap=MIB, device="cpu", progress=progress)
            manager.register("the model", layers, tmp_path)
            captured = capfd.readouterr()
            assert captured.out == ""
            assert ("loading the model" in captured.err) == shown
    assert not caplog.records


def test_closing_is_leaving_it() -> None:
    """A manager needs no call to end: its threads and memory go with it."""
    before = threading.active_count()
    for _ in range(5):
        several = Several(2 * STEP)
        several.manager.prefetch("a")
        within(30, lambda several=several: several.run("b"))
        del several
    assert threading.active_count() == before


def test_version_and_names_of_the_package() -> None:
    assert penstock.__version__
    assert all(hasattr(penstock, name) for name in penstock.__all__)


@pytest.mark.parametrize("pager", ["managed", "frames"])
def test_cap_that_a_model_in_use_cannot_run_under_is_refused(pager: str) -> None:
    manager = manager_with(mlp_256, state_of(build(mlp_256)), cap="1MiB", pager=pager)
    with torch.no_grad(), manager.use("m") as model:
        x = torch.ones(1, 256)
        wanted = model(x)
        with pytest.raises(CapExceededError):
            manager.set_cap("64KiB")
        assert manager.stats().cap == 1 << 20
        assert torch.equal(model(x), wanted)


def mlp_256() -> nn.Sequential:
    return mlp(256, 256, 256)


def test_what_is_no_priority_policy_or_dtype_is_refused_and_nothing_changes() -> None:
    manager = manager_with(mlp_256, state_of(build(mlp_256)), cap="1MiB")
    with pytest.raises(ValueError, match="Priority"):
        manager.reserve("m", priority="high")
    assert "m:" in manager.report()
    with pytest.raises(ValueError, match="floating-point"):
        manager.register("n", mlp_256, state_of(build(mlp_256)), dtype=torch.int8)
    with pytest.raises(TypeError, match="dtype is dtype or None, not str 'bfloat16'"):
        manager.register("n", mlp_256, state_of(build(mlp_256)), dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'n'"):
        manager.acquire("n")
    with pytest.raises(TypeError, match="has order"):
        MemoryManager(cap="1MiB", device="cpu", policy=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size"):
        MemoryManager(cap="1MiB", device="cpu", host_budget="abc")


def test_what_is_no_module_is_refused_by_its_type() -> None:
    for call in (
        penstock.restore,
        penstock.manager_of,
        lambda each: penstock.offload(each, cap=1 << 20),
    ):
        with pytest.raises(TypeError, match="not str"):
            call("abc")  # type: ignore[arg-type]


# ---- loops that call parts of a model ----------------------------------------------------------


@pytest.mark.parametrize("pager", PAGERS)
@torch.no_grad()
def test_a_pass_is_what_a_block_says_where_parts_are_called(pager: str) -> None:
    plain = build(lambda: mlp(*WIDTHS))
    manager = manager_with(lambda: mlp(*WIDTHS), state_of(plain), cap="224KiB", pager=pager)
    wanted = plain(plain(X))
    with manager.use("m") as model:
        for turn in range(5):
            before = manager.stats().models["m"].memory
            with manager.one_pass("m"):
                x = model(X)  # calls inside are part of it
                with manager.one_pass("m"):
                    for part in model:
                        x = part(x)
            assert same_bits(x, wanted)
            after = manager.stats().models["m"].memory
            assert after.passes == before.passes + 1
            assert turn < 2 or after.unscheduled == before.unscheduled
        assert manager.stats().models["m"].steps == 6
        with pytest.raises(RuntimeError, match="of the user's"), manager.one_pass("m"):
            model[0](X)
            raise RuntimeError("of the user's")
        assert same_bits(model(model(X)), wanted)
        with manager.one_pass("m"):
            ours = model(X)
            theirs = within(30, lambda: without_grad(model))  # beside it, in no pass of its own
        assert same_bits(ours, plain(X)) and same_bits(theirs, ours)
    assert manager.stats().peak <= manager.stats().cap
    with pytest.raises(ModelError, match="no model 'n'"), manager.one_pass("n"):
        pass


def without_grad(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(X)
    return result


@pytest.mark.parametrize("pager", PAGERS)
@torch.no_grad()
def test_what_is_held_is_in_place_inside_the_block(pager: str) -> None:
    plain = build(lambda: mlp(*WIDTHS))
    manager = manager_with(lambda: mlp(*WIDTHS), state_of(plain), cap="192KiB", pager=pager)
    with manager.use("m") as model:
        for part, theirs in zip(model, plain, strict=True):
            with manager.hold("m", part):
                assert pinned_pages(manager) >= 2
                loaded = manager.stats().models["m"].memory.misses
                assert same_bits(part(X), theirs(X))
                assert manager.stats().models["m"].memory.misses == loaded
            assert pinned_pages(manager) == 0
        with pytest.raises(CapExceededError, match="a kernel for Sequential"):
            manager.hold("m", model).__enter__()
        with pytest.raises(ModelError, match="model 'm' has no such module"):
            manager.hold("m", plain[0]).__enter__()
        assert same_bits(model(X), plain(X))
    assert manager.stats().used == 0
