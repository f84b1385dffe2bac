"""What a hard cap looks like from below: who has pages under one knows no more of it than this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from penstock.report.stats import ModelStats

__all__ = ["HardCapView", "ModelFigures"]

ModelFigures = Callable[[], Mapping[str, ModelStats]]
"""Returns the figures of the models of one manager."""


class HardCapView(Protocol):
    """The cap of a whole process on one device."""

    def set_cap(self, cap: int | str) -> None:
        """Change the cap; see `penstock.set_cap`."""

    def count_page_tables(self) -> bool:
        """Charge the tables of pinned memory, where they are seen; return whether they are."""

    def free_idle(self) -> int:
        """Free what no tensor has needed for some passes; return how many bytes."""

    def free_cached(self, nbytes: int) -> int:
        """Free frames that the allocator caches, up to so many bytes; return how many."""

    def add_models(self, figures: ModelFigures) -> None:
        """Show the models of a manager among the cap's figures, for as long as the manager lives.

        Parameters
        ----------
        figures
            A method of the manager, which is not kept alive by this.
        """
