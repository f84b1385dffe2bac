"""Runs cases, each in a process of its own, and makes rows of what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.bench.cases import Case
from penstock.bench.options import CaseOptions

__all__ = ["Row", "run_case", "run_cases", "run_for_json"]

Row = dict[str, Any]
"""A case's name, options and figures; or `unavailable` or `failed`, with the reason."""


def run_cases(
    cases: Sequence[Case],
    options: CaseOptions,
    *,
    long_prompt: int | None,
    time_limit: float,
    tell: Callable[[Row], object],
) -> dict[str, Row]:
    """Run cases in order; none of them can end the run.

    Parameters
    ----------
    long_prompt
        Tokens of the long prompt; None for: as the resident case finds it.
    time_limit
        Seconds that an ordinary case may take.
    tell
        Called with each row as soon as it is there.
    """
    rows: dict[str, Row] = {}
    for case in cases:
        row: Row = {"case": case.name}
        reason = _missing(case, rows)
        if reason:
            row["unavailable"] = reason
        else:
            if case.long and "resident-long" in rows:
                long_prompt = rows["resident-long"]["prompt"]
            told = case.apply(options, long_prompt)
            row["options"] = asdict(told)
            row |= run_case(case.kind, told, time_limit * case.slow)
        rows[case.name] = row
        tell(row)
    return rows


def _missing(case: Case, rows: Mapping[str, Row]) -> str:
    for name in case.needs:
        row = rows.get(name)
        if row is None:
            return f"it needs the case {name}"
        reason = row.get("unavailable") or row.get("failed")
        if reason:
            return f"it needs the case {name}: {reason}"
    return ""


def run_case(kind: str, options: CaseOptions, time_limit: float) -> dict[str, Any]:
    """Run one case in a process of its own, and return its figures or the reason for none."""
    command = [sys.executable, "-m", "penstock.bench.case", kind, "--options", options.to_json()]
    return run_for_json(command, time_limit)


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
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=directory,
    )
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
        return {"failed": f"{ended}{': ' + lines[-1] if lines else ''}", "stderr": err[-4000:]}
    if "failed" in found:
        found["stderr"] = err[-4000:]
    return found


def _kill(process: subprocess.Popen[str]) -> None:
    """End a case and what it has started: they are one process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _last_json(out: str) -> dict[str, Any] | None:
    lines = out.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
