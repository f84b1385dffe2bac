"""The hooks of a bound model's modules: they tell of calls, and put host copies into state dicts.

Modules are copied and pickled with their hooks. Those of a bound model belong to it alone, so
copies, whose weights are ordinary tensors, have hooks that do nothing in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from penstock.guard import is_guarded, on_host

__all__ = ["Hooks"]


class Hooks:
    """The hooks of one model.

    Parameters
    ----------
    modules
        All of the model's; they are told apart by their index here.
    holders
        Which of them hold tensors of their own, to be saved.
    """

    def __init__(self, modules: Sequence[nn.Module], holders: Iterable[int]) -> None:
        self._modules = modules
        self._calls: list[Any] = []  # handles
        self._saves = [_on_saving(modules[i]) for i in holders]

    def tell_of(
        self, indices: Iterable[int], enter: Callable[[int], None], leave: Callable[[int], None]
    ) -> None:
        """Tell of the calls of these modules from now on, and of no others.

        Parameters
        ----------
        enter, leave
            Called with the index of a module when a call of it begins, and when it has ended, in
            whichever way. Only the hooks hold them, so that whoever is told goes with the hooks.
        """
        self._tell_of_none()
        for i in indices:
            module = self._modules[i]
            self._calls += (
                module.register_forward_pre_hook(_Hook(enter, i), prepend=True),
                module.register_forward_hook(_Hook(leave, i), always_call=True),
            )

    def remove(self) -> None:
        """Take all hooks off, for good."""
        self._tell_of_none()
        for save in self._saves:
            save.remove()

    def _tell_of_none(self) -> None:
        for handle in self._calls:
            handle.remove()
        self._calls.clear()


class _Alone:
    """A hook that does nothing on copies of its module."""

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _get_no_hook, ()


class _Hook(_Alone):
    """Tells of one module's calls."""

    def __init__(self, tell: Callable[[int], None], module: int) -> None:
        self._tell = tell
        self._module = module

    def __call__(self, *arguments: Any) -> None:  # noqa: ANN401
        self._tell(self._module)


class _Save(_Alone):
    """Puts what is kept on the host into state dicts: for who saves them, or reads them later."""

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object
    ) -> None:
        for held in (module._parameters, module._buffers):
            for name in held:
                value = state.get(prefix + name)
                if value is not held[name] and is_guarded(value):
                    state[prefix + name] = on_host(cast(torch.Tensor, value))


def _on_saving(module: nn.Module) -> Any:  # noqa: ANN401
    return module._register_state_dict_hook(_Save())  # type: ignore[no-untyped-call]


def _no_hook(*arguments: object) -> None:
    """Stand where a hook was."""


def _get_no_hook() -> Callable[..., None]:
    return _no_hook
