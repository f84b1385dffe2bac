"""What is held in place has no steps, and nothing is lost or wrong for it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from penstock import DeviceError, MemoryManager, _core
from penstock.memory import FramesMemory
from python.support import KIB, build, same_bits, state_of

PAGE = 64 * KIB
WIDTH = 128
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


def stack(layers: int) -> nn.Module:
    """Build layers of one page each."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def test_what_stays_has_no_steps_once_the_plan_is_settled() -> None:
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
        assert after.steps_run - before.steps_run < 10
        assert streamed == after.planned_bytes
        assert after.misses == before.misses
        assert all(f"{layer}" in str(manager.schedule("m")) for layer in range(10))
        # What is written to it is kept, and what others take of it comes back as steps.
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
def test_what_is_held_leaves_room_for_every_way(frames: int) -> None:
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


def test_other_paths_are_right_after_what_stays_is_held() -> None:
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
def test_steps_come_back_where_what_ran_without_them_fails_to_end(frames: int) -> None:
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
        pytest.raises(DeviceError, match='cannot keep that: use host="pinned"'),
        torch.no_grad(),
        manager.use("m") as module,
    ):
        for _ in range(8):
            both(module, plain)
        module.train()
        module(X)
    assert manager.stats().used == 0
    with manager.use("m") as module:  # what was lost is lost, and the manager goes on
        both(module.eval(), plain)


def convolutions() -> nn.Module:
    """Build layers whose weights autograd saves as they are, not as views."""
    return nn.Sequential(
        *(nn.Conv2d(16, 16, 8, padding=4 - i % 2, bias=False) for i in range(10)),
        nn.GroupNorm(4, 16),
    )


@pytest.mark.parametrize("evict", [True, False])
def test_backward_of_a_model_that_ran_freely_and_left(evict: bool) -> None:
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
