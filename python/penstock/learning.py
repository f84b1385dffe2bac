"""Learning a model's steps from a pass that was observed operation by operation.

What every observed call of a module read is its step from then on, begun when the module is called.
What a call read beside, now and then, is a step of its own. From the steps follows the order of the
pass. A step takes its pages at the call, where the observed pass took each at its first read: where
a module's own would leave its parts no room, it is read piece by piece after all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import nn

from penstock.steps import Order, Place, Steps

__all__ = ["ObservedCall", "learn", "whole_subtrees"]

# These choose their kernels by whether a tensor is of a class with __torch_function__, so all that
# they look at is part of their step.
_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class ObservedCall(Protocol):
    """One call of a module in an observed pass."""

    @property
    def module(self) -> int:
        """Index of the module."""

    @property
    def parent(self) -> ObservedCall | None:
        """The call inside of which it happened."""

    @property
    def read(self) -> set[int]:
        """Indices of the tensors that it read itself."""


def whole_subtrees(
    modules: Sequence[nn.Module], own: Sequence[frozenset[int]]
) -> dict[int, frozenset[int]]:
    """Find modules that look at tensors of their parts, with all that they look at.

    Parameters
    ----------
    own
        For each module, the indices of the tensors that it holds itself.
    """
    ids = {id(module): i for i, module in enumerate(modules)}
    whole: dict[int, frozenset[int]] = {}
    for i, module in enumerate(modules):
        looked_at: nn.Module | None = module if isinstance(module, _WHOLE) else None
        if isinstance(module, nn.TransformerEncoder) and len(module.layers) > 0:
            looked_at = module.layers[0]
        if looked_at is not None:
            parts = (own[ids[id(part)]] for part in looked_at.modules())
            whole[i] = frozenset().union(*parts)
    return whole


def learn(
    steps: Steps,
    calls: Sequence[ObservedCall],
    most_pages: int,
    pinned: Collection[int] = (),
) -> tuple[Order, frozenset[int]]:
    """Say what each module's step is from now on, and the order that follows from that.

    Parameters
    ----------
    steps
        What is known so far; it learns.
    calls
        Of the pass, in the order in which they began.
    most_pages
        Pages that may be in place at once.
    pinned
        Those that are in any case.

    Returns
    -------
    tuple
        The order, and the steps that are new or have changed.
    """
    changed: set[int] = set()
    for call in calls:
        if steps.learn(call.module, call.read):
            changed.add(call.module)
    order = _order_of(steps, calls, changed)
    if modules := _held_too_long(steps, order, most_pages, set(pinned)):
        for module in modules:
            steps.read_singly(module)
        changed |= modules
        order = _order_of(steps, calls, changed)
    return order, frozenset(changed)


def _order_of(steps: Steps, calls: Sequence[ObservedCall], changed: set[int]) -> Order:
    """Return the steps that observed calls will be; add those that are new to `changed`."""
    places: list[Place] = []
    for call in calls:
        outer: list[int] = []
        around = call.parent
        while around is not None:
            if steps.tensors(around.module):
                outer.insert(0, around.module)
            around = around.parent
        stable = steps.tensors(call.module)
        if stable:
            places.append((call.module, tuple(outer)))
            outer.append(call.module)
        if rest := call.read - stable:
            step, new = steps.read_step(rest)
            if new:
                changed.add(step)
            places.append((step, tuple(outer)))
    return Order(tuple(places))


def _held_too_long(steps: Steps, order: Order, most_pages: int, pinned: set[int]) -> set[int]:
    """Find modules that read by themselves, and hold that while their parts have no room."""
    found: set[int] = set()
    for (_, outer), pages in zip(order.places, steps.pages_in_use(order), strict=True):
        if len(pinned.union(pages)) > most_pages:
            found.update(step for step in outer if step not in steps.whole)
    return found
