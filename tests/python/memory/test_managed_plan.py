"""What stays of managed memory: as much as may, in runs, and with honest figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.memory.managed_plan import (
    BATCHES,
    CALL_BYTES,
    LARGEST_BATCH,
    ManagedPlan,
    choose_kept,
)
from penstock.memory.page_rules import PageRules
from penstock.report.stats import MemoryStats
from python.support import MIB, build, manager_with, mlp, state_of

GIB = 1 << 30
PAGE = 2 * MIB


def plan(
    steps: list[list[int]],
    frames: int,
    seconds: list[float] | None = None,
    streamed: tuple[int, ...] = (),
) -> ManagedPlan:
    rules = PageRules(stream=streamed)
    return choose_kept(
        steps, frames, page_size=PAGE, link_rate=PAGE, seconds=seconds or [], rules=rules
    )


def runs(pages: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for page in pages:
        if found and found[-1][-1] + 1 == page:
            found[-1].append(page)
        else:
            found.append([page])
    return found


def test_all_is_kept_where_it_fits() -> None:
    kept = plan([[0, 1], [3]], 3)
    assert kept == ManagedPlan((0, 1, 3), 0, 0, 0)


def cost(nbytes: int, batch: int) -> float:
    """What a pass takes, in bytes that the link could carry: it loses some between two loads."""
    return nbytes * (1 + CALL_BYTES / batch)


@pytest.mark.parametrize(("pages", "frames"), [(3579, 2048), (3579, 3400), (7500, 1024)])
def test_ring_is_the_one_by_which_a_pass_is_shortest(pages: int, frames: int) -> None:
    made = plan([[page] for page in range(pages)], frames)
    batch = made.ring / BATCHES * PAGE
    taken = cost(made.bytes_per_pass, batch)
    lacking = (pages - frames) * PAGE
    others = [lacking + BATCHES * other for other in range(8 * MIB, 256 * MIB, MIB)]
    best = min(cost(nbytes, (nbytes - lacking) / BATCHES) for nbytes in others)
    assert taken <= 1.005 * best
    assert made.seconds * PAGE == cost(made.bytes_per_pass, made.ring // BATCHES * PAGE)


def test_ring_has_batches_that_are_not_too_large() -> None:
    made = plan([[page] for page in range(200_000)], 20_000)
    assert made.ring == BATCHES * LARGEST_BATCH // PAGE


def test_ring_is_three_quarters_of_a_small_cap() -> None:
    made = plan([[page] for page in range(40)], 12)
    assert (made.ring, len(made.kept)) == (9, 3)
    assert made.bytes_per_pass == 37 * PAGE


def test_large_steps_stay_in_part_so_that_the_ring_need_not_hold_them() -> None:
    steps = [list(range(300)), *([page] for page in range(300, 2000))]
    made = plan(steps, 1000)
    batch = made.ring // BATCHES
    assert made.ring < 150
    assert len(set(steps[0]).difference(made.kept)) <= made.ring - batch


def test_ring_has_room_for_the_largest_step_and_a_batch_where_steps_are_large() -> None:
    steps = [list(range(20 * at, 20 * at + 20)) for at in range(10)]
    made = plan(steps, 30)
    largest = max(len(set(step).difference(made.kept)) for step in steps)
    assert largest + made.ring // BATCHES <= made.ring
    assert len(made.kept) + made.ring == 30


def test_parts_that_must_stream_make_the_ring_larger() -> None:
    steps = [list(range(300)), *([page] for page in range(300, 2000))]
    made = plan(steps, 1000, streamed=tuple(range(300)))
    assert not set(range(300)).intersection(made.kept)
    assert made.ring >= 300 + (made.ring - 300) // BATCHES
    assert len(made.kept) + made.ring == 1000


def test_nothing_is_kept_beside_a_step_that_needs_all() -> None:
    assert plan([list(range(10)), [10, 11]], 10).kept == ()


def test_passing_pages_are_runs_of_about_a_batch() -> None:
    made = plan([[page] for page in range(3579)], 2048)
    passing = [page for page in range(3579) if page not in made.kept]
    batch = made.ring // BATCHES
    assert all(abs(len(run) - batch) <= batch // 8 for run in runs(passing))
    few = plan([[page] for page in range(800)], 32)  # too few to be between all batches
    assert len(runs(list(few.kept))) == len(few.kept) == 8


def test_pages_that_would_be_loaded_twice_a_pass_are_kept_first() -> None:
    steps = [[0], *([page] for page in range(1, 60)), [0], *([page] for page in range(60, 120))]
    made = plan(steps, 24)
    assert 0 in made.kept
    assert made.bytes_per_pass == (120 - 6) * PAGE


def test_pages_that_would_be_loaded_twice_count_twice() -> None:
    steps = [[page] for page in (*range(100), *range(50))]
    made = plan(steps, 24)
    assert set(made.kept) <= set(range(50))
    assert made.bytes_per_pass == (50 + 2 * (50 - 6)) * PAGE


def test_pass_takes_as_long_as_its_compute_where_that_is_longer() -> None:
    assert plan([[page] for page in range(40)], 12, [10.0] * 40).seconds == 400


@given(
    steps=st.lists(st.lists(st.integers(0, 60), max_size=8), min_size=1, max_size=40),
    frames=st.integers(8, 60),
)
def test_any_plan_keeps_all_that_it_may(steps: list[list[int]], frames: int) -> None:
    read = {page for step in steps for page in step}
    made = plan(steps, frames)
    assert set(made.kept) <= read
    assert list(made.kept) == sorted(set(made.kept))
    if len(read) <= frames:
        assert set(made.kept) == read
        return
    assert len(made.kept) + made.ring == frames
    largest = max(len(set(step).difference(made.kept)) for step in steps)
    assert largest + max(1, made.ring // BATCHES) <= made.ring or made.ring == frames
    assert made.bytes_per_pass >= (len(read) - len(made.kept)) * PAGE


SCALE = 512  # pages of 4 KiB are so much smaller than those of 2 MiB


class Block(nn.Module):
    """A layer of Llama-3-8B, by its matrices: 16, 4, 4, 16, 56, 56, 56 pages."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": (128, 128), "k": (128, 32), "v": (128, 32), "o": (128, 128)}
        sizes |= {"gate": (128, 448), "up": (128, 448), "down": (448, 128)}
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q(x) + (self.k(x) * self.v(x)).repeat(1, 4)
        x = self.o(x)
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """Sixteen of them between an embedding and a head of 125 pages each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        self.blocks = nn.Sequential(*(Block() for _ in range(16)))
        self.head = nn.Linear(128, 1000, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(ids)))


@pytest.mark.parametrize("gib", [1, 2, 4, 6])
def test_model_moves_what_has_no_room_and_the_ring(
    gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.memory.managed_plan.CALL_BYTES", CALL_BYTES // SCALE)
    page, cap = PAGE // SCALE, gib * GIB // SCALE
    state = state_of(build(Decoder))
    manager = manager_with(Decoder, state, cap=cap, page_size=page)
    ids = torch.arange(4)
    model = manager.acquire("m")
    wanted = build(Decoder)
    wanted.load_state_dict(state)

    def figures(passes: int) -> MemoryStats:
        with torch.no_grad():
            for _ in range(passes):
                assert torch.equal(model(ids), wanted(ids))
                manager.pager.synchronize()
        return manager.stats().models["m"].memory

    before, after = figures(6), figures(4)
    memory = manager._models["m"].runner.memory
    made = memory.plan
    assert isinstance(made, ManagedPlan)
    assert memory.page_count == 3578  # a page is 2 MiB of 7.5 GB
    assert made.ring * PAGE <= 352 * MIB
    if gib == 4:
        assert made.bytes_per_pass * SCALE <= 3.48e9
    # All of the cap is used, a page stays or passes through once, and nothing else is moved.
    assert len(made.kept) + made.ring == cap // page
    assert made.bytes_per_pass == (memory.page_count - len(made.kept)) * page
    moved = after.loaded_bytes - before.loaded_bytes
    assert abs(moved - 4 * made.bytes_per_pass) <= made.ring // BATCHES * page  # in all
    assert after.misses == before.misses
    assert manager.stats().peak <= cap
    assert memory.region.core.evict(made.kept) == len(made.kept) * page  # all of them were there


def test_model_that_is_used_again_is_brought_in_and_misses_nothing() -> None:
    builder = lambda: mlp(*(256, 1024) * 4, 256)  # noqa: E731  # steps take a quarter of the cap
    state = state_of(build(builder))
    manager = manager_with(builder, state, cap=4 * MIB)
    x = torch.randn(2, 256)

    def use() -> MemoryStats:
        with torch.no_grad(), manager.use("m") as model:
            model(x)
        return manager.stats().models["m"].memory

    use()
    before = use()
    manager.prefetch("m")
    manager.pager.synchronize()
    brought = manager.stats().models["m"].memory
    assert brought.loaded_bytes - before.loaded_bytes > MIB
    assert use().misses == use().misses == before.misses
