"""A video pipeline of four stages under a cap: Penstock beside plain PyTorch and diffusers.

    python bench/pipeline.py [--quick] [--only penstock,group-leaf] [--json FILE]

A text encoder of 5B parameters, a denoiser of 14B and two upscalers, with random weights in bf16,
run under a cap of 24 GiB, each way in a process of its own, one after the other. The bits of every
stage are compared with those of plain PyTorch. Exits with an error if Penstock fails, gives other
bits, or crosses its cap. It takes about 6 minutes on a GPU, 42 GB for the weights (in /dev/shm, or
else in the temporary directory), and beside that as much pinned memory, 1.5 times as much for
diffusers. `--quick` runs it all with tiny modules, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from penstock.bench.runner import Row, run_for_json
from penstock.bench.table import align, reason_of
from penstock.sizes import format_bytes, parse_bytes
from penstock.skeleton import build_skeleton
from pipeline_models import SMALL, STAGES, Shape, builder
from pipeline_subjects import LOADERS, Options, nbytes_of
from report import number, percent, rate, say, size, write_json
from room import host_room, weights_parent

GIB = 1 << 30
MIB = 1 << 20
_OURS = ("penstock", "penstock-hard-cap")
# Host memory beside the weights' files: libraries that pin by powers of two take more.
_HOST_SHARE = {"resident": 0.1, "group-block": 1.6, "group-leaf": 1.6}
_SPARE = 4 * GIB


def main() -> int:
    options = parse()
    shape, cap = sizes(options)
    nbytes = {stage: nbytes_of(build_skeleton(builder(stage, shape))) for stage in STAGES}
    total = sum(nbytes.values())
    cap = cap or max(1, round(total * 0.55))
    device = options.device
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"cap": cap, "weight_bytes": nbytes, "rows": []}
    deadline = time.monotonic() + options.total_limit
    say(f"{', '.join(f'{stage} {n / 1e9:.2f} GB' for stage, n in nbytes.items())}")
    say(f"cap {format_bytes(cap)}, {options.steps} steps, host room {format_bytes(host_room())}")
    parent = options.directory or weights_parent(total)
    with tempfile.TemporaryDirectory(prefix="penstock-pipeline-", dir=parent) as directory:
        told = Options(
            directory=directory,
            device=device,
            shape=shape,
            cap=cap,
            host=options.host,
            steps=options.steps,
            clips=options.clips,
            link_bytes=32 * MIB if options.quick else GIB,
            block_bytes=8 * MIB if options.quick else GIB,
            page_size=256 << 10 if options.quick else None,
        )
        weights = run("weights", told, options.time_limit, deadline)
        found |= weights
        if reason_of(weights):
            say(f"weights: {reason_of(weights)}", weights.get("stderr", ""))
            write_json(found, options.json)
            return 1
        say(*(f"{key}: {value}" for key, value in weights["machine"].items()))
        say(f"weights written in {weights['seconds']:.1f} s to {parent}")
        for name in options.only:
            row: Row = {"case": name}
            needed = round(total * _HOST_SHARE.get(name, 1.1)) + (0 if options.quick else _SPARE)
            if host_room() < needed:
                row["unavailable"] = (
                    f"it may take {format_bytes(needed)} of host memory, and there are "
                    f"{format_bytes(host_room())}"
                )
            else:
                row |= run(name, told, options.time_limit, deadline)
            derive(row, found["rows"])
            found["rows"].append(row)
            say(f"{name}: {outcome(row)}", *([row["stderr"]] if "stderr" in row else []))
            write_json(found, options.json)  # whatever ends the run leaves what was measured
    say("", *stage_table(found["rows"]), "", *case_table(found["rows"], cap), "", *LEGEND)
    broken = complaints(found["rows"], cap)
    found["broken"] = broken
    say("", *(broken or ["every stage of Penstock has the bits of plain PyTorch, under its cap"]))
    write_json(found, options.json)
    return 1 if broken else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny modules, few steps")
    add("--device", default="auto", help='"auto", "cpu" or "cuda"')
    add("--only", default=",".join(LOADERS), help=f"cases: {', '.join(LOADERS)}")
    add("--cap", type=parse_bytes, help="default: 24GiB, or 55%% of the weights if scaled")
    add("--host", default="pinned", help="host tier of Penstock; default: pinned")
    add("--scale", type=float, default=1.0, help="how deep the modules are; default: 1")
    add("--steps", type=int, help="steps of denoising; default: 6")
    add("--clips", type=int, default=2, help="runs; the last one is reported; default: 2")
    add("--directory", type=Path, help="where the weights are written; default: /dev/shm, or /tmp")
    add("--time-limit", type=float, default=150, help="seconds for a case; default: 150")
    add("--total-limit", type=float, default=540, help="seconds for all; default: 540")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - set(LOADERS)
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    # What the others are compared with runs first, or there is nothing to compare with.
    options.only = [name for name in LOADERS if name in {*options.only, "resident"}]
    options.steps = options.steps or (4 if options.quick else 6)
    return options


def sizes(options: argparse.Namespace) -> tuple[Shape, int | None]:
    """Return the shape, and the cap if it does not follow from the weights."""
    shape = SMALL if options.quick else Shape()
    usual = None if options.quick or options.scale != 1 else 24 * GIB
    return shape.scaled(options.scale) if options.scale != 1 else shape, options.cap or usual


def run(name: str, told: Options, time_limit: float, deadline: float) -> dict[str, Any]:
    """Run a case in a process of its own."""
    left = min(time_limit, deadline - time.monotonic())
    if left <= 0:
        return {"unavailable": "there was no time left"}
    script = Path(__file__).with_name("pipeline_case.py")
    command = [sys.executable, str(script), name, "--options", json.dumps(asdict(told))]
    return run_for_json(command, left)


# ---- what follows from the figures ------------------------------------------------------------


def derive(row: Row, rows: list[Row]) -> None:
    """Add to each stage what its bytes and plan say that it takes."""
    resident = {
        stage["stage"]: stage
        for other in rows
        if other["case"] == "resident"
        for stage in other.get("stages", [])
    }
    for stage in row.get("stages", []):
        passes = stage["pass_seconds"]
        if len(passes) > 2:
            stage["step_seconds"] = statistics.median(passes[1:])
            moved = stage["moved_bytes"] - stage["moved_first_bytes"]
            stage["step_moved_bytes"] = moved / (len(passes) - 1)
        if stage["stage"] in resident:
            alone = resident[stage["stage"]]
            stage["compute_seconds"] = alone["seconds"]
            stage["step_compute_seconds"] = alone.get("step_seconds")
        if stage["after"] and row["link"]:
            _derive_plan(stage, row["link"], len(passes))


def _derive_plan(stage: dict[str, Any], link: float, passes: int) -> None:
    """Add the bound and the prediction of a stage that a plan of Penstock's runs.

    Bound: what is not there at first has to come once, and what finds no room beside the others
    again in each further pass. Prediction: what the plan keeps comes at the rate of the link, then
    each pass takes what the plan says.
    """
    before: Mapping[str, Any] = stage["before"]
    after: Mapping[str, Any] = stage["after"]
    missing = max(0, after["nbytes"] - before["resident_bytes"])
    again = max(0, after["nbytes"] - after["room"])
    stage["step_bound_bytes"] = again
    stage["step_bound_seconds"] = again / link
    stage["bound_seconds"] = (missing + (passes - 1) * again) / link
    predicted = after["predicted_seconds"]
    if predicted is not None:
        kept = max(0, missing - after["planned_bytes"])
        stage["step_predicted_seconds"] = predicted
        stage["predicted_seconds"] = kept / link + passes * predicted


def complaints(rows: list[Row], cap: int) -> list[str]:
    """Say what Penstock did not keep to."""
    found = []
    for row in rows:
        if row["case"] not in _OURS or "unavailable" in row:
            continue
        if "failed" in row:
            found.append(f"{row['case']} failed: {row['failed']}")
            continue
        for stage in row["stages"]:
            if stage["bit_identical"] is False or not stage["finite"]:
                found.append(f"{row['case']}, {stage['stage']}: other bits")
            if stage["after"]["ledger_peak"] > cap:
                found.append(f"{row['case']}, {stage['stage']}: the ledger crossed the cap")
        if row["case"] == "penstock-hard-cap" and row["driver_peak_bytes"] > cap:
            found.append(f"{row['case']}: the driver saw more than the cap")
    return found


# ---- text --------------------------------------------------------------------------------------


def stage_table(rows: list[Row]) -> list[str]:
    cells = [
        [
            *("case", "stage", "s", "first s", "predicted s", "bound s", "compute s"),
            *("GB moved", "% of link", "same bits"),
        ]
    ]
    for row in rows:
        if reason_of(row):
            cells.append([row["case"], reason_of(row)])
        for stage in row.get("stages", []):
            moved, link = stage["moved_bytes"], row["link"]
            share = moved / stage["seconds"] / link if link else None
            cells.append(
                [
                    row["case"],
                    stage["stage"],
                    number(stage["seconds"]),
                    number(stage["first_seconds"]),
                    number(stage.get("predicted_seconds")),
                    number(stage.get("bound_seconds")),
                    number(stage.get("compute_seconds")),
                    f"{moved / 1e9:.3f}",
                    percent(share if moved else None),
                    _same(stage, row),
                ]
            )
    return align(cells)


def case_table(rows: list[Row], cap: int) -> list[str]:
    cells = [
        [
            *("case", "s/step", "predicted", "bound", "compute", "GB/step", "% of link"),
            *("% of bound", "ledger peak", "driver peak", "on top", "pinned", "load s", "link"),
            "what it is",
        ]
    ]
    for row in rows:
        if reason_of(row):
            cells.append([row["case"], reason_of(row)])
            continue
        step = next(stage for stage in row["stages"] if stage["stage"] == "denoiser")
        seconds, link = step.get("step_seconds"), row["link"]
        moved, bound = step.get("step_moved_bytes", 0), step.get("step_bound_seconds")
        cells.append(
            [
                row["case"],
                number(seconds),
                number(step.get("step_predicted_seconds")),
                number(bound),
                number(step.get("step_compute_seconds")),
                f"{moved / 1e9:.3f}",
                percent(moved / seconds / link if moved and seconds and link else None),
                percent(bound / seconds if bound and seconds else None),
                size(step["after"].get("ledger_peak")),
                size(row["driver_peak_bytes"]),
                size(max(row["vram_bytes"], row["vram_loading_bytes"])),
                size(row["pinned_bytes"]),
                f"{row['load_seconds']:.1f}",
                rate(link),
                row["note"],
            ]
        )
    return align(cells)


LEGEND = (
    "Stages: of the last clip, from before the module is there until it has gone; first: of the "
    "first one, which learns. predicted: what the plan keeps, at the",
    "rate of the link, and its seconds for each pass. bound: bytes that are not there or cannot "
    "stay, at the rate of the link. compute: all resident.",
    "Steps of the denoiser: median of all but the first. % of bound: of the time, what bytes that "
    "cannot stay under the cap take. driver peak: all",
    "that the driver counts (cudaMemGetInfo), sampled; on top: of that, what came after the "
    "context. A cap of the manager's counts weights only.",
)


def _same(stage: Mapping[str, Any], row: Row) -> str:
    if not stage["finite"]:
        return "NO, not finite"
    if row["case"] == "resident":
        return "reference"
    if stage["bit_identical"] is None:
        return "?"
    return "yes" if stage["bit_identical"] else f"NO, {stage['relative_error']:.1e}"


def outcome(row: Row) -> str:
    if reason_of(row):
        return reason_of(row)
    seconds = ", ".join(f"{stage['stage']} {stage['seconds']:.3f} s" for stage in row["stages"])
    return f"{seconds}; loaded in {row['load_seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
