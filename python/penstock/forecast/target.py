"""The device that a model will run on, and the settings that a manager would have there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock import _core
from penstock.errors import DeviceError
from penstock.memory.devices import open_device
from penstock.memory.frames_memory import page_table_bytes
from penstock.memory.pager import PAGE_SIZE, frame_sizes
from penstock.sizes import parse_bytes, parse_cap

__all__ = ["Target", "find_target"]

_SYSTEM_PAGE = 4096  # the smallest of managed memory
_GRANULARITY = 2 << 20  # of frames on every GPU of NVIDIA's that has them


@dataclass(frozen=True)
class Target:
    """Where a model will run.

    Parameters
    ----------
    device
        torch's name for it.
    pager
        `"frames"` or `"managed"`.
    total_bytes
        Of the device's memory; None where it is not here.
    core
        The device, if it is here.
    page_sizes
        Those that a manager would take, each with the least cap that it is for.
    """

    device: str
    pager: str
    total_bytes: int | None
    core: _core.Device | None
    page_sizes: tuple[tuple[int, int], ...]

    @property
    def is_gpu(self) -> bool:
        """Whether it is one."""
        return self.device.startswith("cuda")

    def page_size(self, cap: int) -> int:
        """Return the size of pages under a cap; the smallest one where that is no cap for any."""
        fitting = (size for least_cap, size in self.page_sizes if least_cap <= cap)
        return max(fitting, default=self.page_sizes[0][1])

    def page_tables(self, host_bytes: int) -> int:
        """Return what is charged on the device for addressing host memory."""
        return page_table_bytes(host_bytes) if self.is_gpu and self.pager == "frames" else 0

    def cap_in_bytes(self, cap: int | str) -> int:
        """Turn a cap into bytes.

        Raises
        ------
        ValueError
            If it is none, or a part of the memory of a device that is not here.
        """
        if self.total_bytes is None and isinstance(cap, str) and "%" in cap:
            raise ValueError(
                f"a cap of {cap} is a part of the memory of {self.device}, which is not here: "
                'give bytes, such as "8GiB"'
            )
        return parse_cap(cap, self.total_bytes or 1)


def find_target(
    device: str | torch.device | _core.Device,
    pager: str,
    page_size: int | str | None,
    *,
    link_is_given: bool,
) -> Target:
    """Find the device, or stand in for a GPU that is not here.

    Parameters
    ----------
    device, pager, page_size
        As `MemoryManager` has them.
    link_is_given
        Whether the link's rate need not be measured; without a device it has to be given.

    Raises
    ------
    DeviceError
        If the device is not here, and the link's rate is not given.
    ValueError
        If the pager is not known, or the page size is none.
    """
    if pager not in ("auto", "managed", "frames"):
        raise ValueError(f'pager kind {pager!r} is not known; use "managed" or "frames"')
    core: _core.Device | None = None
    name = str(device)
    try:
        core, found = open_device(device)
        name, total = str(found), core.info().total_bytes
        granularity = core.info().frame_granularity
    except DeviceError as error:
        if not name.startswith("cuda"):
            raise
        if not link_is_given:
            raise DeviceError(
                f"{error}. To plan for a GPU that is not here, give the rate of its link: "
                '--link 25GB/s, or link="25GB/s"',
                call=error.call,
                code=error.code,
            ) from None
        total, granularity = None, _GRANULARITY
    kind = pager if pager != "auto" else "frames" if name.startswith("cuda") else "managed"
    if page_size is not None:
        size, least = parse_bytes(page_size), granularity if kind == "frames" else _SYSTEM_PAGE
        if size < least or size & (size - 1):
            raise ValueError(
                f"page_size {size} cannot be: it is a power of two, and at least {least} bytes "
                f"with {kind} on {name}"
            )
        sizes = [(size, size)]  # a cap below a page is refused
    else:
        sizes = frame_sizes(granularity) if kind == "frames" else [(1, PAGE_SIZE)]
    return Target(name, kind, total, core, tuple(sizes))
