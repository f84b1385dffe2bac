"""What is held in place goes to tensors that need the room, whatever the model is doing."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import penstock
from penstock import CapExceededError, _core
from penstock.hard_cap import HardCap
from python.support import same_bits, state_of

KIB = 1 << 10
PAGE = 64 * KIB
WIDTH = 128  # a layer's weight is one page
LAYERS = 16
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
PASSES = 6  # until what stays is held in place


class Layer(nn.Module):
    """A linear layer that can be told to do something while it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.before: Callable[[nn.Linear], None] = lambda _: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.before(self.inner)
        y: torch.Tensor = self.inner(x)
        return y.tanh()


class Model(nn.Module):
    """Layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Room:
    """Takes memory for tensors, and gives it back."""

    def __init__(self, cap: HardCap) -> None:
        self._cap = cap
        self.blocks: list[int] = []

    def take(self, pages: int = 1) -> None:
        for _ in range(pages):
            self.blocks.append(self._cap.allocator.allocate(PAGE, 0))

    def take_all(self) -> None:
        with suppress(CapExceededError):
            while True:
                self.take()

    def free(self) -> None:
        while self.blocks:
            self._cap.allocator.free(self.blocks.pop())
        self._cap.allocator.empty_cache()


@pytest.fixture(params=[LAYERS + 1, LAYERS - 4], ids=["whole", "part"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HardCap:
    """Return a cap under which all layers stay, or some of them."""
    cap = HardCap(request.param * PAGE, device=_core.HostDevice(), page_size=PAGE)
    monkeypatch.setattr("penstock.manager.current_cap", lambda _: cap)
    return cap


@pytest.fixture
def room(shared: HardCap) -> Iterator[Room]:
    room = Room(shared)
    yield room
    room.free()


def register() -> tuple[penstock.MemoryManager, Model]:
    torch.manual_seed(0)
    model = Model()
    manager = penstock.MemoryManager(pager="frames", progress=False)
    manager.register("m", Model, state_of(model))
    return manager, model


def steps_of_pass(manager: penstock.MemoryManager, module: nn.Module) -> int:
    before = manager.stats().models["m"].memory.steps_run
    module(X)
    return manager.stats().models["m"].memory.steps_run - before


@contextmanager
def held(manager: penstock.MemoryManager) -> Iterator[Model]:
    """Use the model until most of its modules have no steps."""
    module = manager.acquire("m")
    assert isinstance(module, Model)
    try:
        with torch.no_grad():
            for _ in range(PASSES):
                module(X)
            assert steps_of_pass(manager, module) < LAYERS
            yield module
    finally:
        manager.release("m")


def test_room_is_made_within_a_pass_and_held_again_afterwards(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with held(manager) as module:
        for place in (0, 7, LAYERS - 1):
            module.layers[place].before = lambda _: room.take(shared.pager.cap // PAGE // 2)
            assert same_bits(module(X), plain(X))
            assert len(room.blocks) == shared.pager.cap // PAGE // 2
            module.layers[place].before = lambda _: None
            assert same_bits(module(X), plain(X))
            assert manager.stats().used <= shared.pager.cap
            room.free()
            for _ in range(24):
                assert same_bits(module(X), plain(X))
            assert steps_of_pass(manager, module) < LAYERS
    manager.unregister("m")
    room.free()
    assert shared.pager.budget.stats().used == 0


class TakesWithin(TorchDispatchMode):
    """Needs room while each operation is under way, its arguments in its hands."""

    def __init__(self, room: Room, *, all_of_it: bool = False) -> None:
        super().__init__()
        self.room = room
        self.refused = 0
        self.all_of_it = all_of_it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            (self.room.take_all if self.all_of_it else self.room.take)()
        except CapExceededError:
            self.refused += 1
            self.room.free()
        return func(*args, **(kwargs or {}))


def test_what_an_operation_reads_stays(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with held(manager) as module:
        for _ in range(4):
            wanted = plain(X)
            takes = TakesWithin(room)
            with takes:
                result = module(X)
            assert same_bits(result, wanted)
            assert takes.refused < 3 * LAYERS  # weights did give way
            room.free()
            for _ in range(24):
                module(X)


def test_functions_that_read_weights_of_others_keep_what_they_read(
    shared: HardCap, room: Room
) -> None:
    manager, plain = register()
    with held(manager) as module:
        weights = [layer.inner.weight for layer in module.layers[:3]]
        with TakesWithin(room, all_of_it=True):
            together = torch.cat(weights)  # the list is there for longer than the call
        assert same_bits(together, torch.cat([layer.inner.weight for layer in plain.layers[:3]]))
        del weights
        room.free()
        assert same_bits(module(X), plain(X))


def test_views_that_live_keep_their_pages(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with held(manager) as module:
        view = module.layers[2].inner.weight.t()
        with pytest.raises(CapExceededError):
            room.take(shared.pager.cap // PAGE)
        assert same_bits(view, plain.layers[2].inner.weight.t())
        del view
        room.free()
        assert same_bits(module(X), plain(X))


def test_a_module_that_is_called_keeps_its_weights(shared: HardCap, room: Room) -> None:
    manager, plain = register()

    def read_raw(inner: nn.Linear) -> None:
        # As a kernel that was given an address reads it.
        expected = wanted.pop(0)
        address = inner.weight.data_ptr()
        with pytest.raises(CapExceededError):
            room.take(shared.pager.cap // PAGE)
        assert ctypes.string_at(address, PAGE) == expected

    with held(manager) as module:
        wanted = [
            bytes(module.layers[i].inner.weight.clone().view(torch.uint8).flatten().tolist())
            for i in (3, 9)
        ]
        for layer in (module.layers[3], module.layers[9]):
            layer.inner.register_forward_pre_hook(lambda inner, _: read_raw(inner))
        assert same_bits(module(X), plain(X))
        assert not wanted


def test_another_thread_has_it_while_the_model_is_called(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    errors: list[BaseException] = []

    def take() -> None:
        try:
            room.take(shared.pager.cap // PAGE // 2)
        except BaseException as error:
            errors.append(error)

    def wait(_: nn.Linear) -> None:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()

    with held(manager) as module:
        module.layers[6].before = wait
        assert same_bits(module(X), plain(X))
        assert not errors
        assert len(room.blocks) == shared.pager.cap // PAGE // 2
        module.layers[6].before = lambda _: None
        assert same_bits(module(X), plain(X))


def test_threads_that_take_and_give_at_any_time_change_no_bits(shared: HardCap) -> None:
    manager, plain = register()
    wanted = plain(X)
    stop = threading.Event()
    taken = [0, 0]

    def take_and_give(which: int) -> None:
        chance = random.Random(which)
        mine = Room(shared)
        while not stop.is_set():
            try:
                mine.take(chance.randrange(1, 4))
                taken[which] += 1
            except CapExceededError:
                mine.free()
            if chance.random() < 0.2:
                mine.free()
                time.sleep(0.002 * chance.random())
        mine.free()

    with held(manager) as module:
        threads = [threading.Thread(target=take_and_give, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        try:
            until = time.monotonic() + 4
            while time.monotonic() < until:
                with suppress(CapExceededError):  # they may have left too little
                    assert same_bits(module(X), wanted)
                assert manager.stats().used <= shared.pager.cap
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert all(taken)
        assert same_bits(module(X), wanted)
    manager.unregister("m")
    shared.allocator.empty_cache()
    assert shared.pager.budget.stats().used == 0


def test_an_idle_model_goes_before_one_in_use(shared: HardCap, room: Room) -> None:
    manager, _ = register()
    with held(manager):
        pass
    assert manager.stats().models["m"].memory.resident_bytes > 0
    room.take(shared.pager.cap // PAGE)
    assert manager.stats().models["m"].memory.resident_bytes == 0


def test_what_is_kept_resident_is_not_given(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with held(manager) as module:
        resident = manager.stats().models["m"].memory.resident_bytes
        with manager.keep_resident("m"), pytest.raises(CapExceededError):
            room.take(shared.pager.cap // PAGE)
        assert manager.stats().models["m"].memory.resident_bytes == resident
        room.free()
        assert same_bits(module(X), plain(X))


def test_written_weights_are_kept(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with held(manager) as module:
        for model in (plain, module):
            for layer in model.layers:
                layer.inner.weight.mul_(0.5)
        module.layers[5].before = lambda _: room.take(shared.pager.cap // PAGE // 2)
        assert same_bits(module(X), plain(X))
        module.layers[5].before = lambda _: None
        assert same_bits(module(X), plain(X))


def test_where_gradients_are_taken_there_are_steps(shared: HardCap) -> None:
    manager, plain = register()
    with manager.use("m") as module:
        for _ in range(PASSES):
            module(X)
        assert steps_of_pass(manager, module) >= LAYERS
    # What is held meanwhile has its steps back for such a pass.
    with held(manager) as module, torch.enable_grad():
        assert steps_of_pass(manager, module) >= LAYERS
        x = X.clone().requires_grad_()
        module(x).sum().backward()
        mine = x.grad
        plain(x.detach().requires_grad_())
        other = X.clone().requires_grad_()
        plain(other).sum().backward()
        assert mine is not None
        assert other.grad is not None
        assert same_bits(mine, other.grad)


def test_nobody_is_kept_alive_for_it(shared: HardCap) -> None:
    manager, _ = register()
    with held(manager):
        pass
    runner = weakref.ref(manager._models["m"].runner)
    manager.unregister("m")
    del manager
    gc.collect()
    assert runner() is None
    assert shared.allocator.allocate(PAGE, 0)


def test_a_read_between_passes_that_needs_room_ends(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with held(manager) as module:
        room.take(shared.pager.cap // PAGE // 3)
        for ours, theirs in zip(module.layers, plain.layers, strict=True):
            assert same_bits(ours.inner.weight + 0, theirs.inner.weight + 0)
        with suppress(CapExceededError):  # more at once than may fit: an error, and no deadlock
            torch.cat([layer.inner.weight for layer in module.layers])
        room.free()
        assert same_bits(module(X), plain(X))


def test_the_thread_that_runs_the_model_waits_at_its_hooks(
    shared: HardCap, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, plain = register()
    events: list[str] = []
    begun = threading.Event()
    runner = manager._models["m"].runner
    go_by_steps = runner._go_by_steps

    def slowly(**options: bool) -> None:
        begun.set()
        time.sleep(0.2)  # the model's thread goes on, and comes to a hook
        go_by_steps(**options)
        events.append("by steps")

    thread = threading.Thread(target=lambda: room.take(shared.pager.cap // PAGE // 2))

    def start(_: nn.Linear) -> None:
        thread.start()
        assert begun.wait(20)

    with held(manager) as module:
        monkeypatch.setattr(runner, "_go_by_steps", slowly)
        module.layers[4].before = start
        for layer in module.layers[5:]:
            layer.inner.register_forward_hook(lambda *_: events.append("layer"))
        assert same_bits(module(X), plain(X))
        thread.join(20)
        assert not thread.is_alive()
        assert events[0] == "by steps"
        module.layers[4].before = lambda _: None
        assert same_bits(module(X), plain(X))
