"""The hooks of a paged model: they tell where calls of the whole model begin and end.

Nothing depends on them but what is foreseen. Modules are copied and pickled with their hooks; those
of a paged model belong to it alone, so copies have hooks that do nothing in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["CallHooks", "without_hooks"]

# Torch has these choose other kernels where a module has hooks.
_WITHOUT_HOOKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class CallHooks:
    """The hooks of one model.

    Parameters
    ----------
    module
        The model.
    begin, end
        Called when a call of it begins, and when it has ended; the latter with whether it returned
        something. After an interrupt it is not called.
    """

    def __init__(
        self, module: nn.Module, begin: Callable[[], None], end: Callable[[bool], None]
    ) -> None:
        self._handles: list[Any] = []
        if not isinstance(module, _WITHOUT_HOOKS):
            self._handles += (
                module.register_forward_pre_hook(_Begin(begin), prepend=True),
                module.register_forward_hook(_End(end), always_call=True),
            )

    def remove(self) -> None:
        """Take them off, for good."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Hook:
    """A hook that does nothing on copies of its module."""

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _get_no_hook, ()


class _Begin(_Hook):
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, args: Any) -> None:  # noqa: ANN401
        if not torch.compiler.is_compiling():  # what is compiled is not told
            self._tell()


class _End(_Hook):
    def __init__(self, tell: Callable[[bool], None]) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        if not torch.compiler.is_compiling():
            self._tell(output is not None)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Take these hooks off a module, and all modules in it, inside the block."""
    places = [
        place
        for part in module.modules()
        for place in (part._forward_hooks, part._forward_pre_hooks)
        if any(isinstance(hook, _Hook) for hook in place.values())
    ]
    before = [dict(place) for place in places]
    try:
        for place in places:
            for key in [key for key, hook in place.items() if isinstance(hook, _Hook)]:
                del place[key]
        yield
    finally:
        for place, hooks in zip(places, before, strict=True):
            place.clear()
            place.update(hooks)


def _no_hook(*arguments: object) -> None:
    """Stand where a hook was."""


def _get_no_hook() -> Callable[..., None]:
    return _no_hook
