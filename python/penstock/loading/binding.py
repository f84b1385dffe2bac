"""Parameters and buffers onto pager memory, and finding out when they leave it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from penstock.dispatch import torch_dispatch
from penstock.loading.layout import Placement
from penstock.loading.skeleton import set_payload
from penstock.loading.slots import Slot
from penstock.memory.model_memory import ModelMemory

__all__ = ["Binding", "ParameterMovedWarning", "View", "bind"]


class ParameterMovedWarning(UserWarning):
    """A call such as `.half()` gave parameters memory of their own, outside the cap."""


@dataclass(frozen=True)
class View:
    """A tensor that shares its memory with others of its module.

    Parameters
    ----------
    whole
        Has the bytes of all of them.
    at
        Its first byte in that.
    """

    tensor: torch.Tensor
    whole: Slot
    at: int

    def bind(self) -> None:
        """Have the tensor lie in what is in place now."""
        base = self.whole.current[self.at :]
        items = base.numel() // self.tensor.element_size()
        typed = base[: items * self.tensor.element_size()].view(self.tensor.dtype)
        offset = typed.storage_offset()
        self.tensor.data = typed.as_strided(self.tensor.shape, self.tensor.stride(), offset)


class Binding:
    """A module whose tensors are on one model's memory.

    They are known by themselves: what becomes of their names is the user's business.

    Parameters
    ----------
    module
        A skeleton, or a module whose values were put in place.
    memory
        Has room for all placements; None if there is nothing to place.
    device
        Where tensors go that have no bytes, and buffers that are not on the memory.
    before
        Called for each tensor before it is given its place.
    views
        Tensors of the module that lie in others.
    """

    def __init__(
        self,
        module: nn.Module,
        placements: list[Placement],
        memory: ModelMemory | None,
        device: torch.device,
        *,
        before: Callable[[Placement], None] | None = None,
        views: Sequence[View] = (),
    ) -> None:
        self.module = module
        self.placements = placements
        self._memory = memory
        self._bound: list[tuple[Slot, torch.Tensor]] = []
        self._tensors: list[torch.Tensor] = []
        self._leaves = False
        self._warned: set[str] = set()
        for placement in placements:
            if before is not None:
                before(placement)
            if memory is None or placement.nbytes == 0:
                shape, dtype = placement.source.shape, placement.dtype
                bind(placement.slot, torch.empty(shape, dtype=dtype, device=device))
                continue
            bind(placement.slot, memory.tensor(placement))
            self._bound.append((placement.slot, placement.slot.current))
            self._tensors.append(placement.slot.current)
        placed = {id(placement.slot.current) for placement in placements}
        for view in views:
            view.bind()
            placed.add(id(view.tensor))
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and id(buffer) not in placed:
                    owner._buffers[name] = buffer.to(device)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Let tensors leave the memory inside the block, and for good if it succeeds."""
        self._leaves = True
        try:
            yield
        except BaseException:
            self._leaves = False
            raise

    def may_have_moved(self) -> bool:
        """Whether some tensor has memory of its own; cheap enough for every call."""
        return not self._leaves and not all(map(torch_dispatch.is_keyed, self._tensors))

    def moved(self) -> list[str]:
        """Name the tensors that are no longer where they were bound."""
        if self._memory is None:
            return []
        region = self._memory.region
        return [
            slot.names[0]
            for slot, tensor in self._bound
            if slot.holds(tensor) and not region.holds(tensor)
        ]

    def warn_if_moved(self) -> None:
        """Warn of tensors that left the memory since the last warning.

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
            "dtype when registering instead: register(..., dtype=torch.float16); convert a loaded "
            "module before offload",
            ParameterMovedWarning,
            stacklevel=2,
        )


def bind(slot: Slot, tensor: torch.Tensor) -> None:
    """Give a slot of a module a tensor, under all its names."""
    held = slot.current
    if not held.is_meta and not held.is_inference():
        held.data = tensor  # it is the same object for whoever has it
        return
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
