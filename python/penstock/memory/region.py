"""A range of device addresses, and tensors built directly on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from penstock import _core
from penstock.arguments import checked

__all__ = ["Region"]


@checked
class Region:
    """A range of device addresses, divided into pages; made by `Pager.reserve`.

    Tensors on it keep it alive. Their addresses never change.
    """

    def __init__(self, core: _core.Region, device: torch.device) -> None:
        self.core = core
        self.device = device
        if device.type == "cuda":  # no sooner: a hard cap has to come before
            torch.cuda.init()  # type: ignore[no-untyped-call]

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

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the region."""
        return self.extent(tensor) is not None

    def extent(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Return the first byte of the region that a tensor's storage has, and how many it has.

        None for a tensor that lies elsewhere, or nowhere.
        """
        if tensor.is_meta or tensor.layout != torch.strided:
            return None
        try:
            storage = tensor.untyped_storage()
            start = storage.data_ptr() - self.address
        except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
            return None
        nbytes = storage.nbytes()
        return (start, nbytes) if 0 <= start <= self.nbytes - nbytes and nbytes else None

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
