"""A plan is by the times that steps take in traced passes, which later ones correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from penstock.memory.model_memory import ModelMemory
from penstock.memory.page_rules import PageRules
from penstock.schedule.plan_state import TRANSITIONS, Event, PlanState
from penstock.schedule.planning import Planning

PASSES = 6  # between looks
ORDER = (0, 1)


@dataclass
class Pass:
    """What is known of one."""

    seconds: float
    stall_seconds: float


@dataclass
class Streamer:
    """Tells times."""

    traced: list[float]
    done: list[Pass] = field(default_factory=list)
    tracing: list[bool] = field(default_factory=list)

    def set_trace(self, trace: bool) -> None:
        self.tracing.append(trace)

    def passes(self) -> list[Pass]:
        return self.done

    def step_seconds(self) -> list[float]:
        return self.traced


class Paged:
    """Knows two steps, of a page each."""

    def pages(self, step: int) -> list[int]:
        return [step]


@dataclass
class Memory:
    """Notes by which times it is planned."""

    streamer: Streamer
    paged: Paged = field(default_factory=Paged)
    planned: list[list[float]] = field(default_factory=list)
    asked: list[list[float]] = field(default_factory=list)
    gains: bool = True
    page_count: int = 2
    rules: PageRules = field(default_factory=PageRules)

    def arrange(self, steps: object, seconds: Sequence[float]) -> None:
        self.planned.append(list(seconds))

    def fits(self) -> bool:
        return False

    def follow_others(self) -> bool:
        return False

    def loads_less(self, steps: object, seconds: Sequence[float]) -> bool:
        self.asked.append(list(seconds))
        return self.gains


def settled(traced: list[float]) -> tuple[Planning, Memory]:
    """Plan as runners do, with these times in the traced pass."""
    memory = Memory(Streamer(traced))
    planning = Planning("m", cast(ModelMemory, memory), trace=False)
    for _ in range(6):
        planning.pass_ended(ORDER)
    assert planning.settled(ORDER)
    assert memory.planned[-1] == traced
    return planning, memory


def run(planning: Planning, memory: Memory, seconds: float, stall: float) -> bool:
    """Let passes end, and say whether to plan anew."""
    memory.streamer.done = [Pass(seconds, stall), Pass(2 * seconds, stall), Pass(seconds, stall)]
    told = [planning.correct_times(ORDER) for _ in range(PASSES)]
    assert not any(told[:-1])
    return told[-1]


def test_times_of_a_slow_traced_pass_are_corrected() -> None:
    planning, memory = settled([0.6, 0.2])
    assert run(planning, memory, seconds=0.5, stall=0.3)
    planning.renew(ORDER)
    assert memory.planned[-1] == pytest.approx([0.15, 0.05])
    # As the passes are now.
    assert not run(planning, memory, seconds=0.5, stall=0.3)


def test_times_that_are_right_stay() -> None:
    planning, memory = settled([0.6, 0.2])
    for seconds, stall in ((0.8, 0.0), (0.79, 0.05), (1.5, 0.1), (0.0, 0.0)):
        assert not run(planning, memory, seconds, stall)
    assert not memory.asked


def test_a_plan_that_gains_nothing_is_not_made() -> None:
    planning, memory = settled([0.6, 0.2])
    memory.gains = False
    assert not run(planning, memory, seconds=0.4, stall=0.0)
    assert memory.asked == [pytest.approx([0.3, 0.1])]
    assert len(memory.planned) == 2


def test_times_are_corrected_so_often_and_no_more() -> None:
    planning, memory = settled([0.6, 0.2])
    corrected = [run(planning, memory, seconds=0.5**i, stall=0.0) for i in range(1, 6)]
    assert corrected == [True, True, True, False, False]


def test_states_follow_each_other_until_the_plan_is_settled() -> None:
    memory = Memory(Streamer([0.6, 0.2]))
    planning = Planning("m", cast(ModelMemory, memory), trace=False)
    found = []
    for _ in range(7):
        planning.pass_ended(ORDER)
        found.append(planning.state)
    traced, settled = [PlanState.TRACED] * 3, [PlanState.SETTLED] * 2
    assert found == [PlanState.UNTIMED, PlanState.TRACING, *traced, *settled]
    assert memory.streamer.tracing == [True, False]


def test_a_step_that_was_held_up_in_one_pass_counts_as_short_as_in_the_others() -> None:
    memory = Memory(Streamer([]))
    planning = Planning("m", cast(ModelMemory, memory), trace=False)
    # The device is not done with the first of them when it is asked.
    times = [[], [], [], [], [0.6, 9.0], [0.7, 0.2], [8.0]]
    for traced in times:
        assert not planning.settled(ORDER)
        memory.streamer.traced = traced
        planning.pass_ended(ORDER)
    assert planning.settled(ORDER)
    assert memory.planned == [[], [0.6, 0.0]]


def test_times_of_another_order_do_not_count() -> None:
    memory = Memory(Streamer([0.1, 0.1]))
    planning = Planning("m", cast(ModelMemory, memory), trace=False)
    for _ in range(5):
        planning.pass_ended(ORDER)
    assert planning.state is PlanState.TRACED
    other = (ORDER[0],)
    memory.streamer.traced = [0.5]
    for _ in range(30):
        planning.pass_ended(other)
    assert planning.settled(other)
    assert memory.planned[-1] == [0.5]


def test_timing_ends_whatever_is_planned_meanwhile() -> None:
    memory = Memory(Streamer([0.6, 0.2]))
    planning = Planning("m", cast(ModelMemory, memory), trace=False)
    tracing = memory.streamer.tracing
    for _ in range(2):
        planning.pass_ended(ORDER)
    planning.renew(ORDER)  # the room has changed
    assert (planning.state, tracing) == (PlanState.UNTIMED, [True])
    for _ in range(5):
        planning.pass_ended(ORDER)
    assert (planning.state, tracing[-1]) == (PlanState.SETTLED, False)
    other = (*ORDER, ORDER[0])
    for _ in range(9):  # another order, until the plan is for it alone, and a pass is timed
        planning.pass_ended(other)
        if planning.state is PlanState.TRACING:
            break
    for _ in range(20):  # then the first one, whose times are known
        planning.pass_ended(ORDER)
    assert (planning.state, tracing[-1]) == (PlanState.SETTLED, False)


def test_every_state_is_reached_and_left() -> None:
    reached = {after for nexts in TRANSITIONS.values() for after in nexts.values()}
    assert reached == set(TRANSITIONS) == set(PlanState)
    assert {event for nexts in TRANSITIONS.values() for event in nexts} == set(Event)
    for nexts in TRANSITIONS.values():  # a new plan may come at any time
        assert Event.PLANNED in nexts
