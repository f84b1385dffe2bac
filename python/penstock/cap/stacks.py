"""The Python stacks that made large tensors, noted on request.

The allocator runs without Python, so it cannot know who asks. A dispatch mode does: it sees the
result of every operation of its thread, and notes the stack by the address of the result's memory.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from penstock.torch_private import TorchDispatchMode, tree_leaves

__all__ = ["LARGE_BLOCK", "StackRecorder"]

LARGE_BLOCK = 1 << 20
"""Bytes of memory from which on stacks are noted."""

_DEPTH = 8  # calls of a stack
_MOST = 4096  # stacks; the oldest go first
_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__)))


class StackRecorder(TorchDispatchMode):
    """Notes who made each large tensor, in the thread that enters it.

    Parameters
    ----------
    explain
        Returns what to add to the message of an out-of-memory error.
    """

    def __init__(self, explain: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._explain = explain
        self._stacks: dict[int, tuple[str, ...]] = {}  # by address, the oldest first
        self._thread = threading.current_thread()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation, and note its stack if it made something large."""
        try:
            result = func(*args, **(kwargs or {}))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{error}{self._explain()}") from None
        made = _addresses(result)
        if made and (new := made - _addresses((args, kwargs))):
            stack = _stack()
            for address in new:
                self._stacks.pop(address, None)  # of memory that was freed since
                self._stacks[address] = stack
            while len(self._stacks) > _MOST:
                del self._stacks[next(iter(self._stacks))]
        return result

    def require_own_thread(self) -> None:
        """Refuse other threads, whose modes are others.

        Raises
        ------
        ValueError
            Naming the thread that has to do it.
        """
        if threading.current_thread() is not self._thread:
            raise ValueError(
                f"stacks are recorded in the thread {self._thread.name!r} since it called "
                "record_stacks(True): call record_stacks(False) there"
            )

    def stack_of(self, address: int) -> tuple[str, ...]:
        """Return the stack of what was last made at an address, innermost first; empty if none."""
        return self._stacks.get(address, ())


def _addresses(values: Any) -> set[int]:  # noqa: ANN401
    """Return where the memory of the large tensors among values starts."""
    found = set()
    for value in tree_leaves(values):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_meta:
            continue
        if value.layout is not torch.strided:
            continue
        storage = value.untyped_storage()
        if storage.nbytes() >= LARGE_BLOCK:
            found.add(storage.data_ptr())
    return found


def _stack() -> tuple[str, ...]:
    lines: list[str] = []
    call = sys._getframe(1)
    while call is not None and len(lines) < _DEPTH:
        code = call.f_code
        if not code.co_filename.startswith(_THEIRS):
            lines.append(f"{code.co_filename}:{call.f_lineno} in {code.co_name}")
        call = call.f_back  # type: ignore[assignment]
    return tuple(lines)
