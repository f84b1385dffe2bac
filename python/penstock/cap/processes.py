"""Tensors on their way to other processes, where their memory cannot be shared.

Memory under a hard cap is mapped piece by piece, and another process could neither open it nor be
counted. Torch refuses it where the tensor is pickled, which a queue does on a thread of its own:
who put the tensor there goes on, and who waits for it waits for ever. So it is refused where it is
put into a queue as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from multiprocessing.queues import JoinableQueue, Queue
from typing import Any

import torch

from penstock.errors import DeviceError
from penstock.torch_private import before_sharing

__all__ = ["refuse_sharing"]

_Holder = torch.Tensor | torch.UntypedStorage | torch.TypedStorage


def refuse_sharing(is_served: Callable[[torch.device], bool]) -> None:
    """Refuse tensors of some devices that are sent to other processes, from now on.

    Parameters
    ----------
    is_served
        Tells of a device whether its memory cannot be shared.
    """

    def refuse(value: _Holder) -> None:
        if not is_served(value.device):
            return
        raise DeviceError(
            f"a tensor on {str(value.device)!r} cannot be sent to another process: memory under a "
            "hard cap cannot be shared. Send a copy, tensor.cpu(), and move it to a device there",
            call="share",
            code=0,
        )

    def guard(queue: Any) -> None:  # noqa: ANN401
        theirs = queue.put

        @wraps(theirs)
        def put(self: Any, obj: Any, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
            for value in _held(obj):
                refuse(value)
            theirs(self, obj, *arguments, **options)

        queue.put = put

    before_sharing(refuse)
    guard(Queue)
    guard(JoinableQueue)


def _held(value: Any) -> Iterator[_Holder]:  # noqa: ANN401
    """Find the tensors in a value and in containers of them."""
    left, seen = [value], set()
    while left:
        item = left.pop()
        if isinstance(item, _Holder):
            yield item
        elif isinstance(item, (dict, list, tuple, set, frozenset)) and id(item) not in seen:
            seen.add(id(item))
            left.extend(item.values() if isinstance(item, dict) else item)
