"""The private parts of torch that Penstock uses, all of them, and nothing else.

Where a new torch breaks something, it is here. `TRIED` has the versions with which each was tried:
those of the tests on a CPU, and on a GPU.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.backends import ContextProp
from torch.multiprocessing.reductions import StorageWeakRef, reduce_tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "INDUCTOR",
    "MODULE_CALL",
    "TRIED",
    "ContextProp",
    "InstanceStep",
    "StorageRef",
    "TorchDispatchMode",
    "backward_step",
    "before_sharing",
    "change_count",
    "compiled_scripts",
    "current_stream",
    "function_of",
    "holds_values_elsewhere",
    "in_backward",
    "inductor_cache",
    "inductor_compiler",
    "inductor_guards",
    "inductor_settings",
    "is_alone",
    "library",
    "own_step",
    "parse_to",
    "reduce_tensor",
    "replace_function",
    "share_storage",
    "tree_leaves",
    "tree_map",
    "without_torch_function",
]

TRIED = {
    "ContextProp": "2.11",
    "INDUCTOR": "2.13",
    "MODULE_CALL": "2.13",
    "InstanceStep": "2.13",
    "StorageRef": "2.13",
    "TorchDispatchMode": "2.11 to 2.13",
    "backward_step": "2.13",
    "before_sharing": "2.11 to 2.13",
    "change_count": "2.11 to 2.13",
    "compiled_scripts": "2.13",
    "current_stream": "2.11",
    "function_of": "2.11 to 2.13",
    "holds_values_elsewhere": "2.11 to 2.13",
    "in_backward": "2.11 to 2.13",
    "inductor_cache": "2.13",
    "inductor_compiler": "2.13",
    "inductor_guards": "2.13",
    "inductor_settings": "2.13",
    "library": "2.13",
    "is_alone": "2.13",
    "own_step": "2.13",
    "parse_to": "2.11 to 2.13",
    "reduce_tensor": "2.11 to 2.13",
    "replace_function": "2.11 to 2.13",
    "share_storage": "2.11 to 2.13",
    "tree_leaves": "2.11 to 2.13",
    "tree_map": "2.11 to 2.13",
    "without_torch_function": "2.11 to 2.13",
}
"""The versions of torch with which each was tried."""

without_torch_function = torch._C.DisableTorchFunctionSubclass
"""Within a block, subclasses of tensors are treated as plain ones."""


def in_backward() -> bool:
    """Whether autograd runs this thread, as when it calculates checkpointed segments again."""
    return bool(torch._C._current_graph_task_id() != -1)


MODULE_CALL = torch.nn.Module._wrapped_call_impl.__code__
"""What runs in a frame of Python's while a module is called."""

library: Any = torch._C
"""Torch's library for Python, where there is no public way to a function of it."""

inductor_compiler: Any = torch._TorchCompileInductorWrapper
"""What `torch.compile` calls to have inductor compile a graph."""

inductor_guards: Any = torch._C._dynamo.guards
"""Has the function by which kernels of inductor's find addresses, if this torch has one."""


INDUCTOR = "torch._inductor.compile_fx"
"""Where programs are compiled ahead of time. Importing it takes seconds."""


def inductor_settings() -> Any:  # noqa: ANN401
    """Return what inductor is told where a call does not say otherwise."""
    from torch._inductor import config

    return config


def inductor_cache() -> Any:  # noqa: ANN401
    """Return the module that makes inductor's kernels for the host, and keeps them."""
    from torch._inductor import codecache

    return codecache


def backward_step() -> tuple[int, int] | None:
    """Tell the backward pass and the step of it that autograd runs in this thread, if it does."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return None
    node = torch._C._current_autograd_node()
    return task, -1 if node is None else node._sequence_nr()


def compiled_scripts() -> list[Any]:
    """Return all functions and methods that were made scripts so far."""
    compiled: Any = torch.jit._state._python_cu
    return list(compiled.get_functions())


def current_stream(ordinal: int) -> int:
    """Return the handle of torch's current stream on a CUDA device."""
    return int(torch._C._cuda_getCurrentRawStream(ordinal))


def parse_to(*args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Read the arguments of `Tensor.to`: device, dtype, whether to wait, memory format."""
    return tuple(torch._C._nn._parse_to(*args, **kwargs))


def change_count(tensor: torch.Tensor) -> int:
    """Count how often a tensor was changed in place, as autograd does."""
    return tensor._version


def share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of one storage, which need not have memory."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def is_alone(tensor: torch.Tensor) -> bool:
    """Whether no other tensor is over the storage of this one."""
    storage = tensor.untyped_storage()  # which is a reference, too
    return bool(torch._C._storage_Use_Count(storage._cdata) <= 2)


def holds_values_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that holds its values in tensors of its own."""
    return type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def before_sharing(look: Callable[[torch.UntypedStorage], None]) -> None:
    """Have a function called with each storage on a GPU before another process is let at it."""
    storages: Any = torch.UntypedStorage
    theirs = storages._share_cuda_

    def share(self: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        look(self)
        return theirs(self, *args, **kwargs)

    storages._share_cuda_ = share


def function_of(name: str) -> Callable[..., Any] | None:
    """Return a function that torch's own Python calls in its library, if there is one."""
    found: Callable[..., Any] | None = getattr(torch._C, name, None)
    return found


def replace_function(name: str, ours: Callable[..., Any]) -> None:
    """Have torch's own Python call a function of ours, for the life of the process."""
    setattr(torch._C, name, ours)


class StorageRef:
    """Tells whether any tensors over a storage are left, and keeps none of them alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage; None where nobody has a tensor over it."""
        found: torch.UntypedStorage | None
        found = torch.UntypedStorage._new_with_weak_ptr(self._ref.cdata)
        return found


def own_step(optimizer: Optimizer) -> Callable[..., Any] | None:
    """Return the `step` of an optimizer's class, below the hooks; None where it is not torch's.

    Nor where somebody has given the optimizer another one; schedulers do, which only mark calls.
    """
    step: Any = type(optimizer).step
    instead = optimizer.__dict__.get("step")
    if instead is not None and not hasattr(instead, "_wrapped_by_lr_sched"):
        return None
    if not getattr(step, "hooked", False) or not step.__module__.startswith("torch.optim."):
        return None
    found: Callable[..., Any] = step.__wrapped__
    return found


class InstanceStep:
    """A `step` for one optimizer in place of that of its class, inside the optimizer's hooks.

    Schedulers replace the step of an instance too, to mark that it was called. One that is made
    later wraps this (by `__func__`); of one that was made before, this has the marks.

    Parameters
    ----------
    optimizer
        It is not kept alive.
    step
        Called with the optimizer and the closure.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[..., Any]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._before = optimizer.__dict__.get("step")

        @functools.wraps(type(optimizer).step)
        def method(self: Optimizer, closure: Any = None) -> Any:  # noqa: ANN401
            return step(self, closure)

        self.__func__ = Optimizer.profile_hook_step(method)
        functools.update_wrapper(self, self.__func__)
        if self._before is not None:
            self._wrapped_by_lr_sched = True
        optimizer.step = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Step, as the method would."""
        optimizer: Any = self._optimizer()
        optimizer._opt_called = True
        return self.__func__(optimizer, *args, **kwargs)

    def remove(self) -> None:
        """Take it off, unless somebody has wrapped it meanwhile."""
        optimizer: Any = self._optimizer()
        if optimizer is None or optimizer.__dict__.get("step") is not self:
            return
        del optimizer.step
        if self._before is not None:
            optimizer.step = self._before
