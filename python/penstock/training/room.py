"""What a step of an optimizer has to have in place at once, of one parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import nn
from torch.optim import Optimizer

from penstock.dispatch import torch_dispatch
from penstock.errors import CapExceededError
from penstock.loading.layout import Reserved
from penstock.memory.model_memory import ModelMemory
from penstock.sizes import format_bytes

__all__ = ["require_room"]

# Of weight, gradient and states: what one operation of a step uses, unless it is fused.
_AT_ONCE = 2
_OF_ADAMAX = 3


def require_room(
    memory: ModelMemory,
    optimizer: Optimizer,
    names: Mapping[nn.Parameter, str],
    beside: Mapping[nn.Parameter, Sequence[Reserved]],
) -> None:
    """See that each operation of a step finds room, since a step that fails midway is half done.

    Parameters
    ----------
    names
        The model's parameters, which lie on the memory.
    beside
        Gradient and states of those that are trained.

    Raises
    ------
    CapExceededError
        If one does not, with the least cap.
    """
    pages, worst = 0, ""
    for group in optimizer.param_groups:
        at_once = _OF_ADAMAX if isinstance(optimizer, torch.optim.Adamax) else _AT_ONCE
        if group.get("fused"):
            at_once = sys.maxsize
        for parameter in group["params"]:
            if parameter not in beside:
                continue
            found = _most_pages(memory, parameter, beside[parameter], at_once)
            if found > pages:
                pages, worst = found, names[parameter]
    if pages > memory.most_pages:
        cap, page_size = memory.pager.cap, memory.pager.page_size
        needed = pages * page_size
        raise CapExceededError(
            f"a step of {type(optimizer).__name__} has {format_bytes(needed)} of parameter "
            f"{worst!r} in place at once, in pages of {format_bytes(page_size)}, and the cap is "
            f"{format_bytes(cap)}: raise it to that at least, or make pages smaller (page_size=)",
            requested=needed,
            cap=cap,
            used=memory.pager.budget.stats().used,
        )


def _most_pages(
    memory: ModelMemory, parameter: nn.Parameter, beside: Sequence[Reserved], at_once: int
) -> int:
    address, nbytes = torch_dispatch.storage_range(parameter) or (memory.region.address, 0)
    ranges = [(address - memory.region.address, nbytes)]
    ranges += [(each.offset, each.nbytes) for each in beside]
    pages = [frozenset(memory.region.pages_of(*each)) for each in ranges if each[1]]
    return max(map(_count, combinations(pages, min(at_once, len(pages)))))


def _count(pages: Iterable[frozenset[int]]) -> int:
    return len(frozenset[int]().union(*pages))
