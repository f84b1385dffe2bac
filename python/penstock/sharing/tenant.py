"""A model with weights, as those see it who share a cap with it."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy import Priority
from penstock.run.runner import Runner

__all__ = ["Tenant"]


@dataclass(eq=False)
class Tenant:
    """A model with weights, as those see it who share a cap with it.

    Parameters
    ----------
    in_use
        How many have it acquired.
    last_use
        Number of its last use.
    kept
        How many have it kept resident.
    reserved
        As what it is reserved, if it is.
    pushed_out
        Bytes that it had to give up although it is reserved.
    """

    name: str
    runner: Runner
    in_use: int = 0
    last_use: int = 0
    kept: int = 0
    reserved: Priority | None = None
    pushed_out: int = 0

    @property
    def protected(self) -> bool:
        """Whether nothing of it may be taken."""
        return self.kept > 0 or self.reserved is Priority.PRIMARY

    @property
    def page_count(self) -> int:
        """Pages that it could use."""
        return self.runner.memory.page_count

    @property
    def held(self) -> int:
        """Pages that it holds."""
        return self.runner.memory.held

    @property
    def least(self) -> int:
        """Pages that it has to hold to run at all."""
        return self.runner.least_frames()

    @property
    def claim(self) -> int:
        """Pages that nobody may take from it, but for a model that cannot run otherwise."""
        least = self.least if self.in_use else 0
        if self.reserved is not None:
            return max(least, self.page_count if self.protected else self.held)
        return max(least, self.held) if self.kept else least
