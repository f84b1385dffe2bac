"""Work in a process of its own, which answers with one line of JSON.

A crash, a hang or a lack of memory there is an answer here. One function is for each side of it.
Thread-safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

__all__ = ["answer", "run_for_json"]

_KEPT = 4000  # characters of what a process wrote to standard error


def answer(work: Callable[[], dict[str, Any]], to: TextIO | None = None) -> int:
    """Print what a function returns, or `failed` with the reason; return the exit code.

    This is the process's last line of output, which `run_for_json` reads.

    Parameters
    ----------
    to
        Where to print; standard output if omitted.
    """
    code = 0
    try:
        found = work()
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
        code = 1
    print(json.dumps(found, default=str), file=to or sys.stdout, flush=True)
    return code


def run_for_json(
    command: Sequence[str], time_limit: float, *, directory: Path | None = None
) -> dict[str, Any]:
    """Run a command whose last line is a JSON object; return that, or `failed` with the reason.

    Parameters
    ----------
    time_limit
        Seconds after which the command is ended, with all that it has started.
    directory
        In which it runs; the current one if omitted.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=directory,
    ) as process:
        try:
            out, err = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            _kill(process)
            return {"failed": f"not done after {time_limit:g} s"}
        except BaseException:
            _kill(process)
            raise
    found = _last_json(out)
    if found is None:
        ended = f"exit code {process.returncode}"
        if process.returncode < 0:
            ended = f"ended by signal {signal.Signals(-process.returncode).name}"
        lines = err.strip().splitlines()
        return {"failed": f"{ended}{': ' + lines[-1] if lines else ''}", "stderr": err[-_KEPT:]}
    if "failed" in found:
        found["stderr"] = err[-_KEPT:]
    return found


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and what it has started: they are one process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_json(out: str) -> dict[str, Any] | None:
    lines = out.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
