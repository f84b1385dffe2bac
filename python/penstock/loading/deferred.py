"""Tensors that are not read yet, for libraries that rearrange weights while they load them.

A deferred tensor has a shape and a dtype, on meta, and knows where its values come from. What is
done to it is done to that: a part of a tensor in a file is a part of its extent, tensors that are
joined are their extents piece behind piece, and anything else is a computation for later. So a
library's own rules for loading a checkpoint run without a byte being read, and most of what they
give can still be read from the files straight to its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from penstock.checkpoint import TensorEntry
from penstock.errors import CheckpointError, ModelError
from penstock.loading.fill import open_listed
from penstock.loading.metadata import METADATA
from penstock.loading.weights import Source
from penstock.torch_private import (
    change_count,
    parse_to,
    share_storage,
    tree_leaves,
    tree_map,
    without_torch_function,
)

__all__ = ["Deferred", "defer", "source_of"]

_LEAST_RUN = 4096  # bytes; tensors that interleave in smaller runs are joined in memory
_WITHOUT_EFFECT: frozenset[Any] = frozenset(
    (torch.Tensor.cpu, torch.Tensor.clone, torch.clone, torch.Tensor.contiguous)
)
_TO = torch.Tensor.to
_JOINS = {torch.cat: False, torch.concat: False, torch.stack: True}  # whether it makes a dimension


@dataclass(frozen=True)
class _Computed:
    """One of the results of a function of other tensors."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int

    def __call__(self) -> torch.Tensor:
        args, kwargs = tree_map(_value, (self.args, self.kwargs))
        with torch.no_grad():
            value: torch.Tensor = tree_leaves(self.func(*args, **kwargs))[self.index]
        return value


class Deferred(torch.Tensor):
    """A tensor on meta that knows where its values come from."""

    _where: tuple[TensorEntry, ...] | torch.Tensor | Callable[[], torch.Tensor]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        with without_torch_function():
            if func in METADATA:
                return func(*args, **kwargs)
            if func is _TO:
                func, args, kwargs = _only_dtype(args, kwargs)
            return _deferred_call(func, args, kwargs)


def defer(source: Source) -> Deferred:
    """Make a deferred tensor of one of a checkpoint's."""
    form = torch.empty(source.shape, dtype=source.dtype, device="meta")
    return _make(form, source.where)


def source_of(name: str, tensor: torch.Tensor) -> Source:
    """Say where a tensor's values come from: a deferred one's, or one that has them.

    Parameters
    ----------
    name
        Of the tensor, in the source.
    """
    with without_torch_function():
        where = tensor._where if isinstance(tensor, Deferred) else tensor.detach()
        return Source(name, tensor.dtype, tuple(tensor.shape), where)


def _make(form: torch.Tensor, where: Any) -> Deferred:  # noqa: ANN401
    made = form.as_subclass(Deferred)
    made._where = where
    return made


def _only_dtype(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Leave of a call of `Tensor.to` what changes values: which device they go to does not."""
    tensor, *rest = args
    if rest and isinstance(rest[0], torch.Tensor):
        return _TO, (tensor, rest[0].dtype), {}
    named = {key: kwargs[key] for key in kwargs if key != "copy"}
    _, dtype, _, form = parse_to(*rest, **named)
    order = {} if form is None else {"memory_format": form}
    return _TO, (tensor, tensor.dtype if dtype is None else dtype), order


def _deferred_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Run a function on meta, and say where the values of its results come from."""
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Deferred)]
    if func in _WITHOUT_EFFECT and len(args) == 1 and not kwargs and args[0].is_contiguous():
        return _make(torch.empty_like(args[0], device="meta"), args[0]._where)
    versions = [change_count(tensor) for tensor in given]
    try:
        result = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # it asks for values
        result = None
    if [change_count(tensor) for tensor in given] != versions:
        raise ModelError(
            f"{getattr(func, '__name__', func)} changes a weight that is not read yet: load the "
            "model with from_pretrained, and give it to penstock.offload"
        )
    found = tree_leaves(result)
    if not any(isinstance(value, torch.Tensor) for value in found):
        values, named = tree_map(_value, (args, kwargs))
        return func(*values, **named)
    places = {id(value): index for index, value in enumerate(found)}

    def wrap(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, torch.Tensor) or any(value is each for each in given):
            return value
        where = _part(value, given) or _joined(func, args, kwargs)
        return _make(value, where or _Computed(func, args, kwargs, places[id(value)]))

    return tree_map(wrap, result)


def _value(value: Any) -> Any:  # noqa: ANN401
    """Return a deferred tensor's values, as an ordinary tensor; anything else as it is."""
    if not isinstance(value, Deferred):
        return value
    with without_torch_function():
        where = value._where
        if isinstance(where, torch.Tensor):
            return where
        if not isinstance(where, tuple):
            return where()
        values = torch.empty(value.shape, dtype=value.dtype)
        flat: Any = values.reshape(-1).view(torch.uint8).numpy()
        at = 0
        for entry in where:
            try:
                open_listed(entry).read(entry.offset, flat[at : at + entry.nbytes])
            except CheckpointError as error:
                error.tensor = entry.name
                raise
            at += entry.nbytes
        return values


def _part(value: torch.Tensor, given: Sequence[Deferred]) -> tuple[TensorEntry, ...] | None:
    """Give the extents of a view, where it lies in the files in one piece."""
    for tensor in given:
        same = share_storage(value, tensor) and value.dtype == tensor.dtype
        if same and isinstance(tensor._where, tuple):
            if not value.is_contiguous():
                return None
            first = int(value.storage_offset() - tensor.storage_offset()) * value.itemsize
            return tuple(_cut(tensor._where, first, value.nbytes))
    return None


def _cut(pieces: Sequence[TensorEntry], first: int, nbytes: int) -> Iterator[TensorEntry]:
    """Give the pieces of a range of bytes."""
    for piece in pieces:
        begin, end = max(first, 0), min(first + nbytes, piece.nbytes)
        if begin < end:
            yield replace(piece, offset=piece.offset + begin, nbytes=end - begin)
        first -= piece.nbytes


def _joined(
    func: Any,  # noqa: ANN401
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[TensorEntry, ...] | None:
    """Give the extents of tensors that are joined, where they are worth reading one by one."""
    if func not in _JOINS or (len(args) < 2 and set(kwargs) - {"dim"}):
        return None
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not all(isinstance(each, Deferred) and isinstance(each._where, tuple) for each in tensors):
        return None
    if len({each.dtype for each in tensors}) > 1:
        return None
    form = tensors[0].shape
    dim = dim % (len(form) + _JOINS[func])
    rows = math.prod(form[:dim])
    runs = [each.nbytes // max(1, rows) for each in tensors]
    if rows > 1 and min(runs) < _LEAST_RUN:
        return None
    return tuple(
        piece
        for row in range(rows)
        for each, run in zip(tensors, runs, strict=True)
        for piece in _cut(each._where, row * run, run)
    )
