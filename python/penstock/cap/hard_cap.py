"""A hard cap for the whole process: everything that torch allocates comes out of one ledger.

`set_cap` puts an allocator of Penstock's under torch, on the same frames that weights stream
through. Before it refuses a request it makes room: cached frames first, then weights of models that
nobody uses, then residents by next use, then frames of the ring down to what a step needs. What
large requests still lack they can have of the host, if that was chosen. Managers made without a cap
of their own share what is left. What the process holds beyond the ledger (the CUDA context,
kernels, libraries that ask the driver themselves) is watched and charged as well.
"""

from __future__ import annotations

import os
from collections import deque
from datetime import timedelta
from typing import Literal
from weakref import WeakMethod, finalize

import torch

from penstock import _core
from penstock.errors import CapExceededError, DeviceError
from penstock.memory.hard_cap_view import ModelFigures
from penstock.memory.pager import Pager
from penstock.report.stats import ModelStats
from penstock.sizes import format_bytes, parse_bytes, parse_cap

__all__ = ["HardCap", "Overflow"]

Overflow = Literal["refuse", "managed"]

_FRAME_SIZE = 2 << 20  # small, since one live block keeps a whole frame from everybody else
_PASSES = 8  # for which memory has to be idle before weights may have it
_RESERVE = 128 << 20  # bytes for what grows outside of the ledger between two looks
_LEAST_PART = 48  # of the cap: one in so many is the reserve where that is less
_LOOK = timedelta(seconds=10)  # the longest to wait for a look
_OVERFLOW_PART = 4  # of the host's memory: one in so many is what tensors may take of it


class HardCap:
    """One device's ledger, and the allocator that draws on it.

    Parameters
    ----------
    cap
        Bytes, or a text such as `"8GiB"`, or `"60%"` of the device's memory.
    page_size
        Bytes of a frame; see `Pager`.
    reserve
        Bytes to charge beyond what the process holds outside of the ledger; see `set_cap`.

    Raises
    ------
    CapExceededError
        If what the process holds already and the reserve do not fit.
    """

    def __init__(
        self,
        cap: int | str,
        *,
        device: str | torch.device | _core.Device = "cuda",
        page_size: int | str | None = None,
        reserve: int | str | None = None,
    ) -> None:
        self.pager = Pager(cap=cap, device=device, kind="frames", page_size=page_size)
        self._wanted = self.pager.cap  # by the user; a fraction of the memory may be less
        granularity = self.pager.core_device.info().frame_granularity
        frame_size = min(self.pager.page_size, max(granularity, _FRAME_SIZE))
        self.allocator = _core.CachingAllocator(self.pager.frames.beside(frame_size))
        free = self.pager.core_device.memory_info().free_bytes
        self._default_overflow = min(_host_bytes() // _OVERFLOW_PART, free // 2)
        self.watch = self._watch_outside(reserve)
        self._idle: deque[int] = deque(maxlen=_PASSES)
        self._models: list[WeakMethod[ModelFigures]] = []  # of managers
        self.pager.put_under(self)
        _ = self.pager.link_rate  # measured now, while there is room for that

    def _watch_outside(self, reserve: int | str | None) -> _core.OutsideWatch | None:
        if self.pager.core_device.process_memory() is None:
            return None
        nbytes = min(_RESERVE, self.pager.cap // _LEAST_PART)
        if reserve is not None:
            nbytes = _parse_reserve(reserve)
        watch = _core.OutsideWatch(self.pager.frames, nbytes)
        finalize(self, watch.stop)  # at the latest when the interpreter ends
        return watch

    def set_overflow(self, overflow: Overflow, limit: int | str | None = None) -> None:
        """Say what happens to a large request for which no room can be made; see `set_cap`.

        Raises
        ------
        ValueError
            If `overflow` is none of the choices, or a limit is given for none.
        DeviceError
            If the device has no managed memory that host and device can use at the same time.
        """
        if overflow not in ("refuse", "managed"):
            raise ValueError(f'overflow is "refuse" or "managed", not {overflow!r}')
        if overflow == "refuse":
            if limit is not None:
                raise ValueError('overflow_limit goes with overflow="managed"')
            self.allocator.set_overflow_limit(0)
            return
        reason = self.pager.core_device.info().no_managed_reason
        if reason:
            raise DeviceError(f"tensors cannot overflow here: {reason}", call="set_cap", code=0)
        nbytes = self._default_overflow if limit is None else parse_bytes(limit)
        self.allocator.set_overflow_limit(nbytes)

    def set_reserve(self, reserve: int | str) -> None:
        """Change what is charged beyond what the process holds outside of the ledger."""
        if self.watch is not None:
            self.watch.set_reserve(_parse_reserve(reserve))
            self.watch.look(_LOOK)

    def count_page_tables(self) -> bool:
        """Charge the tables of pinned memory, where they are seen as memory outside of the ledger.

        Returns
        -------
        bool
            Whether they are; if not, they have to be charged by themselves.

        Raises
        ------
        CapExceededError
            If they do not fit.
        """
        if self.watch is None or not self.watch.stats().whole_device:
            return False
        self.watch.look(_LOOK)
        outside = self.watch.stats()
        if outside.charged < outside.held:
            ledger = self.pager.budget.stats()
            raise CapExceededError(
                f"{format_bytes(outside.held)} are held outside of the ledger, tables of pinned "
                f"memory included, and only {format_bytes(outside.charged)} of that fit under the "
                f"cap of {format_bytes(ledger.cap)}. Raise the cap, or give the model another "
                'host tier than "pinned".',
                requested=outside.held - outside.charged,
                cap=ledger.cap,
                used=ledger.used,
            )
        return True

    def set_cap(self, cap: int | str) -> None:
        """Change the cap, making room if need be.

        Raises
        ------
        CapExceededError
            If more is in use than that; room that was made stays made.
        """
        wanted = parse_cap(cap, self.pager.core_device.info().total_bytes)
        self._change(wanted)
        self._wanted = wanted

    @property
    def fraction(self) -> float:
        """The cap as a part of the device's memory."""
        return self.pager.cap / self.pager.core_device.info().total_bytes

    def limit_to(self, fraction: float) -> None:
        """Lower the cap to a part of the device's memory, or raise it again as far as it was set.

        Raises
        ------
        CapExceededError
            If more is in use than that; room that was made stays made.
        """
        total = self.pager.core_device.info().total_bytes
        self._change(min(self._wanted, int(total * fraction)))

    def _change(self, wanted: int) -> None:
        budget = self.pager.budget
        if budget.try_set_cap(wanted):
            return
        self.pager.frames.make_room(budget.cap - wanted)
        if not budget.try_set_cap(wanted):
            used = budget.stats().used
            raise CapExceededError(
                f"cannot lower the cap to {format_bytes(wanted)}: {format_bytes(used)} are in use, "
                "and no room can be made. Free tensors or release models first.",
                requested=wanted,
                cap=budget.cap,
                used=used,
            )

    def add_models(self, figures: ModelFigures) -> None:
        """Show the models of a manager among the figures, for as long as the manager lives.

        Parameters
        ----------
        figures
            A method of the manager, which is not kept alive by this.
        """
        self._models = [each for each in self._models if each() is not None]
        self._models.append(WeakMethod(figures))

    def models(self) -> dict[str, ModelStats]:
        """Return the figures of the models of all managers that share the cap, by name."""
        found: dict[str, ModelStats] = {}
        for each in list(self._models):
            figures = each()
            for name, model in (figures() if figures is not None else {}).items():
                found[name if name not in found else f"{name} ({len(found)})"] = model
        return found

    def free_cached(self, nbytes: int) -> int:
        """Free frames that the allocator caches.

        Parameters
        ----------
        nbytes
            How many bytes, at most.

        Returns
        -------
        int
            Bytes freed.
        """
        return self.allocator.give_back(nbytes)

    def free_idle(self) -> int:
        """Free what no tensor has needed for some passes; called at the end of each.

        Returns
        -------
        int
            Bytes freed.
        """
        self._idle.append(self.allocator.take_idle_bytes())
        if len(self._idle) < _PASSES:
            return 0
        least = min(self._idle)
        if least < self.pager.page_size:
            return 0
        self._idle.clear()
        return self.allocator.give_back(least)


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _parse_reserve(reserve: int | str) -> int:
    return 0 if reserve == 0 else parse_bytes(reserve)
