"""Moving the weights of a loaded module onto pager memory, tensor by tensor, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from penstock.binding import bind
from penstock.errors import ModelError
from penstock.fill import write_rest
from penstock.layout import Placement, lay_out
from penstock.memory import ModelMemory
from penstock.weights import Source, find_slots

__all__ = ["Origin", "give_back", "move_in", "survey"]

Write = Callable[[int, np.ndarray[Any, Any]], None]

_NOWHERE = torch.empty(0)


@dataclass(frozen=True)
class Origin:
    """Where the tensors of a module were."""

    weights: list[torch.device]
    buffers: list[tuple[nn.Module, str, torch.device]]


def survey(module: nn.Module, page_size: int) -> tuple[list[Placement], int, Origin]:
    """Place the tensors of a loaded module, and note where they are.

    Raises
    ------
    ModelError
        If one of them cannot move.
    """
    slots = find_slots(module)
    sources = {}
    for index, slot in enumerate(slots):
        tensor = slot.current
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelError(
                f"{slot.names[0]!r} has no plain values in memory (on meta, sparse or quantized): "
                "load the model first, or register it with its checkpoint"
            )
        if tensor.grad is not None:
            raise ModelError(f"{slot.names[0]!r} has a gradient: call model.zero_grad() first")
        sources[index] = Source(slot.names[0], tensor.dtype, tuple(tensor.shape), _NOWHERE)
    placements, nbytes = lay_out(slots, sources, None, page_size=page_size)
    placed = {id(slot.current) for slot in slots}
    origin = Origin(
        [placement.slot.current.device for placement in placements],
        [
            (owner, name, buffer.device)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and id(buffer) not in placed
        ],
    )
    return placements, nbytes, origin


def move_in(write: Write, placement: Placement) -> None:
    """Write the values that a module has now to where a placement has them."""
    source = replace(placement.source, where=placement.slot.current.detach())
    for _ in write_rest(write, [replace(placement, source=source)]):
        pass


def give_back(placements: list[Placement], memory: ModelMemory | None, origin: Origin) -> None:
    """Give tensors of a module ordinary memory again, with the values that are kept for them."""
    for index, placement in enumerate(placements):
        if memory is None or placement.nbytes == 0:
            value = torch.empty(placement.source.shape, dtype=placement.dtype)
        elif memory.region.holds(placement.slot.current):
            flat = memory.host_copy(placement.offset, placement.nbytes).view(placement.dtype)
            value = flat.as_strided(placement.source.shape, placement.strides).clone()
        else:  # it was moved away
            continue
        bind(placement.slot, value.to(origin.weights[index]))
    for owner, name, device in origin.buffers:
        buffer = owner._buffers.get(name)
        if buffer is not None:
            owner._buffers[name] = buffer.to(device)
