"""Gradients that go to their places as backward makes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from penstock.errors import ModelError
from penstock.training.place import Place

__all__ = ["PagedGradients"]


class PagedGradients:
    """The gradients of a model's parameters.

    Torch gives a parameter without a gradient the one that it has just made, and adds to one that
    is there in place. So a gradient is moved when it is new, and one at a time is in ordinary
    memory.
    """

    def __init__(self, places: Mapping[nn.Parameter, Place]) -> None:
        self._places = places
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for parameter in places
        ]

    def _arrived(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None and isinstance(parameter, nn.Parameter)
        if gradient.requires_grad:
            raise ModelError(
                "gradients that have a history (create_graph=True) cannot be paged: use "
                "torch.autograd.grad for them, or penstock.offload, which pages the weights alone"
            )
        place = self._places[parameter]
        if not place.has(gradient):
            parameter.grad = place.put(gradient)

    def take(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return the gradients that lie on the memory, which parameters then do not have."""
        taken = {}
        for parameter, place in self._places.items():
            if parameter.grad is not None and place.has(parameter.grad):
                taken[parameter] = parameter.grad
                parameter.grad = None
        return taken

    def end(self) -> None:
        """Leave gradients alone from now on; those that somebody has keep their values."""
        for hook in self._hooks:
            hook.remove()
        for place in self._places.values():
            place.empty()
