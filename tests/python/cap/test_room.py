"""What is in place goes to tensors that need the room, whatever the model is doing.

And what stays in place needs no loads, and nothing is lost or wrong for it.
"""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import penstock
from penstock import CapExceededError, DeviceError, MemoryManager, ModelError, _core
from penstock.cap.hard_cap import HardCap
from penstock.memory.frames_memory import FramesMemory
from python.support import build, same_bits, state_of

KIB = 1 << 10
PAGE = 64 * KIB
WIDTH = 128  # a layer's weight is one page
LAYERS = 16
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
PASSES = 8  # until the plan is settled


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
    monkeypatch.setattr("penstock.cap.process.current_cap", lambda _: cap)
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


def loaded_in_pass(manager: penstock.MemoryManager, module: nn.Module) -> int:
    """Count the pages that a pass loads, with what is loaded ahead for the one after it."""
    before = manager.stats().models["m"].memory.loaded_bytes
    module(X)
    return (manager.stats().models["m"].memory.loaded_bytes - before) // PAGE


@contextmanager
def used(manager: penstock.MemoryManager) -> Iterator[Model]:
    """Use the model until its plan is settled: most of it stays, or all."""
    module = manager.acquire("m")
    assert isinstance(module, Model)
    try:
        with torch.no_grad():
            for _ in range(PASSES):
                module(X)
            assert manager._models["m"].runner.settled
            assert loaded_in_pass(manager, module) < LAYERS // 2
            yield module
    finally:
        manager.release("m")


def test_room_is_made_within_a_pass_and_used_again_afterwards(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with used(manager) as module:
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
            assert loaded_in_pass(manager, module) < LAYERS // 2
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
    with used(manager) as module:
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
    with used(manager) as module:
        weights = [layer.inner.weight for layer in module.layers[:3]]
        with TakesWithin(room, all_of_it=True):
            together = torch.cat(weights)  # the list is there for longer than the call
        assert same_bits(together, torch.cat([layer.inner.weight for layer in plain.layers[:3]]))
        del weights
        room.free()
        assert same_bits(module(X), plain(X))


def test_views_keep_no_room_and_are_right(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with used(manager) as module:
        view = module.layers[2].inner.weight.t()
        room.take(shared.pager.cap // PAGE - 1)
        assert manager.stats().models["m"].memory.resident_bytes <= PAGE
        for _ in range(2):
            assert same_bits(view, plain.layers[2].inner.weight.t())
            assert same_bits(module(X), plain(X))
        with pytest.raises(CapExceededError, match=r"Tried to allocate 64\.00 KiB"):
            room.take()  # the largest operation's needs are left to a model in use
        other, theirs = module.layers[3].inner.weight, plain.layers[3].inner.weight
        with pytest.raises(CapExceededError, match=r"aten::mm .* and 1 more reads 128\.00 KiB"):
            view @ other
        wanted = torch.cat([plain.layers[2].inner.weight.t(), theirs])
        assert same_bits(torch.cat([view, other]), wanted)  # in parts
        room.free()
        assert same_bits(view, plain.layers[2].inner.weight.t())
        assert same_bits(module(X), plain(X))


def test_a_kernel_keeps_the_weights_of_its_module(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    called: list[nn.Module] = []

    def read_raw(inner: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        # As one that was given an address reads it.
        with pytest.raises(CapExceededError):
            room.take(shared.pager.cap // PAGE)
        mine = torch.empty(WIDTH, WIDTH)
        ctypes.memmove(mine.data_ptr(), inner.weight.data_ptr(), PAGE)
        room.free()
        called.append(inner)
        return nn.functional.linear(x, mine)

    with used(manager) as module:
        for name in ("layers.3.inner", "layers.9.inner"):
            manager.register_kernel(name, read_raw)
        for _ in range(2):
            assert same_bits(module(X), plain(X))
        assert called == [module.layers[3].inner, module.layers[9].inner] * 2


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

    with used(manager) as module:
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

    with used(manager) as module:
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
    with used(manager):
        pass
    assert manager.stats().models["m"].memory.resident_bytes > 0
    room.take(shared.pager.cap // PAGE)
    assert manager.stats().models["m"].memory.resident_bytes == 0


def test_what_is_kept_resident_is_not_given(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with used(manager) as module:
        resident = manager.stats().models["m"].memory.resident_bytes
        with manager.keep_resident("m"), pytest.raises(CapExceededError):
            room.take(shared.pager.cap // PAGE)
        assert manager.stats().models["m"].memory.resident_bytes == resident
        room.free()
        assert same_bits(module(X), plain(X))


def test_written_weights_are_kept(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with used(manager) as module:
        for model in (plain, module):
            for layer in model.layers:
                layer.inner.weight.mul_(0.5)
        module.layers[5].before = lambda _: room.take(shared.pager.cap // PAGE // 2)
        assert same_bits(module(X), plain(X))
        module.layers[5].before = lambda _: None
        assert same_bits(module(X), plain(X))


def test_backward_passes_are_right_while_others_take_room(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    x, wanted = (X.clone().requires_grad_() for _ in range(2))
    plain(wanted).sum().backward()
    with used(manager) as module, torch.enable_grad():
        for place in (None, 4, 11):
            x.grad = None
            module.zero_grad()
            if place is not None:
                module.layers[place].before = lambda _: room.take(shared.pager.cap // PAGE // 2)
            module(x).sum().backward()
            assert x.grad is not None
            assert same_bits(x.grad, wanted.grad)
            for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
                assert same_bits(ours.grad, theirs.grad)
            if place is not None:
                module.layers[place].before = lambda _: None
            room.free()


def test_nobody_is_kept_alive_for_it(shared: HardCap) -> None:
    manager, _ = register()
    with used(manager):
        pass
    runner = weakref.ref(manager._models["m"].runner)
    manager.unregister("m")
    del manager
    gc.collect()
    assert runner() is None
    assert shared.allocator.allocate(PAGE, 0)


def test_a_read_between_passes_that_needs_room_ends(shared: HardCap, room: Room) -> None:
    manager, plain = register()
    with used(manager) as module:
        room.take(shared.pager.cap // PAGE // 3)
        for ours, theirs in zip(module.layers, plain.layers, strict=True):
            assert same_bits(ours.inner.weight + 0, theirs.inner.weight + 0)
        with suppress(CapExceededError):  # more at once than may fit: an error, and no deadlock
            torch.cat([layer.inner.weight for layer in module.layers])
        room.free()
        assert same_bits(module(X), plain(X))


# ---- what stays --------------------------------------------------------------------------------


def stack(layers: int) -> nn.Module:
    """Build layers of one page each."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def test_what_stays_is_not_loaded_again_once_the_plan_is_settled() -> None:
    manager = MemoryManager(cap=8 * PAGE, device="cpu", pager="frames", page_size=PAGE)
    plain = build(lambda: stack(10), 3)
    wanted = plain(X).detach()
    manager.register("m", lambda: stack(10).eval(), state_of(plain))
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(8):
            assert same_bits(module(X), wanted)
        before = manager.stats().models["m"].memory
        assert same_bits(module(X), wanted)
        after = manager.stats().models["m"].memory
        streamed = after.loaded_bytes - before.loaded_bytes
        assert 0 < after.steps_run - before.steps_run < 10  # of those that had to wait or load
        assert 0 < streamed == after.planned_bytes < 10 * PAGE
        assert after.misses == before.misses
        assert all(f"{layer}" in str(manager.schedule("m")) for layer in range(10))
        # What is written to it is kept, and what others take of it comes back.
        with torch.no_grad():
            for part in plain.parameters():
                part.mul_(0.5)
            for part in module.parameters():
                part.mul_(0.5)
        changed = plain(X).detach()
        assert same_bits(module(X), changed)
        manager.set_cap(4 * PAGE)
        assert manager.stats().used <= 4 * PAGE
        for _ in range(8):
            assert same_bits(module(X), changed)
    assert manager.stats().used == 0


class Shortcut(nn.Module):
    """Leaves out some of its parts when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = stack(10)
        self.left_out = frozenset[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, part in enumerate(self.parts):
            if i not in self.left_out:
                x = part(x)
        return x


class TwoWays(nn.Module):
    """Has a way of small layers, and one of a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.small = stack(10)
        self.large = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.through_large = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) if self.through_large else self.small(x)


@pytest.mark.parametrize("frames", [4, 5, 8, 11])
def test_what_stays_leaves_room_for_every_way(frames: int) -> None:
    plain = build(TwoWays, 5)
    manager = MemoryManager(cap=frames * PAGE, device="cpu", pager="frames", page_size=PAGE)
    manager.register("m", lambda: TwoWays().eval(), state_of(plain))
    with torch.no_grad(), manager.use("m") as module:
        for through_large in (False, True, False, True):
            module.through_large = plain.through_large = through_large
            wanted = plain(X)
            for _ in range(8):
                assert same_bits(module(X), wanted)
    assert manager.stats().used == 0


def test_other_paths_are_right_after_the_plan_is_settled() -> None:
    plain = build(Shortcut, 5)
    manager = MemoryManager(cap=8 * PAGE, device="cpu", pager="frames", page_size=PAGE)
    manager.register("m", lambda: Shortcut().eval(), state_of(plain))
    with torch.no_grad(), manager.use("m") as module:
        for left_out in [(), range(5), (2, 7), (9,), (), range(1, 10)]:
            plain.left_out = module.left_out = frozenset(left_out)
            for _ in range(8):
                assert same_bits(module(X), plain(X))
    assert manager.stats().used == 0
    assert manager.stats().suppressed_errors == 0


@pytest.mark.parametrize("frames", [8, 14])
def test_a_pass_that_fails_to_end_spoils_no_later_one(frames: int) -> None:
    device = _core.FaultyDevice(_core.HostDevice())
    manager = MemoryManager(
        cap=frames * PAGE, device=device, pager="frames", page_size=PAGE, progress=False
    )
    plain = build(lambda: stack(10), 6)
    manager.register("m", lambda: stack(10).eval(), state_of(plain))
    for _ in range(3):
        with torch.no_grad(), suppress(DeviceError), manager.use("m") as module:
            for _ in range(8):
                assert same_bits(module(X), plain(X))
            device.fail_nth_call_of("event_record", 0)
        with torch.no_grad(), manager.use("m") as module:
            assert same_bits(module(X), plain(X))
    assert manager.stats().used == 0


def normed() -> nn.Module:
    layers = (m for _ in range(10) for m in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)))
    return nn.Sequential(*layers)


def both(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        assert same_bits(one(X), other(X))


@pytest.mark.parametrize("frames", [8, 64])
def test_statistics_that_change_in_place_outlive_the_eviction(frames: int) -> None:
    plain = build(normed).eval()
    manager = MemoryManager(cap=frames * PAGE, device="cpu", pager="frames", page_size=PAGE)
    manager.register("m", normed, state_of(plain))
    with manager.use("m") as module:
        module.eval()
        for _ in range(8):
            both(module, plain)
        for each in (module, plain):
            each.train()
        both(module, plain)
        for each in (module, plain):
            each.eval()
        both(module, plain)
    with manager.use("m") as module:
        both(module, plain)


@pytest.mark.parametrize("frames", [8, 64])
def test_statistics_that_do_not_change_need_not_be_kept(tmp_path: Path, frames: int) -> None:
    plain = build(normed).eval()
    save_file(state_of(plain), tmp_path / "model.safetensors")
    manager = MemoryManager(
        cap=frames * PAGE, device="cpu", pager="frames", page_size=PAGE, host="stream"
    )
    manager.register("m", lambda: normed().eval(), tmp_path / "model.safetensors")
    for _ in range(2):
        with manager.use("m") as module:
            for _ in range(8):
                both(module, plain)
    with (
        pytest.raises(
            ModelError,
            match=r"""'m': aten::add_ would write to '\d\.num_batches_tracked', and host tier """
            '"stream" cannot keep what is written: use host="pinned"',
        ),
        torch.no_grad(),
        manager.use("m") as module,
    ):
        for _ in range(8):
            both(module, plain)
        module.train()
        module(X)
    assert manager.stats().used == 0
    with manager.use("m") as module:  # nothing has changed, and the manager goes on
        both(module.eval(), plain)


def convolutions() -> nn.Module:
    """Build layers whose weights autograd saves as they are, not as views."""
    return nn.Sequential(
        *(nn.Conv2d(16, 16, 8, padding=4 - i % 2, bias=False) for i in range(10)),
        nn.GroupNorm(4, 16),
    )


@pytest.mark.parametrize("evict", [True, False])
def test_backward_of_a_model_that_was_in_place_and_left(evict: bool) -> None:
    manager = MemoryManager(cap=24 * PAGE, device="cpu", pager="frames", page_size=PAGE)
    plain, other = build(convolutions), build(lambda: stack(10), 4)
    manager.register("m", convolutions, state_of(plain))
    manager.register("other", lambda: stack(10), state_of(other))
    image = torch.linspace(-1, 1, 16 * 64).view(1, 16, 8, 8)
    module = manager.acquire("m")
    for _ in range(8):
        module(image)
    mine, wanted = (image.clone().requires_grad_() for _ in range(2))
    result = module(mine)
    manager.release("m", evict=evict)
    with torch.no_grad(), manager.use("other") as beside:
        assert same_bits(beside(X), other(X))
    result.sum().backward()
    plain(wanted).sum().backward()
    assert mine.grad is not None
    assert wanted.grad is not None
    assert same_bits(mine.grad, wanted.grad)
    del result
    with torch.no_grad(), manager.use("m") as module:
        assert same_bits(module(image), plain(image))
    assert manager.stats().used == 0


def test_ring_is_widened_once_for_a_capture_and_at_little_cost() -> None:
    layers = 420
    manager = MemoryManager(cap=20 * PAGE, device="cpu", pager="frames", page_size=PAGE)
    plain = build(lambda: stack(layers), 3)
    manager.register("m", lambda: stack(layers), state_of(plain))
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(6):
            module(X)
        runner = manager._models["m"].runner
        before = manager.stats().models["m"].memory
        assert isinstance(runner.memory, FramesMemory)
        assert runner.memory.widen_ring()
        runner.plan()
        for _ in range(6):
            assert same_bits(module(X), plain(X))
        after = manager.stats().models["m"].memory
        assert after.ring_bytes >= before.ring_bytes + PAGE
        assert before.planned_bytes < after.planned_bytes <= before.planned_bytes + 2 * PAGE
        assert not runner.memory.widen_ring()
