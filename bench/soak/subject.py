"""The work of the soak: `python -m bench.soak.subject cap|fraction BYTES SECONDS SEED FILE`.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import penstock
from bench.soak.work import (
    Work,
    attention,
    compiled,
    convolution,
    exhaust,
    graphs,
    is_refusal,
    matmul,
    models,
    tensors,
)
from penstock.cap.process import current_cap

MIB = 1 << 20
TENSOR_THREADS = 8


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
        *(("tensors", tensors(soak.compare), False) for _ in range(TENSOR_THREADS)),
        ("matmul", matmul, False),
        ("convolution", convolution, False),
        ("attention", attention, False),
        ("model", models(soak.capped, soak.compare, soak.note), False),
        ("exhaust", exhaust, False),
        ("graph", graphs(soak.compare), True),
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
