"""How the process of a case says what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.bench.subject import UnavailableError
from penstock.json_process import answer

__all__ = ["report"]


def report(work: Callable[[], dict[str, Any]]) -> int:
    """Print what a function returns as one line of JSON, or why it does not; return the exit code.

    `penstock.json_process.run_for_json` reads that line.
    """

    def tried() -> dict[str, Any]:
        try:
            return work()
        except UnavailableError as error:
            return {"unavailable": str(error)}

    return answer(tried)
