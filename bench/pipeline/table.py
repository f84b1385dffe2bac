"""What follows from the pipeline's figures: bounds, predictions, complaints, and two tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench.harness.report import number, percent, rate, size
from penstock.bench.runner import Row
from penstock.bench.table import align, reason_of

_OURS = ("penstock", "penstock-hard-cap")


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
