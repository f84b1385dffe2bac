"""The layers of a checkpoint, found by the names of its tensors: a module without code of its own.

Names say which module has which tensor. So a tree of modules can be made of them, which is laid
out, filled, bound and planned for as any other is. Its tensors are buffers: no class says which of
them are parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import count
from typing import Any

import torch
from torch import nn

from penstock.errors import CheckpointError, ModelError
from penstock.loading.module_patterns import NamePattern, matches
from penstock.loading.weights import Source, Weights

__all__ = ["LayerFunction", "Layers"]

LayerFunction = Callable[[Any, dict[str, torch.Tensor], int], Any]
"""Called with x, the weights of a layer by their names within it, and its index; returns x."""

_INDEX = "([0-9]{1,9})"
_Held = dict[str, torch.Tensor | None]  # the buffers of a module
_Place = tuple[str, _Held, str]  # a name within a layer; who holds the tensor, and as what


class Layers(nn.Module):
    """The layers of a checkpoint, and what is wanted of the rest, with all tensors on meta.

    Parameters
    ----------
    weights
        The checkpoint; an attribute too, with what is here of it: the layers in turn, then the
        rest. That is the order in which they are laid out.
    pattern
        The name of a layer, with `{}` for its index.
    static
        Patterns of names of tensors beside the layers that are wanted; None for all of them.

    Raises
    ------
    ValueError
        If the pattern has no `{}`, or more than one.
    CheckpointError
        If no tensor is in such a layer, layers between others are missing, or one name is that of a
        tensor and of a module.
    ModelError
        If a pattern of `static` matches nothing.
    """

    weights: Weights
    _layers: list[list[_Place]]
    _layer_of: dict[str, int]
    _static: dict[str, tuple[_Held, str]]
    _parts: list[nn.Module]

    def __init__(
        self, weights: Weights, pattern: str, static: Sequence[NamePattern] | None
    ) -> None:
        super().__init__()
        layers = _find_layers(weights, pattern)
        inside = {name: index for index, layer in enumerate(layers) for name in layer.values()}
        beside = [name for name in weights.sources if name not in inside]
        if static is not None:
            beside = _select(beside, static, weights.origin)
        places = {
            name: _make_place(self, name, weights.sources[name]) for name in (*inside, *beside)
        }
        _require_distinct(self, weights.origin)
        names = [pattern.replace("{}", str(index)) for index in range(len(layers))]
        vars(self).update(  # past torch, which would take them for tensors of the same names
            weights=Weights(weights.origin, {name: weights.sources[name] for name in places}),
            _layers=[[(part, *places[name]) for part, name in each.items()] for each in layers],
            _layer_of=inside,
            _static={name: places[name] for name in beside},
            _parts=[_descend(self, name.split(".")) for name in names],
        )

    def __len__(self) -> int:
        return len(self._layers)

    def forward(self, x: Any, layer_fn: LayerFunction) -> Any:  # noqa: ANN401
        """Pass `x` through a function once for each layer, in turn; return what comes out."""
        for index in range(len(self)):
            x = layer_fn(x, self.layer(index), index)
        return x

    def part(self, index: int) -> nn.Module:
        """Return the module that has the tensors of one layer."""
        return self._parts[index]

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of one layer, by their names within it.

        Raises
        ------
        IndexError
            If there is no such layer.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no layer {index}; there are {len(self)}, from 0 on")
        return {part: _held(held, name) for part, held, name in self._layers[index]}

    def static(self, name: str) -> torch.Tensor:
        """Return a tensor beside the layers.

        Raises
        ------
        ModelError
            If there is none of that name.
        """
        if name in self._static:
            return _held(*self._static[name])
        if name in self._layer_of:
            raise ModelError(f"{name!r} is a tensor of layer {self._layer_of[name]}, not beside it")
        near = get_close_matches(name, self._static, 5, 0) or ["none"]
        raise ModelError(f"there is no tensor {name!r} beside the layers; nearest: {_list(near)}")


def _find_layers(weights: Weights, pattern: str) -> list[dict[str, str]]:
    """List the tensors of each layer: their names within it, and in the checkpoint."""
    head, *tails = pattern.split("{}")
    if len(tails) != 1:
        raise ValueError(
            f"the pattern {pattern!r} names no layers: write one {{}} where the index is, as in "
            "'model.layers.{}'"
        )
    named = re.compile(re.escape(head) + _INDEX + re.escape(tails[0]) + r"\.(.+)", re.DOTALL)
    found: dict[int, dict[str, str]] = {}
    for name in weights.sources:
        if (match := named.fullmatch(name)) and match[1] == str(int(match[1])):
            found.setdefault(int(match[1]), {})[match[2]] = name
    if not found:
        known = _patterns_of(weights.sources)
        raise CheckpointError(
            f"{weights.origin} has no tensor in a layer {pattern!r}; "
            + (f"it has {_list(known)}" if known else "none of its names has an index in it")
        )
    missing = max(found) + 1 - len(found)
    if missing:
        first = next(index for index in count() if index not in found)
        raise CheckpointError(
            f"{weights.origin} has a layer {pattern.replace('{}', str(max(found)))!r}, and lacks "
            f"{missing} of those before it (first: {pattern.replace('{}', str(first))!r}): pass "
            "the whole checkpoint"
        )
    return [found[index] for index in range(len(found))]


def _patterns_of(names: Iterable[str]) -> list[str]:
    """List the patterns of layers that there are, those with most tensors first."""
    found: Counter[str] = Counter()
    for name in names:
        path = name.split(".")
        at = next((at for at, part in enumerate(path[:-1]) if part.isdecimal()), None)
        if at is not None:
            found[".".join((*path[:at], "{}"))] += 1
    return [pattern for pattern, _ in found.most_common(5)]


def _select(names: Sequence[str], patterns: Sequence[NamePattern], origin: str) -> list[str]:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            some = _list(names[:5]) or "none"
            raise ModelError(
                f"static: {pattern!r} matches no tensor of {origin} beside the layers; "
                f"there are {some}" + (", ..." if len(names) > 5 else "")
            )
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def _descend(root: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the module of a path, made where it is not there.

    Names of checkpoints may be those of methods, which `add_module` refuses and nobody here needs.
    """
    for part in path:
        inner = root._modules.get(part)
        if inner is None:
            inner = root._modules[part] = nn.Module()
        root = inner
    return root


def _make_place(root: nn.Module, name: str, source: Source) -> tuple[_Held, str]:
    """Give a module of the tree the tensor of a name; return who holds it, and as what."""
    *path, last = name.split(".")
    held = _descend(root, path)._buffers
    held[last] = torch.empty(source.shape, dtype=source.dtype, device="meta")
    return held, last


def _require_distinct(root: nn.Module, origin: str) -> None:
    for prefix, owner in root.named_modules():
        for name in owner._buffers.keys() & owner._modules.keys():
            full = f"{prefix}.{name}" if prefix else name
            raise CheckpointError(
                f"{origin} has a tensor {full!r}, and others whose names go on from there: rename "
                "it, or leave it out by static=[...]",
                tensor=full,
            )


def _held(held: _Held, name: str) -> torch.Tensor:
    tensor = held[name]
    assert tensor is not None
    return tensor


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
