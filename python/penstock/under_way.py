"""Which modules of a model a thread is calling just now, by its frames, where no hooks tell."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType

from torch import nn

__all__ = ["calls_under_way", "frame_of_thread", "is_inside_penstock"]

_CALL = nn.Module._call_impl.__code__

# Who runs code of these may hold what going back to steps needs.
_OWN = frozenset(
    f"penstock.{module}" for module in ("guard", "hooks", "memory", "planning", "runner")
)


def frame_of_thread(thread: int) -> FrameType | None:
    """Return the innermost frame of a thread."""
    return sys._current_frames().get(thread)


def is_inside_penstock(frame: FrameType | None) -> bool:
    """Whether the frame, or one around it, is of code that runs a model."""
    while frame is not None:
        if frame.f_globals.get("__name__") in _OWN:
            return True
        frame = frame.f_back
    return False


def calls_under_way(
    frame: FrameType | None, modules: Mapping[int, int]
) -> list[tuple[int, FrameType]]:
    """List the calls of a model's modules that have not returned, the outermost first.

    Parameters
    ----------
    frame
        The innermost of the thread that makes them.
    modules
        The index of each module by its `id`.

    Returns
    -------
    list
        Of the module's index, and of the frame that lasts as long as its call.
    """
    found = []
    while frame is not None:
        if frame.f_code is _CALL:
            index = modules.get(id(frame.f_locals.get("self")))
            if index is not None:
                found.append((index, frame))
        frame = frame.f_back
    return found[::-1]
