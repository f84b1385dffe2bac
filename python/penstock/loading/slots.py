"""The tensors of a module that need a value, and which tensor of the weights each gets.

A slot is one tensor of the module, under all the names that share it. Each is paired with one
tensor of the weights; else everything that does not match is refused, as `load_state_dict` would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from penstock.checkpoint.kinds import QUANTIZED, find_quantized
from penstock.errors import CheckpointError, ModelError
from penstock.loading.weights import Source, Weights

__all__ = ["Slot", "find_slots", "match", "shapeless"]


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a module that needs a value.

    Parameters
    ----------
    names
        Every name under which the module holds it; several if tied.
    owners
        For each name, the module that holds it and the last part of the name.
    is_parameter
        False for a persistent buffer.
    shape
        What the module made it with.
    """

    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    is_parameter: bool
    shape: tuple[int, ...]

    @property
    def current(self) -> torch.Tensor:
        """The tensor that the module holds now."""
        module, name = self.owners[0]
        held = (module._parameters if self.is_parameter else module._buffers)[name]
        assert held is not None
        return held

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the module still holds a tensor under one of the names."""
        return any(
            (owner._parameters if self.is_parameter else owner._buffers).get(name) is tensor
            for owner, name in self.owners
        )


def find_slots(module: nn.Module) -> list[Slot]:
    """List the parameters and persistent buffers of a module, tied ones once, in its own order.

    A tensor that is held under a persistent name and under one that is not has both owners.

    Raises
    ------
    ModelError
        If one has no shape yet.
    """
    slots: dict[int, Slot] = {}
    kept = {
        id(tensor)
        for owner in module.modules()
        for held in (owner._parameters, owner._buffers)
        for name, tensor in held.items()
        if tensor is not None and name not in owner._non_persistent_buffers_set
    }
    for is_parameter in (True, False):
        for prefix, owner in module.named_modules(remove_duplicate=False):
            held = owner._parameters if is_parameter else owner._buffers
            for name, tensor in held.items():
                if tensor is None or id(tensor) not in kept:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                if is_lazy(tensor):
                    raise shapeless(full)
                seen = slots.get(id(tensor))
                slots[id(tensor)] = Slot(
                    names=(*seen.names, full) if seen else (full,),
                    owners=(*seen.owners, (owner, name)) if seen else ((owner, name),),
                    is_parameter=seen.is_parameter if seen else is_parameter,
                    shape=tuple(tensor.shape),
                )
    return list(slots.values())


def shapeless(name: str) -> ModelError:
    """Make the error for a tensor of a lazy module that was not called yet."""
    return ModelError(
        f"{name!r} has no shape until the first call: give the module its sizes (Linear instead of "
        "LazyLinear, and so on), or call it once before it is offloaded"
    )


def match(
    module: nn.Module, slots: list[Slot], weights: Weights, *, strict: bool
) -> dict[int, Source]:
    """Pair slots with weights.

    A tied slot takes the last of its names that the weights have, as loading one after the other
    would. Names of non-persistent buffers are no surprise in the weights: older versions of a model
    saved them.

    Parameters
    ----------
    strict
        Whether names that the module lacks, and buffers that the weights lack, are an error. A
        parameter, or a buffer on meta, without a value is an error in any case.

    Returns
    -------
    dict
        The source of each slot, by the slot's index.

    Raises
    ------
    CheckpointError
        With all missing, unexpected and misshaped names at once.
    """
    pairs: dict[int, Source] = {}
    problems: list[str] = []
    missing: list[str] = []
    for index, slot in enumerate(slots):
        found = [weights.sources[name] for name in slot.names if name in weights.sources]
        if found:
            pairs[index] = found[-1]
        elif strict or slot.current.is_meta:
            missing.append(slot.names[0])
        problems += [
            f"size mismatch for {source.name}: the weights have {list(source.shape)}, "
            f"the model has {list(slot.shape)}"
            for source in found
            if source.shape != slot.shape
        ]
    known = {name for slot in slots for name in slot.names}
    known.update(name for name, _ in module.named_buffers())
    unexpected = [name for name in weights.sources if name not in known] if strict else []
    if unexpected:
        problems.insert(0, f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    if missing:
        problems.insert(0, f"{len(missing)} missing: {_listed(missing)}")
    if problems:
        remedy = (
            "Pass the checkpoint of this model; strict=False lets unexpected names and missing "
            "buffers pass"
        )
        if name := find_quantized(weights.sources):
            remedy = f"{name!r} is of quantized weights; {QUANTIZED}"
        lines = "\n  ".join(problems)
        raise CheckpointError(
            f"{weights.origin} does not fit {type(module).__name__}:\n  {lines}\n{remedy}."
        )
    return pairs


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
