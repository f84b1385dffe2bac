"""The main job on a GPU, measured: a model larger than its cap, bit-identical, and what it moves.

    python -m bench.gpu_check [--layers 16] [--cap 2GiB] [--json FILE]

Writes random weights as a checkpoint, runs them all resident and under a cap, compares bits, and
measures the managed pager against a pinned copy in the same run. Exits with an error if a claim
does not hold. Figures go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import penstock
from bench.gpu_check.unified_memory_counters import Counters
from penstock import _core
from penstock.bench.models import build, llama_config, resident_model, write_checkpoint
from penstock.sizes import format_bytes, parse_bytes

GIB = 1 << 30
PROMPT = 16
NEW_TOKENS = 32


class Check:
    """Collects figures and failed claims, and prints them as they come."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.failed: list[str] = []
        self.prefix = ""  # of names from now on

    def figure(self, name: str, value: object, text: str = "") -> None:
        """Note a measured value; `text` is how to print it."""
        self.figures[self.prefix + name] = value
        print(f"  {name}: {text or value}", flush=True)

    def claim(self, name: str, holds: bool) -> None:
        """Note whether something that we promise holds."""
        self.figures[self.prefix + name] = holds
        print(f"  {name}: {'yes' if holds else 'NO'}", flush=True)
        if not holds:
            self.failed.append(self.prefix + name)


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    mask = torch.ones_like(ids)
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return tokens


def run_model(check: Check, directory: Path, config: Any, cap: int, pager: str) -> None:  # noqa: ANN401
    ids = torch.randint(0, config.vocab_size, (1, PROMPT), device="cuda")
    print("all resident, plain PyTorch:")
    wanted_logits, wanted_tokens = run_resident(check, directory, config, ids)
    torch.cuda.empty_cache()

    print(f"under a cap of {format_bytes(cap)}, {pager} pager:")
    check.prefix = f"{pager}_"
    manager = penstock.MemoryManager(cap=cap, device="cuda", pager=pager, progress=False)
    start = time.perf_counter()
    manager.register("llama", lambda: build(config), directory)
    taken = time.perf_counter() - start
    size = manager.stats().models["llama"].nbytes
    rate = size / taken / 1e9
    check.figure("register_GB_per_s", rate, f"{rate:.1f} ({format_bytes(size)} in {taken:.1f} s)")
    with manager.use("llama") as paged:
        bound = {name: p.data_ptr() for name, p in paged.named_parameters()}
        runner = manager._models["llama"].runner
        assert runner is not None
        inside = all(runner.memory.region.holds(p) for p in paged.parameters())
        check.claim("parameters_inside_region", inside)
        check.claim("logits_bit_identical", torch.equal(paged(ids).logits, wanted_logits))
        check.figure("capped_seconds_per_pass", seconds(lambda: paged(ids)))
        before = manager.stats().loaded_bytes
        paged(ids)
        check.figure("capped_bytes_per_pass", manager.stats().loaded_bytes - before)
        check.claim("generated_tokens_equal", torch.equal(generate(paged, ids), wanted_tokens))
        check.claim("logits_bit_identical_after", torch.equal(paged(ids).logits, wanted_logits))
        same = bound == {name: p.data_ptr() for name, p in paged.named_parameters()}
        check.claim("addresses_unchanged", same)
    stats = manager.stats()
    print(stats)
    peak = f"{format_bytes(stats.peak)} of {format_bytes(cap)}"
    check.figure("ledger_peak_bytes", stats.peak, peak)
    check.claim("ledger_peak_within_cap", stats.peak <= cap)
    check.claim("no_weights_at_exit", stats.used_by_tag["weights"] == 0)
    manager.unregister("llama")
    check.claim("ledger_empty_at_end", manager.stats().used == 0)
    check.prefix = ""


def run_resident(
    check: Check,
    directory: Path,
    config: Any,  # noqa: ANN401
    ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    model = resident_model(config, directory, "cuda")
    check.figure("resident_seconds_per_pass", seconds(lambda: model(ids)))
    return model(ids).logits, generate(model, ids)


def seconds(work: Any, repeats: int = 5) -> float:  # noqa: ANN401
    """Median wall time of a call, the device synchronized around it, after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def run_pager(check: Check, counters: Counters, nbytes: int) -> None:
    print(f"managed pager, {format_bytes(nbytes)} at a time:")
    pager = penstock.Pager(cap=2 * nbytes, device="cuda")
    link = _core.measure_link_rate(pager.core_device, nbytes)
    check.figure("pinned_GB_per_s", link / 1e9, f"{link / 1e9:.1f}")
    region = pager.reserve(nbytes, writable=False)
    values = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    region.core.write(0, values.numpy())
    on_device = region.tensor(0, (nbytes,), torch.uint8)
    wanted = values.cuda()

    rates, evictions = [], []
    moved_in = moved_out = 0
    unavailable = ""
    for _ in range(6):
        with counters.counting() as loads:
            start = time.perf_counter()
            pager.prefetch(region)
            torch.cuda.synchronize()
            rates.append(nbytes / (time.perf_counter() - start))
        check_equal = torch.equal(on_device, wanted)
        with counters.counting() as drops:
            start = time.perf_counter()
            given_back = pager.evict(region)
            evictions.append(time.perf_counter() - start)
            torch.cuda.synchronize()
        assert check_equal and given_back == nbytes
        moved_in += loads.host_to_device
        moved_out += drops.device_to_host + drops.host_to_device
        unavailable = drops.unavailable
    prefetch = statistics.median(rates[1:])
    check.figure("prefetch_GB_per_s", prefetch / 1e9, f"{prefetch / 1e9:.1f}")
    check.figure("first_prefetch_GB_per_s", rates[0] / 1e9, f"{rates[0] / 1e9:.1f}")
    check.figure("prefetch_of_pinned", prefetch / link, f"{prefetch / link:.3f}")
    check.claim("prefetch_at_least_0.85_of_pinned", prefetch / link >= 0.85)
    check.figure("clean_evict_ms", 1e3 * statistics.median(evictions))

    if unavailable:
        check.figure("write_back", f"not measured: {unavailable}")
        check.failed.append("write_back_measured")
        return
    check.figure("counted_bytes_in", moved_in, f"{moved_in} for {6 * nbytes} prefetched")
    check.figure("counted_bytes_out_on_clean_evict", moved_out)
    dirty = pager.reserve(nbytes // 4, writable=True)
    pager.prefetch(dirty)
    dirty.tensor(0, (dirty.nbytes,), torch.uint8).fill_(7)
    torch.cuda.synchronize()
    with counters.counting() as control:
        pager.evict(dirty)
        torch.cuda.synchronize()
    check.figure("counted_bytes_out_on_dirty_evict", control.device_to_host)
    check.claim("counter_sees_write_back", control.device_to_host >= dirty.nbytes)
    check.claim("clean_evict_moves_nothing", moved_out == 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--cap", type=parse_bytes, default=2 * GIB)
    parser.add_argument("--transfer", type=parse_bytes, default=2 * GIB)
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    check = Check()
    check.figure("gpu", torch.cuda.get_device_name())
    check.figure("torch", torch.__version__)
    check.figure("python", platform.python_version())
    counters = Counters()
    run_pager(check, counters, options.transfer)
    config = llama_config(options.layers)
    with tempfile.TemporaryDirectory() as directory:
        size = write_checkpoint(config, Path(directory), "cuda")
        check.figure("checkpoint_bytes", size, format_bytes(size))
        for pager in ("frames", "managed"):
            run_model(check, Path(directory), config, options.cap, pager)
    options.json.write_text(json.dumps(check.figures, indent=2) + "\n")
    print("failed: " + ", ".join(check.failed) if check.failed else "all claims hold")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
