"""The low level: regions of paged memory, and tensors built directly on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from penstock import _core
from penstock.sizes import parse_bytes

__all__ = ["Pager", "Region", "open_device"]

PAGE_SIZE = 2 << 20
"""Bytes of a page: what GPU drivers migrate at once, and the largest that a kernel maps whole."""


def open_device(device: str | torch.device | _core.Device) -> tuple[_core.Device, torch.device]:
    """Open a device by its torch name.

    Parameters
    ----------
    device
        `"cpu"`, `"cuda"`, `"cuda:N"`, a torch.device, or `"auto"`: CUDA where there is any. A
        device of the core is taken as it is.

    Returns
    -------
    tuple
        The core's device, and torch's name for it.

    Raises
    ------
    DeviceError
        If there is no such device here; the message says why.
    """
    if isinstance(device, _core.Device):
        core = device
    else:
        name = str(device)
        if name == "auto":
            name = "cuda" if _core.cuda_device_count() > 0 else "cpu"
        if name == "cuda" and torch.cuda.is_available():
            name = f"cuda:{torch.cuda.current_device()}"
        if name == "cpu:0":
            name = "cpu"
        core = _core.open_device(name)
    info = core.info()
    if info.kind is _core.DeviceKind.cuda:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return core, torch.device("cuda", info.ordinal)
    return core, torch.device("cpu")


class Region:
    """A range of device addresses, divided into pages; made by `Pager.reserve`.

    Tensors on it keep it alive. Their addresses never change.
    """

    def __init__(self, core: _core.ManagedRegion, device: torch.device) -> None:
        self.core = core
        self.device = device

    @property
    def address(self) -> int:
        """First device address."""
        return self.core.address

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.core.nbytes

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Build a tensor directly on the region's memory; nothing is copied.

        Parameters
        ----------
        offset
            First byte in the region, a multiple of the dtype's item size.
        shape
            Shape of the tensor, contiguous in row-major order.
        dtype
            Any torch dtype.

        Returns
        -------
        torch.Tensor
            On the region's device. It shares memory with every other tensor on the same bytes.

        Raises
        ------
        IndexError
            If the tensor leaves the region.
        ValueError
            If the offset is not aligned.
        """
        if offset % dtype.itemsize != 0:
            raise ValueError(
                f"offset {offset} is not a multiple of {dtype.itemsize}, the item size of {dtype}"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        self._require_inside(offset, nbytes)
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        flat: torch.Tensor = torch.utils.dlpack.from_dlpack(self.core.dlpack(offset, nbytes))
        return flat.view(dtype).view(tuple(shape))

    def pages_of(self, start: int, nbytes: int) -> list[int]:
        """Return the indices of the pages that a byte range touches.

        Raises
        ------
        IndexError
            If the range leaves the region.
        """
        self._require_inside(start, nbytes)
        return self.core.pages_of(start, nbytes)

    def _require_inside(self, start: int, nbytes: int) -> None:
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise IndexError(
                f"{nbytes} bytes at {start} leave the region of {self.nbytes} bytes; give a range "
                "inside it"
            )


class Pager:
    """Pages of device memory under a cap.

    Parameters
    ----------
    cap
        Bytes that may be resident at once, or a text such as `"1GiB"`.
    device
        See `open_device`.
    kind
        `"managed"`: CUDA's unified memory on a GPU, the operating system's paging on the host.
    page_size
        Bytes of a page, a power of two of at least 4096. Below 2 MiB the host device's kernel may
        map neighbours of a page along with it, and CUDA moves at least 2 MiB anyway.

    Notes
    -----
    Reading a page that is not resident is right, but slow, and not counted. Thread-safe.
    """

    def __init__(
        self,
        *,
        cap: int | str,
        device: str | torch.device | _core.Device = "auto",
        kind: str = "managed",
        page_size: int | str = PAGE_SIZE,
    ) -> None:
        if kind not in ("auto", "managed"):
            raise ValueError(f'pager kind {kind!r} is not known; use "managed"')
        self.core_device, self.device = open_device(device)
        self.kind = "managed"
        self.budget = _core.Budget(parse_bytes(cap))
        self.core = _core.ManagedPager(self.core_device, self.budget, parse_bytes(page_size))

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
            evicted without moving a byte.

        Raises
        ------
        DeviceError
            If the device, or the disk behind the host device, has no room.
        """
        access = _core.Access.read_write if writable else _core.Access.read_mostly
        return Region(self.core.reserve(parse_bytes(nbytes), access), self.device)

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
        return self.core.prefetch(region.core, pages, reader)

    def evict(self, region: Region, start: int = 0, nbytes: int | None = None) -> int:
        """Take a byte range off the device; its bytes are kept, and reading them stays right.

        Waits for work that reads the range where the pager knows of it (`begin` and `end`); other
        readers must have finished. Pages in use are left.

        Parameters
        ----------
        start, nbytes
            As for `prefetch`.

        Returns
        -------
        int
            Bytes given back to the budget.
        """
        return self.core.evict(region.core, self._pages(region, start, nbytes))

    def synchronize(self) -> None:
        """Wait until all that was asked of the pager so far has ended."""
        self.core.synchronize()

    def stream(self) -> int:
        """Return the handle of torch's current stream on the pager's device; 0 on the host."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _pages(self, region: Region, start: int, nbytes: int | None) -> list[int]:
        return region.pages_of(start, region.nbytes - start if nbytes is None else nbytes)
