"""Which gradients and states there will be, before there are any."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from penstock.errors import ModelError
from penstock.loading.layout import Reserved
from penstock.torch_private import own_step

__all__ = [
    "GRADIENT",
    "StateNames",
    "gradients_of",
    "is_paged_state",
    "require_supported",
    "states_of",
]

GRADIENT = "gradient"

# Steps look at all parameters at once; gradients that are sparse.
_REFUSED = (torch.optim.LBFGS, torch.optim.SparseAdam)


def require_supported(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Refuse an optimizer whose states cannot be paged.

    Parameters
    ----------
    names
        The model's parameters.

    Raises
    ------
    ModelError
        If it is not one of torch's, works on all parameters at once, is made for graphs or for
        being differentiated, or has parameters that are not the model's.
    """
    kind = type(optimizer).__name__
    if own_step(optimizer) is None:
        raise ModelError(
            f"{kind} is not an optimizer of torch.optim, or has a step of its own: whether it may "
            "go through its parameters in parts is not known. Use penstock.offload, which pages "
            "the weights alone"
        )
    if isinstance(optimizer, _REFUSED):
        raise ModelError(
            f"{kind} steps on all parameters at once, or on sparse gradients, which cannot be "
            "paged: use penstock.offload, which pages the weights alone"
        )
    for number, group in enumerate(optimizer.param_groups):
        for option in ("capturable", "differentiable"):
            if group.get(option):
                raise ModelError(
                    f"{kind} has {option}=True in parameter group {number}, which is not "
                    f"supported: make it with {option}=False"
                )
        for index, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise ModelError(
                    f"parameter {index} of group {number} of the {kind}, of shape "
                    f"{list(parameter.shape)}, is not one of the model's: prepare the module that "
                    "has all parameters of the optimizer"
                )


def gradients_of(names: Mapping[nn.Parameter, str]) -> Iterator[tuple[nn.Parameter, Reserved]]:
    """List the gradients of the parameters that are trained."""
    for parameter, name in names.items():
        if parameter.requires_grad and parameter.numel():
            yield parameter, _reserved(GRADIENT, name, parameter)


def is_paged_state(value: object) -> bool:
    """Whether this is paged where it is the state of a parameter; scalars are not."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 0


def states_of(
    optimizer: Optimizer, names: Mapping[nn.Parameter, str]
) -> Iterator[tuple[nn.Parameter, Reserved]]:
    """List the states that an optimizer has, or will have when it has stepped.

    Of a parameter without states, they are what a copy of the optimizer makes for zeros of the same
    shape, in host memory.
    """
    known: dict[object, dict[str, torch.Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad or not parameter.numel():
                continue
            states = optimizer.state.get(parameter)
            if not states:
                form = (number, parameter.shape, parameter.stride(), parameter.dtype)
                if form not in known:
                    known[form] = _try_out(optimizer, group, parameter)
                states = known[form]
            for kind, value in states.items():
                if is_paged_state(value):
                    yield parameter, _reserved(kind, names[parameter], value)


class StateNames:
    """The states that an optimizer's step makes or has with the options of now."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._known: dict[object, frozenset[str]] = {}

    def of(self, group: dict[str, Any], parameter: nn.Parameter) -> frozenset[str]:
        """Return the names of those that are paged. Options count by whether they are on."""
        on = frozenset(
            name for name, value in group.items() if not isinstance(value, torch.Tensor) and value
        )
        form = (on, parameter.dim(), parameter.dtype)
        if form not in self._known:
            small = nn.Parameter(torch.empty([2] * parameter.dim(), dtype=parameter.dtype))
            states = _try_out(self._optimizer, group, small)
            self._known[form] = frozenset(
                name for name, value in states.items() if is_paged_state(value)
            )
        return self._known[form]


def _reserved(kind: str, of: str, like: torch.Tensor) -> Reserved:
    strides = torch.empty_like(like, device="meta").stride()
    return Reserved(kind, of, like.dtype, tuple(like.shape), tuple(strides))


def _try_out(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> dict[str, torch.Tensor]:
    """Return the states that a step makes, on meta."""
    double = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
    double.grad = torch.zeros_like(double)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    options = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in group.items()
    }
    twin.param_groups = [options | {"params": [double], "foreach": False, "fused": False}]
    step = own_step(twin)
    assert step is not None
    step(twin)
    return {
        name: value.to("meta")
        for name, value in twin.state[double].items()
        if isinstance(value, torch.Tensor)
    }
