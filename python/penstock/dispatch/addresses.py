"""Addresses of paged tensors, for kernels that read them past torch's dispatcher.

Triton's launchers ask `Tensor.data_ptr`, as do callers of ctypes; what they are given has the bytes
in place, and keeps them there. A kernel is launched soon after, at a time that nobody sees. So what
was taken stays until the thread's next operation on paged tensors; and where there is no room for
more, until the call of the innermost module, or the step of a backward pass, is over in which it
was taken. What one of these takes at once has to fit.

Who takes addresses outside of all modules' calls may only compare them: there the oldest go.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch

from penstock import _core
from penstock.dispatch import torch_dispatch
from penstock.errors import CapExceededError
from penstock.torch_private import MODULE_CALL, backward_step

__all__ = ["hold"]

_OUTSIDE = 0
_BITS = (1 << 64) - 1


def hold(tensor: torch.Tensor) -> None:
    """Have a paged tensor in place for who takes its address.

    Raises
    ------
    CapExceededError
        If it does not fit beside what was taken in the same call.
    """
    step = backward_step()
    scope = next(_scopes(sys._getframe(1), step), _OUTSIDE if step is None else _scope(step, 0, 0))
    while True:
        try:
            return torch_dispatch.hold_address(tensor, scope, patient=False)
        except CapExceededError:
            if not _core.release_ended_addresses(_open_scopes(step)):
                break
    try:
        torch_dispatch.hold_address(tensor, scope, patient=True)
    except CapExceededError as error:
        raise CapExceededError(
            f"{error} The addresses that a module takes in one call hold their tensors until it "
            "has ended. To tell tensors apart, compare untyped_storage().data_ptr(), which brings "
            "nothing in",
            requested=error.requested,
            cap=error.cap,
            used=error.used,
        ) from error


def _open_scopes(step: tuple[int, int] | None) -> list[int]:
    frame = sys._getframe(2)
    found = [*_scopes(frame, step), *_scopes(frame, None)]
    return found if step is None else [*found, _scope(step, 0, 0)]


def _scopes(frame: FrameType | None, step: tuple[int, int] | None) -> Iterator[int]:
    """Tell the calls of modules that are under way, the innermost first."""
    while frame is not None:
        if frame.f_code is MODULE_CALL:
            yield _scope(step, id(frame), id(frame.f_locals["self"]))
        frame = frame.f_back


def _scope(*parts: object) -> int:
    return hash(parts) & _BITS or 1
