"""Modules that are loaded already: offloaded in one line, used as ever, and taken back."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import penstock
from penstock import CapExceededError, ModelError
from penstock.dispatch import torch_dispatch
from python.support import KIB, build, mlp, same_bits, state_of

PAGERS = ("managed", "frames")
X = torch.linspace(-1, 1, 3 * 128).view(3, 128)


def network() -> nn.Module:
    return nn.Sequential(*mlp(*[128] * 7), nn.BatchNorm1d(128))


@pytest.fixture
def plain() -> nn.Module:
    return build(network)


@pytest.fixture(params=PAGERS)
def model(plain: nn.Module, request: pytest.FixtureRequest) -> nn.Module:
    """Give a copy of the plain module, offloaded under a cap of about half of it."""
    return penstock.offload(
        copy.deepcopy(plain), cap="224KiB", device="cpu", pager=request.param, page_size="64KiB"
    )


def manager(model: nn.Module) -> penstock.MemoryManager:
    found = penstock.manager_of(model)
    assert found is not None
    return found


@torch.no_grad()
def test_it_is_the_same_object_and_gives_the_same_bits(plain: nn.Module) -> None:
    for pager in PAGERS:
        own = copy.deepcopy(plain)
        parameters = [id(p) for p in own.parameters()]
        given = penstock.offload(own, cap="224KiB", device="cpu", pager=pager, page_size="64KiB")
        assert given is own
        assert [id(p) for p in own.parameters()] == parameters
        assert all(isinstance(p, nn.Parameter) for p in own.parameters())
        for _ in range(6):
            assert same_bits(own(X), plain(X))
        stats = manager(own).stats()
        assert 0 < stats.peak <= stats.cap < stats.models["model"].nbytes


@torch.no_grad()
def test_state_can_be_saved_and_copied(model: nn.Module, plain: nn.Module, tmp_path: Path) -> None:
    for _ in range(3):
        model(X)
    wanted = state_of(plain)
    assert same_bits(dict(model.state_dict()), wanted)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")
    assert same_bits({name: loaded[name] for name in wanted}, wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert penstock.manager_of(copied) is None
        assert same_bits(copied(X), plain(X))
    assert same_bits(model(X), plain(X))


def test_it_can_be_trained(model: nn.Module, plain: nn.Module) -> None:
    ours = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    model.train()
    plain.train()
    for _ in range(3):
        for module, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            module(X).square().sum().backward()
            optimizer.step()
        grads = [
            (a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
        ]
        assert all(same_bits(a, b) for a, b in grads)
    model.eval()
    plain.eval()
    assert same_bits(model(X), plain(X))
    assert same_bits(dict(model.state_dict()), state_of(plain))
    penstock.restore(model)
    assert same_bits(state_of(model), state_of(plain))


def test_restore_gives_ordinary_memory_back(model: nn.Module, plain: nn.Module) -> None:
    with torch.no_grad():
        model(X)
    ledger = manager(model).pager.budget
    assert penstock.restore(model) is model
    assert penstock.manager_of(model) is None
    assert ledger.stats().used == 0
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert same_bits(state_of(model), state_of(plain))
    assert same_bits(model(X), plain(X))
    with pytest.raises(ModelError, match="not offloaded"):
        penstock.restore(model)


def test_offloading_twice_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="offloaded already"):
        penstock.offload(model, cap="1MiB", device="cpu")


def test_weights_that_cannot_move_are_refused_and_nothing_has_changed(plain: nn.Module) -> None:
    with torch.device("meta"):
        meta = network()
    with pytest.raises(ModelError, match="has no plain values"):
        penstock.offload(meta, cap="1MiB", device="cpu")
    plain(X).sum().backward()
    before = state_of(plain)
    with pytest.raises(ModelError, match="has a gradient"):
        penstock.offload(plain, cap="1MiB", device="cpu")
    assert same_bits(state_of(plain), before)


def test_a_cap_that_one_step_exceeds_leaves_the_model_as_it_was(plain: nn.Module) -> None:
    wanted = plain(X)
    with pytest.raises(CapExceededError):
        penstock.offload(plain, cap=64 * KIB, device="cpu", pager="frames", page_size="64KiB")
    assert penstock.manager_of(plain) is None
    assert {type(p) for p in plain.parameters()} == {nn.Parameter}
    assert same_bits(plain(X), wanted)


def test_a_loaded_module_is_adopted_beside_others(plain: nn.Module) -> None:
    mm = penstock.MemoryManager(cap="224KiB", device="cpu", pager="frames", page_size="64KiB")
    mm.register(
        "other", lambda: mlp(128, 128, 128).eval(), state_of(build(lambda: mlp(*[128] * 3)))
    )
    own = copy.deepcopy(plain)
    mm.adopt("own", own)
    with torch.no_grad(), mm.use("own") as used:
        assert used is own
        assert same_bits(used(X), plain(X))
    with pytest.raises(ModelError, match="not adopted"):
        mm.give_back("other")
    mm.give_back("own")
    assert same_bits(own(X), plain(X))
    with pytest.raises(ModelError, match="no model 'own'"):
        mm.acquire("own")


def test_host_tiers_that_need_files_are_refused(plain: nn.Module) -> None:
    for host in ("mapped", "stream"):
        mm = penstock.MemoryManager(cap="1MiB", device="cpu", pager="frames", host=host)
        with pytest.raises(ModelError, match="reads from files"):
            mm.adopt("own", plain)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="ReLU has no weights, so there is nothing to offload"):
        penstock.offload(nn.ReLU(), cap="1MiB", device="cpu")
    for empty in (nn.LazyLinear(3), nn.LazyBatchNorm1d()):
        with pytest.raises(ModelError, match="has no shape until the first call"):
            penstock.offload(empty, cap="1MiB", device="cpu")


@pytest.mark.parametrize("pager", ["managed", "frames"])
def test_a_cap_below_the_largest_tensor_is_refused_at_once(pager: str) -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    values = model[0].weight.detach().clone()
    with pytest.raises(CapExceededError, match=r"1\.0. MiB"):
        penstock.offload(model, cap="128KiB", device="cpu", pager=pager, page_size="64KiB")
    assert penstock.manager_of(model) is None
    assert torch.equal(model[0].weight, values)
    assert not torch_dispatch.is_keyed(model[0].weight)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_refused_with_the_way_and_nothing_changes() -> None:
    scripted = torch.jit.script(build(lambda: mlp(8, 8, 8)))
    x = torch.ones(2, 8)
    wanted = scripted(x)
    with pytest.raises(ModelError, match=r"compiled by torch\.jit.*the module that it was made of"):
        penstock.offload(scripted, cap="4MiB", device="cpu")
    assert torch.equal(scripted(x), wanted)
