"""Varied work under a cap, for minutes, while another process watches what the driver says.

    python -m bench.soak [--mode cap|fraction|two] [--seconds 480] [--cap GIB] [--json FILE]

This process never uses CUDA: it samples NVML's figure of the device, before, while and after the
work of `bench.soak.subject` runs in processes of its own, and judges. Nobody else may use it
meanwhile. `cap` is one process under `penstock.set_cap`; `two` is two of them at once; `fraction`
is the same work under `torch.cuda.set_per_process_memory_fraction`, to show what that leaves out.
Exit status 1 where a claim fails, 2 where it could not be judged.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import Any

GIB = 1 << 30
LEAST_RATE = 200.0  # samples a second
LEAST_PEAK = 0.97  # of the cap
LEAST_REFUSALS = 200
GRACE = 150.0  # seconds for start and end of a subject


class Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class Watcher:
    """Samples what is used of a device, by the driver, in a thread of its own.

    Parameters
    ----------
    index
        NVML's index of the device.
    """

    def __init__(self, index: int) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._check(self._nvml.nvmlInit_v2(), "nvmlInit")
        self._device = ctypes.c_void_p()
        handle = self._nvml.nvmlDeviceGetHandleByIndex_v2
        self._check(handle(ctypes.c_uint(index), ctypes.byref(self._device)), "device handle")
        self.begun = array("d")
        self.ended = array("d")
        self.used = array("q")
        self.failed = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.read()

    def _check(self, code: int, what: str) -> None:
        if code != 0:
            raise OSError(f"{what}: NVML error {code}")

    def read(self) -> int:
        """Return the bytes in use now."""
        memory = Memory()
        self._check(
            self._nvml.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)), "memory"
        )
        return int(memory.used)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """Wait for the last sample."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                begun = time.monotonic()
                used = self.read()
                self.begun.append(begun)
                self.used.append(used)
                self.ended.append(time.monotonic())
                time.sleep(0.001)
        except OSError as error:
            self.failed = str(error)


def baseline(watcher: Watcher) -> int:
    """Return what is used before anybody of ours is there: the least of two seconds."""
    least = watcher.read()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        least = min(least, watcher.read())
        time.sleep(0.005)
    return least


def run_subjects(options: argparse.Namespace, caps: list[int]) -> list[dict[str, Any]]:
    """Run one subject for each cap, all at once, and return what each says."""
    reports = []
    with tempfile.TemporaryDirectory() as directory:
        subjects = []
        for number, cap in enumerate(caps):
            file = Path(directory) / f"{number}.json"
            command = [
                sys.executable,
                "-X",
                "faulthandler",
                "-m",
                "bench.soak.subject",
                "fraction" if options.mode == "fraction" else "cap",
                str(cap),
                str(options.seconds),
                str(options.seed + number),
                str(file),
            ]
            # One compiling process is enough, and none of them may show up on the device.
            surroundings = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            subjects.append((subprocess.Popen(command, env=surroundings), file))
        end = time.monotonic() + options.seconds + GRACE
        for subject, file in subjects:
            try:
                status = subject.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                subject.kill()
                subject.wait()
                status = -1
            report = json.loads(file.read_text()) if file.exists() else {}
            reports.append({"status": status, **report})
    return reports


def excesses(watcher: Watcher, base: int, limit: int, begun: float, ended: float) -> list[int]:
    """Return the indices of samples, taken wholly within a time, that are above a limit."""
    found = []
    for i in range(bisect_left(watcher.begun, begun), len(watcher.ended)):
        if watcher.ended[i] > ended:
            break
        if watcher.used[i] - base > limit:
            found.append(i)
    return found


def judge(
    options: argparse.Namespace, caps: list[int], reports: list[dict[str, Any]], watcher: Watcher
) -> dict[str, Any]:
    base = options.base
    whole = (watcher.begun[0], watcher.ended[-1])
    rate = len(watcher.used) / (whole[1] - whole[0])
    above = excesses(watcher, base, sum(caps), *whole)
    worst = max(range(len(watcher.used)), key=watcher.used.__getitem__)
    lowered = []  # samples above a cap that was lower for a while
    if options.mode == "cap":
        for low in reports[0].get("lowered", []):
            lowered += excesses(watcher, base, low["cap"], low["begun"], low["ended"])
    peak = (watcher.used[worst] - base) / sum(caps)
    claims = {
        "the watcher took 200 samples a second": rate >= LEAST_RATE and not watcher.failed,
        "every subject ran to its end": all(r["status"] == 0 for r in reports),
        "no byte was wrong": all(r.get("wrong", 1) == 0 for r in reports),
        "no work failed but for want of memory": all(not r.get("failures", [1]) for r in reports),
    }
    if options.mode != "fraction":
        refusals = LEAST_REFUSALS * min(1.0, options.seconds / 480)
        claims |= {
            "the cap was never crossed": not above,
            "a lowered cap was never crossed": not lowered,
            "each ledger's peak was 0.97 of its cap": all(
                r.get("ledger_peak", 0) >= LEAST_PEAK * cap
                for r, cap in zip(reports, caps, strict=True)
            ),
            "out of memory was met and survived often": all(
                r.get("refusals", 0) >= refusals for r in reports
            ),
        }
    if options.mode == "cap":
        claims["the driver's peak was 0.97 of the cap"] = peak >= LEAST_PEAK
    return {
        "mode": options.mode,
        "caps": caps,
        "baseline": base,
        "samples": len(watcher.used),
        "rate_hz": round(rate, 1),
        "longest_gap_s": round(
            max((b - a for a, b in zip(watcher.begun, watcher.begun[1:], strict=False)), default=0),
            4,
        ),
        "watcher_failed": watcher.failed,
        "violations": len(above),
        "violations_while_lowered": len(lowered),
        "worst_excess": max(0, watcher.used[worst] - base - sum(caps)),
        "peak_of_cap": round(peak, 4),
        "around_the_peak": around(watcher.begun[worst], reports),
        "first_violation_s": round(watcher.begun[above[0]] - whole[0], 3) if above else None,
        "around_the_first_violation": around(watcher.begun[above[0]], reports) if above else [],
        "subjects": [{k: v for k, v in r.items() if k != "events"} for r in reports],
        "claims": claims,
    }


def around(when: float, reports: list[dict[str, Any]]) -> list[str]:
    """Return what subjects did within half a second of a time."""
    return [
        f"{at - when:+.3f} s, subject {number}: {what}"
        for number, report in enumerate(reports)
        for at, what in report.get("events", [])
        if abs(at - when) < 0.5
    ][:40]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--mode", choices=["cap", "fraction", "two"], default="cap")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--cap", type=float, help="GiB; of the first process with --mode two")
    parser.add_argument("--second-cap", type=float, default=4.0, help="GiB; with --mode two")
    parser.add_argument("--nvml-index", type=int, help="of the device that torch calls cuda:0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    first = options.cap or (3.0 if options.mode == "two" else 6.0)
    caps = [int(first * GIB)]
    if options.mode == "two":
        caps.append(int(options.second_cap * GIB))
    index = options.nvml_index
    if index is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        index = int(visible) if visible.isdigit() else 0
    try:
        watcher = Watcher(index)
    except (OSError, AttributeError) as error:
        print(f"nothing to watch with: {error}", file=sys.stderr)
        return 2
    options.base = baseline(watcher)
    watcher.start()
    try:
        reports = run_subjects(options, caps)
    finally:
        watcher.stop()
    result = judge(options, caps, reports, watcher)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    for claim, held in result["claims"].items():
        print("holds " if held else "FAILS ", claim)
    return 0 if all(result["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
