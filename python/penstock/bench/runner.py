"""Runs cases, each in a process of its own, and makes rows of what they say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from penstock.bench.cases import Case
from penstock.bench.options import CaseOptions
from penstock.json_process import run_for_json

__all__ = ["Row", "run_case", "run_cases"]

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
