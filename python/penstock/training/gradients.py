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
        self._places[parameter].move_in(gradient)

    def end(self) -> None:
        """Have gradients go to ordinary memory, where their parameters are, and be left alone."""
        for hook in self._hooks:
            hook.remove()
        for parameter, place in self._places.items():
            if parameter.grad is not None:
                place.move_out(parameter.grad, parameter.device)
            place.empty()
