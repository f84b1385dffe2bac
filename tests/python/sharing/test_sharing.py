"""Dividing frames among models: nobody below what it needs, nothing wasted, nothing twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sharing.division import divide

MODELS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 500)).map(lambda each: (each[0], sum(each))),
    min_size=1,
    max_size=6,
)


@given(models=MODELS, total=st.integers(0, 3000))
def test_shares_lie_between_least_and_most_and_within_the_total(
    models: list[tuple[int, int]], total: int
) -> None:
    least, most = zip(*models, strict=True)
    shares = divide(total, least, most)
    assert all(few <= share <= many for few, share, many in zip(least, shares, most, strict=True))
    assert sum(shares) <= max(total, sum(least))
    if sum(most) <= total:
        assert shares == list(most)
    elif total >= sum(least):
        assert total - sum(shares) < len(models), "what is left is less than a frame for each"


@given(models=MODELS, total=st.integers(0, 3000), more=st.integers(0, 100))
def test_a_larger_total_takes_from_nobody(
    models: list[tuple[int, int]], total: int, more: int
) -> None:
    least, most = zip(*models, strict=True)
    before = divide(total, least, most)
    after = divide(total + more, least, most)
    assert all(a <= b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("total", "shares"),
    [(5, [4, 2]), (6, [4, 2]), (16, [9, 7]), (36, [19, 17]), (46, [24, 22]), (90, [24, 22])],
)
def test_the_rest_goes_by_what_each_could_use(total: int, shares: list[int]) -> None:
    assert divide(total, [4, 2], [24, 22]) == shares


def test_no_models_divide_nothing() -> None:
    assert divide(10, [], []) == []
