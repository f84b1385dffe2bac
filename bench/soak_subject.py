"""The work of `soak.py`: `python soak_subject.py cap|fraction BYTES SECONDS SEED FILE`.

Threads that allocate, multiply, convolve, attend, capture graphs, run models that stream, and ask
for all there is until they are refused. What is in memory is compared with what was put there.
"""

import contextlib
import gc
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import penstock
from penstock.hard_cap import current_cap

MIB = 1 << 20
TENSOR_THREADS = 8
STREAMS = 4
# What libraries say where torch's refusal was on the way to them.
REFUSALS = ("out of memory", "the cap is", "unable to find an engine", "alloc_failed")

Work = Callable[[random.Random], None]


class Gate:
    """Work goes through in any number; a capture alone, since CUDA refuses waits meanwhile."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Go through with others."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else is inside, and keep others out."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._alone = True
            self._condition.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()


class Soak:
    """Runs work in threads until a time, and counts.

    Parameters
    ----------
    capped
        Under a hard cap, and not under a fraction of torch's.
    cap
        Bytes.
    seconds, seed
        For how long; of all that is random.
    """

    def __init__(self, capped: bool, cap: int, seconds: float, seed: int) -> None:
        self.capped = capped
        self.cap = cap
        self.seed = seed
        self.end = time.monotonic() + seconds
        self.gate = Gate()
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.wrong = 0
        self.failures: list[str] = []
        self.events: list[tuple[float, str]] = []
        self.lowered: list[dict[str, float]] = []

    def note(self, what: str) -> None:
        """Remember what happened now, for whoever looks at a sample of this time."""
        self.events.append((time.monotonic(), what))

    def compare(self, equal: bool, what: str) -> None:
        """Count a result that is not what it should be."""
        if not equal:
            self.wrong += 1
            self.note(f"wrong: {what}")

    def repeat(self, name: str, work: Work, seed: int, alone: bool = False) -> None:
        """Do something over and over; a refusal is counted, any other error ends it."""
        choose = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                with self.gate.alone() if alone else self.gate.work():
                    work(choose)
                if self.done[name] == 0:
                    self.note(f"first {name} done")
                self.done[name] += 1
            except Exception as error:
                if not is_refusal(error):
                    self.failures.append(f"{name}: {traceback.format_exc()[-3000:]}")
                    self.note(f"{name} failed")
                    return
                self.refused[name] += 1
                time.sleep(0.005)
            if alone:
                time.sleep(0.2)  # else nobody else would get a turn

    def report(self) -> dict[str, Any]:
        """Return what was counted."""
        return {
            "done": dict(self.done),
            "refused": dict(self.refused),
            "refusals": sum(self.refused.values()),
            "wrong": self.wrong,
            "failures": self.failures,
            "lowered": self.lowered,
            "events": self.events,
        }


def is_refusal(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, penstock.CapExceededError)):
        return True
    return isinstance(error, RuntimeError) and any(r in str(error).lower() for r in REFUSALS)


def tensors(soak: Soak) -> Work:
    """Make tensors with a value on some stream; look at them later, on another."""
    side = [torch.cuda.Stream() for _ in range(STREAMS)]
    held: list[tuple[torch.Tensor, int, torch.cuda.Event]] = []

    def work(choose: random.Random) -> None:
        stream = choose.choice(side)
        with torch.cuda.stream(stream):
            if held and (len(held) > 16 or choose.random() < 0.5):
                tensor, value, ready = held.pop(choose.randrange(len(held)))
                stream.wait_event(ready)
                wrong = (tensor != value).sum()
                tensor.record_stream(stream)
                del tensor  # while the comparison may still run
                soak.compare(wrong.item() == 0, "a tensor")
                return
            try:
                tensor = torch.empty(
                    int(2 ** choose.uniform(4, 26)), dtype=torch.uint8, device="cuda"
                )
            except (RuntimeError, penstock.CapExceededError):
                held.clear()
                raise
            value = choose.randrange(256)
            tensor.fill_(value)
            ready = torch.cuda.Event()
            ready.record(stream)
            held.append((tensor, value, ready))

    return work


def matmul(choose: random.Random) -> None:
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    m, k, n = (choose.choice([8, 64, 257, 1024, 3000]) for _ in range(3))
    a = torch.randn(m, k, device="cuda", dtype=dtype)
    b = torch.randn(k, n, device="cuda", dtype=dtype)
    F.linear(a, b.t(), torch.zeros(n, device="cuda", dtype=dtype)).sum().item()


def convolution(choose: random.Random) -> None:
    channels, size = choose.choice([3, 32, 128]), choose.choice([16, 65, 128])
    dtype = choose.choice([torch.float32, torch.float16])
    weight = torch.randn(64, channels, 3, 3, device="cuda", dtype=dtype, requires_grad=True)
    image = torch.randn(choose.choice([1, 8]), channels, size, size, device="cuda", dtype=dtype)
    F.conv2d(image, weight, padding=1).square().mean().backward()
    torch.cuda.current_stream().synchronize()


def attention(choose: random.Random) -> None:
    dtype = choose.choice([torch.float16, torch.bfloat16, torch.float32])
    length, width = choose.choice([17, 256, 1500]), choose.choice([64, 128])
    q = torch.randn(2, 8, length, width, device="cuda", dtype=dtype, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q, is_causal=choose.random() < 0.5).sum().backward()
    torch.cuda.current_stream().synchronize()


def graphs(soak: Soak) -> Work:
    def work(choose: random.Random) -> None:
        width = choose.choice([256, 1024])
        weight = torch.randn(width, width, device="cuda")
        x = torch.randn(choose.choice([8, 64]), width, device="cuda")

        def run() -> torch.Tensor:
            y = x
            for _ in range(6):
                y = torch.tanh(y @ weight * 0.03)
            return y

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        side.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            y = run()
        captured.replay()
        wanted = y.clone()
        for _ in range(10):
            noise = torch.full((choose.randrange(1, 4 * MIB),), 7.0, device="cuda")
            captured.replay()
            soak.compare(torch.equal(y, wanted), "a graph's result")
            soak.compare(bool((noise == 7.0).all()), "a tensor beside a graph")

    return work


def models(soak: Soak) -> Work:
    """Have a model come, run and go; its passes are compared with its weights used one by one."""
    manager = penstock.MemoryManager(device="cuda", progress=False) if soak.capped else None

    def work(choose: random.Random) -> None:
        width, depth = choose.choice([512, 1024, 2048]), choose.choice([8, 16, 32])
        generator = torch.Generator().manual_seed(choose.randrange(1 << 30))
        state = {}
        for i in range(depth):
            state[f"{i}.weight"] = torch.randn(width, width, generator=generator) * 0.02
            state[f"{i}.bias"] = torch.randn(width, generator=generator)

        def build() -> nn.Module:
            return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).eval()

        def passes(model: nn.Module) -> None:
            for _ in range(choose.randrange(2, 10)):
                x = torch.randn(choose.choice([4, 64, 4096]), width, device="cuda")
                y = model(x)
                wanted = x
                for i in range(depth):
                    wanted = F.linear(
                        wanted, state[f"{i}.weight"].cuda(), state[f"{i}.bias"].cuda()
                    )
                soak.compare(torch.equal(y, wanted), f"a pass of {depth} x {width}")

        soak.note(f"a model of {depth} x {width}")
        with torch.no_grad():
            if manager is None:
                model = build()
                model.load_state_dict(state)
                passes(model.cuda())
                return
            name = "model"
            manager.register(name, build, state)
            try:
                with manager.use(name) as bound:
                    passes(bound)
            finally:
                manager.unregister(name)

    return work


def exhaust(choose: random.Random) -> None:
    """Ask for more until it is refused; the refusal is the result."""
    held = []
    while True:
        held.append(
            torch.empty(choose.choice([2, 16, 64, 200]) * MIB, dtype=torch.uint8, device="cuda")
        )


def compiled() -> None:
    step = torch.compile(lambda a, b: torch.relu(a @ b) + 1)
    a = torch.randn(256, 256, device="cuda")
    torch.testing.assert_close(step(a, a), torch.relu(a @ a) + 1)


def change_caps(soak: Soak) -> None:
    """Lower the cap for a second now and then, and note when it was lower."""
    choose = random.Random(soak.seed)
    while time.monotonic() < soak.end - 6:
        time.sleep(5)
        try:
            lower_cap(soak, int(soak.cap * choose.uniform(0.5, 0.9)))
        except penstock.CapExceededError:
            soak.refused["lower cap"] += 1
        except Exception:
            soak.failures.append(f"lower cap: {traceback.format_exc()[-3000:]}")
            return


def lower_cap(soak: Soak, low: int) -> None:
    penstock.set_cap(low)
    begun = time.monotonic()
    soak.note(f"cap lowered to {low}")
    time.sleep(1)
    soak.lowered.append({"cap": low, "begun": begun, "ended": time.monotonic()})
    soak.done["lower cap"] += 1
    penstock.set_cap(soak.cap)


def main() -> None:
    mode, cap, seconds, seed, file = sys.argv[1:]
    soak = Soak(mode == "cap", int(cap), float(seconds), int(seed))
    soak.note("start")
    if soak.capped:
        penstock.set_cap(soak.cap)
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(soak.cap / total)
    soak.note("capped")
    repeated: list[tuple[str, Work, bool]] = [
        *(("tensors", tensors(soak), False) for _ in range(TENSOR_THREADS)),
        ("matmul", matmul, False),
        ("convolution", convolution, False),
        ("attention", attention, False),
        ("model", models(soak), False),
        ("exhaust", exhaust, False),
        ("graph", graphs(soak), True),
    ]
    threads = [
        threading.Thread(target=soak.repeat, args=(name, work, soak.seed * 100 + i, alone))
        for i, (name, work, alone) in enumerate(repeated)
    ]
    try:
        compiled()
        soak.done["compile"] += 1
    except Exception:
        soak.failures.append(f"compile: {traceback.format_exc()[-3000:]}")
    if soak.capped:
        threads.append(threading.Thread(target=change_caps, args=(soak,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = soak.report()
    try:
        torch.cuda.synchronize()
        gc.collect()
        report |= ledger() if soak.capped else {"torch_peak": torch.cuda.max_memory_reserved()}
    except Exception:
        report["failures"].append(f"at the end: {traceback.format_exc()[-3000:]}")
    Path(file).write_text(json.dumps(report))
    for failure in report["failures"]:
        print(failure, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if report["failures"] else 0)  # daemon threads of libraries have no say in it


def ledger() -> dict[str, Any]:
    hard_cap = current_cap("cuda")
    assert hard_cap is not None
    stats = hard_cap.pager.budget.stats()
    report: dict[str, Any] = {
        "ledger_peak": stats.peak,
        "ledger": dict(stats.used_by_tag),
        "summary": penstock.memory_summary(),
    }
    if hard_cap.watch is not None:
        watch = hard_cap.watch.stats()
        report["outside"] = {
            name: getattr(watch, name) for name in ("held", "charged", "whole_device")
        }
    return report


if __name__ == "__main__":
    main()
