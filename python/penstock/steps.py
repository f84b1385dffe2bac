"""What is known of a model's execution: the steps, what each reads, and the order of each pass.

A step is the call of one module with the tensors that it reads itself; it has the module's index as
its id. What a module reads of a tensor now and then, or only on some paths, is a step of its own,
whose id is given when it is seen first.

A pass is the call of an entry point: the outermost module that is called. Each entry point has an
order of its own, that of its last pass, since an encoder and a decoder, or a prefill and a decode,
may be called by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

__all__ = ["Order", "Place", "Steps"]

Place = tuple[int, tuple[int, ...]]
"""A step, and the steps around it that have not ended when it begins."""


@dataclass(frozen=True)
class Order:
    """The steps of one pass."""

    places: tuple[Place, ...]

    @property
    def steps(self) -> list[int]:
        """The ids of the steps."""
        return [step for step, _ in self.places]

    @property
    def all_steps(self) -> set[int]:
        """The ids of all steps in it, those around others included."""
        return {each for step, outer in self.places for each in (step, *outer)}


@dataclass
class Steps:
    """The steps of one model.

    Parameters
    ----------
    modules
        Names of the modules; a step below their number is the call of that module.
    own
        For each module, the indices of the tensors that it holds itself.
    whole
        For modules that look at tensors of their parts too, all that they look at; it is always
        part of their step.
    tensor_pages
        For each tensor, the pages that it lies on.
    """

    modules: Sequence[str]
    own: Sequence[frozenset[int]]
    whole: dict[int, frozenset[int]]
    tensor_pages: Sequence[Sequence[int]]
    _learned: dict[int, frozenset[int]] = field(default_factory=dict)
    _reads: dict[frozenset[int], int] = field(default_factory=dict)
    _read_tensors: list[frozenset[int]] = field(default_factory=list)

    def tensors(self, step: int) -> frozenset[int]:
        """Return the tensors that a step reads."""
        if not self.is_module(step):
            return self._read_tensors[step - len(self.modules)]
        return self._learned.get(step, self.whole.get(step, self.own[step]))

    def pages(self, *steps: int) -> list[int]:
        """Return the pages that steps read, ascending."""
        tensors = {i for step in steps for i in self.tensors(step)}
        return sorted({page for i in tensors for page in self.tensor_pages[i]})

    def pages_in_use(self, order: Order) -> list[list[int]]:
        """List, for each place of an order, the pages of its step and of those around it."""
        found = {(step, outer): self.pages(step, *outer) for step, outer in set(order.places)}
        return [found[place] for place in order.places]

    def is_module(self, step: int) -> bool:
        """Whether a step is the call of a module."""
        return step < len(self.modules)

    def without(self, order: Order, tensors: Set[int]) -> Order:
        """Return what is left of an order where some tensors need no step."""
        left = {step: not self.tensors(step) <= tensors for step in order.all_steps}
        return Order(
            tuple(
                (step, tuple(each for each in outer if left[each]))
                for step, outer in order.places
                if left[step]
            )
        )

    def learn(self, module: int, read: Iterable[int]) -> bool:
        """Note what one call of a module read; return whether that changes its step.

        A step has what every observed call read. The rest is read in steps of its own.
        """
        before = self.tensors(module)
        known = self._learned.get(module)
        seen = self.whole.get(module, frozenset()).union(read)
        self._learned[module] = seen if known is None else known & seen
        return self._learned[module] != before

    def hold_whole(self, module: int, tensors: frozenset[int] | None) -> None:
        """Have a module's step read certain tensors in any case; None for none of them.

        What was learned of the module is forgotten.
        """
        self._learned.pop(module, None)
        if tensors is None:
            self.whole.pop(module, None)
        else:
            self.whole[module] = tensors

    def read_singly(self, module: int) -> None:
        """Have a module's step read nothing; what the module reads is in steps of its own."""
        self._learned[module] = frozenset()

    def read_step(self, tensors: Iterable[int]) -> tuple[int, bool]:
        """Return the step that reads just these tensors, and whether it is new."""
        key = frozenset(tensors)
        step = self._reads.get(key)
        if step is not None:
            return step, False
        step = len(self.modules) + len(self._read_tensors)
        self._reads[key] = step
        self._read_tensors.append(key)
        return step, True

    def name(self, step: int) -> str:
        """Name a step for people."""
        if self.is_module(step):
            return self.modules[step] or "the model itself"
        return f"read {step - len(self.modules)}"
