"""A video pipeline of four stages under a cap: Penstock beside plain PyTorch and diffusers.

    python -m bench.pipeline [--quick] [--only penstock,group-leaf] [--json FILE]

A text encoder of 5B parameters, a denoiser of 14B and two upscalers, with random weights in bf16,
run under a cap of 24 GiB, each way in a process of its own, one after the other. The bits of every
stage are compared with those of plain PyTorch. Exits with an error if Penstock fails, gives other
bits, or crosses its cap. It takes about 7 minutes on a GPU, 42 GB for the weights (in /dev/shm, or
else in the temporary directory), and beside that as much pinned memory, 1.5 times as much for
diffusers. `--quick` runs it all with tiny modules, on a CPU too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

from bench.harness.case_runs import CaseRuns, add_options, parse_options
from bench.harness.report import say
from bench.harness.weights_place import weights_parent
from bench.pipeline.models import SMALL, STAGES, Shape, builder
from bench.pipeline.subjects import LOADERS, Options, nbytes_of
from bench.pipeline.table import LEGEND, case_table, complaints, derive, outcome, stage_table
from penstock.bench.runner import Row
from penstock.loading.host_tiers import available_host_bytes
from penstock.loading.skeleton import build_skeleton
from penstock.sizes import format_bytes, parse_bytes

GIB = 1 << 30
MIB = 1 << 20
# Host memory beside the weights' files: libraries that pin by powers of two take more.
_HOST_SHARE = {"resident": 0.1, "group-block": 1.6, "group-leaf": 1.6}
_SPARE = 4 * GIB


def main() -> int:
    options = parse()
    shape, cap = sizes(options)
    nbytes = {stage: nbytes_of(build_skeleton(builder(stage, shape))) for stage in STAGES}
    total = sum(nbytes.values())
    cap = cap or max(1, round(total * 0.55))
    found: dict[str, Any] = {"cap": cap, "weight_bytes": nbytes}
    runs = CaseRuns("bench.pipeline.case", options, found)
    say(f"{', '.join(f'{stage} {n / 1e9:.2f} GB' for stage, n in nbytes.items())}")
    room = format_bytes(available_host_bytes())
    say(f"cap {format_bytes(cap)}, {options.steps} steps, host room {room}")
    parent = options.directory or weights_parent(total)
    small_pages = options.quick and options.device == "cpu"  # a GPU's frames are 2 MiB at least
    with tempfile.TemporaryDirectory(prefix="penstock-pipeline-", dir=parent) as directory:
        told = Options(
            directory=directory,
            device=options.device,
            shape=shape,
            cap=cap,
            host=options.host,
            steps=options.steps,
            clips=options.clips,
            link_bytes=32 * MIB if options.quick else GIB,
            block_bytes=8 * MIB if options.quick else GIB,
            page_size=256 << 10 if small_pages else None,
        )
        if not runs.write_weights(told):
            return 1
        say(f"weights written in {found['seconds']:.1f} s to {parent}")
        for name in options.only:
            row: Row = {"case": name}
            needed = round(total * _HOST_SHARE.get(name, 1.1)) + (0 if options.quick else _SPARE)
            if available_host_bytes() < needed:
                row["unavailable"] = (
                    f"it may take {format_bytes(needed)} of host memory, and there are "
                    f"{format_bytes(available_host_bytes())}"
                )
            elif name == "penstock-hard-cap" and options.quick and options.device != "cpu":
                row["unavailable"] = "a cap for tiny modules has no room for a CUDA context"
            else:
                row |= runs.run(name, told)
            derive(row, runs.rows)
            runs.keep(row, f"{name}: {outcome(row)}")
    say("", *stage_table(runs.rows), "", *case_table(runs.rows, cap), "", *LEGEND)
    well = "every stage of Penstock has the bits of plain PyTorch, under its cap"
    return runs.conclude(complaints(runs.rows, cap), well)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pipeline", description=(__doc__ or "").split("\n")[0]
    )
    add_options(parser, LOADERS, LOADERS, quick="tiny modules, few steps", limits=(150, 540))
    add = parser.add_argument
    add("--cap", type=parse_bytes, help="default: 24GiB, or 55%% of the weights if scaled")
    add("--host", default="pinned", help="host tier of Penstock; default: pinned")
    add("--scale", type=float, default=1.0, help="how deep the modules are; default: 1")
    add("--steps", type=int, help="steps of denoising; default: 6")
    add("--clips", type=int, default=2, help="timed runs; the last one is reported; default: 2")
    options = parse_options(parser, LOADERS)
    # What the others are compared with runs first, or there is nothing to compare with.
    options.only = [name for name in LOADERS if name in {*options.only, "resident"}]
    options.steps = options.steps or (4 if options.quick else 6)
    return options


def sizes(options: argparse.Namespace) -> tuple[Shape, int | None]:
    """Return the shape, and the cap if it does not follow from the weights."""
    shape = SMALL if options.quick else Shape()
    usual = None if options.quick or options.scale != 1 else 24 * GIB
    return shape.scaled(options.scale) if options.scale != 1 else shape, options.cap or usual


if __name__ == "__main__":
    sys.exit(main())
