"""A module that is a model of a manager: brought in when it is called, let go of afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from penstock.arguments import check_call, checked
from penstock.manager.manager import MemoryManager

__all__ = ["LazyModule"]


@checked
class LazyModule(nn.Module):
    """Stands where a module is wanted, and has a manager's model do the work.

    The first call registers the model, if it is told how. Each call acquires it, and releases it
    when it has returned; its pages stay until others need the room. There is nothing else to it:
    it has no parameters of its own, and who wants more asks the manager.

    Parameters
    ----------
    manager
        That has the model, or is to have it.
    name
        The model's.
    module_or_builder, weights, options
        For `MemoryManager.register`, in the first call; None for a model that is registered.

    Raises
    ------
    ValueError
        If one of builder and weights is given without the other.

    Examples
    --------
    >>> decoder = penstock.LazyModule(mm, "vae", build_vae, "vae.safetensors")
    >>> pipeline = nn.Sequential(penstock.LazyModule(mm, "llm"), decoder)
    """

    def __init__(
        self,
        manager: MemoryManager,
        name: str,
        module_or_builder: nn.Module | Callable[[], nn.Module] | None = None,
        weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        if (module_or_builder is None) != (weights is None):
            raise ValueError("to register a model takes both a builder and its weights")
        if module_or_builder is not None:  # not in the first call, where nobody looks for it
            check_call(MemoryManager.register, manager, name, module_or_builder, weights, **options)
        self.manager = manager
        self.name = name
        self._register = (module_or_builder, weights, options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call the model."""
        builder, weights, options = self._register
        if builder is not None and weights is not None:
            self.manager.register(self.name, builder, weights, exist_ok=True, **options)
        module = self.manager.acquire(self.name)
        try:
            return module(*args, **kwargs)
        finally:
            self.manager.release(self.name)
