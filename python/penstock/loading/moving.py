"""Moving the weights of a loaded module onto pager memory, tensor by tensor, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from penstock.dispatch import torch_dispatch
from penstock.errors import ModelError
from penstock.loading.binding import View
from penstock.loading.fill import write_rest
from penstock.loading.layout import Placement, lay_out
from penstock.loading.slots import Slot, find_slots
from penstock.loading.weights import Source
from penstock.memory.model_memory import ModelMemory, is_in_service
from penstock.torch_private import holds_values_elsewhere

__all__ = ["Origin", "move_in", "move_out", "survey"]

Write = Callable[[int, np.ndarray[Any, Any]], None]

_NOWHERE = torch.empty(0)
_LARGEST_ITEM = 16  # bytes


@dataclass(frozen=True)
class Origin:
    """Where the tensors of a module were."""

    weights: dict[int, torch.device]
    """By offset in the region."""
    buffers: list[tuple[nn.Module, str, torch.device]]


def survey(module: nn.Module, page_size: int) -> tuple[list[Placement], int, Origin, list[View]]:
    """Place the tensors of a loaded module, and note where they are.

    Tensors that overlap in memory are placed as one, of which they become views (`View.bind`) when
    that is in place.

    Raises
    ------
    ModelError
        If one of them cannot move.
    """
    slots = find_slots(module)
    for slot in slots:
        _require_movable(slot)
    slots, views = _join_shared(slots, _passing_buffers(module, slots))
    sources = {}
    for index, slot in enumerate(slots):
        tensor = slot.current
        sources[index] = Source(slot.names[0], tensor.dtype, tuple(tensor.shape), _NOWHERE)
    placements, nbytes = lay_out(slots, sources, None, page_size=page_size)
    placed = {id(slot.current) for slot in slots} | {id(view.tensor) for view in views}
    origin = Origin(
        {each.offset: each.slot.current.device for each in placements if each.nbytes},
        [
            (owner, name, buffer.device)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and id(buffer) not in placed
        ],
    )
    return placements, nbytes, origin, views


def _require_movable(slot: Slot) -> None:
    tensor = slot.current
    if is_in_service(tensor):
        raise ModelError(
            f"{slot.names[0]!r} is paged already, by this manager or another one: restore or "
            "give back the model that has it first"
        )
    if holds_values_elsewhere(tensor):
        raise ModelError(
            f"{slot.names[0]!r} is a {type(tensor).__name__}, which holds its values in "
            "tensors of its own: such weights cannot be paged"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ModelError(
            f"{slot.names[0]!r} is a conjugate or negative view: give the module its values "
            "(resolve_conj(), resolve_neg())"
        )
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise ModelError(
            f"{slot.names[0]!r} has no plain values in memory (on meta, sparse or quantized): "
            "load the model first, or register it with its checkpoint"
        )
    if tensor.grad is not None:
        raise ModelError(f"{slot.names[0]!r} has a gradient: call model.zero_grad() first")


def _passing_buffers(module: nn.Module, slots: Sequence[Slot]) -> list[Slot]:
    """List the buffers that are not saved and have no slot of their own."""
    known = {id(slot.current) for slot in slots}
    return [
        Slot((name,), ((owner, name),), is_parameter=False, shape=tuple(buffer.shape))
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and id(buffer) not in known and buffer.layout == torch.strided
    ]


def _join_shared(slots: Sequence[Slot], passing: Sequence[Slot]) -> tuple[list[Slot], list[View]]:
    """Replace slots whose tensors overlap in memory by one for the bytes of all of them.

    So are tensors with gaps, or whose elements share bytes: they keep their strides.

    Parameters
    ----------
    passing
        Of tensors that count only where they overlap with others.
    """
    by_storage: dict[int, list[Slot]] = {}
    for slot in slots:
        by_storage.setdefault(slot.current.untyped_storage().data_ptr(), [])
    for slot in (*slots, *passing):
        if slot.current.untyped_storage().data_ptr() not in by_storage:
            continue
        by_storage.setdefault(slot.current.untyped_storage().data_ptr(), []).append(slot)
    order = {id(slot): index for index, slot in enumerate(slots)}
    joined: list[Slot] = []
    views: list[View] = []
    for group in by_storage.values():
        # Runs of ranges that touch each other, in the order of their beginnings.
        group.sort(key=lambda slot: _range(slot.current))
        runs: list[list[Slot]] = []
        end = -1
        for slot in group:
            first, last = _range(slot.current)
            if not runs or first >= end or first == last:
                runs.append([])
            runs[-1].append(slot)
            end = max(end, last)
        for run in runs:
            if len(run) == 1 and _is_dense(run[0].current):
                joined += [slot for slot in run if id(slot) in order]
                continue
            end = max(_range(slot.current)[1] for slot in run)
            first = _range(run[0].current)[0] // _LARGEST_ITEM * _LARGEST_ITEM
            joined.append(whole := _whole(run, first, end))
            for slot in run:
                at = _range(slot.current)[0] - first
                views.append(View(slot.current, whole, at))
    return sorted(joined, key=lambda slot: order.get(id(slot), len(order))), views


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether each byte between the first and the last one is of one element."""
    first, end = _range(tensor)
    return end - first == tensor.numel() * tensor.element_size()


def _whole(run: Sequence[Slot], first: int, end: int) -> Slot:
    """Make a slot for bytes of a storage, held by a module of its own."""
    base = torch.empty(0, dtype=torch.uint8, device=run[0].current.device)
    base.set_(run[0].current.untyped_storage(), first, (end - first,), (1,))
    holder = nn.Module()
    holder.register_buffer("bytes", base)
    names = tuple(name for slot in run for name in slot.names)
    owners = ((holder, "bytes"), *(owner for slot in run for owner in slot.owners))
    return Slot(names, owners, is_parameter=False, shape=(end - first,))


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and that behind the last."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return first, first
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((int(size) - 1) * int(stride) for size, stride in spans)
    return first, first + (last + 1) * tensor.element_size()


def move_in(write: Write | None, placement: Placement) -> None:
    """Write the values that a module has now to where a placement has them.

    Parameters
    ----------
    write
        Puts bytes at an offset of the memory; None where no tensor has any.
    """
    if write is None:
        return
    source = replace(placement.source, where=placement.slot.current.detach())
    for _ in write_rest(write, [replace(placement, source=source)]):
        pass


def move_out(module: nn.Module, memory: ModelMemory | None, origin: Origin) -> None:
    """Move what a module holds of a model's memory to ordinary memory, with its values now.

    Tensors keep what they share, also with views that others have, where they stay on the device.
    Nothing has changed where this fails.
    """
    storages: dict[int, list[torch.Tensor]] = {}  # by offset
    values: dict[int, torch.Tensor] = {}
    strays: list[tuple[torch.Tensor, torch.Tensor]] = []  # on the memory of a model before this one
    for tensor in {id(tensor): tensor for tensor in _tensors(module)}.values():
        extent = memory.region.extent(tensor) if memory is not None else None
        if memory is not None and extent is not None:
            storages.setdefault(extent[0], []).append(tensor)
            if extent[0] not in values:
                device = origin.weights.get(extent[0], tensor.device)
                values[extent[0]] = memory.host_copy(*extent).to(device, copy=True)
        elif torch_dispatch.is_keyed(tensor) and not is_in_service(tensor):
            strays.append((tensor, tensor.detach().clone()))
    for offset, tensors in storages.items():
        _move_storage_out(tensors, values[offset])
    for tensor, value in strays:
        tensor.data = value
    for owner, name, device in origin.buffers:
        buffer = owner._buffers.get(name)
        if buffer is not None:
            owner._buffers[name] = buffer.to(device)


def _move_storage_out(tensors: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Have tensors over one storage lie where the values of all of it are."""
    stay = values.device == tensors[0].device
    if stay:
        torch_dispatch.take_memory(tensors[0], values)
    for tensor in tensors:
        if stay:
            tensor.data = torch_dispatch.plain(tensor)
            continue
        plain = torch.empty(0, dtype=tensor.dtype, device=values.device)
        storage = values.untyped_storage()
        tensor.data = plain.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.grad is not None:
            tensor.grad.data = tensor.grad.to(values.device)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of a module, those that have several names so often."""
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers):
            yield from (tensor for tensor in held.values() if tensor is not None)
