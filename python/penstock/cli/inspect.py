"""`penstock inspect`: what is in a checkpoint, and whether it runs under a cap."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from rich.console import Console

from penstock.checkpoint import open_checkpoint
from penstock.checkpoint.kinds import QUANTIZED, find_quantized
from penstock.cli.output import print_table
from penstock.errors import CheckpointError
from penstock.forecast.estimate import least_cap
from penstock.report.alike import Alike, group_alike
from penstock.sizes import format_bytes

__all__ = ["run"]

_SHOWN = 20


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read the headers, print tables, and return the figures."""
    checkpoint = open_checkpoint(options.checkpoint)
    tensors = sorted(checkpoint.tensors.values(), key=lambda t: (-t.nbytes, t.name))
    groups = group_alike(tensors)
    by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        by_dtype[tensor.dtype] += tensor.nbytes
    found: dict[str, Any] = {
        "path": str(options.checkpoint),
        "files": [str(file) for file in checkpoint.files],
        "tensor_count": len(tensors),
        "nbytes": checkpoint.nbytes,
        "bytes_by_dtype": dict(by_dtype),
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "nbytes": t.nbytes}
            for t in tensors
        ],
        "groups": [
            {
                "name": group.name,
                "dtype": group.dtype,
                "shape": list(group.shape),
                "count": group.count,
                "nbytes": group.count * group.nbytes,
            }
            for group in groups
        ],
    }
    if options.cap:
        found["cap"] = _judge(options, checkpoint.nbytes, tensors[0].nbytes if tensors else 0)
    shown = [Alike(t.name, t.dtype, t.shape, 1, t.nbytes) for t in tensors]
    _print(found, console, shown if options.all else groups[:_SHOWN])
    return found


def _judge(options: argparse.Namespace, nbytes: int, largest: int) -> dict[str, Any]:
    """Say whether it runs under the cap, as `penstock plan` does."""
    judged: dict[str, Any] = {
        "nbytes": options.cap,
        "fits_whole": nbytes <= options.cap,
        "largest_tensor_fits": largest <= options.cap,
        "resident_share": min(1.0, options.cap / max(1, nbytes)),
    }
    try:
        least, works = least_cap(options.checkpoint, options.cap)
    except CheckpointError as error:
        return {**judged, "runs": False, "problem": str(error)}
    problem = f"{least.needed_by} needs a cap of {format_bytes(least.nbytes)}"
    return {
        **judged,
        "runs": works,
        "least_cap": least.nbytes,
        "problem": "" if works else f"{problem} ({least.nbytes} bytes)",
    }


def _print(found: dict[str, Any], console: Console, shown: list[Alike]) -> None:
    rows = [
        (
            row.name,
            row.dtype,
            " x ".join(map(str, row.shape)) or "scalar",
            (f"{row.count} x " if row.count > 1 else "") + format_bytes(row.nbytes),
        )
        for row in shown
    ]
    left = found["tensor_count"] - sum(row.count for row in shown)
    if left > 0:
        rows.append((f"... {left} smaller ones (--all lists them)", "", "", ""))
    print_table(console, ("tensor", "dtype", "shape", "size"), rows)
    dtypes = ", ".join(f"{code} {format_bytes(n)}" for code, n in found["bytes_by_dtype"].items())
    console.print(
        f"{found['tensor_count']} tensors in {len(found['files'])} files, "
        f"{format_bytes(found['nbytes'])}: {dtypes or 'empty'}",
        highlight=False,
    )
    if find_quantized(tensor["name"] for tensor in found["tensors"]):
        console.print(f"these are quantized weights; {QUANTIZED}", highlight=False)
    if "cap" in found:
        console.print(_verdict(found["cap"]), highlight=False)


def _verdict(cap: dict[str, Any]) -> str:
    under = f"under a cap of {format_bytes(cap['nbytes'])}"
    if not cap["runs"]:
        return f"{under}: cannot run, {cap['problem']}"
    if cap["fits_whole"]:
        return f"{under}: all of it stays resident"
    return (
        f"{under}: runs, with at most {cap['resident_share']:.0%} resident; `penstock plan` says "
        "how fast"
    )
