"""Skeletons: modules whose parameters have shapes and dtypes, but no memory.

A builder runs as it is, with one difference: each parameter becomes a meta tensor the moment it is
registered, before anything initializes it. Buffers are left alone, so that what a constructor
computes (rotary tables, masks, positions) is real and right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from penstock.errors import ModelError

__all__ = ["build_skeleton", "set_payload"]


def set_payload(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Give a parameter other memory, keeping the object, its class and its attributes.

    Whoever holds the parameter (tied modules, lists, optimizers) sees the change.

    Raises
    ------
    RuntimeError
        If torch cannot swap it, because something holds a weak reference to it.
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
        All parameters on meta, all buffers real.

    Raises
    ------
    ModelError
        If a parameter has memory already, or a buffer has none.
    """
    if isinstance(module_or_builder, nn.Module):
        module = module_or_builder
    else:
        with _parameters_on_meta():
            module = module_or_builder()
    if not isinstance(module, nn.Module):
        raise ModelError(f"the builder returned {type(module).__name__}, not a torch.nn.Module")
    _require_skeleton(module)
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter
    builder_thread = threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is None or param.is_meta or threading.get_ident() != builder_thread:
            return
        if isinstance(param, UninitializedParameter):
            raise ModelError(
                f"parameter {name!r} of {type(self).__name__} has no shape until the first call; "
                "give the module its sizes (Linear instead of LazyLinear, and so on)"
            )
        set_payload(param, torch.empty_like(param.data, device="meta"))

    with _patch_lock:
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


_patch_lock = threading.Lock()


def _require_skeleton(module: nn.Module) -> None:
    real = [name for name, parameter in module.named_parameters() if not parameter.is_meta]
    if real:
        raise ModelError(
            f"{len(real)} parameters have memory already (first: {real[0]!r}): pass a builder, "
            "such as lambda: Model(config), or a module made under torch.device('meta')"
        )
    empty = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if empty:
        raise ModelError(
            f"{len(empty)} buffers are on meta (first: {empty[0]!r}), so what the constructor "
            "computed into them is lost: pass a builder, such as lambda: Model(config)"
        )
