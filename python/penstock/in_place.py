"""What of a model is held in place, and needs no steps: all of it, or what its plan keeps.

Its pages are in use as a whole, its tensors have their plain class, and only modules that read
others tell of their calls. Which tensors that can be is decided here; `runner` holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    def leaves_room(self, steps: Steps, orders: Iterable[Order], room: int) -> bool:
        """Whether so many pages beside what is held are enough for whatever path a pass takes.

        Parameters
        ----------
        orders
            Of the entry points so far. A path beside them calls some module, alone.
        """
        held = frozenset(self.pages)
        paths = [steps.pages_in_use(order) for order in orders]
        paths.append([steps.pages(module) for module in range(len(steps.modules))])
        return all(len(set(read) - held) <= room for path in paths for read in path)


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
