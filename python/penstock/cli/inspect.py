"""`penstock inspect`: what is in a checkpoint, and what would fit under a cap."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from rich.console import Console

from penstock.checkpoint import open_checkpoint
from penstock.checkpoint.kinds import QUANTIZED, find_quantized
from penstock.cli.output import print_table
from penstock.sizes import format_bytes

__all__ = ["run"]

_SHOWN = 20


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read the headers, print tables, and return the figures."""
    checkpoint = open_checkpoint(options.checkpoint)
    tensors = sorted(checkpoint.tensors.values(), key=lambda t: (-t.nbytes, t.name))
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
    }
    if options.cap:
        largest = tensors[0].nbytes if tensors else 0
        found["cap"] = {
            "nbytes": options.cap,
            "fits_whole": checkpoint.nbytes <= options.cap,
            "largest_tensor_fits": largest <= options.cap,
            "resident_share": min(1.0, options.cap / max(1, checkpoint.nbytes)),
        }
    _print(found, console, len(tensors) if options.all else _SHOWN)
    return found


def _print(found: dict[str, Any], console: Console, shown: int) -> None:
    rows = [
        (
            tensor["name"],
            tensor["dtype"],
            " x ".join(map(str, tensor["shape"])) or "scalar",
            format_bytes(tensor["nbytes"]),
        )
        for tensor in found["tensors"][:shown]
    ]
    left = found["tensor_count"] - shown
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
        console.print(_verdict(found), highlight=False)


def _verdict(found: dict[str, Any]) -> str:
    cap = found["cap"]
    size = format_bytes(cap["nbytes"])
    if cap["fits_whole"]:
        return f"under a cap of {size}: all of it stays resident"
    if not cap["largest_tensor_fits"]:
        largest = found["tensors"][0]
        return (
            f"under a cap of {size}: cannot run, {largest['name']} alone has "
            f"{format_bytes(largest['nbytes'])}"
        )
    return (
        f"under a cap of {size}: runs if what each operation reads fits, in whole pages, with "
        f"at most {cap['resident_share']:.0%} resident"
    )
