"""Running a model module by module: pages are fetched ahead of their use and free after it.

A step is the call of one module, and the pages of the tensors that it holds itself. Hooks begin and
end steps. Calls are watched operation by operation: what a module reads of others' tensors is a
step of its own, begun when it is read and ended with the call, so that the cap holds whatever is
read. A model that is wholly resident is watched in the first call of each entry point (the
outermost module called) only, unless it has read others' tensors. The order of steps is learned
from every call; before the first it is that of registration.

This is the small, first form of look-ahead. One model runs in one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from penstock.binding import Binding
from penstock.errors import CapExceededError
from penstock.observe import ReadObserver
from penstock.pager import Pager, Region
from penstock.sizes import format_bytes

__all__ = ["LookAhead"]

_LARGEST_BATCH = 256 << 20  # bytes in one request: unified memory moves large ranges faster


Step = int | tuple[int, ...]
"""The call of a module, by its index; or a read of others' tensors, by the pages."""


@dataclass
class _Call:
    """One call of a module that is under way."""

    module: int
    pages: list[list[int]] = field(default_factory=list)
    observer: ReadObserver | None = None


class _Hook:
    """A hook of one module. Copies and pickles of the module, on ordinary memory, have none."""

    def __init__(self, work: Callable[..., None], module: int) -> None:
        self._work = work
        self._module = module

    def __call__(self, *arguments: Any) -> None:  # noqa: ANN401
        self._work(self._module)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _get_no_hook, ()


def _no_hook(*arguments: object) -> None:
    """Stand where a hook was."""


def _get_no_hook() -> Callable[..., None]:
    return _no_hook


class LookAhead:
    """Keeps the pages of a bound model ahead of its execution.

    Parameters
    ----------
    name
        The model's, for messages.
    """

    def __init__(self, name: str, binding: Binding, pager: Pager, region: Region) -> None:
        self._name = name
        self._binding = binding
        self._pager = pager
        self._region = region
        self.unscheduled_reads = 0
        self._reads_others = False  # tensors of other modules, in some call so far
        self.passes = 0

        self._modules = [module_name for module_name, _ in binding.module.named_modules()]
        self._pages: list[set[int]] = [set() for _ in self._modules]
        self._storages: dict[int, list[int]] = {}
        ids = {id(module): i for i, module in enumerate(binding.module.modules())}
        for placement, tensor in binding.placed():
            pages = region.pages_of(placement.offset, placement.nbytes)
            self._storages[tensor.untyped_storage().data_ptr()] = pages
            for owner, _ in placement.slot.owners:
                self._pages[ids[id(owner)]].update(pages)

        self._orders: dict[int, list[Step]] = {}  # by entry point: the steps of its last call
        self._order: list[Step] = [i for i, pages in enumerate(self._pages) if pages]
        self._follow(self._order)
        self._calls: list[_Call] = []
        self._called: list[Step] = []
        self._handles = [
            handle
            for i, module in enumerate(binding.module.modules())
            for handle in (
                module.register_forward_pre_hook(_Hook(self._enter, i), prepend=True),
                module.register_forward_hook(_Hook(self._leave, i), always_call=True),
            )
        ]

    @property
    def steps(self) -> list[str]:
        """Names of the steps in the order in which they are expected."""
        return [self._modules[i] if isinstance(i, int) else f"read of {i}" for i in self._order]

    def remove(self) -> None:
        """Take the hooks off the module."""
        self.unwind()
        for handle in self._handles:
            handle.remove()

    def prefetch(self) -> None:
        """Ask for pages from the beginning of the order, as far as there is room.

        May be called while the model runs in another thread.
        """
        batch: set[int] = set()
        left = self._pager.cap
        page_size = self._region.core.page_size
        for pages in self._steps:
            batch.update(pages)
            if len(batch) * page_size >= min(self._batch, left):
                self._ask(batch)
                left -= len(batch) * page_size
                batch = set()
            if left <= 0:
                return
        self._ask(batch)

    def unwind(self) -> None:
        """End calls that an interrupt left open."""
        while self._calls:
            self._close(self._calls.pop())

    # ---- hooks ---------------------------------------------------------------------------------

    def _enter(self, index: int) -> None:
        call = _Call(index)
        self._calls.append(call)  # before what can fail: the other hook pops it in any case
        if len(self._calls) == 1:
            self._enter_outermost(index, call)
        if self._pages[index]:
            self._begin(call, index)

    def _leave(self, index: int) -> None:
        if not self._calls or self._calls[-1].module != index:
            return  # unwound meanwhile
        outermost = len(self._calls) == 1
        self._close(self._calls.pop())
        if outermost:
            self.passes += 1
            if self._called != self._orders.get(index):
                self._orders[index] = self._called
                self._follow(self._called)

    def _enter_outermost(self, index: int, call: _Call) -> None:
        self._binding.warn_if_moved()
        self._called = []
        if index not in self._orders or self._reads_others or not self._is_resident():
            call.observer = ReadObserver(self._storages, self._read)
            call.observer.__enter__()  # type: ignore[no-untyped-call]
        if self._orders.get(index, self._order) is not self._order:
            self._follow(self._orders[index])

    def _is_resident(self) -> bool:
        stats = self._pager.core.region_stats(self._region.core)
        return stats.resident_pages == self._region.core.page_count

    def _close(self, call: _Call) -> None:
        if call.observer is not None:
            call.observer.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        error: Exception | None = None
        for pages in call.pages:
            try:
                self._pager.core.end(self._region.core, pages, self._pager.stream())
            except Exception as caught:
                error = caught
        if error is not None:
            raise error

    def _read(self, pages: set[int]) -> None:
        held = {page for call in self._calls for pages in call.pages for page in pages}
        unscheduled = tuple(sorted(pages - held))
        if unscheduled:
            self._reads_others = True
            self.unscheduled_reads += unscheduled not in self._order
            self._begin(self._calls[-1], unscheduled)

    def _begin(self, call: _Call, step: Step) -> None:
        """Begin a step; it ends with the call."""
        self._called.append(step)
        self._advance(step)
        pages = self._pages_of(step)
        try:
            self._pager.core.begin(self._region.core, pages, self._pager.stream())
        except CapExceededError as error:
            name = self._modules[call.module] or type(self._binding.module).__name__
            size = format_bytes(len(pages) * self._region.core.page_size)
            raise CapExceededError(
                f"model {self._name!r}: step {name!r} reads {size} at once. {error}",
                requested=error.requested,
                cap=error.cap,
                used=error.used,
            ) from None
        call.pages.append(pages)
        self._ask_ahead(self._window)

    def _pages_of(self, step: Step) -> list[int]:
        return sorted(self._pages[step]) if isinstance(step, int) else list(step)

    # ---- order ---------------------------------------------------------------------------------

    def _follow(self, order: list[Step]) -> None:
        """Expect the steps in this order, over and over."""
        self._order = order
        page_size = self._region.core.page_size
        self._steps = [self._pages_of(step) for step in order]
        self._step_bytes = [len(pages) * page_size for pages in self._steps]
        self._bytes_before = [0, *accumulate(self._step_bytes)]
        self._window = self._pager.cap // 2
        self._batch = max(1, min(_LARGEST_BATCH, self._window // 4))
        self._position = -1  # of the step that runs
        self._asked = 0  # steps after it that were asked for
        self._pager.core.set_schedule(self._region.core, self._steps)

    def _advance(self, step: Step) -> None:
        """Move to the next place of a step in the order, if it has one."""
        count = len(self._order)
        for skipped in range(count):
            place = (self._position + 1 + skipped) % count
            if self._order[place] == step:
                self._position = place
                self._asked = max(0, self._asked - 1 - skipped)
                self._pager.core.advance(self._region.core, place)
                return

    def _ask_ahead(self, window: int) -> None:
        """Ask for the pages of the steps to come, a batch at a time, up to `window` bytes."""
        count = len(self._order)
        ahead = self._bytes_ahead()
        while self._asked < count - 1 and ahead < window:
            pages: set[int] = set()
            nbytes = 0
            while self._asked < count - 1 and nbytes < self._batch:
                self._asked += 1
                place = (self._position + self._asked) % count
                pages.update(self._steps[place])
                nbytes += self._step_bytes[place]
            ahead += nbytes
            self._ask(pages)

    def _ask(self, pages: set[int]) -> None:
        self._pager.core.prefetch_ahead(self._region.core, sorted(pages))

    def _bytes_ahead(self) -> int:
        first = self._position + 1
        wraps, end = divmod(first + self._asked, max(1, len(self._order)))
        before = self._bytes_before
        return before[end] - before[first] + wraps * before[-1]
