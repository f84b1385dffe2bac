"""A cap for a part of a program, where the allocator of the process cannot be changed any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from penstock import _core
from penstock.arguments import checked
from penstock.cap import process
from penstock.cap.process import STATE
from penstock.cap.set_cap import require_cuda
from penstock.memory.pager import Pager

__all__ = ["CappedScope", "capped"]


class CappedScope:
    """The ledger of one `capped` block. Sizes in bytes."""

    def __init__(self, budget: _core.Budget) -> None:
        self._budget = budget

    @property
    def cap(self) -> int:
        """What may be held."""
        return self._budget.cap

    @property
    def used(self) -> int:
        """What torch holds of it, live or cached."""
        return self._budget.stats().used

    @property
    def peak(self) -> int:
        """The most that it held at any time."""
        return self._budget.stats().peak


@checked
@contextmanager
def capped(
    cap: int | str, *, device: str | torch.device = "cuda", page_size: int | str | None = None
) -> Iterator[CappedScope]:
    """Cap what the calling thread allocates of a GPU within a `with` block.

    For code that has used CUDA already, or shares the process with some that has; otherwise
    `set_cap` is better. A request that does not fit raises `torch.OutOfMemoryError`.

    Parameters
    ----------
    cap
        Bytes, or a text such as `"2GiB"` or `"10%"`; by frames, as torch asks for memory in pieces
        of 2 or 20 MiB and more.
    device
        `"cuda"` or `"cuda:N"`.
    page_size
        Bytes of a frame; see `Pager`.

    Raises
    ------
    DeviceError
        If there is no such GPU.
    ValueError
        If the process has a hard cap on that device, or another such block is active on it, or
        tensors of an earlier one are alive.

    Notes
    -----
    Counted is what this thread allocates; backward passes run in threads of their own and are not.
    Memory that lies in torch's cache for the block is not given back before a request is refused:
    where that might help, call `torch.cuda.empty_cache()`. Weights of managers make no room for it,
    and memory outside of torch's allocator is not counted. Tensors may outlive the block; what they
    hold goes back when they are gone and torch's cache is emptied.
    """
    if process.current_cap(device) is not None:
        raise ValueError(f"{str(device)!r} has a hard cap for the whole process already")
    require_cuda(device, "capped", "Give MemoryManager a cap instead.")
    pager = Pager(cap=cap, device=device, kind="frames", page_size=page_size)
    ordinal = pager.core_device.info().ordinal
    if ordinal in STATE.capped:
        raise ValueError("another capped() block is active on this device")
    if _core.installed_torch_allocator(ordinal) is not None:
        _uninstall(ordinal)
    _core.install_torch_allocator(ordinal, _core.CachingAllocator(pager.frames))
    STATE.capped.add(ordinal)
    pool: torch.cuda.MemPool | None = None
    try:
        if STATE.pool_allocator is None:
            STATE.pool_allocator = torch.cuda.memory.CUDAPluggableAllocator(
                _core.__file__, "penstock_pool_malloc", "penstock_pool_free"
            )
        pool = torch.cuda.MemPool(STATE.pool_allocator.allocator())
        with torch.cuda.use_mem_pool(pool, device=pager.device):
            yield CappedScope(pager.budget)
    finally:
        pool = None  # gives back what no tensor holds
        STATE.capped.discard(ordinal)
        with suppress(ValueError):  # tensors are alive, and are still to be freed there
            _uninstall(ordinal)


def _uninstall(ordinal: int) -> None:
    try:
        _core.uninstall_torch_allocator(ordinal)
    except ValueError as error:
        raise ValueError(
            "tensors of an earlier capped() block are alive on this device: free them, and call "
            "torch.cuda.empty_cache()"
        ) from error
