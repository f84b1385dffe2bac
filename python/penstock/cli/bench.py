"""`penstock bench`: Penstock beside plain PyTorch and others' offloading, in one table."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock.bench.cases import Case, Sizes, catalogue, select
from penstock.bench.claims import claim_lines, judge
from penstock.bench.machine import describe_machine
from penstock.bench.models import llama_config, write_checkpoint
from penstock.bench.options import CaseOptions
from penstock.bench.runner import Row, run_cases
from penstock.bench.table import LEGEND, reason_of, table
from penstock.cli.settings_options import cap_text
from penstock.memory.devices import open_device
from penstock.optional_packages import require_transformers
from penstock.sizes import format_bytes, parse_cap

__all__ = ["add_options", "run"]

GIB = 1 << 30
MIB = 1 << 20
_FULL = {"layers": 16, "hidden": 4096, "vocabulary": 32000}
_SMALL = {"layers": 8, "hidden": 512, "vocabulary": 4096}
_QUICK_CASES = (
    "resident",
    "triple-buffer",
    "accelerate",
    "diffusers-block",
    "diffusers-leaf-record",
    "penstock-frames-ring",
    "penstock-managed-ring",
    "penstock-frames-graph",
)


def add_options(parser: argparse.ArgumentParser, size: Callable[[str], int]) -> None:
    """Add the command's options; `size` reads sizes."""
    add = parser.add_argument
    add("--device", default="auto", help='"auto", "cpu" or "cuda"')
    add("--quick", action="store_true", help="a tiny model and few cases; speed is not judged")
    add("--cases", help="names, separated by commas; those that they need run too")
    add("--layers", type=int, help="decoder layers; default: 16 on a GPU, 8 on the CPU")
    add("--hidden", type=int, help="width; default: 4096 on a GPU, 512 on the CPU")
    add("--vocabulary", type=int, help="tokens; default: 32000 on a GPU, 4096 on the CPU")
    add("--prompt", type=int, default=16, help="tokens of a pass; default: 16")
    add(
        "--long-prompt",
        default="auto",
        help='tokens, "none", or "auto": so many that compute takes as long as copying',
    )
    add(
        "--ring",
        type=size,
        help="cap at which next to nothing stays; default on a GPU: 400MiB, managed 2GiB",
    )
    add("--cap", type=cap_text, help='such as "8GiB" or "60%%"; default: 4GiB on a GPU')
    add("--host-budget", type=size, default=2 * GIB, help="RAM of the stream tier; default: 2GiB")
    add("--passes", type=int, default=10, help="passes to time at least; default: 10")
    add("--time-limit", type=float, default=240, help="seconds for an ordinary case; default: 240")
    add("--directory", type=Path, help="where to write the checkpoint; default: a temporary one")
    add("--json", dest="json_file", type=Path, metavar="FILE", help="write the figures there too")


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write a checkpoint, run the cases, print the table and the claims, and return all of it.

    `ok` is false if a claim that could be judged does not hold: then the exit code is 1.
    """
    require_transformers("the benchmark's model", "bench")
    plan = _plan(options)

    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory(prefix="penstock-bench-", dir=options.directory) as name:
        checkpoint = Path(name, "checkpoint")
        checkpoint.mkdir()
        config = llama_config(plan.layers, plan.hidden, plan.vocabulary)
        nbytes = write_checkpoint(config, checkpoint, plan.device)
        torch.cuda.empty_cache()
        told = plan.case_options(checkpoint, Path(name, "references"))
        sizes = plan.sizes(nbytes)
        cases = plan.cases(sizes)
        machine = describe_machine(torch.device(plan.device), told.link_bytes)
        say(*(f"{key}: {value}" for key, value in machine.items()))
        say(
            f"model: Llama-shaped, {plan.layers} layers of width {plan.hidden}, bf16, "
            f"{format_bytes(nbytes)} in {len(told.files())} files",
            "",
        )
        found: dict[str, Any] = {
            "machine": machine,
            "model": {
                "layers": plan.layers,
                "hidden": plan.hidden,
                "vocabulary": plan.vocabulary,
                "nbytes": nbytes,
            },
            "sizes": asdict(sizes),
            "rows": [],
        }

        def tell(row: Row) -> None:
            say(f"  {row['case']}: {_outcome(row)}")
            found["rows"].append(row)
            _write(found, options.json_file)  # whatever ends the run leaves what was measured

        rows = run_cases(
            cases, told, long_prompt=plan.long_prompt, time_limit=options.time_limit, tell=tell
        )
    claims = judge(rows, plan.no_speed)
    say("", *table(found["rows"]), "", *LEGEND, "", *claim_lines(claims))
    found["claims"] = [asdict(claim) for claim in claims]
    found["ok"] = all(claim.holds is not False for claim in claims)
    _write(found, options.json_file)
    return found


@dataclass(frozen=True)
class _Plan:
    """What a run measures, with what the device and the options leave open filled in."""

    options: argparse.Namespace
    device: str
    small: bool
    layers: int
    hidden: int
    vocabulary: int
    long_prompt: int | None  # None: to be found; 0: none

    def case_options(self, checkpoint: Path, references: Path) -> CaseOptions:
        return CaseOptions(
            checkpoint=str(checkpoint),
            references=str(references),
            device=self.device,
            layers=self.layers,
            hidden=self.hidden,
            vocabulary=self.vocabulary,
            prompt=self.options.prompt,
            passes=3 if self.options.quick else self.options.passes,
            least_seconds=0.0 if self.options.quick else 2.0,
            link_bytes=64 * MIB if self.small else GIB,
        )

    def sizes(self, nbytes: int) -> Sizes:
        return Sizes(
            ring=self.options.ring or (max(16 * MIB, nbytes // 4) if self.small else 400 * MIB),
            peer=max(16 * MIB, nbytes // 3) if self.small else 1280 * MIB,
            managed_ring=self.options.ring
            or (max(16 * MIB, nbytes // 4) if self.small else 2 * GIB),
            cap=self.options.cap or (nbytes // 2 if self.small else 4 * GIB),
            above=nbytes + nbytes // 8 + 64 * MIB,
            host_budget=self.options.host_budget,
        )

    def cases(self, sizes: Sizes) -> list[Case]:
        cases = catalogue(torch.device(self.device).type, sizes)
        if self.options.cases:
            cases = select(cases, self.options.cases.split(","))
        elif self.options.quick:
            cases = select(cases, [case.name for case in cases if case.name in _QUICK_CASES])
        return [case for case in cases if not (case.long and self.long_prompt == 0)]

    @property
    def no_speed(self) -> str:
        """Why speed is not judged; nothing if it is."""
        if torch.device(self.device).type != "cuda":
            return "it is a promise about a GPU"
        return "--quick measures too little to say" if self.options.quick else ""


def _plan(options: argparse.Namespace) -> _Plan:
    core, device = open_device(options.device)
    if options.cap is not None:
        options.cap = parse_cap(options.cap, core.info().total_bytes)
    small = options.quick or device.type == "cpu"
    shape = _SMALL if small else _FULL
    return _Plan(
        options,
        str(device),
        small,
        layers=options.layers or shape["layers"],
        hidden=options.hidden or shape["hidden"],
        vocabulary=options.vocabulary or shape["vocabulary"],
        long_prompt=_long_prompt(options.long_prompt),
    )


def _write(found: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(found, indent=2, default=str) + "\n")


def _outcome(row: Row) -> str:
    return reason_of(row) or f"{row['seconds']:.5f} s a pass"


def _long_prompt(text: str) -> int | None:
    """Read the option: None for auto, 0 for none."""
    if text == "auto":
        return None
    if text == "none":
        return 0
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f'--long-prompt is "auto", "none" or a number of tokens, not {text!r}')
    return int(text)
