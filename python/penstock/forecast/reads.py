"""Which tensors one operation reads, judged by their names.

An operation reads one matrix of a module, and may read all of the module's vectors with it (a
bias, a scale). Some operations of torch read more, and are known by the names that their modules
give: recurrent layers, attention and encoder layers in their fast path. Experts that lie in one
stack, or are stored one by one and merged into one by whoever loads them, may be given whole to
one operation. Where a program reads several matrices at once in some other way, nobody can know
from names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["Names", "expert_of", "find_reads"]

Names = Sequence[str]
"""Every name of one tensor; several if it is tied."""

_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d+(_reverse)?$")
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)$")
_MERGED = {"gate_proj": "gate_up", "up_proj": "gate_up", "w1": "gate_up", "w3": "gate_up"}
_ATTENTION = "in_proj_weight"
_ENCODER = (f"self_attn.{_ATTENTION}", "linear1.weight", "linear2.weight")
_OF_ENCODER = ("self_attn.", "linear1.", "linear2.", "norm1.", "norm2.")


def expert_of(name: str) -> tuple[str, str, str] | None:
    """Split the name of a tensor of one expert: that of all experts, the expert's, the rest's."""
    match = _EXPERT.fullmatch(name)
    return (match[1], match[2], match[3]) if match else None


def find_reads(tensors: Sequence[Names], shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """List what the operations of a pass read, in the order of the tensors.

    Parameters
    ----------
    tensors
        The names of each.
    shapes
        Of each.

    Returns
    -------
    list
        For each operation, the indices of the tensors that it reads at most.
    """
    owners: dict[str, dict[int, str]] = {}
    for index, names in enumerate(tensors):
        for name in names:
            owner, last = _owner_of(name)
            owners.setdefault(owner, {})[index] = last
    reads: list[tuple[int, ...]] = []
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
            reads.append(tuple(sorted(together)))
        elif _ATTENTION in held.values():
            output = f"{owner}.out_proj" if owner else "out_proj"
            done.add(output)
            reads.append(tuple(sorted({*held, *owners.get(output, {})})))
        else:
            reads += _reads_of_module(held, shapes)
    return reads


def _owner_of(name: str) -> tuple[str, str]:
    """Return the module that a tensor belongs to, and its name there."""
    expert = expert_of(name)
    if expert is None:
        owner, _, last = name.rpartition(".")
        return owner, last
    experts, _, rest = expert
    projection, _, last = rest.rpartition(".")
    return f"{experts}.{_MERGED.get(projection, projection)}", f"merged {last}"


def _reads_of_module(
    held: dict[int, str], shapes: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    matrices = [index for index in held if len(shapes[index]) > 1]
    vectors = [index for index in held if len(shapes[index]) <= 1]
    together = [i for i in matrices if _RECURRENT.match(held[i]) or held[i].startswith("merged ")]
    alone = [index for index in matrices if index not in together]
    reads = [(index, *vectors) for index in alone]
    if together or not alone:
        reads.append((*together, *vectors))
    return [tuple(sorted(read)) for read in reads if read]
