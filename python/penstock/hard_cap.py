"""A hard cap for the whole process: everything that torch allocates comes out of one ledger.

`set_cap` puts an allocator of Penstock's under torch, on the same frames that weights stream
through. Before it refuses a request it makes room: cached frames first, then weights of models that
nobody uses, then residents by next use, then frames of the ring down to what a step needs. Managers
made without a cap of their own share what is left.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from penstock import _core
from penstock.errors import CapExceededError, DeviceError
from penstock.pager import Pager
from penstock.sizes import format_bytes, parse_bytes
from penstock.torch_hook import hook_torch

if TYPE_CHECKING:
    from penstock.manager import MemoryManager

__all__ = ["HardCap", "current_cap", "set_cap"]

_FRAME_SIZE = 2 << 20  # small, since one live block keeps a whole frame from everybody else
_PASSES = 8  # for which memory has to be idle before weights may have it


class HardCap:
    """One device's ledger, and the allocator that draws on it.

    Parameters
    ----------
    cap
        Bytes, or a text such as `"8GiB"`.
    page_size
        Bytes of a frame; see `Pager`.
    """

    def __init__(
        self,
        cap: int | str,
        *,
        device: str | torch.device | _core.Device = "cuda",
        page_size: int | str | None = None,
    ) -> None:
        self.pager = Pager(cap=cap, device=device, kind="frames", page_size=page_size)
        granularity = self.pager.core_device.info().frame_granularity
        frame_size = min(self.pager.page_size, max(granularity, _FRAME_SIZE))
        self.allocator = _core.CachingAllocator(self.pager.frames.beside(frame_size))
        self._idle: deque[int] = deque(maxlen=_PASSES)
        self.pager.hard_cap = self
        self.managers: WeakSet[MemoryManager] = WeakSet()

    def set_cap(self, cap: int | str) -> None:
        """Change the cap, making room if need be.

        Raises
        ------
        CapExceededError
            If more is in use than that; room that was made stays made.
        """
        wanted = parse_bytes(cap)
        budget = self.pager.budget
        if budget.try_set_cap(wanted):
            return
        for manager in self.managers:
            manager.loosen()
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

    def free_idle(self) -> int:
        """Give back what no tensor has needed for some passes; called at the end of each.

        Returns
        -------
        int
            Bytes given back.
        """
        self._idle.append(self.allocator.take_idle_bytes())
        if len(self._idle) < _PASSES:
            return 0
        least = min(self._idle)
        if least < self.pager.page_size:
            return 0
        self._idle.clear()
        return self.allocator.give_back(least)

    def is_roomy(self) -> bool:
        """Whether so much is free that weights may be fixed, out of reach for tensors.

        That is a quarter of the cap, and as much as tensors have ever needed.
        """
        budget = self.pager.budget
        needed = max(budget.cap // 4, self.allocator.stats()["active_bytes.all.peak"])
        return budget.available >= needed


_caps: dict[int, HardCap] = {}  # by ordinal; the one piece of state of the process


def set_cap(
    cap: int | str, *, device: str | torch.device = "cuda", page_size: int | str | None = None
) -> None:
    """Cap what this process holds of a GPU, all that torch allocates included.

    The first call puts Penstock's allocator under torch, and has to come before torch's first use
    of CUDA. Later calls change the cap. A request that does not fit makes room by evicting weights,
    and is refused with `torch.OutOfMemoryError` where that is not enough.

    Parameters
    ----------
    cap
        Bytes, or a text such as `"8GiB"`.
    device
        `"cuda"` or `"cuda:N"`.
    page_size
        Bytes of a frame; see `Pager`. Only with the first call.

    Raises
    ------
    DeviceError
        If there is no such GPU, or torch has allocated on a GPU already.
    CapExceededError
        If the cap is lowered below what is in use.
    """
    known = current_cap(device)
    if known is not None:
        if page_size is not None and parse_bytes(page_size) != known.pager.page_size:
            raise ValueError(
                f"page_size cannot change: frames have {known.pager.page_size} bytes since the "
                "first call"
            )
        known.set_cap(cap)
        return
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        raise DeviceError(
            f"a hard cap needs a CUDA device, and {device!r} is none that torch can use here. "
            "Give MemoryManager a cap of its own instead.",
            call="set_cap",
            code=0,
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise DeviceError(
            "torch has begun to use CUDA already, so its allocator cannot be changed any more: "
            "call penstock.set_cap before anything else touches the GPU",
            call="set_cap",
            code=0,
        )
    hard_cap = HardCap(cap, device=device, page_size=page_size)
    ordinal = hard_cap.pager.core_device.info().ordinal
    hook_torch(ordinal, hard_cap.allocator)
    _caps[ordinal] = hard_cap


def current_cap(device: str | torch.device | _core.Device) -> HardCap | None:
    """Return the hard cap of a device, if one was set."""
    if not _caps:
        return None
    if isinstance(device, _core.Device):
        return next((cap for cap in _caps.values() if cap.pager.core_device is device), None)
    if device == "auto":
        device = "cuda"
    where = torch.device(device)
    if where.type != "cuda":
        return None
    index = where.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return _caps.get(index)
