"""Running a bound model step by step: what happens when its modules are called.

The first pass of an entry point is observed operation by operation: a dispatch mode sees which
tensors are really read, whoever reads them, and their pages are made ready just then. From it each
module's step is learned (`learning`). In later passes hooks begin a step when its module is called,
and open the tensors that it reads; whatever is read beside goes through the guard, and is a step of
its own from then on. After a pass the plan is improved (`planning`). What stays is held in place
(`in_place`): a model that is there as a whole runs freely and has no hooks but on its entry points;
where a part streams, by a settled plan, only the modules that read it have hooks. Tensors under
the same cap can have what is held at any time (`giving`).

One model runs in one thread at a time; others wait for their turn. An interrupt (anything that is
no `Exception`) ends calls without a word of it: those are ended by whoever comes next.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import nn

from penstock.binding import Binding
from penstock.errors import CapExceededError, ScheduleError
from penstock.giving import Giving
from penstock.guard import Entry, Guard
from penstock.hooks import Hooks
from penstock.in_place import InPlace, choose
from penstock.learning import learn, whole_subtrees
from penstock.memory import FramesMemory, ModelMemory
from penstock.observe import ReadObserver
from penstock.planning import Planning, too_large
from penstock.steps import Order, Place, Steps
from penstock.turns import Turn, Turns, is_over
from penstock.under_way import calls_under_way, frame_of_thread

__all__ = ["Runner"]


class _Call:
    """One call of a module that is under way."""

    __slots__ = ("begun", "entries", "frame", "module", "outer", "parent", "read")

    def __init__(self, module: int, parent: _Call | None, frame: FrameType) -> None:
        self.module = module
        self.parent = parent
        self.frame = frame  # of the function that calls the module's hooks and its forward
        # The steps of the calls around it.
        self.outer: tuple[int, ...] = (*parent.outer, *parent.begun) if parent else ()
        self.begun: list[int] = []  # steps
        self.entries: Sequence[Entry] = ()  # opened
        self.read: set[int] = set()  # tensors, if observed


class Runner:
    """Runs a bound model on its memory.

    Parameters
    ----------
    name
        The model's, for messages.
    memory
        Where the model's tensors are; an attribute, too.
    trace
        Whether times are taken of every step and load.
    turns
        Those of the models beside which it runs.
    """

    def __init__(
        self,
        name: str,
        binding: Binding,
        memory: ModelMemory,
        *,
        trace: bool = False,
        turns: Turns | None = None,
    ) -> None:
        self._name = name
        self._binding = binding
        self.memory = memory
        self.before_call: Callable[[], None] | None = None  # of calls from outside
        self._streamer = memory.streamer
        self._stream = memory.pager.stream
        self._capturing = False

        self._modules = list(binding.module.modules())
        ids = {id(module): i for i, module in enumerate(self._modules)}
        self._module_ids = ids
        held: list[set[int]] = [set() for _ in self._modules]
        self._guard = Guard(self)
        self._step_entries: list[list[Entry]] = [[] for _ in self._modules]
        self._entries: list[Entry] = []
        self._by_address: dict[int, list[int]] = {}
        for index, (placement, tensor) in enumerate(binding.placed()):
            pages = memory.region.pages_of(placement.offset, placement.nbytes)
            address = tensor.untyped_storage().data_ptr()
            entry = self._guard.add(tensor, placement.offset, placement.nbytes, pages)
            self._entries.append(entry)
            self._by_address[address] = [index]
            for owner, _ in placement.slot.owners:
                held[ids[id(owner)]].add(index)
        self._index = {id(entry): i for i, entry in enumerate(self._entries)}
        names = [module_name for module_name, _ in binding.module.named_modules()]
        own = [frozenset(each) for each in held]
        self._usual_whole = whole_subtrees(self._modules, own)
        self._held_whole: set[int] = set()
        self._steps = Steps(
            names,
            own,
            dict(self._usual_whole),
            [entry.pages for entry in self._entries],
        )
        for step in range(len(self._modules)):
            self._define(step)

        holders = [i for i, tensors in enumerate(own) if tensors]
        self._orders: dict[int, Order] = {}  # by entry point
        self._followed = Order(tuple((i, ()) for i in holders))
        self._follow(self._followed)
        self._planning = Planning(name, self._steps, memory, trace=trace)
        self._tracing = trace
        self._streamer.set_trace(trace)
        self._in_pass = False
        self._error_before: BaseException | None = None
        self._calls: list[_Call] = []
        self.turn = Turn(turns or Turns(), name)
        self._unwinding = False
        self.gate = threading.RLock()  # while a pass begins or ends, and while others plan
        self._streams: dict[int, None] = {}  # of calls since something is in place; the last last
        self._thread: threading.Thread | None = None  # of the latest pass
        self._plan_later = False
        self._called: list[Place] = []
        self._observer: ReadObserver | None = None
        self._observed: list[_Call] = []
        self._saving: AbstractContextManager[Any] | None = None
        self._loaded_before = 0
        self._in_place: InPlace | None = None
        self._declined: Order | None = None  # of which a part is not to be held in place
        self._by_steps = False  # for good
        self._changed = False  # in the midst of a pass, back to steps
        self._hooks = Hooks(self._modules, holders)
        self._hook_all()
        self._giving = Giving(self, _HOOKS)

    # ---- what others may ask -------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The model's."""
        return self._name

    @property
    def steps(self) -> list[str]:
        """Names of the steps in the order in which they are expected."""
        return [self._steps.name(step) for step in self._expected.steps]

    def step_name(self, step: int) -> str:
        """Name a step for people."""
        return self._steps.name(step)

    def least_frames(self) -> int:
        """Return the fewest pages that have to be in place at once."""
        return self._planning.least_frames(self._expected)

    @property
    def _expected(self) -> Order:
        """The order of all steps."""
        return self._in_place.order if self._in_place else self._followed

    @property
    def _free(self) -> bool:
        """Whether all is in place, and nothing to do in steps."""
        return self._in_place is not None and self._in_place.whole

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._binding.module

    @property
    def settled(self) -> bool:
        """Whether the plan is final for the order that is followed."""
        return self._free or self._planning.settled(self._expected)

    def stay_by_steps(self) -> None:
        """Hold nothing in place from now on: a graph needs its pages idle."""
        self._by_steps = True
        self.attach()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Let the next pass be captured in a graph, with all it loads."""
        self._capturing = True
        self._streamer.set_capturing(True)
        try:
            yield
        finally:
            self._capturing = False
            self._streamer.set_capturing(False)

    @contextmanager
    def resting(self) -> Iterator[bool]:
        """Have calls wait until the block ends; say whether none is under way."""
        self.unwind()
        with self.gate:
            yield not self._calls

    @property
    def runs_elsewhere(self) -> bool:
        """Whether a call is under way in another thread."""
        return bool(self._calls) and not self.turn.mine

    def plan_later(self) -> None:
        """Plan anew when the pass that is under way ends."""
        self._plan_later = True

    def give_way(self) -> bool:
        """Have a pass that is under way hold no more frames than the model may.

        What its present step does not use goes; what comes later is loaded when it is needed. The
        pass that follows is planned for.

        Returns
        -------
        bool
            Whether it does. It cannot where it reads what is held in place in another thread, at
            any time, and while it is captured.
        """
        assert isinstance(self.memory, FramesMemory)
        with self.gate:
            if self.memory.frames_held <= self.memory.frames:
                return True
            if self._capturing:
                return False
            if self._in_place and not self.turn.mine:
                return False
            self._go_by_steps_here()
            self._plan_later = True
            self.memory.give_up(self.memory.frames_held - self.memory.frames, self._last_first())
            return self.memory.frames_held <= self.memory.frames

    # ---- for who needs what is held in place ---------------------------------------------------

    @property
    def holds(self) -> bool:
        """Whether anything is held in place."""
        return self._in_place is not None

    @property
    def captures(self) -> bool:
        """Whether a graph is being captured."""
        return self._capturing

    @property
    def is_called(self) -> bool:
        """Whether a call is under way."""
        return bool(self._calls)

    def stop_holding(self, frame: FrameType | None) -> bool:
        """Go back to running step by step, for a tensor that is about to be made.

        Parameters
        ----------
        frame
            What this thread runs.

        Returns
        -------
        bool
            Whether it does; it cannot where calls are not found among the frames.
        """
        if not self._calls:
            self._go_by_steps(while_read=True)
            return True
        thread = self.turn.holder
        if thread == threading.get_ident() or thread is None:
            return self._go_by_steps_at(frame)
        own = self._stream
        last = next(reversed(self._streams), own())
        self._stream = lambda: last
        try:
            return self._go_by_steps_at(frame_of_thread(thread))
        finally:
            self._stream = own

    # ---- back to steps -------------------------------------------------------------------------

    def _go_by_steps_here(self) -> None:
        """Go back to running step by step within a call in this thread, if anything is in place."""
        if self._in_place and not self._go_by_steps_at(sys._getframe()):
            self._go_by_steps()  # what is being called reads guarded tensors

    def _go_by_steps_at(self, frame: FrameType | None) -> bool:
        """Go back to running step by step within a call; what is being called has its steps.

        Parameters
        ----------
        frame
            The innermost of the thread that calls.

        Returns
        -------
        bool
            Whether it does; it cannot where calls are not found among the frames.
        """
        self._hook_all()  # first, so that no module is called unnoticed from now on
        told = {call.frame: call for call in self._calls}
        calls: list[_Call] = []
        for index, called in calls_under_way(frame, self._module_ids):
            call = told.pop(called, None) or _Call(index, None, called)
            call.parent = calls[-1] if calls else None
            calls.append(call)
        if told:
            self._hook_left()
            return False
        self._calls = calls
        for call in calls:
            entries = self._step_entries[call.module]
            if not call.begun and entries:
                self._streamer.begin(call.module, self._stream())  # its pages are in place
                call.begun.append(call.module)
                call.entries = entries
                self._guard.open(entries)
        self._go_by_steps(while_read=True)
        return True

    def go_by_steps(self) -> bool:
        """Go back to running step by step, from within a call if that is in this thread.

        Returns
        -------
        bool
            Whether it does; it cannot where it runs freely in another thread.
        """
        with self.resting() as resting:
            if self._in_place and resting:
                self._go_by_steps()
            elif self.turn.mine:
                self._go_by_steps_here()
            return self._in_place is None

    def give_up(self, pages: int) -> None:
        """Give up so many pages, if the model is idle: those first that it reads last.

        Parameters
        ----------
        pages
            At least; where several share a frame, they go together.
        """
        with self.resting() as resting:
            if resting:
                self.attach()
                self._guard.release_kept()
                self.memory.give_up(pages, self._last_first())

    def _last_first(self) -> list[int]:
        """List all pages, in the reverse order of the expected pass."""
        read = [page for pages in self._steps.pages_in_use(self._expected) for page in pages]
        return list(dict.fromkeys((*read, *self.memory.all_pages)))[::-1]

    def schedule(self) -> list[tuple[str, list[str], list[int]]]:
        """List the steps to come: name, names of the tensors read, pages in use."""
        names = [placement.slot.names[0] for placement, _ in self._binding.placed()]
        return [
            (self._steps.name(step), sorted(names[i] for i in self._steps.tensors(step)), pages)
            for (step, _), pages in zip(
                self._expected.places, self._steps.pages_in_use(self._expected), strict=True
            )
        ]

    def plan(self) -> None:
        """Plan anew for the order that is followed, before the next pass.

        Raises
        ------
        CapExceededError
            If a step cannot run in what the model may use.
        ScheduleError
            If a call is under way.
        """
        self._plan_later = False
        self.attach()
        self._declined = None
        self._planning.renew(self._followed, guess=not self._orders)

    def prefetch(self) -> None:
        """Load from the beginning of the order on, as far as there is room."""
        self._streamer.prefetch()

    def evict(self) -> None:
        """Give up all that is in place and not in use; the next call loads it again.

        A model that runs freely just now keeps what it has.
        """
        with self.resting() as resting:
            if not resting and self._in_place:
                return
            try:
                self.attach()
            finally:  # what was written may be lost, not the room
                self._guard.release_kept()
                self.memory.evict()

    def unwind(self) -> None:
        """End calls that an interrupt left open, also where that was in another thread."""
        if self.turn.seize(sys._getframe()):
            try:
                self.end_interrupted()
            finally:
                self.turn.give_back()

    def end_interrupted(self) -> None:
        """End calls that an interrupt left open, the inner ones first; by who has the turn."""
        self._unwinding = True
        try:
            while self._calls and is_over(self._calls[-1].frame):
                self._end_last()
        finally:
            self._unwinding = False

    def attach(self) -> None:
        """Go back to running step by step, if anything is held in place."""
        if self._in_place is None:
            return
        if self._calls:
            raise ScheduleError(f"model {self._name!r} is running; wait until its call has ended")
        self._go_by_steps()

    def _go_by_steps(self, *, while_read: bool = False) -> None:
        # Modules that are being called may go on: what they read from now on is guarded.
        self._guard.look_for_moved()
        held, self._in_place = self._in_place, None
        assert held is not None
        # Whatever fails: the pages are in use no more, so from now on there are steps.
        try:
            self._guard.close(held.entries, training=True, unhooked=True, while_read=while_read)
        finally:
            try:
                self._end_use(held.pages)
            finally:
                self._hook_all()
                self._changed = bool(self._calls)
                if self._followed is not held.order:
                    self._follow(held.order)

    def _end_use(self, pages: list[int]) -> None:
        """Let go of pages once all work so far that was given to any stream has run."""
        core = self.memory.region.core
        last = self._stream()
        for stream in self._streams:
            if stream != last:
                core.begin(pages, stream)
                core.end(pages, stream)
        self._streams.clear()
        core.end(pages, last)

    def hold_whole(self, module: nn.Module, whole: bool) -> None:
        """Have a module's step hold all tensors in it, from its call on; or as it was learned.

        Passes are observed anew. Without a meaning once the model is detached.

        Raises
        ------
        ScheduleError
            If a call is under way.
        """
        with self.resting() as resting:
            if self._guard.removed:
                return
            if not resting:
                raise ScheduleError(
                    f"model {self._name!r} is being called: its kernels can change when the call "
                    "has ended"
                )
            self.attach()
            ids = {id(each): i for i, each in enumerate(self._modules)}
            index = ids[id(module)]
            held = (self._steps.own[ids[id(part)]] for part in module.modules())
            tensors = frozenset[int]().union(*held)
            (self._held_whole.add if whole else self._held_whole.discard)(index)
            usual = self._usual_whole.get(index)
            self._steps.hold_whole(index, tensors if whole else usual)
            self._define(index)
            self._orders.clear()
            self._planning.forget()
            steps = (i for i in range(len(self._modules)) if self._steps.tensors(i))
            self._follow(Order(tuple((i, ()) for i in steps)))

    def detach(self, *, readable: bool) -> None:
        """Take the hooks and guards off the module, for good.

        Parameters
        ----------
        readable
            Whether the memory can be read without them; else reading it is an error from now on.
        """
        self.unwind()
        self.attach()
        self._hooks.remove()
        self._guard.remove(self._name, readable=readable)

    # ---- access, for the guard -----------------------------------------------------------------

    def begin_read(self, entries: Sequence[Entry]) -> object:
        """Make the pages of tensors ready that are read outside of steps."""
        if self._giving.under_way:
            self._giving.wait()
        pages = sorted({page for entry in entries for page in entry.pages})
        if not self._in_pass or self._observer is not None or not self.turn.mine:
            try:
                self._streamer.begin_pages(pages, self._stream())
            except CapExceededError:
                if self._calls or self.before_call is None:
                    raise
                self.before_call()  # nobody has acquired it
                self._streamer.begin_pages(pages, self._stream())
            return pages
        # Inside a pass it is a step of its own from now on, so that it is expected next time.
        call = self._calls[-1]
        step = self._read_step({self._index[id(entry)] for entry in entries})
        self._begin_step(call, step)
        call.begun.remove(step)
        return step

    def end_read(self, begun: object) -> None:
        """Let go of them."""
        if isinstance(begun, int):
            self._streamer.end(begun, self._stream())
        else:
            assert isinstance(begun, list)
            self._streamer.end_pages(begun, self._stream())

    def hold(self, pages: Sequence[int]) -> None:
        """Keep pages in place."""
        self._streamer.begin_pages(pages, self._stream())

    def let_go(self, pages: Sequence[int]) -> None:
        """Take one `hold` back."""
        self._streamer.end_pages(pages, self._stream())

    def write_back(self, offset: int, nbytes: int) -> None:
        """Keep what was written to a tensor in use."""
        self.memory.write_back(offset, nbytes, self._stream())

    def host_copy(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as they are kept on the host."""
        return self.memory.host_copy(offset, nbytes)

    # ---- hooks ---------------------------------------------------------------------------------

    def _hook(self, modules: Iterable[int]) -> None:
        self._hooks.tell_of(modules, self._enter, self._leave)

    def _hook_all(self) -> None:
        self._hook(range(len(self._modules)))

    def _hook_left(self) -> None:
        """Have hooks where steps are left beside what is held in place."""
        assert self._in_place is not None
        left = (step for step in self._in_place.rest.all_steps if self._steps.is_module(step))
        self._hook({0, *self._orders, *left})

    def _enter(self, index: int) -> None:
        if self._giving.under_way:
            self._giving.wait()
        frame = _frame_of_call(sys._getframe(2))
        calls = self._calls
        if not self._inside_call():
            if self.before_call is not None:
                self.before_call()
            if self.turn.mine or self.turn.take(frame):
                self.end_interrupted()
        call = _Call(index, calls[-1] if calls else None, frame)
        # Before what can fail: the other hook pops it in any case.
        if calls:
            calls.append(call)
        else:
            with self.gate:
                calls.append(call)
                self._thread = threading.current_thread()
            stream = self._stream()
            self._streams.pop(stream, None)
            self._streams[stream] = None
            if self._in_place and not self._may_hold():
                self._go_by_steps()
        if self._free:
            return
        if call.parent is None:
            self._begin_pass(index)
        if self._observer is not None:
            self._observed.append(call)
            if index in self._held_whole:
                self._begin_step(call, index)
        elif self._step_entries[index]:
            self._begin_step(call, index)
            call.entries = self._step_entries[index]
            self._guard.open(call.entries)

    def _inside_call(self) -> bool:
        """Whether this is inside the call that began last: then nobody takes over its turn."""
        last = self._calls[-1:]
        # In this order: where the turn is this thread's afterwards, so was the call.
        return (
            bool(last) and not is_over(last[0].frame) and self.turn.holder == threading.get_ident()
        )

    def _leave(self, index: int) -> None:
        if self._giving.under_way:
            self._giving.wait()
        calls = self._calls
        if not self._inside_call() and not self.turn.mine:
            return  # it never began, or was ended meanwhile
        if calls and calls[-1].module != index and is_over(calls[-1].frame):
            self.end_interrupted()
        if not calls or calls[-1].module != index:
            return
        outermost = len(calls) == 1
        try:
            self._end_last()
        finally:
            if outermost:
                self.turn.give_back()

    def _end_last(self) -> None:
        """End the call that began last, and with the outermost one, the pass."""
        if len(self._calls) > 1:
            self._end_call()
            return
        with self.gate:
            try:
                self._end_call()
            finally:
                if self._in_place and not self._may_hold():
                    self.attach()
                if self._plan_later or self.memory.settle():
                    with suppress(CapExceededError):
                        self.plan()

    def _end_call(self) -> None:
        calls = self._calls
        call = calls[-1]
        index = call.module
        if self._free:
            calls.pop()
            return
        try:
            if self._observer is not None:
                read = [self._entries[i] for i in call.read]
                self._guard.settle(read, training=self._modules[index].training)
            elif call.entries:
                self._guard.close(call.entries, training=self._modules[index].training)
        finally:
            calls.pop()
            try:
                self._end_steps(call)
            finally:
                if not calls:
                    self._end_pass(index)

    def _begin_step(self, call: _Call, step: int) -> None:
        self._called.append((step, (*call.outer, *call.begun)))
        try:
            self._streamer.begin(step, self._stream())
        except CapExceededError as error:
            nbytes = len(self._steps.pages(step)) * self.memory.pager.page_size
            raise too_large(self._name, self._steps.name(call.module), nbytes, error) from None
        call.begun.append(step)

    def _end_steps(self, call: _Call) -> None:
        error: Exception | None = None
        for step in reversed(call.begun):
            try:
                self._streamer.end(step, self._stream())
            except Exception as caught:
                error = caught
        if error is not None:
            raise error

    # ---- passes --------------------------------------------------------------------------------

    def _begin_pass(self, entry: int) -> None:
        order = self._orders.get(entry)
        if self._in_place:
            if order is self._in_place.order and not self._guard.lost:
                order = self._followed
            else:
                self._go_by_steps()
        self._changed = False
        if self._guard.lost or order is None:
            self._binding.warn_if_moved()
        if not self._capturing and self.memory.pager.capturing():
            raise ScheduleError(
                f"model {self._name!r} streams, so a graph of it is captured by "
                "MemoryManager.capture, which has its copies captured too"
            )
        self._guard.release_kept()
        self._called = []
        self._observed = []
        if order is not None and order is not self._followed:
            self._follow(order)
        self._error_before = sys.exc_info()[1]
        self._streamer.begin_pass(self._stream())
        self._in_pass = True
        self._loaded_before = self._streamer.stats().loaded_bytes
        self._saving = self._guard.saving()
        self._saving.__enter__()
        if order is None:
            self._guard.open(self._entries)
            self._observer = ReadObserver(self._by_address, self._read)
            self._observer.__enter__()  # type: ignore[no-untyped-call]

    def _end_pass(self, entry: int) -> None:
        if not self._in_pass:
            return  # it failed to begin
        self._in_pass = False
        failed = self._unwinding or sys.exc_info()[1] is not self._error_before
        observed = self._observer is not None
        own = self._thread is threading.current_thread()  # whose modes they are
        if self._observer is not None:
            if own:
                self._observer.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._observer.stop()
            self._observer = None
            self._guard.close(self._entries)
        if self._saving is not None:
            if own:
                self._saving.__exit__(None, None, None)
            self._saving = None
        if self._in_place:
            steady = self._followed.places == tuple(self._called)
            if not steady and not failed:
                self._declined = self._in_place.order
                self._go_by_steps()
                self._changed = True
        elif not failed and not self._changed:
            if observed:
                self._learn()
            known = self._orders.get(entry)
            steady = observed or (known is not None and known.places == tuple(self._called))
            if known is None or not steady:
                self._orders[entry] = Order(tuple(self._called))
                self._follow(self._orders[entry])
        self.memory.end_pass()
        self._streamer.end_pass(self._stream())
        if failed or self._capturing or self._changed:
            return
        if steady and self.settled and not self.memory.fits():
            self._plan_later |= self._planning.correct_times(self._expected)
        if self._in_place:
            return
        self._planning.improve(self._followed, steady=steady)
        if self.memory.fits():
            ready = self._streamer.stats().loaded_bytes == self._loaded_before
        else:
            ready = steady and not self._tracing and self._planning.settled(self._followed)
        if ready and not self._by_steps:
            self._hold_in_place()

    def _hold_in_place(self) -> None:
        """Hold what stays, until something else is wanted of it; then only the rest has steps."""
        core = self.memory.region.core
        pages = self.memory.staying() if self._may_hold() else []
        if not pages or not core.settled(pages):
            return
        order = self._followed
        held = choose(
            self._steps, order, self._entries, pages, keeps_writes=self.memory.keeps_writes
        )
        if not self.memory.fits() and not self._worth_holding(held):
            self._declined = order
            return
        stream = self._stream()
        core.begin(pages, stream)
        self._streams = {stream: None}
        self._guard.open(held.entries)
        self._streamer.set_trace(self._tracing)
        self._in_place = held
        self._hook_left()
        if not held.whole:
            self._follow(held.rest)

    def _may_hold(self) -> bool:
        """Whether what stays may be held in place beside tensors that need memory.

        They have it given up (`giving`); where gradients are taken, too many hold the weights to
        know which are read just then, so there has to be memory enough.
        """
        if not torch.is_grad_enabled() or self.memory.roomy():
            return True
        return not any(entry.tensor.requires_grad for entry in self._entries)

    def _worth_holding(self, held: InPlace) -> bool:
        assert isinstance(self.memory, FramesMemory)
        if held.order is self._declined:
            return False
        room = self.memory.frames_held - len(held.pages)
        fewer = len(held.rest.all_steps) < len(held.order.all_steps)
        return fewer and held.leaves_room(self._steps, self._orders.values(), room)

    # ---- learning ------------------------------------------------------------------------------

    def _read(self, read: set[int]) -> None:
        """Note what an operation of an observed pass is about to read, and make it ready."""
        call = self._calls[-1]
        call.read |= read
        held = {i for each in self._calls for step in each.begun for i in self._steps.tensors(step)}
        missing = read - held
        if not missing:
            return
        if not call.begun and missing <= self._steps.tensors(call.module):
            self._begin_step(call, call.module)
        else:
            self._begin_step(call, self._read_step(missing))

    def _learn(self) -> None:
        observed, self._observed = self._observed, []
        order, changed = learn(
            self._steps, observed, self.memory.most_pages, self.memory.parts.pinned
        )
        for step in changed:
            self._define(step)
        self._called = list(order.places)

    def _read_step(self, tensors: set[int]) -> int:
        step, new = self._steps.read_step(tensors)
        if new:
            self._define(step)
        return step

    def _define(self, step: int) -> None:
        self._streamer.define(step, self._steps.pages(step), self._steps.name(step))
        if self._steps.is_module(step):
            self._step_entries[step] = [self._entries[i] for i in sorted(self._steps.tensors(step))]

    def _follow(self, order: Order) -> None:
        self._followed = order
        self._streamer.follow(order.steps, self._steps.pages_in_use(order))


_HOOKS = (Runner._enter.__code__, Runner._leave.__code__)


def _frame_of_call(frame: FrameType) -> FrameType:
    """Return the frame of torch's that lasts as long as a call, its hooks after errors included."""
    if frame.f_code.co_name == "inner" and frame.f_back is not None:
        return frame.f_back
    return frame
