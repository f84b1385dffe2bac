"""Running the cases of a benchmark, each in a process of its own, and keeping what they give."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness.report import say, write_json
from penstock.bench.runner import Row
from penstock.bench.table import reason_of
from penstock.json_process import run_for_json

__all__ = ["CaseRuns", "add_options", "parse_options"]


def add_options(
    parser: argparse.ArgumentParser,
    cases: Collection[str],
    chosen: Collection[str],
    *,
    quick: str,
    limits: tuple[int, int],
) -> None:
    """Add the options that such benchmarks share.

    Parameters
    ----------
    cases, chosen
        Which there are, and which run if nothing is said.
    quick
        What `--quick` does.
    limits
        Seconds for a case, and for all.
    """
    add = parser.add_argument
    case, total = limits
    add("--quick", action="store_true", help=quick)
    add("--device", default="auto", help='"auto", "cpu" or "cuda"')
    add("--only", default=",".join(chosen), help=f"cases: {', '.join(cases)}")
    add(
        "--directory",
        type=_absolute,
        help="where the weights are written; default: /dev/shm, or /tmp",
    )
    add("--time-limit", type=float, default=case, help=f"seconds for a case; default: {case}")
    add("--total-limit", type=float, default=total, help=f"seconds for all; default: {total}")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")


def _absolute(text: str) -> Path:
    """Read a path; cases run in another directory."""
    return Path(text).resolve()


def parse_options(parser: argparse.ArgumentParser, cases: Collection[str]) -> argparse.Namespace:
    """Parse them: `only` becomes a list of cases, `device` one that is there."""
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - set(cases)
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    if options.device == "auto":
        options.device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return options


_ROOT = Path(__file__).resolve().parents[2]  # where `bench` is found


class CaseRuns:
    """Runs of one benchmark's cases.

    Parameters
    ----------
    module
        Run as a script, it takes a case and `--options`, and prints its figures as JSON.
    options
        Of `parse_options`.
    found
        Where rows go; it is written after each of them.
    """

    def __init__(self, module: str, options: argparse.Namespace, found: dict[str, Any]) -> None:
        self._module = module
        self._options = options
        self._deadline = time.monotonic() + options.total_limit
        self.found = found
        self.rows: list[Row] = found.setdefault("rows", [])

    def run(self, name: str, told: Any) -> dict[str, Any]:  # noqa: ANN401
        """Run a case in a process of its own; `told` is a dataclass."""
        left = min(self._options.time_limit, self._deadline - time.monotonic())
        if left <= 0:
            return {"unavailable": "there was no time left"}
        command = [sys.executable, "-m", self._module, name, "--options", json.dumps(asdict(told))]
        return run_for_json(command, left, directory=_ROOT)

    def write_weights(self, told: Any) -> bool:  # noqa: ANN401
        """Have the weights written, and tell of the machine; return whether they are there."""
        weights = self.run("weights", told)
        self.found |= weights
        reason = reason_of(weights)
        if reason:
            say(f"weights: {reason}", weights.get("stderr", ""))
        else:
            say(*(f"{key}: {value}" for key, value in weights["machine"].items()))
        self.save()
        return not reason

    def keep(self, row: Row, text: str) -> None:
        """Add a row, and say it."""
        self.rows.append(row)
        say(text, *([row["stderr"]] if "stderr" in row else []))
        self.save()  # whatever ends the run leaves what was measured

    def save(self) -> None:
        """Write what was found so far."""
        write_json(self.found, self._options.json)

    def conclude(self, broken: list[str], well: str) -> int:
        """Say what was not kept to, or that all was; return the exit code."""
        self.found["broken"] = broken
        say("", *(broken or [well]))
        self.save()
        return 1 if broken else 0
