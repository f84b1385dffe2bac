"""The ledger against a model of it, through sequences of calls that hypothesis makes up."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock import CapExceededError
from penstock._core import Budget, Tag

TAGS = st.sampled_from(list(Tag))
AMOUNTS = st.integers(0, 1000)


class Ledger(RuleBasedStateMachine):
    """A dict of tags and a cap are all that the budget has to agree with."""

    def __init__(self) -> None:
        super().__init__()
        self.cap = 1000
        self.budget = Budget(self.cap)
        self.used = dict.fromkeys(Tag, 0)
        self.peak = 0
        self.refused = 0

    def total(self) -> int:
        return sum(self.used.values())

    def fits(self, nbytes: int) -> bool:
        return self.total() + nbytes <= self.cap

    def charged(self, tag: Tag, nbytes: int) -> None:
        self.used[tag] += nbytes
        self.peak = max(self.peak, self.total())

    @rule(tag=TAGS, nbytes=AMOUNTS, waits=st.booleans())
    def try_charge(self, tag: Tag, nbytes: int, waits: bool) -> None:
        fits = self.fits(nbytes)
        if waits:
            given = self.budget.charge_within(tag, nbytes, timedelta(0))
        else:
            given = self.budget.try_charge(tag, nbytes)
        assert given == fits
        if fits:
            self.charged(tag, nbytes)
        else:
            self.refused += 1

    @rule(tag=TAGS, nbytes=AMOUNTS)
    def charge(self, tag: Tag, nbytes: int) -> None:
        if self.fits(nbytes):
            self.budget.charge(tag, nbytes)
            self.charged(tag, nbytes)
            return
        with pytest.raises(CapExceededError) as refusal:
            self.budget.charge(tag, nbytes)
        self.refused += 1
        figures = (refusal.value.requested, refusal.value.cap, refusal.value.used)
        assert figures == (nbytes, self.cap, self.total())

    @rule(tag=TAGS, nbytes=AMOUNTS)
    def release(self, tag: Tag, nbytes: int) -> None:
        if nbytes <= self.used[tag]:
            self.budget.release(tag, nbytes)
            self.used[tag] -= nbytes
        else:
            with pytest.raises(RuntimeError, match=f"releasing {nbytes} bytes of {tag.name}"):
                self.budget.release(tag, nbytes)

    @rule(cap=st.integers(0, 2000))
    def set_cap(self, cap: int) -> None:
        fits = self.total() <= cap
        assert self.budget.try_set_cap(cap) == fits
        if fits:
            self.cap = cap

    @rule()
    def reset_peaks(self) -> None:
        self.budget.reset_peaks()
        self.peak = self.total()

    @invariant()
    def agrees(self) -> None:
        stats = self.budget.stats()
        assert stats.used_by_tag == {tag.name: nbytes for tag, nbytes in self.used.items()}
        assert (stats.used, stats.cap, stats.peak) == (self.total(), self.cap, self.peak)
        assert stats.refused == self.refused
        assert stats.used <= stats.cap
        assert self.budget.available == self.cap - self.total()


Ledger.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLedger = Ledger.TestCase


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
