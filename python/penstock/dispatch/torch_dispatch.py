"""Paged tensors, seen where torch dispatches operations: what the library in C++ offers.

A keyed tensor is an ordinary one whose implementation carries one more dispatch key. Before each
operation that reads or writes one, torch's dispatcher calls the library, which has the core bring
in the bytes. The library is built against the installed torch, with the package or on first use.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import threading
from typing import TYPE_CHECKING, Protocol, cast

from penstock import built_libraries as built
from penstock.errors import DeviceError

if TYPE_CHECKING:
    import torch

__all__ = [
    "address_function",
    "hold_address",
    "install",
    "is_keyed",
    "key",
    "plain",
    "readable",
    "storage_range",
    "take_memory",
]

_NAME = "penstock_torch_dispatch"


class _Library(Protocol):
    def install(self, capsule: object, /) -> None: ...
    def key(self, tensor: torch.Tensor, /) -> torch.Tensor: ...
    def is_keyed(self, value: object, /) -> bool: ...
    def readable(self, tensor: torch.Tensor, /) -> torch.Tensor: ...
    def plain(self, tensor: torch.Tensor, /) -> torch.Tensor: ...
    def take_memory(self, tensor: torch.Tensor, values: torch.Tensor, /) -> None: ...
    def hold_address(self, tensor: torch.Tensor, scope: int, patient: bool, /) -> None: ...
    def address_function(self) -> int: ...
    def storage_range(self, tensor: torch.Tensor, /) -> tuple[int, int] | None: ...


_lock = threading.Lock()
_loaded: _Library | None = None


def install(capsule: object) -> None:
    """Have operations on keyed tensors held by these functions from now on.

    Parameters
    ----------
    capsule
        The core's table of functions (`PagingApi`). It is kept for the life of the process.

    Raises
    ------
    DeviceError
        If the library cannot be built or loaded; this holds for each function of the module.
    ValueError
        If the table is another one, or of another version.
    """
    _library().install(capsule)


def key(tensor: torch.Tensor) -> torch.Tensor:
    """Return a keyed tensor over the same storage, with a gradient and history of its own.

    Raises
    ------
    ValueError
        If the tensor is not an ordinary strided one.
    """
    return _library().key(tensor)


def is_keyed(value: object) -> bool:
    """Return whether this is a keyed tensor. Anything else than a tensor is none."""
    return _library().is_keyed(value)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a keyed tensor; a plain copy where torch itself takes the key out of what it calls.

    It does so where it makes a tensor of numbers, which may be tensors without dimensions.
    """
    return _library().readable(tensor)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the key over the same storage: nobody sees what is done with it."""
    return _library().plain(tensor)


def take_memory(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Have the storage of a tensor take over the memory of another's, which is left without any.

    All tensors over the storage are there from then on.

    Raises
    ------
    ValueError
        If the storages differ in size or device.
    """
    _library().take_memory(tensor, values)


def hold_address(tensor: torch.Tensor, scope: int, *, patient: bool) -> None:
    """Have the bytes of a keyed tensor in place for a kernel that is given its address.

    They stay until this thread's next operation on paged tensors, or until a call of a model or the
    backward pass ends; what a host tier can keep of them counts as written.

    Parameters
    ----------
    scope
        Told to `_core.release_ended_addresses`, by which they may go sooner.
    patient
        Whether to wait for other threads where there is no room.

    Raises
    ------
    CapExceededError
        If they do not fit beside what operations and other addresses hold.
    """
    _library().hold_address(tensor, scope, patient)


def address_function() -> int:
    """Return where `void* (*)(PyObject* tensor)` is, which kernels of inductor's ask."""
    return _library().address_function()


def storage_range(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return address and length in bytes of what a view spans; None if it has no bytes."""
    return _library().storage_range(tensor)


def _library() -> _Library:
    return _loaded if _loaded is not None else _load()


def _load() -> _Library:
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _open()
        return _loaded


def _open() -> _Library:
    try:
        path = built.build_extension(built.torch_dispatch_sources(), built.prebuilt_directory())
        loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
        spec = importlib.util.spec_from_loader(_NAME, loader)
        if spec is None:
            raise ImportError(f"{path} is no extension of Python's")
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except subprocess.CalledProcessError as error:
        raise _failure(f"the compiler failed: {error.stderr.strip()[-1000:]}") from error
    except (ImportError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise _failure(str(error)) from error
    return cast(_Library, module)


def _failure(reason: str) -> DeviceError:
    import torch

    return DeviceError(
        f"the library that sees torch's operations cannot be had for torch {torch.__version__}: "
        f"{reason}. Install a C++ compiler or set CXX, or reinstall penstock against this torch "
        "(pip install --no-build-isolation)"
    )
