"""Training on a device whose calls fail: typed errors, and all goes on from a state dict."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import penstock
from penstock import PenstockError, _core
from python.support import PAGERS, build, mlp, same_bits

WIDTH, LAYERS = 128, 12
X = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)


def network() -> nn.Module:
    return mlp(*[WIDTH] * (LAYERS + 1))


class Rig:
    """A model in training under a third of everything on a device that fails on demand."""

    def __init__(self, pager: str) -> None:
        self.device = _core.FaultyDevice(_core.HostDevice())
        self.plain = build(network)
        self.model = copy.deepcopy(self.plain)
        self.theirs, self.ours = (
            torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
            for each in (self.plain, self.model)
        )
        cap = sum(each.nbytes for each in self.plain.parameters())
        penstock.training.prepare(
            self.model, self.ours, cap=cap, device=self.device, pager=pager, page_size="64KiB"
        )

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        loss: torch.Tensor = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def recover(self) -> None:
        """Bring both to the same state, and see that they go on with the same bits."""
        self.device.reset()
        manager = penstock.manager_of(self.model)
        assert manager is not None
        self.ours.zero_grad()
        self.ours.load_state_dict(copy.deepcopy(self.theirs.state_dict()))
        self.model.load_state_dict(self.plain.state_dict())
        assert same_bits(self.step(self.model, self.ours), self.step(self.plain, self.theirs))
        assert same_bits(dict(self.model.state_dict()), dict(self.plain.state_dict()))
        manager.pager.synchronize()
        stats = manager.stats()
        held = sum(model.memory.resident_bytes for model in stats.models.values())
        assert held == stats.used <= stats.peak <= stats.cap


@pytest.mark.parametrize("pager", PAGERS)
def test_any_call_may_fail_in_training(pager: str) -> None:
    rig = Rig(pager)
    rig.recover()
    rig.device.reset()
    rig.step(rig.model, rig.ours)
    calls = {name: count for name, count in rig.device.calls().items() if count}
    rig.recover()
    raised = 0
    for name, count in calls.items():
        for position in sorted({0, count // 3, count // 2, count - 1}):
            rig.device.reset()
            rig.device.fail_nth_call_of(name, position)
            try:
                rig.step(rig.model, rig.ours)
            except PenstockError:
                raised += 1
                assert rig.device.fired, name
            rig.recover()
    assert raised > 0


@pytest.mark.parametrize("pager", PAGERS)
def test_what_nobody_has_any_more_is_given_back(pager: str) -> None:
    rig = Rig(pager)
    rig.step(rig.model, rig.ours)
    manager = penstock.manager_of(rig.model)
    assert manager is not None
    core = manager.pager
    gone = [weakref.ref(rig.model), weakref.ref(rig.ours)]
    del rig, manager
    gc.collect()
    core.reclaim()
    assert [each() for each in gone] == [None, None]
    assert core.budget.stats().used == 0
