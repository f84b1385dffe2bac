"""Torch's own allocator against a hard cap's, on recorded traces of allocations.

    python -m bench.allocator [--json FILE]

One process records what real models ask for under torch's allocator, and replays it there; another
replays it under a hard cap. Times are of replaying alone, so that the ratio is of the allocators
(with the cost of calling them from Python in both).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

PASSES = 9

Trace = list[int]  # sizes; -1 - n frees what the n-th entry took
Run = Callable[[], None]


def llama(prompt: int, steps: int) -> Run:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=7168,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 32000, (1, prompt), device="cuda")

    def run() -> None:
        with torch.no_grad():
            model.generate(ids, max_new_tokens=steps, do_sample=False, pad_token_id=0)

    return run


def unet_step() -> Run:
    down = [nn.Conv2d(4 * 4**i if i else 4, 4 * 4 ** (i + 1), 3, 2, 1) for i in range(4)]
    up = [nn.ConvTranspose2d(4 * 4 ** (i + 1), 4 * 4**i if i else 4, 4, 2, 1) for i in range(4)]
    model = nn.ModuleList([*down, *up]).cuda().eval()
    x = torch.randn(2, 4, 256, 256, device="cuda")

    def run() -> None:
        with torch.no_grad():
            held, y = [], x
            for layer in model[:4]:
                held.append(y)
                y = torch.nn.functional.silu(layer(y))
            for i in reversed(range(4)):
                y = torch.nn.functional.silu(model[4 + i](y)) + held[i]

    return run


def training_step() -> Run:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(8))
    )
    model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x = torch.randn(512, 1024, device="cuda")

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    return run


WORKLOADS = {
    "llama prefill": lambda: llama(2048, 1),
    "llama decode": lambda: llama(16, 24),
    "unet step": unet_step,
    "training step": training_step,
}


def record(make: Callable[[], Run]) -> Trace:
    """Return what one pass asks for and frees."""
    run = make()
    run()
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(context=None, max_entries=1_000_000)
    run()
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    trace, live = [], {}
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = len(trace)
            trace.append(event["size"])
        elif event["action"] == "free_requested" and event["addr"] in live:
            trace.append(-1 - live.pop(event["addr"]))
    return trace


def replay(trace: Trace) -> None:
    allocate = torch.cuda.caching_allocator_alloc
    free = torch.cuda.caching_allocator_delete
    held, taken = {}, []
    for entry in trace:
        if entry >= 0:
            held[len(taken)] = allocate(entry, stream=0)
            taken.append(None)
        else:
            free(held.pop(-1 - entry))
            taken.append(None)
    for address in held.values():
        free(address)


def measure(traces: dict[str, Trace]) -> dict[str, Any]:
    found = {}
    for name, trace in traces.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        replay(trace)
        seconds = []
        for _ in range(PASSES):
            start = time.perf_counter()
            replay(trace)
            seconds.append(time.perf_counter() - start)
        found[name] = {
            "requests": sum(entry >= 0 for entry in trace),
            "seconds": statistics.median(seconds),
            "reserved_peak": torch.cuda.max_memory_reserved(),
            "allocated_peak": torch.cuda.max_memory_allocated(),
        }
    return found


def child(mode: str, path: str) -> None:
    file = Path(path)
    if mode == "native":
        traces = {name: record(make) for name, make in WORKLOADS.items()}
        file.write_text(json.dumps(traces))
    else:
        import penstock

        penstock.set_cap("32GiB")
        traces = json.loads(file.read_text())
    torch.zeros(1, device="cuda")
    print(json.dumps(measure(traces)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.allocator", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for mode in ("native", "hard cap"):
            command = [
                sys.executable,
                "-m",
                "bench.allocator",
                "--child",
                mode,
                f"{directory}/traces.json",
            ]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[mode] = json.loads(ran.stdout.splitlines()[-1])
    print(f"{'trace':16} {'requests':>9} {'native':>10} {'hard cap':>10} {'time':>6} {'memory':>7}")
    for name, native in found["native"].items():
        ours = found["hard cap"][name]
        each = [1e9 * x["seconds"] / x["requests"] for x in (native, ours)]
        print(
            f"{name:16} {native['requests']:9} {each[0]:7.0f} ns {each[1]:7.0f} ns "
            f"{each[1] / each[0]:6.2f} {ours['reserved_peak'] / native['reserved_peak']:7.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
