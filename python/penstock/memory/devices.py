"""Devices by torch's names, without being the first to use CUDA."""

from __future__ import annotations

import torch

from penstock import _core

__all__ = ["current_ordinal", "device_of", "open_device", "uses_cuda"]


def open_device(device: str | torch.device | _core.Device) -> tuple[_core.Device, torch.device]:
    """Open a device by its torch name.

    Parameters
    ----------
    device
        `"cpu"`, `"cuda"`, `"cuda:N"`, a torch.device, or `"auto"`: CUDA where there is any. A
        device of the core is taken as it is.

    Returns
    -------
    tuple
        The core's device, and torch's name for it.

    Raises
    ------
    DeviceError
        If there is no such device here; the message says why.
    """
    if isinstance(device, _core.Device):
        core = device
    else:
        name = str(device)
        if name == "auto":
            name = "cuda" if _core.cuda_device_count() > 0 else "cpu"
        if name == "cuda" and torch.cuda.is_available():
            name = f"cuda:{current_ordinal()}"
        if name == "cpu:0":
            name = "cpu"
        core = _core.open_device(name)
    info = core.info()
    if info.kind is _core.DeviceKind.cuda:
        return core, torch.device("cuda", info.ordinal)
    return core, torch.device("cpu")


def device_of(name: str | torch.device) -> torch.device:
    """Return torch's device of a name.

    Raises
    ------
    ValueError
        If torch has no such name.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'unknown device {name!r}: use "cpu", "cuda" or "cuda:N"') from error


def current_ordinal() -> int:
    """Return torch's current CUDA device, without being the first to use CUDA.

    A hard cap has to come before that.
    """
    return torch.cuda.current_device() if uses_cuda() else 0


def uses_cuda() -> bool:
    """Whether torch has begun to use CUDA in this process."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
