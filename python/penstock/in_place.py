"""What of a model is held in place, and needs no steps: all of it, or what its plan keeps.

Its pages are in use as a whole, its tensors have their plain class, and only modules that read
others tell of their calls. Which tensors that can be is decided here; `runner` holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.guard import Entry
from penstock.steps import Order, Steps

__all__ = ["InPlace", "choose"]


@dataclass(frozen=True)
class InPlace:
    """What is held.

    Parameters
    ----------
    pages
        In use for as long as that is so.
    entries
        Of the tensors that can be read at any time.
    order
        Of all steps, as it was followed before.
    rest
        Of the steps that are left.
    """

    pages: list[int]
    entries: list[Entry]
    order: Order
    rest: Order

    @property
    def whole(self) -> bool:
        """Whether no step is left."""
        return not self.rest.places


def choose(
    steps: Steps,
    order: Order,
    entries: Sequence[Entry],
    pages: list[int],
    *,
    keeps_writes: bool,
) -> InPlace:
    """Choose the tensors that can be read without steps.

    Parameters
    ----------
    entries
        Of all tensors, by index.
    pages
        Those that can be held.
    keeps_writes
        Whether what is written to a tensor can be kept. If not, those that may change without
        counting it have their steps, which know whether they were computed with to be changed.
    """
    held = frozenset(pages)
    staying = {
        i
        for i, entry in enumerate(entries)
        if held.issuperset(entry.pages) and (keeps_writes or not entry.silent)
    }
    rest = steps.without(order, staying)
    # What is read now and then is a step by all of its tensors.
    for step in rest.all_steps:
        if not steps.is_module(step):
            staying -= steps.tensors(step)
    return InPlace(pages, [entries[i] for i in sorted(staying)], order, rest)
