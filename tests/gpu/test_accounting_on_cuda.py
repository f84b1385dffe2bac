"""What the cap counts on a real GPU. Each test has a process of its own: an allocator stays."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.gpu

HEAD = """
import ctypes
import time
from datetime import timedelta

import torch

import penstock
from penstock.cap.process import current_cap

MIB = 1 << 20


def cap():
    found = current_cap("cuda")
    assert found is not None
    return found


def look():
    assert cap().watch.look(timedelta(seconds=10))
    return cap().watch.stats()


def tag(name):
    return cap().pager.budget.stats().used_by_tag[name]


def cuda_malloc(nbytes):
    address = ctypes.c_uint64()
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes)) == 0
    return address


def cuda_free(address):
    assert ctypes.CDLL("libcuda.so.1").cuMemFree_v2(address) == 0
"""


def run(body: str) -> str:
    code = HEAD + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_context_and_kernels_are_charged_and_the_ledger_covers_the_device() -> None:
    run("""
    penstock.set_cap("6GiB")
    at_start = look()
    assert at_start.held > 50 * MIB, at_start.held  # the context
    a = torch.randn(2048, 2048, device="cuda")
    b = (a @ a).relu().sum()  # loads cuBLAS and its kernels
    torch.cuda.synchronize()
    seen = look()
    assert seen.held >= at_start.held
    assert seen.charged == seen.held + seen.reserve == tag("outside")
    held = cap().pager.core_device.process_memory().bytes
    assert cap().pager.budget.stats().used >= held
    assert cap().pager.core_device.suppressed_count == 0
    """)


def test_memory_taken_past_every_allocator_is_seen_and_makes_weights_or_caches_give_way() -> None:
    run("""
    penstock.set_cap("6GiB")
    x = torch.zeros(16, device="cuda")
    before = look().held
    address = cuda_malloc(512 * MIB)
    grown = look()
    assert grown.held - before >= 500 * MIB, (before, grown.held)
    cuda_free(address)
    for _ in range(10):
        look()
    assert look().held <= grown.held - 500 * MIB
    # Now with the cap full of frames that torch caches.
    free = cap().pager.budget.available
    cached = torch.empty(free - 64 * MIB, dtype=torch.uint8, device="cuda")
    del cached
    assert cap().pager.budget.available < 128 * MIB
    address = cuda_malloc(512 * MIB)
    assert look().charged >= look().held
    ledger = cap().pager.budget.stats()
    assert ledger.used <= ledger.cap
    cuda_free(address)
    """)


def test_frames_that_come_and_go_are_not_taken_for_outside_memory() -> None:
    run("""
    penstock.set_cap("6GiB")
    x = torch.zeros(16, device="cuda")
    before = look().held
    for i in range(200):
        block = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        del block
        torch.cuda.empty_cache()
    assert look().held - before < 64 * MIB, (before, look().held)  # page tables, at most
    print(cap().watch.stats().looks, cap().watch.stats().discarded)
    """)


def test_cap_that_has_no_room_for_the_context_is_refused() -> None:
    run("""
    try:
        penstock.set_cap("64MiB")
    except penstock.CapExceededError as error:
        assert "Raise the cap" in str(error), error
    else:
        raise AssertionError("it was taken")
    """)


def test_looks_cost_nothing_that_one_would_notice() -> None:
    run("""
    penstock.set_cap("6GiB")
    x = torch.zeros(1 << 20, device="cuda")

    def seconds():
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20000):
            x.add_(1)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds()
    watched = min(seconds() for _ in range(5))
    cap().watch.stop()
    alone = min(seconds() for _ in range(5))
    print(f"with looks {watched:.4f} s, without {alone:.4f} s")
    assert watched < 1.1 * alone
    """)


def test_figures_add_up_and_name_who_made_a_block() -> None:
    run("""
    penstock.set_cap("6GiB")

    def make_it():
        return torch.zeros(300 * MIB, dtype=torch.uint8, device="cuda")

    penstock.record_stacks()
    kept = make_it()
    stats = penstock.memory_stats()
    parts = ("weights", "ring", "activations", "cached", "workspace", "outside", "reserve")
    assert sum(getattr(stats, part) for part in parts) == stats.used <= stats.cap
    assert stats.largest[0].nbytes == 300 * MIB
    assert stats.largest[0].address == kept.data_ptr()
    assert "make_it" in stats.largest[0].stack[0]
    try:
        torch.empty(6 << 30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        assert "make_it" in str(error), error
    else:
        raise AssertionError("it does not fit")
    assert penstock.memory_stats().out_of_memory == 1
    penstock.record_stacks(False)
    print(penstock.memory_summary())
    """)


def test_pressure_is_told_off_the_allocating_thread() -> None:
    run("""
    import threading

    penstock.set_cap("6GiB")
    x = torch.zeros(16, device="cuda")
    told = []
    handle = penstock.on_pressure(lambda event: told.append((event, threading.current_thread())))
    try:
        torch.empty(6 << 30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        pass
    end = time.monotonic() + 30
    while not told and time.monotonic() < end:
        time.sleep(0.001)
    assert told[-1][0].kind == "refused"
    assert told[-1][0].asked == 6 << 30
    assert told[-1][1] is not threading.main_thread()
    handle.remove()
    """)


def test_scoped_cap_refuses_beyond_it_and_leaves_the_rest_alone() -> None:
    run("""
    free = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")  # torch's own allocator
    with penstock.capped("512MiB") as scope:
        a = torch.zeros(300 * MIB, dtype=torch.uint8, device="cuda")
        assert 300 * MIB <= scope.used <= scope.cap == 512 * MIB
        try:
            torch.zeros(300 * MIB, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            pass
        else:
            raise AssertionError("it does not fit")
        try:
            with penstock.capped("1GiB"):
                pass
        except ValueError as error:
            assert "active" in str(error)
        else:
            raise AssertionError("two at once")
        b = a[:MIB] + 1
        torch.cuda.synchronize()
        assert int(b[-1]) == 1
        del a
    big = torch.empty(2048 * MIB, dtype=torch.uint8, device="cuda")  # not capped any more
    assert scope.peak <= 512 * MIB
    del b
    torch.cuda.empty_cache()
    assert scope.used == 0, scope.used
    with penstock.capped("64MiB"):
        torch.zeros(8 * MIB, dtype=torch.uint8, device="cuda")
    """)
