"""Streaming a module that is already loaded, by one line; and taking that back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from typing_extensions import Unpack

from penstock.arguments import checked
from penstock.errors import ModelError
from penstock.loading.layout import Reserved
from penstock.loading.module_patterns import NamePattern
from penstock.loading.slots import find_slots
from penstock.manager.manager import MemoryManager
from penstock.manager.settings import Options

__all__ = ["MODEL", "keep_acquired", "manager_of", "offload", "on_restore", "restore", "take_over"]

M = TypeVar("M", bound=nn.Module)

MODEL = "model"
"""What the manager of an offloaded module calls it."""

_Leaving = Callable[[], AbstractContextManager[None]]


@dataclass
class _Offloaded:
    """What a module remembers of being offloaded. Copies of the module are not."""

    manager: MemoryManager
    adopted: bool
    leaving: _Leaving = nullcontext  # around giving the weights back

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _not_offloaded, ()


def _not_offloaded() -> None:
    return None


@checked
def offload(
    model: M,
    *,
    pin: Sequence[NamePattern] = (),
    stream: Sequence[NamePattern] = (),
    **settings: Unpack[Options],
) -> M:
    """Have a loaded module run on a device with at most `cap` bytes of its weights there.

    The weights move, one by one, into pinned host memory (with managed memory, into that), so there
    are never two copies of the model; from there they stream when the module is called. Nothing
    else changes: the module is the same object, its `state_dict` and saving work, inputs go to
    `device`.

    Parameters
    ----------
    model
        A module with its weights in ordinary memory, on any device.
    pin, stream
        Patterns of names of modules that stay in place, and of those that stream even where there
        is room for them; see `MemoryManager.register`.
    settings
        `cap`, `device` and all others of `MemoryManager`. The host tier can only be pinned: a
        loaded module has no files to read from.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    ModelError
        If it is offloaded already, has no weights or some that cannot move (on meta, sparse,
        quantized), or a pattern matches nothing.
    CapExceededError
        If a step of it cannot run under the cap, or what is pinned does not fit. The module is as
        it was then.

    See Also
    --------
    restore : Takes it back.
    manager_of : Tells what it does.
    """
    take_over(model, pin=pin, stream=stream, **settings)
    return model


def take_over(
    model: nn.Module,
    *,
    pin: Sequence[NamePattern] = (),
    stream: Sequence[NamePattern] = (),
    beside: Sequence[Reserved] = (),
    **settings: Unpack[Options],
) -> MemoryManager:
    """Do what `offload` does, with room for other tensors beside the weights; return the manager.

    Raises
    ------
    CapExceededError, ModelError
        As `offload` does.
    """
    if manager_of(model) is not None:
        raise ModelError("the model is offloaded already; penstock.restore(model) takes that back")
    manager = MemoryManager(**settings)
    if not any(slot.current.numel() for slot in find_slots(model)):
        raise ModelError(
            f"{type(model).__name__} has no weights, so there is nothing to offload: give it the "
            "module that holds them"
        )
    manager.adopt(MODEL, model, pin=pin, stream=stream, beside=beside)
    try:
        keep_acquired(manager, MODEL, adopted=True)
    except BaseException:
        manager.give_back(MODEL)
        raise
    return manager


def on_restore(model: nn.Module, leaving: _Leaving) -> None:
    """Have `restore` enter a context around giving back the weights of an offloaded model."""
    offloaded = _offloaded(model)
    assert offloaded is not None
    offloaded.leaving = leaving


def keep_acquired(manager: MemoryManager, name: str, *, adopted: bool = False) -> nn.Module:
    """Acquire the one model of a manager for as long as it lives, and have it know its manager.

    Parameters
    ----------
    adopted
        Whether it was loaded before, so that `restore` can take it back.

    Raises
    ------
    CapExceededError
        If a step of it cannot run under the cap.
    """
    manager.require_room(name)
    model = manager.acquire(name)
    object.__setattr__(model, "_penstock_offloaded", _Offloaded(manager, adopted))
    return model


@checked
def restore(model: M) -> M:
    """Take `offload` back: the weights return to ordinary memory, where they were before.

    Of a model that `penstock.training.prepare` took, so do its gradients and the states of its
    optimizer: both go on as they were without Penstock.

    Raises
    ------
    ModelError
        If the model is not offloaded, or was never in ordinary memory.
    """
    offloaded = _offloaded(model)
    if offloaded is None:
        raise ModelError("the model is not offloaded")
    if not offloaded.adopted:
        raise ModelError(
            "the model was read from its checkpoint to where it streams from, and never was in "
            "ordinary memory: to have it there, load the checkpoint without Penstock"
        )
    with offloaded.leaving():
        offloaded.manager.release(MODEL)
        offloaded.manager.give_back(MODEL)
    object.__delattr__(model, "_penstock_offloaded")
    return model


@checked
def manager_of(model: nn.Module) -> MemoryManager | None:
    """Return the manager of an offloaded model: for its report, schedule, statistics and cap.

    The manager knows the model as `"model"`.

    Parameters
    ----------
    model
        A module that was given to `offload` or loaded by a front end, or any other.

    Returns
    -------
    MemoryManager or None
        None where the model is not offloaded; copies of an offloaded one are not.

    See Also
    --------
    offload : Makes the manager.
    """
    offloaded = _offloaded(model)
    return None if offloaded is None else offloaded.manager


def _offloaded(model: nn.Module) -> _Offloaded | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    found = model.__dict__.get("_penstock_offloaded")
    return found if isinstance(found, _Offloaded) else None
