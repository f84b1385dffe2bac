"""Where weights wait on the host before they stream: choosing a tier, and filling it."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path

from penstock import _core
from penstock.errors import CapExceededError, DeviceError
from penstock.loading.fill import direct_extents, require_as_listed, wait, write_rest
from penstock.loading.layout import Placement
from penstock.memory.pager import Pager
from penstock.report.progress import Progress
from penstock.sizes import format_bytes

__all__ = [
    "HOST_TIERS",
    "available_host_bytes",
    "choose_tier",
    "open_tier",
    "pager_with",
    "require_budget",
    "ring_bytes",
]

HOST_TIERS = ("auto", "pinned", "mapped", "stream")

_log = logging.getLogger("penstock")

_SPARE = 0.8  # of the memory that is free, for pinning without being told
_RING = 2 << 30  # bytes of pinned buffers where no budget is given
_LEAST_RING = 4  # pages: one is copied, one waits for that, two are read
_MAP_LIMIT = timedelta(seconds=30)


def pager_with(pager: str, host: str, host_budget: object) -> str:
    """Return the kind of pager that goes with what is said of the host, which is for frames alone.

    Raises
    ------
    ValueError
        If it is managed memory, which has a place of its own.
    """
    if host == "auto" and host_budget is None:
        return pager
    if pager == "managed":
        said = f"host={host!r}" if host != "auto" else "host_budget"
        raise ValueError(
            f"{said} is for frames: managed memory waits where the driver or the operating system "
            'keeps it. Leave it out, or use pager="frames"'
        )
    return "frames" if pager == "auto" else pager


def open_tier(
    kind: str,
    pager: Pager,
    nbytes: int,
    placements: list[Placement],
    *,
    budget: int | None,
    progress: Progress | None = None,
    keep_cached: bool = False,
) -> _core.HostTier:
    """Make a host tier for a model's tensors, and wait until they can stream.

    Parameters
    ----------
    kind
        `"pinned"`, `"mapped"`, `"stream"`, or `"auto"`: pinned where the budget allows it, else
        stream. Where mapping fails, it is as with auto.
    nbytes
        Size of the region.
    budget
        Bytes of host memory that it may take; None for what the system has to spare.
    progress
        Told how far it is; see `Progress`.
    keep_cached
        Whether what is copied from files into memory stays in the page cache as well.

    Raises
    ------
    CapExceededError
        If the tier needs more than the budget.
    CheckpointError
        If a file cannot be read, or was changed since its tensors were listed.
    DeviceError
        If the system refuses the memory.
    """

    def make(kind: str) -> _core.HostTier:
        tier = _make(kind, pager, nbytes, placements, budget, keep_cached=keep_cached)
        return _fill(tier, placements, progress, keep_cached=keep_cached)

    if kind == "mapped":
        try:
            return make(kind)
        except DeviceError as error:
            _log.warning("host tier mapped cannot be used, so another one is: %s", error)
            kind = "auto"
    if kind == "auto":
        kind, allowed = choose_tier(nbytes, budget)
        _log.info(
            "host tier %s: %s of weights, %s of host memory allowed",
            kind,
            format_bytes(nbytes),
            format_bytes(allowed),
        )
    return make(kind)


def choose_tier(nbytes: int, budget: int | None, taken: int = 0) -> tuple[str, int]:
    """Choose a tier as `"auto"` does: pinned where that is allowed, else stream.

    Parameters
    ----------
    nbytes
        Size of the region.
    budget
        Bytes of host memory that it may take; None for what the system has to spare.
    taken
        Bytes that will have been taken by then of what is free now.

    Returns
    -------
    tuple
        The kind, and the bytes of host memory that are allowed.
    """
    allowed = int(max(0, available_host_bytes() - taken) * _SPARE) if budget is None else budget
    return "pinned" if nbytes <= allowed else "stream", allowed


def ring_bytes(nbytes: int, page_size: int, budget: int | None, in_memory: int) -> int:
    """Return the size of the ring of buffers in front of a disk.

    Parameters
    ----------
    nbytes
        Size of the region.
    budget
        Bytes of host memory that it may take; None for two GiB.
    in_memory
        Bytes that no file has as they are to be, and that wait in memory.

    Raises
    ------
    CapExceededError
        If the smallest one is more than the budget.
    """
    least = _LEAST_RING * page_size
    what = (
        f'host="stream", with a ring of {_LEAST_RING} pages at least and '
        f"{format_bytes(in_memory)} that no file has (converted, or given as tensors),"
    )
    require_budget(least + in_memory, budget, what, "make pages smaller (page_size)")
    most = _RING if budget is None else budget - in_memory
    return max(least, min(most, -(-nbytes // page_size) * page_size))


def require_budget(needed: int, budget: int | None, what: str, remedy: str) -> None:
    """Refuse what needs more host memory than a model may take.

    Parameters
    ----------
    what, remedy
        For the message: what needs it, and what to do beside raising the budget.

    Raises
    ------
    CapExceededError
        If it is more than the budget.
    """
    if budget is None or needed <= budget:
        return
    raise CapExceededError(
        f"{what} takes {format_bytes(needed)} of host memory, and host_budget allows "
        f"{format_bytes(budget)}: raise it to at least that, or {remedy}",
        requested=needed,
        cap=budget,
        used=0,
    )


def _make(
    kind: str,
    pager: Pager,
    nbytes: int,
    placements: list[Placement],
    budget: int | None,
    *,
    keep_cached: bool,
) -> _core.HostTier:
    paths, extents = direct_extents(placements)
    device, page = pager.core_device, pager.page_size
    threads = min(16, os.cpu_count() or 1)
    if kind == "pinned":
        require_budget(nbytes, budget, 'host="pinned"', 'use host="auto", or "stream"')
        return _core.PinnedTier(device, nbytes, page, paths, extents, threads, keep_cached)
    in_memory = sum(each.nbytes for each in placements) - sum(extent[3] for extent in extents)
    if kind == "mapped":
        what = 'what host="mapped" cannot leave in files (converted, or given as tensors)'
        require_budget(in_memory, budget, what, "save the weights as they are to be")
        return _core.MappedTier(device, nbytes, page, paths, extents, _MAP_LIMIT)
    if kind == "stream":
        ring = ring_bytes(nbytes, page, budget, in_memory)
        return _core.StreamTier(device, nbytes, page, paths, extents, ring, 8)
    raise ValueError(f"host tier {kind!r} is not known; use one of {', '.join(HOST_TIERS)}")


def _fill(
    tier: _core.HostTier,
    placements: list[Placement],
    progress: Progress | None,
    *,
    keep_cached: bool,
) -> _core.HostTier:
    total = sum(placement.nbytes for placement in placements)
    told = progress or (lambda done, total: None)
    told(0, total)
    require_as_listed(placements)
    for done in write_rest(tier.write, placements, keep_cached=keep_cached):
        told(done, total)
    for done in wait(tier):
        told(total - tier.total_bytes + done, total)
    told(total, total)
    return tier


def available_host_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how much host memory can be taken: the system's, within the control group's limit.

    The page cache of files counts as free, as it does for the system: it goes when memory is asked
    for. Pages of it that are mapped and in use do not.

    Parameters
    ----------
    group
        Where the control group's files are (kernel.org, admin-guide/cgroup-v2, memory).
    """
    available = _core.open_device("cpu").memory_info().free_bytes
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            lines = (group / "memory.stat").read_text().splitlines()
            stat = {name: int(value) for name, value in (line.split() for line in lines)}
            cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            cached = max(0, cached - stat.get("file_mapped", 0) - stat.get("file_dirty", 0))
            used = int((group / "memory.current").read_text()) - cached
            available = min(available, int(limit) - used)
    except (OSError, ValueError):  # no such control group here
        pass
    return max(0, available)
