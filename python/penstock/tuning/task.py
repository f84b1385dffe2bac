"""What the process of a trial is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FIRST", "Task"]

FIRST = 2
"""Timed passes after which a trial may be known to be slower than the best."""


@dataclass(frozen=True)
class Task:
    """What the process of a trial is told; it travels as JSON.

    Parameters
    ----------
    setup
        `"module:function"` or `"path/to/script.py:function"`.
    given
        What the function is called with, by keyword.
    passes
        To time.
    limit
        Seconds; if none of the first passes takes less, the trial ends. None for no limit.
    search_path
        Where modules are looked for.
    """

    setup: str
    given: dict[str, Any]
    passes: int
    limit: float | None
    search_path: list[str]

    def to_json(self) -> str:
        """Write it as text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        """Read it from text."""
        return Task(**json.loads(text))
