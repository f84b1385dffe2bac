"""Kernels of the user's own in place of modules' forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import nn
from typing_extensions import Self

from penstock.errors import ModelError

__all__ = ["Kernel", "KernelFunction"]

KernelFunction = Callable[..., Any]
"""Called with the module, then with what the module is called with."""


class Kernel:
    """A function in place of the forward of some modules; made by `MemoryManager.register_kernel`.

    A context manager, too, which takes it off at the end of the block.

    Parameters
    ----------
    function
        What is called instead.
    modules
        Names and modules, of which none has a kernel.
    holding
        Returns what has the tensors of a module in place while the function runs.
    """

    def __init__(
        self,
        function: KernelFunction,
        modules: Sequence[tuple[str, nn.Module]],
        holding: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        for name, module in modules:
            if isinstance(module.__dict__.get("forward"), _Replaced):
                raise ModelError(f"module {name!r} has a kernel already; remove that first")
        self._modules: list[tuple[nn.Module, Any]] = []
        self.names = tuple(name for name, _ in modules)
        for _, module in modules:
            self._modules.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _Replaced(function, module, holding)

    def remove(self) -> None:
        """Give the modules their own forward back; once more does nothing."""
        while self._modules:
            module, before = self._modules[-1]
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
            self._modules.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Replaced:
    """The forward of a module that has a kernel. Copies of the module have their own forward."""

    def __init__(
        self,
        function: KernelFunction,
        module: nn.Module,
        holding: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        self._function = function
        self._module = module
        self._holding = holding

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with self._holding(self._module):
            return self._function(self._module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _own_forward(memo.get(id(self._module), self._module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self._module,)


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return MethodType(type(module).forward, module)
