"""What hands the memory of tensors out without asking torch's dispatcher.

Arrays, DLPack capsules, lists, pickles and copies of storages read memory as it is, and nothing
brings in a paged tensor's bytes for them. They are given plain copies instead. What would have to
share memory with the tensor (an array to write to, memory of several processes) is read-only, or
refused.

Who asks for a tensor's address (`data_ptr`) gets it with the bytes in place, for a kernel that is
launched at once; they stay until the thread's next operation on paged tensors. Triton's launchers
ask that way. Storages give the address alone, which tells tensors apart.
"""

from __future__ import annotations

import atexit
import copy
from collections.abc import Callable
from functools import wraps
from multiprocessing.reduction import ForkingPickler
from typing import Any

import safetensors.torch
import torch
import torch.utils.dlpack
from torch import nn

from penstock import _core
from penstock.dispatch import addresses, torch_dispatch
from penstock.dispatch.inductor import hold_for_kernels
from penstock.errors import ModelError
from penstock.torch_private import reduce_tensor

__all__ = ["give_out_copies"]

_done: list[bool] = []


def give_out_copies() -> None:
    """Have torch's functions give out copies of paged tensors, from now on."""
    if _done:
        return
    _done.append(True)
    tensor = torch.Tensor
    _replace(tensor, "data_ptr", _data_ptr)
    _replace(tensor, "numpy", _numpy)
    _replace(tensor, "tolist", lambda theirs, self: theirs(_plain(self)))
    _replace(tensor, "__dlpack__", lambda theirs, self, *a, **k: theirs(_plain(self), *a, **k))
    _replace(torch.utils.dlpack, "to_dlpack", lambda theirs, self: theirs(_plain(self)))
    _replace(tensor, "__reduce_ex__", lambda theirs, self, protocol: theirs(_plain(self), protocol))
    _replace(tensor, "__deepcopy__", _deepcopy)
    _replace(tensor, "share_memory_", _refuse_sharing)
    for name in ("__bool__", "__complex__", "__float__", "__index__", "__int__"):
        _replace(tensor, name, lambda theirs, self: theirs(torch_dispatch.readable(self)))
    for name in ("new", "new_tensor"):  # which ask the highest key of a tensor for its device
        _replace(tensor, name, lambda theirs, self, *a, **k: theirs(_keyless(self), *a, **k))
    for name in ("_to_ndarray", "_tobytes"):  # of safetensors, by its version
        if hasattr(safetensors.torch, name):
            _replace(safetensors.torch, name, lambda theirs, self, *a: theirs(_plain(self), *a))
    _refuse_property(tensor, "__cuda_array_interface__")
    hold_for_kernels()
    atexit.register(_core.release_addresses)  # while there is a device to release it on
    for kind in (torch.Tensor, nn.Parameter):
        ForkingPickler.register(kind, _reduce_for_process)


def _replace(owner: object, name: str, ours: Callable[..., Any]) -> None:
    """Replace a method, or a function whose first argument is a tensor, for paged ones alone."""
    theirs = getattr(owner, name)

    @wraps(theirs)
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if torch_dispatch.is_keyed(self):
            return ours(theirs, self, *args, **kwargs)
        return theirs(self, *args, **kwargs)

    setattr(owner, name, method)


def _refuse_property(owner: type, name: str) -> None:
    theirs = getattr(owner, name)

    @wraps(theirs.fget)
    def value(self: torch.Tensor) -> Any:  # noqa: ANN401
        if torch_dispatch.is_keyed(self) and self.is_cuda:
            raise ModelError(
                "a paged tensor's memory is not to be shared: it holds other bytes later. Give a "
                "copy, tensor.clone(), or through DLPack, which copies by itself"
            )
        return theirs.fget(self)

    setattr(owner, name, property(value))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a paged tensor into ordinary memory, on its device, with its class and attributes."""
    with torch.inference_mode(False), torch.no_grad():
        value = tensor.detach().clone(memory_format=torch.preserve_format)
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    elif tensor.is_leaf and tensor.requires_grad:
        value.requires_grad_()
    if type(value) is not type(tensor):
        value.__class__ = type(tensor)
    value.__dict__.update(tensor.__dict__)
    return value


def _keyless(tensor: torch.Tensor) -> torch.Tensor:
    return torch_dispatch.plain(tensor)


def _data_ptr(theirs: Callable[[torch.Tensor], int], self: torch.Tensor) -> int:
    addresses.hold(self)
    return theirs(self)


def _numpy(theirs: Callable[..., Any], self: torch.Tensor, *, force: bool = False) -> Any:  # noqa: ANN401
    if self.requires_grad and torch.is_grad_enabled() and not force:
        return theirs(self)  # torch's own refusal
    array = theirs(_plain(self.detach()), force=force)
    array.flags.writeable = False  # it is a copy: what is written to it would be lost
    return array


def _deepcopy(theirs: Callable[..., Any], self: torch.Tensor, memo: dict[Any, Any]) -> Any:  # noqa: ANN401
    if not self.is_leaf:
        return theirs(self, memo)  # torch's own refusal
    if id(self) not in memo:
        copied = _plain(self)
        # What shares memory in the original does so in the copy.
        whole = ("penstock", self.untyped_storage().data_ptr(), self.dtype)
        if whole not in memo:
            base = torch.empty(0, dtype=self.dtype, device=self.device)
            size = self.untyped_storage().nbytes() // self.element_size()
            base.set_(self.untyped_storage(), 0, (size,), (1,))
            memo[whole] = torch_dispatch.key(base).clone()
        shared = memo[whole].as_strided(self.shape, self.stride(), self.storage_offset())
        copied.data = shared
        if self.grad is not None:
            copied.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = copied
    return memo[id(self)]


def _refuse_sharing(theirs: Callable[..., Any], self: torch.Tensor) -> Any:  # noqa: ANN401
    raise ModelError(
        "a paged tensor cannot be shared with other processes: its memory is not the process's own "
        "for long. Share a copy, tensor.clone().share_memory_()"
    )


def _reduce_for_process(tensor: torch.Tensor) -> Any:  # noqa: ANN401
    plain = _plain(tensor) if torch_dispatch.is_keyed(tensor) else tensor
    return reduce_tensor(plain)  # type: ignore[no-untyped-call]
