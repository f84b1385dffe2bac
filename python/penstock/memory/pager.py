"""The low level: pages of device memory under a cap, and what brings them in and out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from datetime import timedelta

import torch

from penstock import _core
from penstock.arguments import checked
from penstock.memory.devices import open_device
from penstock.memory.hard_cap_view import HardCapView
from penstock.memory.link_rate import LinkRate
from penstock.memory.region import Region
from penstock.sizes import format_bytes, parse_bytes, parse_cap
from penstock.torch_private import current_stream

__all__ = ["PAGE_SIZE", "Pager", "frame_sizes", "wait_until_pinned"]

PAGE_SIZE = 2 << 20
"""Bytes of a managed page: what drivers migrate at once, the largest that a kernel maps whole."""

FRAME_SIZE = 32 << 20
"""Bytes of a frame where the cap is large: copies of that size reach the link's full rate."""


_FRAMES = 16  # at least under a cap, where the size of frames is not said


def frame_sizes(granularity: int) -> list[tuple[int, int]]:
    """List the sizes of frames that are taken by themselves, each with the least cap it is for.

    They are large enough for the link's full rate, and small enough for a ring to be a small part.

    Parameters
    ----------
    granularity
        Of the device, in bytes.
    """
    sizes = [(1, granularity)]
    while sizes[-1][1] < FRAME_SIZE:
        size = sizes[-1][1] * 2
        sizes.append((size * _FRAMES, size))
    return sizes


def wait_until_pinned(tier: _core.HostTier) -> None:
    """Say that all is written that was to be, and wait until pages can be loaded from a tier."""
    while not tier.wait_for(timedelta(seconds=1)):
        pass


@checked
class Pager:
    """Pages of device memory under a cap.

    Parameters
    ----------
    cap
        Bytes that may be resident at once, or a text such as `"1GiB"`, or `"60%"` of the device's
        memory; another pager to share the ledger and the device of.
    device
        See `open_device`.
    kind
        `"managed"`: CUDA's unified memory on a GPU, the operating system's paging on the host.
        `"frames"`: physical memory mapped under reserved addresses, copied to from pinned host
        memory. `"auto"`: frames on a GPU, else managed.
    page_size
        Bytes of a page, a power of two. Managed pages have at least 4096, 2 MiB if omitted: below
        that the host device's kernel may map neighbours of a page along with it, and CUDA moves at
        least 2 MiB anyway. Frames have at least the device's granularity, and at most 32 MiB and a
        sixteenth of the cap if omitted.

    Notes
    -----
    Reading a managed page that is not resident is right, but slow, and not counted. Reading or
    writing a page of frames that is not in place is undefined: use it after `prefetch`, and have
    that done before anything else is prefetched that might take its place. Thread-safe.
    """

    def __init__(
        self,
        *,
        cap: int | str | Pager,
        device: str | torch.device | _core.Device = "auto",
        kind: str = "managed",
        page_size: int | str | None = None,
    ) -> None:
        if kind not in ("auto", "managed", "frames"):
            raise ValueError(f'pager kind {kind!r} is not known; use "managed" or "frames"')
        self.core_device: _core.Device
        self.device: torch.device
        self.budget: _core.Budget
        self.hard_cap: HardCapView | None = None
        self._link: LinkRate
        shared = cap if isinstance(cap, Pager) else None
        if shared is not None:
            self.core_device, self.device = shared.core_device, shared.device
            self.budget = shared.budget
            self.hard_cap = shared.hard_cap
            self._link = shared._link
        else:
            assert not isinstance(cap, Pager)
            self.core_device, self.device = open_device(device)
            self.budget = _core.Budget(parse_cap(cap, self.core_device.info().total_bytes))
            self._link = LinkRate(self.core_device, self.budget)
        if kind == "auto":
            kind = "frames" if self.device.type == "cuda" else "managed"
        self.kind = kind
        self._managed: _core.ManagedPager | None = None
        self._frames: _core.FramePool | None = None
        if kind == "managed":
            self.page_size = self._page_size(page_size)
            self._managed = _core.ManagedPager(self.core_device, self.budget, self.page_size)
        elif shared is not None:
            self._frames = shared.frames
            self.page_size = shared.page_size
        else:
            self.page_size = self._page_size(page_size)
            self._frames = _core.FramePool(self.core_device, self.budget, self.page_size)

    def _page_size(self, wanted: int | str | None) -> int:
        if wanted is not None:
            size = parse_bytes(wanted)
            if size > self.cap:
                raise ValueError(
                    f"page_size is {format_bytes(size)}, and the cap {format_bytes(self.cap)}: no "
                    "page would fit. Make pages smaller, or leave page_size out, or raise the cap"
                )
            return size
        if self.kind == "managed":
            return PAGE_SIZE
        sizes = frame_sizes(self.core_device.info().frame_granularity)
        return max(size for least_cap, size in sizes if least_cap <= self.cap)

    @property
    def core(self) -> _core.ManagedPager:
        """The core's pager of managed memory."""
        if self._managed is None:
            raise ValueError("this pager works with frames, not with managed memory")
        return self._managed

    @property
    def frames(self) -> _core.FramePool:
        """The core's pool of frames."""
        if self._frames is None:
            raise ValueError("this pager works with managed memory, not with frames")
        return self._frames

    def put_under(self, hard_cap: HardCapView) -> None:
        """Have all that is paged by this, and by pagers that share it, count for a hard cap."""
        self.hard_cap = hard_cap
        self._link.charged = True

    @property
    def divides(self) -> bool:
        """Whether models have to be told how many pages they may hold.

        Else the pager takes pages from whichever holds them, as others are used.
        """
        return self._frames is not None

    def reclaim(self) -> None:
        """Take back frames of regions that are gone, as far as nothing uses them any more."""
        if self._frames is not None:
            self._frames.reclaim_retired()

    @property
    def link_rate(self) -> float:
        """Bytes per second of copies from pinned memory, measured once."""
        return self._link.begin().result()

    @contextmanager
    def measuring_link(self) -> Iterator[None]:
        """Measure `link_rate` beside what the block does, if nobody has; it has been at the end."""
        measured = self._link.begin()
        try:
            yield
        finally:
            wait([measured])  # not beside whoever captures a graph next

    def plan(
        self,
        page_count: int,
        steps: Sequence[Sequence[int]],
        frames: int,
        seconds: Sequence[float] = (),
        *,
        keep: Sequence[int] = (),
        stream: Sequence[int] = (),
        least_ring: int = 0,
    ) -> _core.Plan:
        """Plan which pages stay and how the others stream.

        Parameters
        ----------
        page_count
            Pages of the region.
        steps
            Pages in use at each step of a pass.
        frames
            How many pages may be held at once.
        seconds
            Compute time of each step; empty if unknown.
        keep, stream
            Pages that have to stay, and those that must not.
        least_ring
            Frames that the others share at least, as far as there are so many.

        Raises
        ------
        CapExceededError
            If a step needs more frames than that.
        """
        return _core.plan(
            page_count=page_count,
            page_size=self.page_size,
            steps=steps,
            frames=frames,
            link_rate=self.link_rate,
            step_seconds=seconds,
            keep=keep,
            stream=stream,
            least_ring=least_ring,
        )

    def capturing(self) -> bool:
        """Whether torch's current stream is being captured in a graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @property
    def cap(self) -> int:
        """Bytes that may be resident at once."""
        return self.budget.cap

    def reserve(self, nbytes: int | str, *, writable: bool = True) -> Region:
        """Reserve a region; nothing of it is resident yet, and its bytes are undefined.

        Parameters
        ----------
        nbytes
            Size in bytes.
        writable
            Whether the device will write to it. A region that is filled once and then only read is
            evicted without moving a byte, and what the device writes to it can be lost with that.

        Raises
        ------
        DeviceError
            If the device, or the disk behind the host device, has no room.
        """
        size = parse_bytes(nbytes)
        if self.kind == "frames":
            tier = self.empty_tier(size)
            wait_until_pinned(tier)
            core = _core.FramesRegion(self.frames, tier)
            core.set_writable(writable)
            return Region(core, self.device)
        access = _core.Access.read_write if writable else _core.Access.read_mostly
        return Region(self.core.reserve(size, access), self.device)

    def empty_tier(self, nbytes: int) -> _core.HostTier:
        """Make pinned host memory for a region of frames; see `wait_until_pinned`."""
        return _core.PinnedTier(self.core_device, nbytes, self.page_size, [], [], 1)

    def prefetch(
        self,
        region: Region,
        start: int = 0,
        nbytes: int | None = None,
        *,
        stream: int | None = None,
    ) -> int:
        """Make a byte range of a region resident on the device.

        Other pages are evicted if there is no room. Returns before the copies end.

        Parameters
        ----------
        start, nbytes
            Range in bytes inside the region, rounded outward to pages; all from `start` on if
            `nbytes` is omitted.
        stream
            CUDA stream handle that will read the range; the current stream if omitted. Its later
            work is ordered after the copies.

        Returns
        -------
        int
            Bytes newly charged to the budget.

        Raises
        ------
        CapExceededError
            If the range cannot fit under the cap after eviction.
        DeviceError
            If the device refuses a call.
        IndexError
            If the range leaves the region.
        ValueError
            If the region is another pager's.
        """
        pages = self._pages(region, start, nbytes)
        reader = self.stream() if stream is None else stream
        if isinstance(region.core, _core.ManagedRegion):
            return self.core.prefetch(region.core, pages, reader)
        before = region.core.stats().resident_bytes
        region.core.begin(pages, reader)
        region.core.end(pages, reader)
        return max(0, region.core.stats().resident_bytes - before)

    def evict(self, region: Region, start: int = 0, nbytes: int | None = None) -> int:
        """Take a byte range off the device; its bytes are kept.

        Waits for work that uses the range where the pager knows of it (`begin` and `end`); other
        work on it must have finished. Pages in use are left. Managed memory can be read on; frames,
        after the next `prefetch`.

        Parameters
        ----------
        start, nbytes
            As for `prefetch`.

        Returns
        -------
        int
            Bytes released to the budget.
        """
        pages = self._pages(region, start, nbytes)
        if isinstance(region.core, _core.ManagedRegion):
            return self.core.evict(region.core, pages)
        return region.core.evict(pages)

    def synchronize(self) -> None:
        """Wait until all that was asked of the pager so far has ended."""
        if self._managed is not None:
            self._managed.synchronize()

    def stream(self) -> int:
        """Return the handle of torch's current stream on the pager's device; 0 on the host."""
        if self.device.type != "cuda":
            return 0
        return current_stream(self.device.index)

    def _pages(self, region: Region, start: int, nbytes: int | None) -> list[int]:
        return region.pages_of(start, region.nbytes - start if nbytes is None else nbytes)
