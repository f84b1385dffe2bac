"""The page table against a model of it, through sequences of calls that hypothesis makes up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock import ScheduleError
from penstock._core import PageState, PageTable

PAGES = 6
PAGE = st.integers(0, PAGES - 1)
STEPS = st.lists(st.lists(PAGE, max_size=4), max_size=5)

MOVES = {
    "begin_load": (PageState.absent, PageState.loading),
    "finish_load": (PageState.loading, PageState.resident),
    "cancel_load": (PageState.loading, PageState.absent),
    "begin_evict": (PageState.resident, PageState.evicting),
    "finish_evict": (PageState.evicting, PageState.absent),
    "cancel_evict": (PageState.evicting, PageState.resident),
}


class Table(RuleBasedStateMachine):
    """States, pins and order of use in plain lists; next uses by looking through the schedule."""

    @initialize(steps=STEPS)
    def start(self, steps: list[list[int]]) -> None:
        self.table = PageTable(PAGES)
        self.states = [PageState.absent] * PAGES
        self.pins = [0] * PAGES
        self.last_use = [0] * PAGES
        self.clock = 0
        self.set_schedule(steps)

    def next_use(self, page: int) -> int | None:
        """Look at one pass from now on: the time of a step is its place plus one, and on and on."""
        for time in range(self.now + 1, self.now + 1 + len(self.steps)):
            if page in self.steps[(time - 1) % len(self.steps)]:
                return time
        return None

    @rule(steps=STEPS)
    def set_schedule(self, steps: list[list[int]]) -> None:
        self.table.set_schedule(steps)
        self.steps = steps
        self.now = 0

    @rule(step=st.integers(0, 5))
    def advance(self, step: int) -> None:
        if step >= len(self.steps):
            with pytest.raises(IndexError):
                self.table.advance(step)
            return
        self.table.advance(step)
        self.now += 1
        while (self.now - 1) % len(self.steps) != step:
            self.now += 1

    @rule(name=st.sampled_from(list(MOVES)), page=PAGE)
    def move(self, name: str, page: int) -> None:
        call: Callable[[int], None] = getattr(self.table, name)
        before, after = MOVES[name]
        if self.states[page] is before and not (name == "begin_evict" and self.pins[page]):
            call(page)
            self.states[page] = after
        else:
            with pytest.raises(ScheduleError, match=f"page {page} "):
                call(page)

    @rule(page=PAGE)
    def load(self, page: int) -> None:
        assume(self.states[page] is PageState.absent)
        self.move("begin_load", page)
        self.move("finish_load", page)

    @rule(page=PAGE)
    def pin(self, page: int) -> None:
        self.table.pin(page)
        self.pins[page] += 1

    @rule(page=PAGE)
    def unpin(self, page: int) -> None:
        if self.pins[page]:
            self.table.unpin(page)
            self.pins[page] -= 1
        else:
            with pytest.raises(ScheduleError, match="not pinned"):
                self.table.unpin(page)

    @rule(page=PAGE)
    def touch(self, page: int) -> None:
        self.table.touch(page)
        self.clock += 1
        self.last_use[page] = self.clock

    @invariant()
    def agrees(self) -> None:
        never = float("inf")
        uses = {page: self.next_use(page) for page in range(PAGES)}
        assert [self.table.state(page) for page in range(PAGES)] == self.states
        assert [self.table.pins(page) for page in range(PAGES)] == self.pins
        assert {page: self.table.next_use(page) for page in range(PAGES)} == uses
        for state in PageState:
            assert self.table.count(state) == self.states.count(state)
        evictable = [
            page
            for page in range(PAGES)
            if self.states[page] is PageState.resident and not self.pins[page]
        ]
        evictable.sort(key=lambda page: (-(uses[page] or never), self.last_use[page], -page))
        assert self.table.victims(PAGES) == evictable
        assert self.table.victims(2) == evictable[:2]
        later = [page for page in evictable if (uses[page] or never) > self.now + 2]
        assert self.table.victims(PAGES, self.now + 2) == later


Table.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestTable = Table.TestCase


def test_pages_that_do_not_exist_are_refused_and_nothing_changes() -> None:
    table = PageTable(2)
    table.set_schedule([[0], [1]])
    with pytest.raises(IndexError):
        table.set_schedule([[2]])
    with pytest.raises(IndexError):
        table.begin_load(2)
    assert table.next_use(1) == 2
