"""When a running model is planned for, for which orders, and by which times.

The first plan is for the tensors in the order in which they lie: a guess. From the first passes on
it is for the order that is expected of them, and where kinds of passes alternate (an encoder and a
decoder), for two of them together, until one comes several times in a row. A plan for one order is
made once more when some passes were traced, with the times that its steps took; then it is settled.
`plan_state` has the states and what leads from one to the other. Where the room changes later, as
when the model is used again, the plan is by the times that are known.

`step_times` has what is known of these times. They are corrected when some passes have run by a
settled plan, and a plan that then loads less is made.
"""

from __future__ import annotations

from contextlib import suppress

from penstock import _core
from penstock.errors import CapExceededError
from penstock.memory.model_memory import ModelMemory
from penstock.schedule.plan_state import TRANSITIONS, Event, PlanState
from penstock.schedule.step_times import Order, StepTimes
from penstock.sizes import format_bytes

__all__ = ["Planning"]

_REPEATS = 8  # passes of one entry point in a row, before the plan is for it alone
_PASSES = 6  # by a plan, before its times are compared with theirs
_COMPARED = 3  # passes: the shortest of the last ones counts


class Planning:
    """Has a model's memory arranged for the passes that are expected.

    Parameters
    ----------
    name
        The model's, for messages.
    trace
        Whether times are taken of every pass anyway.
    """

    def __init__(self, name: str, memory: ModelMemory, *, trace: bool) -> None:
        self._name = name
        self._memory = memory
        self._pages: dict[int, list[int]] = {}  # of steps
        self._trace = trace
        self._orders: list[Order] = []  # planned for
        self._previous: Order | None = None  # of the pass before
        self._repeats = 0
        self._state = PlanState.GUESSED
        self._renew_later = False
        self._times = StepTimes()
        self._passes = 0  # by the present plan

    @property
    def state(self) -> PlanState:
        """How well the plan fits."""
        return self._state

    def settled(self, order: Order) -> bool:
        """Whether the plan is for this order alone, and by its times."""
        return self._state is PlanState.SETTLED and self._orders == [order]

    def pages_of(self, order: Order) -> list[list[int]]:
        """List, for each step of an order, the pages that it needs."""
        paged = self._memory.paged
        for step in order:
            if step not in self._pages:
                self._pages[step] = paged.pages(step)
        return [self._pages[step] for step in order]

    def least_frames(self, order: Order) -> int:
        """Return the fewest pages that have to be in place at once.

        Parameters
        ----------
        order
            What is expected, should nothing have been planned for yet.
        """
        pages = [used for each in self._orders or [order] for used in self.pages_of(each)]
        return _core.least_frames(self._memory.page_count, pages, self._memory.rules.keep)

    def renew(self, order: Order) -> None:
        """Plan anew, as what the model may use has changed.

        Parameters
        ----------
        order
            What is expected, should nothing have been planned for yet.

        Raises
        ------
        CapExceededError
            If a step cannot run in what the model may use.
        """
        self._renew_later = False
        self._plan_for(self._orders or [order])
        if self._state is PlanState.GUESSED:
            self._orders = []

    def renew_later(self) -> None:
        """Plan anew when the pass that is under way ends."""
        self._renew_later = True

    def pass_ended(self, order: Order) -> None:
        """Improve the plan, where there is anything to improve.

        Parameters
        ----------
        order
            Of passes of the kind that has just ended.
        """
        if self._state is PlanState.GUESSED:
            self._follow(Event.LEARNED)
        if self._renew_later or self._memory.follow_others():
            with suppress(CapExceededError):
                self.renew(order)
        if not self.settled(order) or self._memory.fits():
            self.improve(order)
        elif self.correct_times(order):
            with suppress(CapExceededError):
                self.renew(order)

    def improve(self, order: Order) -> None:
        """Plan for the order that is expected after a pass, or by its times, where that is better.

        Parameters
        ----------
        order
            Of passes of the kind that has just ended.
        """
        self._repeats = self._repeats + 1 if self._previous == order else 0
        previous, self._previous = self._previous, order
        with suppress(CapExceededError):  # this pass is done; the next says which step is too large
            if order not in self._orders:
                same_kind = previous is not None and previous[0] == order[0]
                together = (order,) if previous is None or same_kind else (previous, order)
                self._plan_for(list(dict.fromkeys(together)))
            elif len(self._orders) > 1 and self._repeats >= _REPEATS:
                self._plan_for([order])
            elif self._orders == [order]:
                self._improve_by_times(order)

    def correct_times(self, order: Order) -> bool:
        """Correct the times of a settled plan's steps by passes that have run by it since.

        Call it when such a pass has ended.

        Returns
        -------
        bool
            Whether to plan anew, as passes would load less.
        """
        self._passes += 1
        if self._passes % _PASSES:
            return False
        # Those that are over, by the device: the latest may not be.
        passes = self._memory.streamer.passes()[-_COMPARED:]
        taken = min((each.seconds - each.stall_seconds for each in passes), default=0.0)
        if not self._times.correct(order, taken):
            return False
        return self._memory.loads_less(self.pages_of(order), self._times.of(order))

    def _plan_for(self, orders: list[Order]) -> None:
        pages = [used for order in orders for used in self.pages_of(order)]
        seconds = self._times.of(orders[0]) if len(orders) == 1 else []
        try:
            self._memory.arrange(pages, seconds)
        except CapExceededError as error:
            steps = [step for order in orders for step in order]
            step, largest = max(zip(steps, pages, strict=True), key=lambda each: len(each[1]))
            nbytes = len(largest) * self._memory.pager.page_size
            raise CapExceededError(
                f"model {self._name!r}: {self._memory.paged.describe(step)} reads "
                f"{format_bytes(nbytes)} at once, in whole pages. {error}",
                requested=error.requested,
                cap=error.cap,
                used=error.used,
            ) from None
        self._orders = orders
        self._follow(Event.PLANNED_BY_TIMES if seconds else Event.PLANNED)
        self._passes = 0

    def _follow(self, event: Event) -> None:
        before, self._state = self._state, TRANSITIONS[self._state][event]
        if self._state is before:
            return
        # A new plan without times leaves timing on: the pass after the next one is timed anyway.
        if self._state is PlanState.TRACING:
            self._memory.streamer.set_trace(True)
        elif self._state is PlanState.SETTLED:
            self._memory.streamer.set_trace(self._trace)

    def _improve_by_times(self, order: Order) -> None:
        if self._state is PlanState.SETTLED:
            return
        if self._state is PlanState.TRACED:
            seconds = self._memory.streamer.step_seconds()
            if seconds and self._times.add(order, seconds):
                self._plan_for([order])
                return
        self._follow(Event.PASS)
