"""Who gives way: the rules, and bytes moved beside the fewest that any choice could move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ModelError
from penstock.policy import Candidate, FarthestUse, Priority, UseHistory, order_of_victims

A = Candidate("a", 10, last_use=1)
B = Candidate("b", 10, last_use=2)
C = Candidate("c", 10, last_use=3)


def order(*candidates: Candidate) -> list[str]:
    return order_of_victims(FarthestUse(), candidates)


# ---- rules ---------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_where_nothing_is_known() -> None:
    assert order(C, A, B) == ["a", "b", "c"]


def test_the_farthest_next_use_goes_first() -> None:
    near, far = replace(A, next_use=1), replace(B, next_use=5)
    assert order(near, far) == ["b", "a"]
    assert order(near, far, C) == ["c", "b", "a"], "unknown is farther than anything known"


def test_what_costs_more_to_bring_back_stays_longer() -> None:
    from_disk = replace(A, next_use=4, seconds_per_byte=10.0)
    from_memory = replace(B, next_use=2, seconds_per_byte=1.0)
    assert order(from_disk, from_memory) == ["b", "a"]


def test_models_in_use_go_after_idle_ones_and_secondaries_after_all() -> None:
    in_use = replace(A, in_use=True)
    secondary = replace(B, priority=Priority.SECONDARY)
    assert order(in_use, secondary, C) == ["c", "a", "b"]


def test_protected_models_never_go() -> None:
    assert order(replace(A, protected=True), B) == ["b"]


@pytest.mark.parametrize(
    ("names", "fault"),
    [(["x"], "holds nothing"), (["a"], "is protected"), (["b", "b"], "was named before")],
)
def test_answers_of_a_policy_are_checked(names: list[str], fault: str) -> None:
    class Fixed:
        def order(self, candidates: Sequence[Candidate]) -> list[str]:
            return names

    with pytest.raises(ModelError, match=rf"policy Fixed names .*{fault}"):
        order_of_victims(Fixed(), [replace(A, protected=True), B])


# ---- what history says ---------------------------------------------------------------------------


def after(uses: str) -> UseHistory:
    history = UseHistory()
    for name in uses:
        history.note(name)
    return history


def test_nothing_is_known_until_two_uses_agree() -> None:
    for uses in ("", "a", "ab", "aba", "abca"):
        assert all(after(uses).next_use(name) is None for name in "abc"), uses


def test_a_cycle_is_expected_to_go_on() -> None:
    history = after("abcab")
    assert [history.next_use(name) for name in "cabx"] == [1, 2, 3, None]


def test_uses_in_a_row_are_one() -> None:
    assert [after("aaabbbcaab").next_use(name) for name in "cab"] == [1, 2, 3]


def test_the_longest_agreement_counts() -> None:
    # "a" is followed by "b" or by "d", as what was before it says.
    history = after("cabdabcab")
    assert history.next_use("d") == 1


@given(period=st.text("abcd", min_size=2, max_size=6), repeats=st.integers(3, 5))
def test_the_next_use_in_a_periodic_order_is_exact(period: str, repeats: int) -> None:
    if any(a == b for a, b in pairwise(period + period[0])):
        return  # uses in a row are one
    history = after(period * repeats)
    for name in set(period):
        assert history.next_use(name) == period.index(name) + 1


# ---- bytes moved -------------------------------------------------------------------------------

State = tuple[int, ...]  # of each model, the pages that are there


def replay(
    uses: Sequence[int],
    sizes: Sequence[int],
    cap: int,
    history: UseHistory | None,
    state: State | None = None,
) -> tuple[int, State]:
    """Carry out uses of whole models by the default policy; count the pages that are loaded.

    Parameters
    ----------
    history
        What knows of next uses; None for an oracle.
    """
    there = list(state or [0] * len(sizes))
    last = [0] * len(sizes)
    moved = 0
    for at, used in enumerate(uses):
        if history:
            history.note(str(used))

        def next_use(model: int, at: int = at) -> int | None:
            if history:
                return history.next_use(str(model))
            rest = list(uses[at + 1 :])
            return rest.index(model) + 1 if model in rest else None

        candidates = [
            Candidate(str(i), there[i], last_use=last[i], next_use=next_use(i))
            for i in range(len(sizes))
            if i != used and there[i]
        ]
        lacking = sum(there) - there[used] + sizes[used] - cap
        for name in order(*candidates):
            given_up = min(max(lacking, 0), there[int(name)])
            there[int(name)] -= given_up
            lacking -= given_up
        assert lacking <= 0
        moved += sizes[used] - there[used]
        there[used] = sizes[used]
        last[used] = at
    return moved, tuple(there)


def fewest(uses: Sequence[int], sizes: Sequence[int], cap: int, state: State) -> int:
    """Find the fewest pages that have to be loaded, by trying every choice."""

    @cache
    def search(at: int, there: State) -> int:
        if at == len(uses):
            return 0
        used = uses[at]
        least = None
        others = [range(n + 1) if i != used else [sizes[i]] for i, n in enumerate(there)]
        for left in product(*others):
            if sum(left) <= cap:
                moved = sizes[used] - there[used] + search(at + 1, left)
                least = moved if least is None else min(least, moved)
        assert least is not None
        return least

    return search(0, state)


SIZES = st.lists(st.integers(1, 3), min_size=2, max_size=4)


@given(sizes=SIZES, data=st.data())
def test_by_known_next_uses_nothing_moves_that_need_not(
    sizes: list[int], data: st.DataObject
) -> None:
    cap = data.draw(st.integers(max(sizes), sum(sizes)))
    uses = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=9))
    moved, _ = replay(uses, sizes, cap, None)
    assert moved == fewest(uses, sizes, cap, (0,) * len(sizes))


@given(sizes=SIZES, data=st.data())
def test_a_periodic_order_is_learned_and_then_nothing_moves_that_need_not(
    sizes: list[int], data: st.DataObject
) -> None:
    cap = data.draw(st.integers(max(sizes), sum(sizes)))
    period = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=2, max_size=6))
    period = [a for a, b in zip(period, [*period[1:], period[0]], strict=True) if a != b]
    history = UseHistory()
    _, state = replay(period * 3, sizes, cap, history)
    moved, _ = replay(period * 2, sizes, cap, history, state)
    assert moved == fewest(period * 2, sizes, cap, state)


def test_a_cycle_moves_less_than_by_least_recent_use() -> None:
    """Three models where two fit: by recency, each use would load all of its model."""
    history = UseHistory()
    _, state = replay([0, 1, 2] * 3, [4, 4, 4], 8, history)
    moved, _ = replay([0, 1, 2] * 4, [4, 4, 4], 8, history, state)
    assert moved == 6 * 4, "half of what recency would move"
