"""Estimates beside what really runs on a GPU."""

import pytest
import torch
from torch import nn

import penstock

pytestmark = pytest.mark.gpu

MIB = 1 << 20
HOW = {"device": "cuda", "pager": "frames", "page_size": "2MiB"}
PASSES = 24  # until a plan is settled


def stack():
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16))).eval()


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(3)
    model = stack()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 1024, device="cuda")
    with torch.no_grad():
        return state, x, model.cuda()(x)


def run(reference, cap):
    state, x, wanted = reference
    manager = penstock.MemoryManager(cap=cap, host="pinned", **HOW)
    manager.register("m", stack, state)
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(PASSES):
            assert torch.equal(model(x), wanted)
        torch.cuda.synchronize()
        return manager.stats(), manager.stats().models["m"].memory


def test_the_least_cap_runs_and_a_page_less_is_refused(reference):
    found = penstock.estimate(reference[0], stack, disk="1GB/s", **HOW)
    assert found.fits
    stats, _ = run(reference, found.least_cap)
    assert stats.peak <= found.least_cap
    with pytest.raises(penstock.CapExceededError):
        run(reference, found.least_cap - 2 * MIB)


@pytest.mark.parametrize("cap", [24 * MIB, 48 * MIB])
def test_what_stays_and_what_streams(reference, cap):
    found = penstock.estimate(reference[0], stack, cap=cap, disk="1GB/s", **HOW)
    _, memory = run(reference, cap)
    assert found.pinned == memory.pinned_bytes
    assert abs(found.streamed - memory.planned_bytes) <= max(found.at.ring, memory.ring_bytes)
    assert found.compute > 0 and found.memory > 0  # torch uses CUDA already
    assert found.seconds >= 0.9 * found.streamed / found.link
