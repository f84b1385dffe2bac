"""The ledger against a reference that is a dictionary: any sequence of calls, every figure."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock._core import Budget, Tag
from penstock.errors import CapExceededError

LARGEST = 2**64 - 1
TAGS = st.sampled_from(list(Tag))
# Small sizes meet the cap often; the large ones would wrap around in 64 bits.
SIZES = st.one_of(st.integers(0, 120), st.integers(LARGEST - 120, LARGEST))


class BudgetMachine(RuleBasedStateMachine):
    @initialize(cap=st.one_of(st.integers(0, 300), st.just(LARGEST)))
    def make(self, cap: int) -> None:
        self.budget = Budget(cap)
        self.cap = cap
        self.used = dict.fromkeys(Tag, 0)
        self.peaks = dict.fromkeys(Tag, 0)
        self.peak = 0
        self.refused = 0

    def total(self) -> int:
        return sum(self.used.values())

    def charged(self, tag: Tag, nbytes: int) -> bool:
        """Enter a charge into the reference; tell whether it fits."""
        if self.total() + nbytes > self.cap:
            self.refused += 1
            return False
        self.used[tag] += nbytes
        self.peaks[tag] = max(self.peaks[tag], self.used[tag])
        self.peak = max(self.peak, self.total())
        return True

    @rule(tag=TAGS, nbytes=SIZES)
    def try_charge(self, tag: Tag, nbytes: int) -> None:
        assert self.budget.try_charge(tag, nbytes) == self.charged(tag, nbytes)

    @rule(tag=TAGS, nbytes=SIZES, limit=st.integers(-1, 1))
    def charge_within(self, tag: Tag, nbytes: int, limit: int) -> None:
        in_time = self.budget.charge_within(tag, nbytes, timedelta(milliseconds=limit))
        assert in_time == self.charged(tag, nbytes)

    @rule(tag=TAGS, nbytes=SIZES)
    def charge(self, tag: Tag, nbytes: int) -> None:
        used = self.total()
        if self.charged(tag, nbytes):
            self.budget.charge(tag, nbytes)
            return
        with pytest.raises(CapExceededError) as caught:
            self.budget.charge(tag, nbytes)
        error = caught.value
        assert (error.requested, error.cap, error.used) == (nbytes, self.cap, used)
        assert f"{nbytes} bytes" in str(error)

    @rule(tag=TAGS, share=st.floats(0, 1))
    def release(self, tag: Tag, share: float) -> None:
        nbytes = min(int(self.used[tag] * share), self.used[tag])
        self.budget.release(tag, nbytes)
        self.used[tag] -= nbytes

    @rule(tag=TAGS, more=st.integers(1, 200))
    def release_more_than_the_tag_holds(self, tag: Tag, more: int) -> None:
        nbytes = min(self.used[tag] + more, LARGEST)
        if nbytes == self.used[tag]:
            return
        with pytest.raises(RuntimeError, match=tag.name):
            self.budget.release(tag, nbytes)

    @rule(cap=st.one_of(st.integers(0, 400), st.just(LARGEST)))
    def set_cap(self, cap: int) -> None:
        fits = self.total() <= cap
        assert self.budget.try_set_cap(cap) == fits
        if fits:
            self.cap = cap

    @rule()
    def reset_peaks(self) -> None:
        self.budget.reset_peaks()
        self.peaks = dict(self.used)
        self.peak = self.total()

    @invariant()
    def every_figure_is_the_reference(self) -> None:
        stats = self.budget.stats()
        assert stats.used_by_tag == {tag.name: used for tag, used in self.used.items()}
        assert stats.peak_by_tag == {tag.name: peak for tag, peak in self.peaks.items()}
        assert (stats.cap, stats.used, stats.peak) == (self.cap, self.total(), self.peak)
        assert stats.refused == self.refused
        assert stats.used <= stats.cap
        assert self.budget.cap == self.cap
        assert self.budget.available == self.cap - self.total()


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_limit_without_end_does_not_overflow() -> None:
    budget = Budget(10)
    assert budget.charge_within(Tag.weights, 10, timedelta.max)
    budget.release(Tag.weights, 10)


@pytest.mark.parametrize("nbytes", [-1, LARGEST + 1, 1.5, "1"])
def test_sizes_that_are_none_are_refused(nbytes: object) -> None:
    budget = Budget(10)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        budget.try_charge(Tag.weights, nbytes)
    assert budget.stats().used == 0


def test_waiter_gets_what_another_thread_releases() -> None:
    budget = Budget(10)
    budget.charge(Tag.cache, 10)
    waiter = threading.Thread(
        target=lambda: budget.charge_within(Tag.weights, 4, timedelta(seconds=60)), daemon=True
    )
    waiter.start()
    budget.release(Tag.cache, 4)
    waiter.join(60)
    assert not waiter.is_alive()
    assert budget.stats().used_by_tag["weights"] == 4
