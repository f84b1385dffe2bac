"""Where weights wait on the host before they stream: choosing a tier, and filling it."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path

from penstock import _core
from penstock.errors import DeviceError
from penstock.fill import Progress, direct_extents, wait, write_rest
from penstock.layout import Placement
from penstock.pager import Pager
from penstock.sizes import format_bytes

__all__ = ["HOST_TIERS", "open_tier"]

HOST_TIERS = ("auto", "pinned", "mapped", "stream")

_log = logging.getLogger("penstock")

_SPARE = 0.8  # of the memory that is free, for pinning without being told
_RING = 2 << 30  # bytes of pinned buffers where no budget is given
_MAP_LIMIT = timedelta(seconds=30)


def open_tier(
    kind: str,
    pager: Pager,
    nbytes: int,
    placements: list[Placement],
    *,
    budget: int | None,
    progress: Progress | None = None,
) -> _core.HostTier:
    """Make a host tier for a model's tensors, and wait until they can stream.

    Parameters
    ----------
    kind
        `"pinned"`, `"mapped"`, `"stream"`, or `"auto"`: pinned where the budget allows it, else
        stream.
    nbytes
        Size of the region.
    budget
        Bytes of host memory that it may take; None for what the system has to spare.
    progress
        Told how far it is; see `Progress`.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    DeviceError
        If the system refuses the memory.
    """
    if kind == "auto":
        allowed = budget if budget is not None else int(available_host_bytes() * _SPARE)
        kind = "pinned" if nbytes <= allowed else "stream"
        _log.info(
            "host tier %s: %s of weights, %s of host memory allowed",
            kind,
            format_bytes(nbytes),
            format_bytes(allowed),
        )
    if kind == "mapped":
        try:
            return _fill(_make(kind, pager, nbytes, placements, budget), placements, progress)
        except DeviceError as error:
            _log.warning("host tier mapped cannot be used, so the weights are pinned: %s", error)
            kind = "pinned"
    return _fill(_make(kind, pager, nbytes, placements, budget), placements, progress)


def _make(
    kind: str, pager: Pager, nbytes: int, placements: list[Placement], budget: int | None
) -> _core.HostTier:
    paths, extents = direct_extents(placements)
    device, page = pager.core_device, pager.page_size
    threads = min(16, os.cpu_count() or 1)
    if kind == "pinned":
        return _core.PinnedTier(device, nbytes, page, paths, extents, threads)
    if kind == "mapped":
        return _core.MappedTier(device, nbytes, page, paths, extents, _MAP_LIMIT)
    if kind == "stream":
        ring = min(_RING if budget is None else budget, -(-nbytes // page) * page)
        return _core.StreamTier(device, nbytes, page, paths, extents, max(ring, 4 * page), 8)
    raise ValueError(f"host tier {kind!r} is not known; use one of {', '.join(HOST_TIERS)}")


def _fill(
    tier: _core.HostTier, placements: list[Placement], progress: Progress | None
) -> _core.HostTier:
    total = sum(placement.nbytes for placement in placements)
    told = progress or (lambda done, total: None)
    told(0, total)
    for done in write_rest(tier.write, placements):
        told(done, total)
    for done in wait(tier):
        told(total - tier.total_bytes + done, total)
    told(total, total)
    return tier


def available_host_bytes() -> int:
    """Return how much host memory can be taken: the system's, within the control group's limit."""
    available = _core.open_device("cpu").memory_info().free_bytes
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            available = min(available, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such control group here
        pass
    return max(0, available)
