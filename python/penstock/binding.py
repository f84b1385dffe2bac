"""Parameters and buffers onto pager memory, and finding out when they leave it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from penstock.layout import Placement
from penstock.pager import Region
from penstock.skeleton import set_payload
from penstock.weights import Slot

__all__ = ["Binding", "ParameterMovedWarning", "bind"]


class ParameterMovedWarning(UserWarning):
    """A call such as `.half()` gave parameters memory of their own, outside the cap."""


class Binding:
    """A module whose tensors are views of one region.

    Parameters
    ----------
    module
        A skeleton.
    region
        Memory for all placements; None if there is nothing to place.
    device
        Where buffers that are not on the region go.
    before
        Called for each tensor before it is given its place.
    """

    def __init__(
        self,
        module: nn.Module,
        placements: list[Placement],
        region: Region | None,
        device: torch.device,
        *,
        before: Callable[[Placement], None] | None = None,
    ) -> None:
        self.module = module
        self.placements = placements
        self.region = region
        self._addresses: dict[int, int] = {}
        self._warned: set[str] = set()
        for index, placement in enumerate(placements):
            if before is not None:
                before(placement)
            tensor = self._tensor(placement, device)
            bind(placement.slot, tensor)
            if placement.nbytes:
                self._addresses[index] = tensor.data_ptr()
        bound = {id(p.slot.current) for p in placements}
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and id(buffer) not in bound:
                    owner._buffers[name] = buffer.to(device)

    def _tensor(self, placement: Placement, device: torch.device) -> torch.Tensor:
        shape = placement.source.shape
        if self.region is None:
            return torch.empty(shape, dtype=placement.dtype, device=device)
        tensor = self.region.tensor(placement.offset, shape, placement.dtype)
        return tensor.as_strided(shape, placement.stride) if placement.stride else tensor

    def placed(self) -> list[tuple[Placement, torch.Tensor]]:
        """List the tensors that are on the region, as the module holds them now."""
        return [
            (self.placements[index], self.placements[index].slot.current)
            for index in self._addresses
        ]

    def moved(self) -> list[str]:
        """Name the tensors that are no longer where they were bound."""
        return [
            self.placements[index].slot.names[0]
            for index, address in self._addresses.items()
            if _address(self.placements[index].slot.current) != address
        ]

    def warn_if_moved(self) -> None:
        """Warn of tensors that left the region since the last warning.

        Warns
        -----
        ParameterMovedWarning
            With their names; their memory is outside the cap.
        """
        new = [name for name in self.moved() if name not in self._warned]
        if not new:
            return
        self._warned.update(new)
        warnings.warn(
            f"{len(new)} parameters are no longer on pager memory (first: {new[0]!r}), so the cap "
            "does not count them: a call such as .half() or .to(dtype) copied them. Ask for the "
            "dtype when registering instead: register(..., dtype=torch.float16)",
            ParameterMovedWarning,
            stacklevel=2,
        )


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.data_ptr()


def bind(slot: Slot, tensor: torch.Tensor) -> None:
    """Give a slot of a module a tensor, under all its names."""
    held = slot.current
    if isinstance(held, nn.Parameter):
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        held.requires_grad_(held.requires_grad and differentiable)
        try:
            set_payload(held, tensor)
            return
        except RuntimeError:  # weakly referenced, as an LSTM's are: put a new one in its place
            tensor = nn.Parameter(tensor, requires_grad=held.requires_grad)
    for owner, name in slot.owners:
        setattr(owner, name, tensor)
