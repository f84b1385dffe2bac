"""The catalogue of cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.bench.options import CaseOptions

__all__ = ["PEERS", "Case", "Sizes", "catalogue", "select"]

PEERS = (
    "accelerate",
    "diffusers-block",
    "diffusers-block-record",
    "diffusers-leaf",
    "diffusers-leaf-record",
)
"""Libraries that Penstock is to be faster than."""


@dataclass(frozen=True)
class Sizes:
    """Caps of Penstock's cases, in bytes.

    Parameters
    ----------
    ring
        So little that nothing stays resident but the ring.
    peer
        Less than the fastest of the peers takes, which keeps embedding and head in place.
    cap
        A part of the weights.
    above
        More than all weights.
    host_budget
        RAM that the tier that streams from disk may take.
    """

    ring: int
    peer: int
    managed_ring: int
    cap: int
    above: int
    host_budget: int


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Parameters
    ----------
    kind
        Which loader runs it.
    options
        What differs from the options of the run.
    needs
        Cases that have to run before: they write its reference, or find its prompt.
    long
        Whether it runs the long prompt.
    slow
        How much more time than others it may take.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    long: bool = False
    slow: float = 1.0

    def apply(self, options: CaseOptions, long_prompt: int | None) -> CaseOptions:
        """Return the options of a run with those of this case; `long_prompt` is for long cases."""
        changed = replace(options, **self.options)
        return replace(changed, prompt=long_prompt or 0) if self.long else changed


def catalogue(device: str, sizes: Sizes) -> list[Case]:
    """List the cases that a device can have, in the order in which they run."""
    frames = {"pager": "frames", "host": "pinned"}
    managed = {"pager": "managed"}
    stream = {"host": "stream", "host_budget": sizes.host_budget, "cap": sizes.ring}

    def ours(name: str, *, needs: str = "resident", **options: Any) -> Case:  # noqa: ANN401
        return Case(f"penstock-{name}", "penstock", options, (needs,))

    cases = [
        Case("resident", "resident", {"writes": "short"}),
        ours("frames-ring", **frames, cap=sizes.ring),
        ours("frames-peer", **frames, cap=sizes.peer),
        ours("managed-ring", **managed, cap=sizes.managed_ring),
        ours("frames-cap", **frames, cap=sizes.cap),
        ours("managed-cap", **managed, cap=sizes.cap),
        ours("frames-above", **frames, cap=sizes.above, beside_resident=True),
        ours("managed-above", **managed, cap=sizes.above, beside_resident=True),
    ]
    if device == "cpu":
        return cases
    graph = {"captured": True, "reference": "graph"}
    long = {"reference": "long"}
    first = [
        Case("resident-graph", "resident", {**graph, "writes": "graph"}),
        Case("resident-long", "resident", {**long, "writes": "long"}, long=True),
        Case("triple-buffer", "triple-buffer", {"variant": "everything"}, ("resident",)),
        Case("triple-buffer-layers", "triple-buffer", {"variant": "layers"}, ("resident",)),
        Case(
            "triple-buffer-long",
            "triple-buffer",
            {**long, "variant": "everything"},
            ("resident-long",),
            long=True,
        ),
        Case("accelerate", "accelerate", {}, ("resident",), slow=2.0),
        *(
            Case(f"diffusers-{variant}", "diffusers", {"variant": variant}, ("resident",), slow=2.0)
            for variant in ("block", "block-record", "leaf", "leaf-record")
        ),
    ]
    last = [
        Case(
            "penstock-frames-long",
            "penstock",
            {**long, **frames, "cap": sizes.ring},
            ("resident-long",),
            long=True,
        ),
        ours("frames-graph", needs="resident-graph", **graph, **frames, cap=sizes.ring),
        ours("frames-mapped", pager="frames", host="mapped", cap=sizes.ring),
        Case(
            "penstock-frames-stream",
            "penstock",
            {"pager": "frames", **stream, "cold": True, "passes": 5, "least_seconds": 0.0},
            ("resident",),
            slow=2.0,
        ),
    ]
    return [cases[0], *first, *cases[1:], *last]


def select(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Choose cases by name, with those that they need, in the catalogue's order.

    Raises
    ------
    ValueError
        If there is no case of a name.
    """
    known = {case.name: case for case in cases}
    wanted: set[str] = set()
    for name in names:
        if name not in known:
            raise ValueError(f"there is no case {name!r} here; there are: {', '.join(known)}")
        wanted |= {name, *known[name].needs}
    return [case for case in cases if case.name in wanted]
