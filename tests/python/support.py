"""What the tests of models share: making them, comparing bits, watching memory, not hanging."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import penstock

KIB = 1 << 10
MIB = 1 << 20
SYSTEM_PAGE = 4 * KIB  # what the system maps, and so the ledger counts, as a whole

T = TypeVar("T")
PAGERS = ("managed", "frames")

Builder = Callable[[], nn.Module]


def build(builder: Builder, seed: int = 0) -> nn.Module:
    """Build a model in ordinary memory, its weights drawn from a seed."""
    torch.manual_seed(seed)
    return builder().eval()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def mlp(*widths: int) -> nn.Sequential:
    """Build linear layers without anything between them: one step each."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def manager_with(
    builder: Builder,
    state: Mapping[str, torch.Tensor],
    *,
    cap: int | str,
    page_size: int | str | None = "64KiB",
    device: Any = "cpu",
    pager: str = "managed",
    host: str = "auto",
    verify: bool = False,
    trace: bool = False,
    **options: Any,
) -> penstock.MemoryManager:
    """Make a manager that has one model, "m"."""
    manager = penstock.MemoryManager(
        cap=cap,
        device=device,
        page_size=page_size,
        pager=pager,
        host=host,
        verify=verify,
        trace=trace,
    )
    manager.register("m", lambda: builder().eval(), state, **options)
    return manager


def region_of(manager: penstock.MemoryManager, name: str = "m") -> penstock.Region:
    """Return the region of a registered model that has weights."""
    runner = manager._models[name].runner
    assert runner is not None
    return runner.memory.region


def pinned_pages(manager: penstock.MemoryManager) -> int:
    """Count the pages that are in use, of all models."""
    runners = [model.runner for model in manager._models.values()]
    return sum(each.memory.region.core.stats().pinned_pages for each in runners if each is not None)


def charge_of(region: penstock.Region) -> int:
    """Return what a region costs the ledger when all of it is resident."""
    return -(-region.nbytes // SYSTEM_PAGE) * SYSTEM_PAGE


def raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's elements in order."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same_bits(found: object, wanted: object) -> bool:
    """Compare tensors, in any nesting, by structure, dtype, shape and every bit."""
    ours, our_form = tree_flatten(found)
    theirs, their_form = tree_flatten(wanted)
    return our_form == their_form and all(map(_same, ours, theirs))


def _same(found: object, wanted: object) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return type(found) is type(wanted) and found == wanted
    same_form = found.dtype == wanted.dtype and found.shape == wanted.shape
    return same_form and raw(found) == raw(wanted)


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do the work on another thread, so that a hang is a failed test and not a hanging one."""
    return run_threads(work, seconds=seconds)[0]


def run_threads(*works: Callable[[], T], seconds: float = 60) -> list[T]:
    """Do each work on a thread of its own, all at once; return what they do, or raise an error."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    torch_threads = torch.get_num_threads()

    def run(number: int, work: Callable[[], T]) -> None:
        torch.set_num_threads(torch_threads)  # each thread has its own, and sums depend on it
        try:
            results[number] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
        assert not thread.is_alive(), f"not done after {seconds} s"
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(works))]


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; return whether it came to hold within half a minute."""
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def run_python(code: str, seconds: float = 60) -> str:
    """Run code in a process of its own, which must end by itself and well; return what it says."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class ResidentSampler(threading.Thread):
    """Watches the system's count of a model's resident bytes, while a block runs.

    The system counts page by page, and counts pages twice that are replaced by others meanwhile: a
    count is right if nothing was evicted before it ended.
    """

    def __init__(self, manager: penstock.MemoryManager, name: str) -> None:
        super().__init__(daemon=True)
        self._manager = manager
        self._region = region_of(manager, name).core
        self._ended = threading.Event()
        self._errors: list[BaseException] = []
        self.samples: list[int] = []

    def sample(self) -> None:
        before = self._manager.pager.core.stats().evicted_bytes
        nbytes = self._region.resident_bytes()
        assert nbytes is not None, "this system does not tell which pages are resident"
        if self._manager.pager.core.stats().evicted_bytes == before:
            self.samples.append(nbytes)

    @property
    def peak(self) -> int:
        return max(self.samples)

    def run(self) -> None:
        try:
            while not self._ended.wait(0.0005):
                self.sample()
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> ResidentSampler:
        self.sample()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()
        if self._errors:
            raise self._errors[0]
        self.sample()
