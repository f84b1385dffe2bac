"""`penstock plan`: what a model needs under a cap and how fast it is, before it is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock.cli.output import print_table
from penstock.cli.settings_options import add_settings
from penstock.errors import DeviceError
from penstock.forecast.estimate import estimate
from penstock.forecast.result import AtCap, Estimate
from penstock.memory.devices import open_device
from penstock.report.charts import ChartPoint, bars, write_chart
from penstock.sizes import format_bytes, parse_rate

__all__ = ["add_options", "run"]

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_options(parser: argparse.ArgumentParser, size: Callable[[str], int]) -> None:
    """Add the command's options; `size` reads sizes."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint, its directory, or that of a pipeline")
    add_settings(parser, size, no_cap="the least that works")
    add("--caps", type=_several(size), default=(), help="of the table, separated by commas")
    add("--tokens", type=_count, default=1, help="of each sequence in a pass; default: 1")
    add("--batch", type=_count, default=1, help="sequences in a pass; default: 1")
    add("--training", choices=("frozen", "all"), help="which weights; default: forward passes")
    add("--dtype", choices=_DTYPES, help="what weights become; default: what they are")
    add("--link", type=_rate("B/s"), help='to the device, such as "25GB/s"; default: measured')
    add("--disk", type=_rate("B/s"), help="default: measured")
    add("--compute", type=_rate("FLOPS"), help='such as "400TFLOPS"; default: measured')
    add("--memory", type=_rate("B/s"), help="of the device's own memory; default: measured")
    add("--plot", type=_picture, metavar="FILE", help="write a chart: .svg, or .png")


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Estimate, print it, and return the figures.

    `ok` is false where the model would be refused under the cap: then the exit code is 1.
    """
    try:
        _begin_cuda(options.device)
        found = estimate(
            options.checkpoint,
            cap=options.cap,
            caps=options.caps,
            tokens=options.tokens,
            batch=options.batch,
            training=options.training,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            device=options.device,
            pager=options.pager,
            host=options.host,
            host_budget=options.host_budget,
            page_size=options.page_size,
            link=options.link,
            disk=options.disk,
            compute=options.compute,
            memory=options.memory,
        )
    except ValueError as error:  # a value that is none on this device
        options.refuse(str(error))
    points = [ChartPoint(row.cap, row.resident, row.seconds) for row in found.caps if row.fits]
    if options.plot is not None:
        write_chart(options.plot, points, str(options.checkpoint))
    _print(found, points, console)
    return {**found.as_dict(), "path": str(options.checkpoint), "ok": found.fits}


def _begin_cuda(device: str) -> None:
    """Use CUDA, so that the GPU's speed is measured: this process needs no hard cap."""
    try:
        _, found = open_device(device)
    except DeviceError:
        return  # it is said where it is needed
    if found.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call]


def _print(found: Estimate, points: list[ChartPoint], console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    at = found.at
    cap = format_bytes(found.cap)
    facts = [
        ("weights", format_bytes(found.nbytes)),
        ("least cap", f"{format_bytes(found.least_cap)} ({found.least_cap} bytes)"),
        ("needed by", found.least_cap_by or "nothing"),
    ]
    if found.least_cap_indexed is not None:
        indexed = format_bytes(found.least_cap_indexed)
        facts.append(("least cap, experts one by one", indexed))
    if at.fits:
        facts += [
            (f"stays under {cap}", format_bytes(at.resident)),
            ("streams each pass", format_bytes(at.streamed)),
            (f"a pass of {found.tokens} tokens", f"{_seconds(at.seconds)}, bound: {at.bound}"),
        ]
    facts.append(
        ("host memory", f"{format_bytes(found.host)}, pinned {format_bytes(found.pinned)}")
    )
    if found.beside:
        facts.append(("gradients, states", f"{format_bytes(found.beside)} beside the cap"))
    if found.spill:
        facts.append(("spill file", format_bytes(found.spill)))
    facts.append(("loading, cold", _seconds(found.load_seconds)))
    facts.append(("link", f"{found.link / 1e9:.1f} GB/s"))
    facts.append(("disk", f"{found.disk / 1e9:.1f} GB/s" if found.disk else "not known"))
    facts.append(
        ("compute", f"{found.compute / 1e12:.3g} TFLOPS" if found.compute else "not known")
    )
    print_table(console, ("", ""), facts, head=False)
    if len(at.parts) > 1:
        rows = [_row(part.name, part.resident, part.streamed, part) for part in at.parts]
        print_table(console, ("part", "stays", "streams", "seconds", "bound"), rows)
    rows = [_row(format_bytes(row.cap), row.resident, row.streamed, row) for row in found.caps]
    print_table(console, ("cap", "stays", "streams", "seconds", "bound"), rows)
    for line in bars(points, plain="utf" not in (console.encoding or "").lower()):
        say(line)
    settings = [(each.name, each.value, each.why) for each in found.settings]
    print_table(console, ("setting", "it takes", "because"), settings)
    for note in found.notes:
        say(f"- {note}")
    if not found.fits:
        say(f"under a cap of {cap}: cannot run, {found.problem}")


def _row(name: str, resident: int, streamed: int, of: Any) -> tuple[str, ...]:  # noqa: ANN401
    if isinstance(of, AtCap) and not of.fits:
        return (name, "cannot run", "", "", "")
    known = of.seconds is not None
    sizes = format_bytes(resident), format_bytes(streamed)
    return (name, *sizes, f"{of.seconds:.3g}" if known else "?", of.bound if known else "")


def _seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.3g} s"


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a count is a whole number above 0, not {text!r}")
    return int(text)


def _rate(unit: str) -> Callable[[str], float]:
    def rate(text: str) -> float:
        try:
            return parse_rate(text, unit)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return rate


def _several(size: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    def sizes(text: str) -> tuple[int, ...]:
        return tuple(size(part) for part in text.split(","))

    return sizes


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"a chart is a .svg or a .png, not {text!r}")
    return path
