"""Memory for one model, of the kind that the pager has: with its bytes in place, or empty."""

from __future__ import annotations

from penstock import _core
from penstock.loading.fill import fill
from penstock.loading.host_tiers import open_tier, require_budget
from penstock.loading.layout import Placement
from penstock.memory.frames_memory import FramesMemory
from penstock.memory.managed_memory import ManagedMemory
from penstock.memory.model_memory import ModelMemory
from penstock.memory.pager import Pager
from penstock.report.progress import Progress

__all__ = ["empty_memory", "filled_memory"]


def filled_memory(
    pager: Pager,
    nbytes: int,
    placements: list[Placement],
    *,
    host: str,
    host_budget: int | None,
    keep_cached: bool,
    writable: bool,
    verify: bool,
    progress: Progress | None,
) -> ModelMemory:
    """Make memory for tensors, and read them to their places; nothing of it is resident.

    Parameters
    ----------
    nbytes
        For all placements.
    host, host_budget
        The host tier of frames, and the bytes of host memory that it may take; see `open_tier`.
    keep_cached
        Whether what is copied from files stays in the page cache as well.
    writable
        Whether managed memory will be written to.
    verify
        Whether loads into frames are compared with their source.
    progress
        Told how far it is.

    Raises
    ------
    CapExceededError, CheckpointError, DeviceError
        As `open_tier` and `fill` do.
    """
    if not pager.divides:
        region = pager.reserve(nbytes, writable=writable)
        fill(region, placements, progress, keep_cached=keep_cached)
        return ManagedMemory(pager, region)
    tier = open_tier(
        host,
        pager,
        nbytes,
        placements,
        budget=host_budget,
        progress=progress,
        keep_cached=keep_cached,
    )
    return _frames(pager, tier, verify)


def empty_memory(
    pager: Pager, nbytes: int, *, host_budget: int | None, verify: bool
) -> ModelMemory:
    """Make memory to which the tensors of a loaded module are written (`ModelMemory.write`).

    Raises
    ------
    CapExceededError
        If it is more host memory than the budget has.
    DeviceError
        If there is no room for it.
    """
    if not pager.divides:
        return ManagedMemory(pager, pager.reserve(nbytes, writable=False))
    remedy = "register the model with its checkpoint, which can be streamed"
    require_budget(nbytes, host_budget, "a loaded module, pinned,", remedy)
    return _frames(pager, pager.empty_tier(nbytes), verify)


def _frames(pager: Pager, tier: _core.HostTier, verify: bool) -> FramesMemory:
    memory = FramesMemory(pager, tier)
    memory.region_core.set_verify(verify)
    return memory
