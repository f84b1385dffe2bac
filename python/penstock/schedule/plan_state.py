"""How well a plan fits the passes that run by it: from the first guess until it is settled."""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["TRANSITIONS", "Event", "PlanState"]


class PlanState(Enum):
    """What the plan is for."""

    GUESSED = auto()
    """The tensors in the order in which they lie: no pass has run yet."""
    UNTIMED = auto()
    """An order of steps, without knowing how long they take."""
    TRACING = auto()
    """The same, and passes are timed from the one under way on."""
    TRACED = auto()
    """The same, and their times can be read as soon as the device is done with them."""
    SETTLED = auto()
    """An order of steps, by the times that they take."""


class Event(Enum):
    """What changes that."""

    LEARNED = auto()
    """The first pass has ended, so an order is known."""
    PASS = auto()
    """A pass in the very order that was planned for has ended."""
    PLANNED = auto()
    """There is a new plan, without times."""
    PLANNED_BY_TIMES = auto()
    """There is a new plan, by the times of its steps."""


TRANSITIONS = {
    PlanState.GUESSED: {
        Event.LEARNED: PlanState.UNTIMED,
        Event.PLANNED: PlanState.GUESSED,
    },
    PlanState.UNTIMED: {
        Event.PASS: PlanState.TRACING,
        Event.PLANNED: PlanState.UNTIMED,
        Event.PLANNED_BY_TIMES: PlanState.SETTLED,
    },
    PlanState.TRACING: {
        Event.PASS: PlanState.TRACED,
        Event.PLANNED: PlanState.UNTIMED,
        Event.PLANNED_BY_TIMES: PlanState.SETTLED,
    },
    PlanState.TRACED: {
        Event.PASS: PlanState.TRACED,
        Event.PLANNED: PlanState.UNTIMED,
        Event.PLANNED_BY_TIMES: PlanState.SETTLED,
    },
    PlanState.SETTLED: {
        Event.PLANNED: PlanState.UNTIMED,
        Event.PLANNED_BY_TIMES: PlanState.SETTLED,
    },
}
"""The next state, by the state and the event; what is not here cannot happen."""
