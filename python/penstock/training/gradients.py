"""Gradients that go to their places as backward makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from penstock.errors import ModelError
from penstock.torch_private import change_count, is_alone
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
            parameter.register_post_accumulate_grad_hook(_mover_to(place))  # type: ignore[no-untyped-call]
            for parameter, place in places.items()
        ]

    def end(self) -> None:
        """Have gradients go to ordinary memory, where their parameters are, and be left alone."""
        for hook in self._hooks:
            hook.remove()
        for parameter, place in self._places.items():
            if parameter.grad is not None:
                place.move_out(parameter.grad, parameter.device)
            place.empty()


def _mover_to(place: Place) -> Callable[[torch.Tensor], None]:
    """Make the hook of one parameter, which must not lead back to it: torch would keep both."""

    def move(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or torch.compiler.is_compiling():
            return  # another hook has taken it; or it is one of a graph's, and stays where it is
        if gradient.requires_grad:
            raise ModelError(
                "gradients that have a history (create_graph=True) cannot be paged: use "
                "torch.autograd.grad for them, or penstock.offload, which pages the weights alone"
            )
        # What was there before, over memory that others have too, is the user's: it stays theirs.
        if change_count(gradient) == 0 or is_alone(gradient):
            place.move_in(gradient)

    return move
