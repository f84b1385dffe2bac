"""What stays of managed memory: as much as may, in runs, and with honest figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.managed_plan import BATCH_BYTES, BATCHES, ManagedPlan, plan_managed
from penstock.report.stats import MemoryStats
from python.support import MIB, build, manager_with, mlp, state_of

PAGE = BATCH_BYTES // 4  # a batch is four pages


def plan(steps: list[list[int]], frames: int, seconds: list[float] | None = None) -> ManagedPlan:
    return plan_managed(steps, frames, page_size=PAGE, link_rate=PAGE, seconds=seconds or [])


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


def test_ring_is_of_six_batches_where_the_cap_is_large() -> None:
    made = plan([[page] for page in range(200)], 80)
    assert made.ring == BATCHES * 4
    assert len(made.kept) == 80 - made.ring
    assert made.bytes_per_pass == (200 - 56) * PAGE
    assert made.seconds == 200 - 56


def test_ring_is_half_of_a_small_cap() -> None:
    made = plan([[page] for page in range(40)], 12)
    assert (made.ring, len(made.kept)) == (6, 6)


def test_ring_has_room_for_the_largest_step_and_a_batch() -> None:
    made = plan([list(range(20)), *([page] for page in range(20, 80))], 30)
    assert made.ring == 20 + 15 // BATCHES  # a batch of half the cap


def test_nothing_is_kept_beside_a_step_that_needs_all() -> None:
    assert plan([list(range(10)), [10, 11]], 10).kept == ()


def test_passing_pages_are_runs_of_about_a_batch() -> None:
    made = plan([[page] for page in range(200)], 80)
    passing = [page for page in range(200) if page not in made.kept]
    assert {len(run) for run in runs(passing)} <= {3, 4, 5}
    few = plan([[page] for page in range(200)], 32)  # too few to be between all batches
    assert len(runs(list(few.kept))) == 16


def test_pages_that_would_be_loaded_twice_a_pass_are_kept_first() -> None:
    steps = [[0], *([page] for page in range(1, 60)), [0], *([page] for page in range(60, 120))]
    made = plan(steps, 24)
    assert 0 in made.kept
    assert made.bytes_per_pass == (120 - 12) * PAGE


def test_pages_that_would_be_loaded_twice_count_twice() -> None:
    steps = [[page] for page in (*range(100), *range(50))]
    made = plan(steps, 24)
    assert set(made.kept) <= set(range(50))
    assert made.bytes_per_pass == (50 + 2 * (50 - 12)) * PAGE


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
    assert made.ring > max(len(set(step)) for step in steps) or made.ring == frames
    assert made.bytes_per_pass >= (len(read) - len(made.kept)) * PAGE


@pytest.mark.parametrize("cap", [6, 9, 14])
def test_model_moves_what_the_plan_says(cap: int) -> None:
    widths = [512] * 21  # 20 steps of one MiB and a little
    builder = lambda: mlp(*widths)  # noqa: E731
    state = state_of(build(builder))
    manager = manager_with(builder, state, cap=cap * MIB)
    x = torch.randn(2, 512)
    model = manager.acquire("m")

    def figures(passes: int) -> MemoryStats:
        with torch.no_grad():
            for _ in range(passes):
                model(x)
                manager.pager.synchronize()
        return manager.stats().models["m"].memory

    before, after = figures(6), figures(4)
    moved = after.loaded_bytes - before.loaded_bytes
    assert after.planned_bytes > 0
    assert abs(moved - 4 * after.planned_bytes) <= (cap * MIB) // 8  # a batch
    assert after.misses == before.misses
