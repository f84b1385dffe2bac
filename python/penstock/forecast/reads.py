"""Which tensors one operation reads, judged by their names.

An operation reads one matrix of a module, and may read all of the module's vectors with it, and
what quantized matrices are scaled by. Some operations of torch read more, and are known by the
names that their modules give: recurrent layers, attention and encoder layers in their fast path.
Experts that lie in one stack, or are stored one by one and merged into one by whoever loads them,
may be given whole to one operation, or one by one. Where a program reads several matrices at once
in some other way, nobody can know from names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Names", "Read", "find_reads", "has_experts"]

Names = Sequence[str]
"""Every name of one tensor; several if it is tied."""


@dataclass(frozen=True)
class Read:
    """What one operation reads.

    Parameters
    ----------
    tensors
        By their indices.
    part, parts
        Of each of them, it reads this one of so many parts of the same size.
    """

    tensors: tuple[int, ...]
    part: int = 0
    parts: int = 1

    def extent(self, offset: int, nbytes: int) -> tuple[int, int]:
        """Return the first byte that is read of a tensor, and how many are."""
        size = nbytes // self.parts
        return offset + self.part * size, size


# Read by one operation: of recurrent layers, merged experts, and what a parametrization joins.
_TOGETHER = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d+(_reverse)?$|merged |original\d+$")
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)$")
_SCALE = re.compile(r"(^|_)(scales?|scale_inv|scale_2|qzeros|zeros?_points?|absmax)$")
_STACK = re.compile(r"\bexperts\.[^.]*$")
_MERGED = {"gate_proj": "gate_up", "up_proj": "gate_up", "w1": "gate_up", "w3": "gate_up"}
_ATTENTION = "in_proj_weight"
_ENCODER = (f"self_attn.{_ATTENTION}", "linear1.weight", "linear2.weight")
_OF_ENCODER = ("self_attn.", "linear1.", "linear2.", "norm1.", "norm2.")


def has_experts(name: str) -> bool:
    """Whether a tensor is one expert's, or a stack of experts."""
    return _EXPERT.fullmatch(name) is not None or _STACK.search(name) is not None


def find_reads(
    tensors: Sequence[Names], shapes: Sequence[Sequence[int]], *, indexed: bool = False
) -> list[Read]:
    """List what the operations of a pass read, in the order of the tensors.

    Parameters
    ----------
    tensors
        The names of each.
    shapes
        Of each.
    indexed
        Whether experts are read one by one, and not a whole stack of them at once.

    Returns
    -------
    list
        For each operation, what it reads at most.
    """
    owners: dict[str, dict[int, str]] = {}
    for index, names in enumerate(tensors):
        for name in names:
            owner, last = _owner_of(name, indexed)
            owners.setdefault(owner, {})[index] = last
    reads: list[Read] = []
    done: set[str] = set()
    by_name = {name: index for index, names in enumerate(tensors) for name in names}
    for owner, held in owners.items():
        if owner in done:
            continue
        encoder = owner.removesuffix("self_attn").rstrip(".")
        prefix = f"{encoder}." if encoder else ""
        if owner.endswith("self_attn") and all(prefix + last in by_name for last in _ENCODER):
            parts = tuple(prefix + part for part in _OF_ENCODER)
            together = {i for name, i in by_name.items() if name.startswith(parts)}
            done.update(other for other in owners if f"{other}.".startswith(parts))
            reads.append(Read(tuple(sorted(together))))
        elif _ATTENTION in held.values():
            output = f"{owner}.out_proj" if owner else "out_proj"
            done.add(output)
            reads.append(Read(tuple(sorted({*held, *owners.get(output, {})}))))
        else:
            found = _reads_of_module(held, shapes)
            stacks = indexed and _STACK.search(f"{owner}.") is not None
            reads += _one_by_one(found, shapes) if stacks else found
    return reads


def _one_by_one(reads: Sequence[Read], shapes: Sequence[Sequence[int]]) -> Iterator[Read]:
    """Divide what is read of stacks by their first dimension, which counts the experts."""
    for read in reads:
        counts = {shapes[index][0] for index in read.tensors if len(shapes[index]) > 1}
        count = counts.pop() if len(counts) == 1 else 1
        yield from (Read(read.tensors, part, count) for part in range(max(1, count)))


def _owner_of(name: str, indexed: bool) -> tuple[str, str]:
    """Return the module that a tensor belongs to, and its name there."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        owner, _, last = name.rpartition(".")
        return owner, last
    projection, _, last = expert[3].rpartition(".")
    of = f"{expert[1]}.{expert[2]}" if indexed else expert[1]
    return f"{of}.{_MERGED.get(projection, projection)}", f"merged {last}"


def _reads_of_module(held: dict[int, str], shapes: Sequence[Sequence[int]]) -> list[Read]:
    vectors = [i for i, name in held.items() if len(shapes[i]) <= 1 or _SCALE.search(name)]
    matrices = [index for index in held if index not in vectors]
    together = [i for i in matrices if _TOGETHER.match(held[i])]
    alone = [index for index in matrices if index not in together]
    reads = [(index, *vectors) for index in alone]
    if together or not alone:
        reads.append((*together, *vectors))
    return [Read(tuple(sorted(read))) for read in reads if read]
