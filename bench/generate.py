"""Text generation under caps: Penstock beside plain PyTorch and accelerate.

    python bench/generate.py [--quick] [--caps 4GiB,8GiB,12GiB] [--json FILE]

A model of the shape of Llama-3-8B with random weights in bf16 (16 GB), which generates greedily
from a prompt of 16 tokens, under each cap in a process of its own. Tokens are compared with those
of plain PyTorch. Exits with an error if Penstock fails, gives other tokens, or crosses its cap. It
takes about 2 minutes on a GPU, 16 GB for the weights (in /dev/shm, or else in the temporary
directory), and as much host memory again. `--quick` runs it with a tiny model, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from generate_case import LOADERS, Options
from generate_table import LEGEND, complaints, derive, label, outcome, table
from penstock.bench.runner import Row, run_for_json
from penstock.bench.table import reason_of
from penstock.extras import require_transformers
from penstock.sizes import format_bytes, parse_bytes
from report import say, write_json
from room import host_room, weights_parent

GIB = 1 << 30
MIB = 1 << 20
_FULL = {"layers": 32, "hidden": 4096, "vocabulary": 128_256}
_SMALL = {"layers": 6, "hidden": 512, "vocabulary": 1024}
_FULL_CAPS = [4 * GIB, 8 * GIB, 12 * GIB]
_SMALL_CAPS = [12 * MIB, 24 * MIB]
_CASES = ("resident", "penstock", "accelerate")
_PASSES_TO_SETTLE = 8  # after which Penstock's plan changes no more


def main() -> int:
    options = parse()
    require_transformers("the benchmark's model", "bench")
    device = options.device
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    shape = dict(_SMALL if options.quick else _FULL)
    shape["layers"] = options.layers or shape["layers"]
    caps = options.caps or (_SMALL_CAPS if options.quick else _FULL_CAPS)
    found: dict[str, Any] = {"shape": shape, "caps": caps, "rows": []}
    deadline = time.monotonic() + options.total_limit
    parent = options.directory or weights_parent(0 if options.quick else 17 * GIB)
    with tempfile.TemporaryDirectory(prefix="penstock-generate-", dir=parent) as directory:
        told = Options(
            directory=directory,
            device=device,
            **shape,
            cap=0,
            prompt=options.prompt,
            tokens=options.tokens,
            warm_tokens=2,
            link_bytes=32 * MIB if options.quick else GIB,
            block_bytes=8 * MIB if options.quick else GIB,
        )
        weights = run("weights", told, options.time_limit, deadline)
        found |= weights
        if reason_of(weights):
            say(f"weights: {reason_of(weights)}", weights.get("stderr", ""))
            write_json(found, options.json)
            return 1
        say(*(f"{key}: {value}" for key, value in weights["machine"].items()))
        nbytes = weights["weight_bytes"]
        say(f"{format_bytes(nbytes)} written in {weights['seconds']:.1f} s to {parent}")
        for name, cap in cases(options.only, caps):
            row: Row = {"case": name, "cap": cap}
            if name != "resident" and host_room() < nbytes * 1.2:
                row["unavailable"] = f"there are {format_bytes(host_room())} of host memory"
            else:
                ours = name.startswith("penstock")
                changed = replace(
                    told,
                    cap=cap or 0,
                    tokens=min(options.tokens, options.peer_tokens)
                    if name == "accelerate"
                    else options.tokens,
                    warm_tokens=_PASSES_TO_SETTLE if ours else told.warm_tokens,
                )
                row |= run(name, changed, options.time_limit, deadline)
            derive(row, found["rows"])
            found["rows"].append(row)
            say(f"{label(row)}: {outcome(row)}", *([row["stderr"]] if "stderr" in row else []))
            write_json(found, options.json)  # whatever ends the run leaves what was measured
    say("", *table(found["rows"]), "", *LEGEND)
    broken = complaints(found["rows"])
    found["broken"] = broken
    say("", *(broken or ["Penstock generates the tokens of plain PyTorch, under its caps"]))
    write_json(found, options.json)
    return 1 if broken else 0


def parse() -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [parse_bytes(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model")
    add("--device", default="auto", help='"auto", "cpu" or "cuda"')
    add("--only", default=",".join(_CASES), help=f"cases: {', '.join(LOADERS)}")
    add("--caps", type=sizes, help="for weights, separated by commas; default: 4GiB,8GiB,12GiB")
    add("--layers", type=int, help="decoder layers; default: 32")
    add("--prompt", type=int, default=16, help="tokens of the prompt; default: 16")
    add("--tokens", type=int, default=16, help="tokens to generate; default: 16")
    add("--peer-tokens", type=int, default=8, help="tokens that accelerate generates; default: 8")
    add("--directory", type=Path, help="where the weights are written; default: /dev/shm, or /tmp")
    add("--time-limit", type=float, default=90, help="seconds for a case; default: 90")
    add("--total-limit", type=float, default=300, help="seconds for all; default: 300")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - set(LOADERS)
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    if min(options.tokens, options.peer_tokens) < 2:
        parser.error("give at least 2 tokens: the first is the prompt's")
    return options


def cases(names: list[str], caps: list[int]) -> list[tuple[str, int | None]]:
    """List cases with their caps; what the others are compared with runs first."""
    found: list[tuple[str, int | None]] = [("resident", None)]
    for name in LOADERS:
        if name in names and name != "resident":
            found += [(name, cap) for cap in caps]
    return found


def run(name: str, told: Options, time_limit: float, deadline: float) -> dict[str, Any]:
    """Run a case in a process of its own."""
    left = min(time_limit, deadline - time.monotonic())
    if left <= 0:
        return {"unavailable": "there was no time left"}
    script = Path(__file__).with_name("generate_case.py")
    command = [sys.executable, str(script), name, "--options", json.dumps(asdict(told))]
    return run_for_json(command, left)


if __name__ == "__main__":
    sys.exit(main())
