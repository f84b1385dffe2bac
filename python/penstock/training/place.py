"""A place on a model's memory, for whichever tensor is a gradient or a state just now."""

from __future__ import annotations

from dataclasses import replace

import torch

from penstock.dispatch import torch_dispatch
from penstock.errors import ModelError
from penstock.loading.layout import Reserved
from penstock.memory.model_memory import ModelMemory
from penstock.torch_private import StorageRef

__all__ = ["Place"]


class Place:
    """Room for one tensor at a time, which operations page.

    Torch makes new gradients, and old ones keep their values for whoever has them, who may be
    reading them in another thread. So a place is taken as long as somebody has the last tensor, and
    those that come meanwhile stay in ordinary memory.
    """

    def __init__(self, memory: ModelMemory, reserved: Reserved) -> None:
        self._memory = memory
        self._reserved = reserved
        self._address = memory.region.address + reserved.offset
        self._last: StorageRef | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._reserved.nbytes

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies here."""
        lies = torch_dispatch.storage_range(tensor) == (self._address, self.nbytes)
        return lies and tensor.shape == self._reserved.shape

    def require_fits(self, tensor: torch.Tensor) -> None:
        """Refuse a tensor that cannot be put here.

        Raises
        ------
        ModelError
            If it is not dense, or of another shape or dtype.
        """
        wanted = self._reserved
        if tensor.layout != torch.strided:
            raise ModelError(
                f"the {wanted.name} is sparse ({tensor.layout}): such tensors cannot be paged. "
                "Train without sparse gradients (nn.Embedding(sparse=False)), or with "
                "penstock.offload"
            )
        if (tuple(tensor.shape), tensor.dtype) != (wanted.shape, wanted.dtype):
            raise ModelError(
                f"the {wanted.name} is {tensor.dtype} of shape {list(tensor.shape)}, and room was "
                f"made for {wanted.dtype} of shape {list(wanted.shape)}: penstock.restore(model), "
                "then prepare again"
            )

    def move_in(self, tensor: torch.Tensor) -> None:
        """Have a tensor lie here, with its values, unless the place is taken.

        Raises
        ------
        CapExceededError, ModelError
            As `put` does.
        """
        if self.has(tensor):
            return
        if self._is_taken():
            self.require_fits(tensor)
        else:
            tensor.data = self.put(tensor)

    def move_out(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Have a tensor lie in ordinary memory, if it lies here."""
        if not self.has(tensor):
            return
        if device != self._memory.region.device:
            tensor.data = tensor.detach().to(device)
            return
        self.empty()
        tensor.data = torch_dispatch.plain(tensor)

    @torch.no_grad()
    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor that has the values of another one, and lies here if it may.

        Raises
        ------
        CapExceededError
            If there is no room to bring its pages in.
        ModelError
            As `require_fits` does.
        """
        self.require_fits(tensor)
        if self._is_taken():
            return tensor.to(self._memory.region.device, copy=True)
        strides = tuple(torch.empty_like(tensor, device="meta").stride())  # without gaps
        placed = self._memory.tensor(replace(self._reserved, strides=strides))
        self._last = StorageRef(placed)
        return placed.copy_(tensor)

    def _is_taken(self) -> bool:
        return self._last is not None and self._last.storage() is not None

    def empty(self) -> None:
        """Have tensors that still lie here go to ordinary memory, on the device."""
        storage = self._last.storage() if self._last is not None else None
        if storage is not None:
            whole = torch.empty(0, dtype=torch.uint8, device=self._memory.region.device)
            whole.set_(storage, 0, (storage.nbytes(),), (1,))
            torch_dispatch.take_memory(whole, torch_dispatch.key(whole).clone())
        self._last = None
