"""The page table against its drawing and against victims chosen the slow and obvious way."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from penstock._core import PageState, PageTable
from penstock.errors import ScheduleError

# The arrows of the drawing in page_table.hpp.
ARROWS = {
    "begin_load": (PageState.absent, PageState.loading),
    "finish_load": (PageState.loading, PageState.resident),
    "cancel_load": (PageState.loading, PageState.absent),
    "begin_evict": (PageState.resident, PageState.evicting),
    "finish_evict": (PageState.evicting, PageState.absent),
    "cancel_evict": (PageState.evicting, PageState.resident),
}
NEVER = float("inf")


@dataclass
class Page:
    state: PageState = PageState.absent
    pins: int = 0
    last_use: int = 0
    kept: bool = False


@dataclass
class Reference:
    pages: list[Page]
    steps: list[list[int]] = field(default_factory=list)
    now: int = 0
    uses: int = 0

    def next_use(self, page: int) -> float:
        """Walk through the repeated schedule until the page comes."""
        for time in range(self.now + 1, self.now + len(self.steps) + 1):
            if page in self.steps[(time - 1) % len(self.steps)]:
                return time
        return NEVER

    def victims(self, limit: int, after: int = 0) -> list[int]:
        planned = any(page.kept for page in self.pages)
        free = [
            index
            for index, page in enumerate(self.pages)
            if page.state is PageState.resident
            and page.pins == 0
            and self.next_use(index) > after
            and not (page.kept and after)
        ]

        def order(index: int) -> tuple[bool, float, int, int]:
            page = self.pages[index]
            by_next_use = page.kept or not planned
            return (
                page.kept,
                -self.next_use(index) if by_next_use else 0,
                page.last_use,
                -index,
            )

        free.sort(key=order)
        return free[:limit]


class PageTableMachine(RuleBasedStateMachine):
    @initialize(page_count=st.integers(1, 8))
    def make(self, page_count: int) -> None:
        self.table = PageTable(page_count)
        self.reference = Reference([Page() for _ in range(page_count)])

    def draw_page(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.reference.pages) - 1))

    @rule(data=st.data(), arrow=st.sampled_from(sorted(ARROWS)))
    def move(self, data: st.DataObject, arrow: str) -> None:
        index = self.draw_page(data)
        page = self.reference.pages[index]
        source, target = ARROWS[arrow]
        call = getattr(self.table, arrow)
        if page.state is source and not (arrow == "begin_evict" and page.pins):
            call(index)
            page.state = target
        else:
            with pytest.raises(ScheduleError, match=f"page {index} is"):
                call(index)

    @rule(data=st.data())
    def bring_in(self, data: st.DataObject) -> None:
        """Take the common way; it is what makes victims."""
        index = self.draw_page(data)
        page = self.reference.pages[index]
        if page.state is not PageState.absent:
            return
        self.table.begin_load(index)
        self.table.finish_load(index)
        self.table.touch(index)
        page.state = PageState.resident
        self.reference.uses += 1
        page.last_use = self.reference.uses

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        index = self.draw_page(data)
        self.table.pin(index)
        self.reference.pages[index].pins += 1

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        index = self.draw_page(data)
        page = self.reference.pages[index]
        if page.pins:
            self.table.unpin(index)
            page.pins -= 1
        else:
            with pytest.raises(ScheduleError, match=f"page {index} is not pinned"):
                self.table.unpin(index)

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        index = self.draw_page(data)
        self.table.touch(index)
        self.reference.uses += 1
        self.reference.pages[index].last_use = self.reference.uses

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.integers(0, len(self.reference.pages) - 1), max_size=5))
        self.table.keep(pages)
        for index, page in enumerate(self.reference.pages):
            page.kept = index in pages

    @rule()
    def keep_a_page_that_does_not_exist(self) -> None:
        with pytest.raises(IndexError):
            self.table.keep([0, len(self.reference.pages)])

    @rule(data=st.data())
    def set_schedule(self, data: st.DataObject) -> None:
        page = st.integers(0, len(self.reference.pages) - 1)
        steps = data.draw(st.lists(st.lists(page, max_size=4), max_size=6))
        self.table.set_schedule(steps)
        self.reference.steps = steps
        self.reference.now = 0

    @rule()
    def set_schedule_with_a_page_that_does_not_exist(self) -> None:
        with pytest.raises(IndexError):
            self.table.set_schedule([[0], [len(self.reference.pages)]])

    @precondition(lambda self: self.reference.steps)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        count = len(self.reference.steps)
        step = data.draw(st.integers(0, count - 1))
        self.table.advance(step)
        self.reference.now += (step - self.reference.now) % count + 1

    @rule(beyond=st.integers(0, 3))
    def advance_to_a_step_that_does_not_exist(self, beyond: int) -> None:
        with pytest.raises(IndexError):
            self.table.advance(len(self.reference.steps) + beyond)

    @rule(limit=st.integers(0, 9), later=st.integers(0, 9))
    def ask_for_some_victims(self, limit: int, later: int) -> None:
        after = self.reference.now + later
        assert self.table.victims(limit, after) == self.reference.victims(limit, after)

    @invariant()
    def every_page_is_as_in_the_reference(self) -> None:
        table, reference = self.table, self.reference
        assert table.page_count == len(reference.pages)
        assert table.now == reference.now
        for index, page in enumerate(reference.pages):
            next_use = table.next_use(index)
            assert (table.state(index), table.pins(index)) == (page.state, page.pins)
            assert table.kept(index) == page.kept
            assert (NEVER if next_use is None else next_use) == reference.next_use(index)
        for state in PageState:
            assert table.count(state) == sum(page.state is state for page in reference.pages)
        assert table.victims(99) == reference.victims(99)


TestPageTable = PageTableMachine.TestCase
TestPageTable.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_pages_that_do_not_exist_are_refused() -> None:
    table = PageTable(2)
    for name in [*ARROWS, "pin", "unpin", "touch", "state", "pins", "next_use", "kept"]:
        with pytest.raises(IndexError):
            getattr(table, name)(2)
