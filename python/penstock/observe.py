"""Seeing which tensors operations really read, whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["ReadObserver", "storage_address"]


class ReadObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, calls back before each operation with the tensors that it reads.

    Parameters
    ----------
    tensors
        Indices of tensors by the address at which their storage begins.
    on_read
        Called with the indices, before the operation runs.
    """

    def __init__(
        self, tensors: Mapping[int, Sequence[int]], on_read: Callable[[set[int]], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = tensors
        self._on_read = on_read

    def stop(self) -> None:
        """Tell of nothing any more, where the mode cannot be left."""
        self._tensors = {}

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        read: set[int] = set()
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                read.update(self._tensors.get(storage_address(value), ()))
        if read:
            self._on_read(read)
        return func(*args, **kwargs)


def storage_address(tensor: torch.Tensor) -> int:
    """Return where a tensor's storage begins, by which tensors and views of them are known."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass without memory of its own
        return 0
