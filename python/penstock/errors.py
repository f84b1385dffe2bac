"""The exceptions that Penstock raises.

Each message is complete in itself: what is wrong, the numbers, and the remedy. The attributes
repeat the parts that a program may want to act on; an attribute is None where it does not apply.
The C++ core raises the same classes. Every error can be pickled, so it crosses process borders.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CapExceededError",
    "CheckpointError",
    "DeviceError",
    "ModelError",
    "PenstockError",
    "ScheduleError",
]


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose."""


class CapExceededError(PenstockError, MemoryError):
    """A request does not fit under the cap.

    Parameters
    ----------
    message
        What was asked for, what is held, and how to make room.
    requested, cap, used
        Bytes asked for, bytes allowed, and bytes charged when the request came.
    """

    def __init__(
        self,
        message: str = "",
        *,
        requested: int | None = None,
        cap: int | None = None,
        used: int | None = None,
    ) -> None:
        super().__init__(message)
        self.requested = requested
        self.cap = cap
        self.used = used


class DeviceError(PenstockError):
    """A call to the device's driver or runtime failed.

    Parameters
    ----------
    message
        The call, its result, and what to do.
    call
        Name of the function that failed.
    code
        The code it returned.
    """

    def __init__(
        self, message: str = "", *, call: str | None = None, code: int | None = None
    ) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class CheckpointError(PenstockError):
    """A checkpoint cannot be read, or breaks a rule of its format.

    Parameters
    ----------
    message
        The file, the tensor, the rule that is broken, and what to do.
    path
        The file or directory at fault.
    tensor
        Name of the tensor at fault.
    offset
        Byte in the file at which the fault lies.
    """

    def __init__(
        self,
        message: str = "",
        *,
        path: Path | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor
        self.offset = offset


class ScheduleError(PenstockError):
    """The steps of a pass cannot be recorded, or contradict the recorded schedule."""


class ModelError(PenstockError):
    """A model name is unknown or taken, or a model cannot be bound to its checkpoint."""
