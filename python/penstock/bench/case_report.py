"""How the process of a case says what it found."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

from penstock.bench.subject import UnavailableError

__all__ = ["report"]


def report(work: Callable[[], dict[str, Any]]) -> int:
    """Print what a function returns as one line of JSON, or why it does not; return the exit code.

    `penstock.bench.runner.run_for_json` reads that line.
    """
    code = 0
    try:
        found = work()
    except UnavailableError as error:
        found = {"unavailable": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
        code = 1
    sys.stdout.write(json.dumps(found, default=str) + "\n")
    sys.stdout.flush()
    return code
