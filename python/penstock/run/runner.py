"""A paged model in use: its operations page by themselves, and this plans for their passes.

What an operation reads or writes is brought in and held by the core, as torch dispatches it; so
nothing here is on the way of a call. The model's own hooks say where calls begin and end, and the
core says when a pass has ended, and what is expected of the next one: then the plan is improved.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from penstock import _core
from penstock.loading.binding import Binding
from penstock.memory.model_memory import ModelMemory
from penstock.run import scripts
from penstock.run.hooks import CallHooks
from penstock.schedule.planning import Planning
from penstock.schedule.step_times import Order
from penstock.torch_private import in_backward

__all__ = ["Runner"]


class Runner:
    """Plans for a model that runs on paged memory.

    Parameters
    ----------
    name
        The model's, for messages.
    memory
        Where the model's tensors are; an attribute, too.
    trace
        Whether times are taken of every step and load.
    """

    def __init__(
        self, name: str, binding: Binding, memory: ModelMemory, *, trace: bool = False
    ) -> None:
        self._name = name
        self._binding = binding
        self.memory = memory
        self._paged = memory.paged
        self._planning = Planning(name, memory, trace=trace)
        self._lock = threading.RLock()  # of the plan
        self._orders: dict[int, Order] = {}  # expected, by the first step
        self._latest: Order | None = None
        self._one_pass = _OnePass()
        memory.streamer.set_trace(trace)
        scripts.prepare()
        # The core and the module's hooks must not keep this, which keeps them.
        mine = weakref.ref(self)
        self._paged.on_pass(_weakly(mine, Runner._pass_ended))
        self._hooks = CallHooks(
            binding.module, _weakly(mine, Runner._call_begins), _weakly(mine, Runner._call_ended)
        )

    # ---- what others may ask -------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The model's."""
        return self._name

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._binding.module

    @property
    def step_count(self) -> int:
        """Steps of the pass that is expected."""
        return len(self._paged.expected())

    def step_name(self, step: int) -> str:
        """Name a step for people."""
        return self._paged.describe(step)

    def schedule(self) -> list[tuple[str, list[str], list[int]]]:
        """List the steps to come: name, names of the tensors on its pages, and these."""
        paged = self._paged
        return [
            (paged.describe(step), paged.tensors(step), paged.pages(step))
            for step in paged.expected()
        ]

    def least_frames(self) -> int:
        """Return the fewest pages that have to be in place at once."""
        return self._planning.least_frames(self._expected)

    @property
    def _expected(self) -> Order:
        return self._latest or tuple(self._paged.expected())

    @property
    def settled(self) -> bool:
        """Whether the plan is final for the order that is expected."""
        return self.memory.fits() or self._planning.settled(self._expected)

    @property
    def is_called(self) -> bool:
        """Whether a call of the whole model is under way."""
        return self._paged.in_call()

    # ---- room ----------------------------------------------------------------------------------

    def plan(self) -> None:
        """Plan anew, as what the model may use has changed.

        Raises
        ------
        CapExceededError
            If a step cannot run in that.
        """
        with self._lock:
            self._planning.renew(self._expected)

    def plan_later(self) -> None:
        """Plan anew when the pass that is under way ends."""
        self._planning.renew_later()

    def prefetch(self) -> None:
        """Load from what is expected next on, as far as there is room."""
        self.memory.streamer.prefetch()

    def evict(self) -> None:
        """Give up all that no operation uses just now; it is loaded again when it is needed."""
        _core.release_addresses()
        self.memory.evict()

    def give_up(self, pages: int) -> None:
        """Give up so many pages, as far as no operation uses them: those first that come last."""
        read = [page for step in self._planning.pages_of(self._expected) for page in step]
        order = list(dict.fromkeys((*read, *self.memory.all_pages)))[::-1]
        self.memory.give_up(pages, order)

    def on_next_use(self, tell: Callable[[], None] | None) -> None:
        """Have a function called once, before the next operation that uses the weights."""
        self._paged.on_next_use(tell)

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Have all tensors of a module in place inside the block, for who takes their addresses."""
        tensors = (*module.parameters(), *module.buffers())
        extents = {self.memory.region.extent(tensor) for tensor in tensors}
        ranges = sorted(extent for extent in extents if extent is not None)
        if not ranges:
            yield
            return
        what = f"a kernel for {type(module).__name__}"
        held = self._paged.hold(what, ranges, self.memory.pager.stream())
        try:
            yield
        finally:
            if held is not None:
                _core.let_go(held)

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Let the next pass be captured in a graph, with all it loads."""
        self._paged.set_capturing(True)
        try:
            yield
        finally:
            self._paged.set_capturing(False)

    def detach(self) -> None:
        """Plan no more. Whoever has a tensor can go on reading it."""
        self._hooks.remove()
        _core.release_addresses()
        self._paged.on_pass(None)
        self._paged.on_next_use(None)

    # ---- passes --------------------------------------------------------------------------------

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Have a block be what a call of the model is, calls inside it included."""
        if self._one_pass.under_way:
            yield
            return
        self._call_begins()
        self._one_pass.under_way = True
        returned = False
        try:
            yield
            returned = True
        finally:
            self._one_pass.under_way = False
            self._call_ended(returned)

    def _call_begins(self) -> None:
        if self._binding.may_have_moved():
            self._binding.warn_if_moved()
        if not in_backward() and not self._one_pass.under_way:
            self._paged.begin_call()

    def _call_ended(self, returned: bool) -> None:
        if in_backward() or self._one_pass.under_way:
            return
        complete = not torch.is_grad_enabled()
        self._paged.end_call(self.memory.pager.stream(), not returned, complete)

    def _pass_ended(self, end: _core.PassEnd) -> None:
        with self._lock:
            if end.changed or end.first not in self._orders:
                self._orders[end.first] = tuple(self._paged.order(end.first))
            order = self._latest = self._orders[end.first]
            self.memory.end_pass()
            self._planning.pass_ended(order)


class _OnePass(threading.local):
    under_way = False  # in this thread


def _weakly(runner: weakref.ref[Runner], method: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:  # noqa: ANN401
        alive = runner()
        if alive is not None:
            method(alive, *arguments)

    return call
