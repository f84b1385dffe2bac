"""Which models give way when another needs room: pure decisions, from figures alone.

The manager lists every model that holds device memory as a `Candidate`, and a policy says in which
order they give way. What no policy can do is take pages that are protected (`keep_resident`, or
reserved as primary), or those of a secondary while others have any: the first is refused here,
the second is not done by who makes room.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from penstock.errors import ModelError

__all__ = ["Candidate", "FarthestUse", "Policy", "Priority", "UseHistory", "order_of_victims"]

_REMEMBERED = 128  # uses
_CONTEXT = 16  # of them that are compared, at most
_SURE = 2  # that have to agree before the rest is believed


class Priority(Enum):
    """How firmly a reserved model stays."""

    PRIMARY = "primary"
    """It is never evicted."""
    SECONDARY = "secondary"
    """It is evicted only when nothing else is left, and the report says so."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        known = " or ".join(repr(each.value) for each in cls)
        raise ValueError(f"{value!r} is not a valid Priority: it is {known}")


@dataclass(frozen=True)
class Candidate:
    """A model that holds device memory, as a policy sees it.

    Parameters
    ----------
    name
        The model's.
    nbytes
        Device memory that it holds, in bytes.
    in_use
        Whether somebody has it acquired.
    priority
        Of its reservation; None without one.
    protected
        Whether it may not give way now, whatever the policy says.
    last_use
        Number of its last use; uses of all models are counted together.
    next_use
        After how many uses, of all models, it is expected to be used again; 1 for the very next.
        None where nothing is known.
    seconds_per_byte
        What it costs to bring a byte of it back.
    """

    name: str
    nbytes: int
    in_use: bool = False
    priority: Priority | None = None
    protected: bool = False
    last_use: int = 0
    next_use: int | None = None
    seconds_per_byte: float = 1.0


class Policy(Protocol):
    """Says who gives way first. Give your own to `MemoryManager(policy=...)`.

    It is called with the manager's lock held: decide by what is given, and do not call the manager.
    """

    def order(self, candidates: Sequence[Candidate]) -> Sequence[str]:
        """Put models into the order in which they give way.

        Parameters
        ----------
        candidates
            All models that hold device memory but the one that asks, the least recently used
            first. Protected ones are among them, and must not be returned.

        Returns
        -------
        sequence of str
            Names, each once. A model that is left out keeps what it holds.
        """


class FarthestUse:
    """The policy that a manager has by default: what is missed last and least goes first.

    Secondaries go after all others, models in use after idle ones. Within that, the least seconds
    of loading for each use of waiting: with equal costs that is the farthest next use, which moves
    the fewest bytes (L. A. Belady, "A study of replacement algorithms for a virtual-storage
    computer", 1966). Models of which no next use is known go first, the least recently used first.
    """

    def order(self, candidates: Sequence[Candidate]) -> list[str]:
        """See `Policy`."""
        movable = [each for each in candidates if not each.protected]
        return [each.name for each in sorted(movable, key=_worth)]


def _worth(candidate: Candidate) -> tuple[bool, bool, float, int]:
    distance = math.inf if candidate.next_use is None else candidate.next_use
    secondary = candidate.priority is Priority.SECONDARY
    loss = candidate.seconds_per_byte / distance
    return secondary, candidate.in_use, loss, candidate.last_use


def order_of_victims(policy: Policy, candidates: Sequence[Candidate]) -> list[str]:
    """Ask a policy for its order, and check the answer.

    Raises
    ------
    ModelError
        If it names a model that is none of the candidates, is protected, or was named before.
    """
    allowed = {each.name: not each.protected for each in candidates}
    order = list(policy.order(candidates))
    for at, name in enumerate(order):
        if name not in allowed:
            fault = "holds nothing that could be evicted"
        elif not allowed[name]:
            fault = "is protected: leave it out"
        elif name in order[:at]:
            fault = "was named before"
        else:
            continue
        raise ModelError(f"the policy {type(policy).__name__} names {name!r}, which {fault}")
    return order


class UseHistory:
    """The models that were used last, in order, and what they say of the uses to come.

    What followed the last time that models were used in the order of late is expected again. Two
    uses in a row have to agree; of several such times the one that agrees longest counts, and of
    these the last.
    """

    def __init__(self) -> None:
        self._uses: deque[str] = deque(maxlen=_REMEMBERED)
        self._expected: dict[str, int] | None = None

    def note(self, name: str) -> None:
        """Note a use. Uses of one model in a row are one."""
        if not self._uses or self._uses[-1] != name:
            self._uses.append(name)
            self._expected = None

    def next_use(self, name: str) -> int | None:
        """Return after how many uses a model is expected again; None where nothing is known."""
        if self._expected is None:
            self._expected = self._expect()
        return self._expected.get(name)

    def _expect(self) -> dict[str, int]:
        uses = list(self._uses)
        longest, found = _SURE - 1, None
        for at in range(len(uses) - 2, -1, -1):
            length = 0
            while (
                length < min(at + 1, _CONTEXT) and uses[at - length] == uses[len(uses) - 1 - length]
            ):
                length += 1
            if length > longest:
                longest, found = length, at
        if found is None:
            return {}
        expected: dict[str, int] = {}
        for distance, name in enumerate(uses[found + 1 :], 1):
            expected.setdefault(name, distance)
        return expected
