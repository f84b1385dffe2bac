"""Kernels that torch's inductor makes: where they get the addresses of paged tensors from.

Matrix products of a compiled model go through torch's dispatcher. The other kernels take addresses:
Triton's on a GPU ask `Tensor.data_ptr`, as any kernel of Triton's. Those in C++ for a CPU ask a
function of torch's whose address they are told when they are loaded; they are told of ours. A
program that inductor writes in C++ as a whole asks nobody, so it is refused paged tensors; and so
is one that it compiles ahead of time, which has the weights in it.

All of it is private to torch. Where it is not as expected, paged tensors are refused to compiled
models, rather than read as they lie.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from penstock.dispatch import torch_dispatch
from penstock.errors import ModelError
from penstock.torch_private import (
    INDUCTOR,
    inductor_cache,
    inductor_compiler,
    inductor_guards,
    inductor_settings,
)

__all__ = ["hold_for_kernels"]

_ADDRESS = "_torchinductor_pyobject_tensor_data_ptr"
_CATCH = "catch(std::exception const& e) {{"
_OURS = f"{_CATCH}\n                if (PyErr_Occurred()) return nullptr;  // as penstock says"
_ready: list[bool] = []  # whether inductor's kernels for a CPU ask us


def hold_for_kernels() -> None:
    """Have inductor's kernels ask for paged tensors, in models that are compiled from now on."""
    if hasattr(inductor_guards, _ADDRESS):
        setattr(inductor_guards, _ADDRESS, torch_dispatch.address_function())
    theirs = inductor_compiler.__call__

    @wraps(theirs)
    def compile_holding(self: Any, model: Any, inputs: Any, **options: Any) -> Any:  # noqa: ANN401
        if not _ready:
            _ready.append(_prepare())
        compiled = theirs(self, model, inputs, **options)
        whole = {**self.config, **(options.get("config_patches") or {})}
        if _ready[0] and not whole.get("cpp_wrapper", inductor_settings().cpp_wrapper):
            return compiled
        return _refusing(compiled, list(model.parameters()) + list(model.buffers()))

    inductor_compiler.__call__ = compile_holding
    _when_imported(INDUCTOR, _refuse_ahead_of_time)


def _prepare() -> bool:
    """Have kernels pass our errors on. Those that were loaded before are made anew."""
    codecache = inductor_cache()
    cache: Any = getattr(codecache, "CppPythonBindingsCodeCache", None)
    template = getattr(cache, "suffix_template", "")
    if not hasattr(inductor_guards, _ADDRESS) or _ADDRESS not in template:
        return False
    cache.suffix_template = template.replace(_CATCH, _OURS)
    cache.cache_clear()
    codecache.PyCodeCache.cache_clear()
    return _OURS in cache.suffix_template


def _refuse_ahead_of_time(compile_fx: ModuleType) -> None:
    theirs = getattr(compile_fx, "compile_fx_aot", None)
    if theirs is None:
        return

    @wraps(theirs)
    def compile_fx_aot(model: torch.nn.Module, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        own = (value for part in model.modules() for value in vars(part).values())
        if any(map(torch_dispatch.is_keyed, (*model.parameters(), *model.buffers(), *own))):
            raise ModelError(
                "a program that is compiled ahead of time takes weights as they lie in memory, and "
                "this one's are paged: restore the model first (penstock.restore, give_back)"
            )
        return theirs(model, *args, **options)

    compile_fx.compile_fx_aot = compile_fx_aot  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    """Has a function called with a module when that was imported, which takes seconds to do."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._function = function

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ANN401
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._function(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, function))


def _refusing(compiled: Callable[..., Any], own: Iterable[torch.Tensor]) -> Callable[..., Any]:
    @wraps(compiled)
    def call(*inputs: Any) -> Any:  # noqa: ANN401
        if any(map(torch_dispatch.is_keyed, (*own, *inputs))):
            raise ModelError(
                "inductor has made one program of this model, which reads weights past torch's "
                "dispatcher: compile it without cpp_wrapper, or with another backend"
            )
        return compiled(*inputs)

    return call
