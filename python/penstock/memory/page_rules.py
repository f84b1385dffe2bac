"""Pages that the user has decided about: which have to stay, and which must not."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NO_RULES", "PageRules"]


@dataclass(frozen=True)
class PageRules:
    """What the user has said of pages of a region; the planner decides about all others.

    Parameters
    ----------
    keep
        Those that stay while the model is in use, ascending.
    stream
        Those that never stay, ascending.
    """

    keep: tuple[int, ...] = ()
    stream: tuple[int, ...] = ()


NO_RULES = PageRules()
