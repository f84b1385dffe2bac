"""Text generation under caps: Penstock beside plain PyTorch and accelerate.

    python -m bench.generate [--quick] [--caps 4GiB,8GiB,12GiB] [--json FILE]

A model of the shape of Llama-3-8B with random weights in bf16 (16 GB), which generates greedily
from a prompt of 16 tokens, under each cap in a process of its own. Tokens are compared with those
of plain PyTorch. Exits with an error if Penstock fails, gives other tokens, or crosses its cap. It
takes some 4 minutes on a GPU, 16 GB for the weights (in /dev/shm, or else in the temporary
directory), and as much host memory again. `--quick` runs it with a tiny model, on a CPU too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from typing import Any

from bench.generate.case import LOADERS, Options
from bench.generate.table import LEGEND, complaints, derive, label, outcome, table
from bench.harness.case_runs import CaseRuns, add_options, parse_options
from bench.harness.report import say
from bench.harness.weights_place import weights_parent
from penstock.bench.runner import Row
from penstock.loading.host_tiers import available_host_bytes
from penstock.optional_packages import require_transformers
from penstock.sizes import format_bytes, parse_bytes

GIB = 1 << 30
MIB = 1 << 20
_FULL = {"layers": 32, "hidden": 4096, "vocabulary": 128_256}
_SMALL = {"layers": 6, "hidden": 512, "vocabulary": 1024}
_FULL_CAPS = [4 * GIB, 8 * GIB, 12 * GIB]
_SMALL_CAPS = [12 * MIB, 24 * MIB]
_CASES = ("resident", "penstock", "accelerate")


def main() -> int:
    options = parse()
    require_transformers("the benchmark's model", "bench")
    shape = dict(_SMALL if options.quick else _FULL)
    shape["layers"] = options.layers or shape["layers"]
    caps = options.caps or (_SMALL_CAPS if options.quick else _FULL_CAPS)
    found: dict[str, Any] = {"shape": shape, "caps": caps}
    runs = CaseRuns("bench.generate.case", options, found)
    parent = options.directory or weights_parent(0 if options.quick else 17 * GIB)
    with tempfile.TemporaryDirectory(prefix="penstock-generate-", dir=parent) as directory:
        told = Options(
            directory=directory,
            device=options.device,
            **shape,
            cap=0,
            prompt=options.prompt,
            tokens=options.tokens,
            link_bytes=32 * MIB if options.quick else GIB,
            block_bytes=8 * MIB if options.quick else GIB,
        )
        if not runs.write_weights(told):
            return 1
        nbytes = found["weight_bytes"]
        say(f"{format_bytes(nbytes)} written in {found['seconds']:.1f} s to {parent}")
        for name, cap in cases(options.only, caps):
            row: Row = {"case": name, "cap": cap}
            if name != "resident" and available_host_bytes() < nbytes * 1.2:
                row["unavailable"] = (
                    f"there are {format_bytes(available_host_bytes())} of host memory"
                )
            else:
                row |= runs.run(name, tell(told, name, cap, options.peer_tokens))
            derive(row, runs.rows)
            runs.keep(row, f"{label(row)}: {outcome(row)}")
    say("", *table(runs.rows), "", *LEGEND)
    return runs.conclude(
        complaints(runs.rows), "Penstock generates the tokens of plain PyTorch, under its caps"
    )


def tell(told: Options, name: str, cap: int | None, peer_tokens: int) -> Options:
    """Return the options of one case."""
    changed = replace(told, cap=cap or 0)
    if name == "accelerate":
        return replace(changed, tokens=min(told.tokens, peer_tokens))
    return changed


def parse() -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [parse_bytes(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m bench.generate", description=(__doc__ or "").split("\n")[0]
    )
    add_options(parser, LOADERS, _CASES, quick="a tiny model", limits=(90, 300))
    add = parser.add_argument
    add("--caps", type=sizes, help="for weights, separated by commas; default: 4GiB,8GiB,12GiB")
    add("--layers", type=int, help="decoder layers; default: 32")
    add("--prompt", type=int, default=16, help="tokens of the prompt; default: 16")
    add("--tokens", type=int, default=16, help="tokens to generate; default: 16")
    add("--peer-tokens", type=int, default=8, help="tokens that accelerate generates; default: 8")
    options = parse_options(parser, LOADERS)
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


if __name__ == "__main__":
    sys.exit(main())
