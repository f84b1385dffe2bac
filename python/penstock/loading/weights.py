"""Where the values of tensors come from: files, memory, or a function that makes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.checkpoint import TensorEntry, open_checkpoint
from penstock.checkpoint.dtypes import torch_dtype, torch_shape
from penstock.checkpoint.kinds import TORCH_SUFFIXES
from penstock.checkpoint.torch_files import load_torch_checkpoint
from penstock.errors import CheckpointError

__all__ = ["Source", "Weights", "open_weights", "require_floating"]


@dataclass(frozen=True, eq=False)
class Source:
    """One tensor of the weights.

    Parameters
    ----------
    where
        Extents of files, in which it lies piece behind piece; or the tensor itself, in memory; or a
        function that makes it in memory, which is called when its bytes are wanted.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    where: tuple[TensorEntry, ...] | torch.Tensor | Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """All tensors that can be had, by name, and what they came from."""

    origin: str
    sources: Mapping[str, Source]


def open_weights(
    weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Weights,
) -> Weights:
    """Find the tensors of a checkpoint, or take those of a state dict.

    Parameters
    ----------
    weights
        What `open_checkpoint` takes, a torch file, tensors by name, or what this returns.

    Raises
    ------
    CheckpointError
        If there is nothing that can be read.
    """
    if isinstance(weights, Weights):
        return weights
    if isinstance(weights, Mapping):
        return Weights("the given tensors", dict(_in_memory(weights)))
    path = Path(weights)
    if path.name.endswith(TORCH_SUFFIXES):
        return Weights(str(path), dict(_in_memory(load_torch_checkpoint(path))))
    return Weights(str(path), dict(_in_files(open_checkpoint(path).tensors)))


def require_floating(dtype: torch.dtype | None) -> None:
    """Refuse a type that weights cannot be converted to without losing what they are.

    Raises
    ------
    ValueError
        If it is not a floating-point type.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is a floating-point torch.dtype or None, not {dtype!r}")


def _in_memory(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Source]]:
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"weights: a tensor's name is a str, not {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise _without_bytes(name, f"a {type(tensor).__name__}")
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            kind = "on meta" if tensor.is_meta else "sparse or quantized"
            raise _without_bytes(name, f"a tensor that is {kind}")
        values = tensor.detach().resolve_conj().resolve_neg()
        yield name, Source(name, values.dtype, tuple(values.shape), values)


def _without_bytes(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} of the given tensors is {what}: give a dense tensor with values", tensor=name
    )


def _in_files(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Source]]:
    for name, entry in entries.items():
        shape = tuple(torch_shape(entry.dtype, entry.shape))
        yield name, Source(name, torch_dtype(entry.dtype), shape, (entry,))
