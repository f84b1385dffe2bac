"""Streaming a module that is already loaded, by one line; and taking that back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from penstock import _core
from penstock.errors import ModelError
from penstock.manager import MemoryManager

__all__ = ["manager_of", "offload", "restore"]

M = TypeVar("M", bound=nn.Module)

_NAME = "model"


@dataclass
class _Offloaded:
    """What a module remembers of being offloaded. Copies of the module are not."""

    manager: MemoryManager

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _not_offloaded, ()


def _not_offloaded() -> None:
    return None


def offload(
    model: M,
    *,
    cap: int | str | None = None,
    device: str | torch.device | _core.Device = "auto",
    pager: str = "auto",
    page_size: int | str | None = None,
    verify: bool = False,
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
    cap, device, pager, page_size, verify
        See `MemoryManager`.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    ModelError
        If it is offloaded already, or has weights that cannot move (on meta, sparse, quantized).
    CapExceededError
        If a step of it cannot run under the cap. The module is as it was then.

    See Also
    --------
    restore : Takes it back.
    manager_of : Tells what it does.
    """
    if manager_of(model) is not None:
        raise ModelError("the model is offloaded already; penstock.restore(model) takes that back")
    manager = MemoryManager(
        cap=cap, device=device, pager=pager, host="pinned", page_size=page_size, verify=verify
    )
    manager.adopt(_NAME, model)
    try:
        manager.acquire(_NAME)
    except BaseException:
        manager.give_back(_NAME)
        raise
    object.__setattr__(model, "_penstock_offloaded", _Offloaded(manager))
    return model


def restore(model: M) -> M:
    """Take `offload` back: the weights return to ordinary memory, where they were before.

    Raises
    ------
    ModelError
        If the model is not offloaded.
    """
    manager = manager_of(model)
    if manager is None:
        raise ModelError("the model is not offloaded")
    manager.release(_NAME)
    manager.give_back(_NAME)
    object.__delattr__(model, "_penstock_offloaded")
    return model


def manager_of(model: nn.Module) -> MemoryManager | None:
    """Return the manager of an offloaded model: for its report, schedule, statistics and cap.

    The manager knows the model as `"model"`.

    Parameters
    ----------
    model
        A module that was given to `offload`, or any other.

    Returns
    -------
    MemoryManager or None
        None where the model is not offloaded; copies of an offloaded one are not.

    See Also
    --------
    offload : Makes the manager.
    """
    offloaded = model.__dict__.get("_penstock_offloaded")
    return offloaded.manager if isinstance(offloaded, _Offloaded) else None
