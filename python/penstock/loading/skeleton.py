"""Skeletons: modules whose parameters have shapes and dtypes, but no memory.

A builder runs as it is, with one difference: each parameter becomes a meta tensor the moment it is
registered, before anything initializes it. Buffers are left alone, so that what a constructor
computes (rotary tables, masks, positions) is real and right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from penstock.errors import ModelError
from penstock.loading.slots import shapeless

__all__ = ["build_skeleton", "set_payload"]


def set_payload(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Give a parameter other memory, keeping the object, its class and its attributes.

    Whoever holds the parameter (tied modules, lists, optimizers) sees the change.

    Raises
    ------
    RuntimeError
        If torch cannot swap it, because something refers to its tensor weakly or by a view.
    """
    replacement = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    if type(parameter) is not nn.Parameter:
        replacement.__class__ = type(parameter)
    replacement.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, replacement)  # type: ignore[no-untyped-call]


def build_skeleton(module_or_builder: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Build a module without memory for its parameters, or check one that has none.

    Parameters
    ----------
    module_or_builder
        A function without arguments that returns the module; or a module that was built under
        `torch.device("meta")`.

    Returns
    -------
    nn.Module
        All parameters on meta; all buffers real, but for those that the constructor computed from
        parameters and that weights bring along.

    Raises
    ------
    ModelError
        If a parameter has memory already or no shape yet, or a buffer has lost its values.
    """
    if isinstance(module_or_builder, nn.Module):
        module = module_or_builder
    else:
        with _parameters_on_meta(), _NoValues():
            module = module_or_builder()
    if not isinstance(module, nn.Module):
        raise ModelError(f"the builder returned {type(module).__name__}, not a torch.nn.Module")
    _require_skeleton(module)
    return module


class _Building(threading.local):
    depth = 0  # builders that run in this thread, one inside the other


_building = _Building()
_patch_lock = threading.Lock()
_patched = 0  # builders that run in all threads
_register_parameter = nn.Module.register_parameter


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    global _patched, _register_parameter
    with _patch_lock:
        if _patched == 0:
            _register_parameter = nn.Module.register_parameter
            nn.Module.register_parameter = _register_on_meta  # type: ignore[method-assign]
        _patched += 1
    _building.depth += 1
    try:
        yield
    finally:
        _building.depth -= 1
        with _patch_lock:
            _patched -= 1
            if _patched == 0:
                nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]


def _register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    _register_parameter(self, name, param)
    if param is None or param.is_meta or _building.depth == 0:
        return
    if isinstance(param, UninitializedParameter):
        raise shapeless(name)
    try:
        set_payload(param, torch.empty_like(param.data, device="meta"))
    except RuntimeError as error:
        raise ModelError(
            f"parameter {name!r} of {type(self).__name__} cannot be made without memory, because "
            f"the constructor keeps a view or a weak reference of it ({error}). Build the module "
            "under torch.device('meta') instead"
        ) from error


class _NoValues(TorchFunctionMode):
    """Skips what fills parameters, which are on meta: a good part of the time that building takes.

    What does not fit into memory is made on meta, too: it can only be a parameter to be replaced.
    """

    _PLAIN = (torch.Tensor, nn.Parameter)  # other classes may do more than fill
    _FACTORIES = frozenset((torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn))
    _FILLS = frozenset(
        (
            torch.Tensor.add_,
            torch.Tensor.clamp_,
            torch.Tensor.erfinv_,
            torch.Tensor.fill_,
            torch.Tensor.mul_,
            torch.Tensor.normal_,
            torch.Tensor.uniform_,
            torch.Tensor.zero_,
        )
    )

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func in self._FILLS or _initializes(func):
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and type(filled) in self._PLAIN and filled.is_meta:
                return filled
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if func not in self._FACTORIES or "allocate memory" not in str(error):
                raise
            return func(*args, **{**kwargs, "device": "meta"})


def _initializes(func: object) -> bool:
    name = getattr(func, "__name__", "")  # of torch, or of who has put another in its place
    return name.endswith("_") and getattr(nn.init, name, None) is func


def _require_skeleton(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise shapeless(name)
    real = [name for name, parameter in module.named_parameters() if not parameter.is_meta]
    if real:
        raise ModelError(
            f"{len(real)} parameters have memory already (first: {real[0]!r}): pass a builder, "
            "such as lambda: Model(config), or a module made under torch.device('meta')"
        )
    lost = []
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(buffer, UninitializedBuffer):
                raise shapeless(full)
            if buffer is not None and buffer.is_meta and name in owner._non_persistent_buffers_set:
                lost.append(full)
    if lost:
        raise ModelError(
            f"{len(lost)} buffers are on meta (first: {lost[0]!r}), so what the constructor "
            "computed into them is lost: pass a builder, such as lambda: Model(config)"
        )
