"""Reads and writes of weights by anybody, at any time: right, or refused, over both pagers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from penstock import MemoryManager, ModelError, ParameterMovedWarning
from python.support import (
    KIB,
    PAGERS,
    build,
    manager_with,
    pinned_pages,
    run_python,
    same_bits,
    state_of,
)

WIDTH = 128
CAP = 256 * KIB  # four pages, of seven
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
Tensor = torch.Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
        self.register_buffer("offset", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.offset


class Pair:
    """A model that streams, acquired and with some passes behind it, and the same one resident."""

    def __init__(self, pager: str, cap: int = CAP) -> None:
        self.plain = build(Net)
        self.manager = manager_with(
            Net, state_of(self.plain), cap=cap, pager=pager, writable=pager == "managed"
        )
        self.ours = self.manager.acquire("m")
        self.run()

    def run(self) -> None:
        """Have every page overwritten by others."""
        with torch.no_grad():
            for _ in range(3):
                assert same_bits(self.ours(X), self.plain(X))

    def weights(self, index: int = 2) -> tuple[nn.Parameter, nn.Parameter]:
        return self.ours.layers[index].weight, self.plain.layers[index].weight

    def check(self) -> None:
        """Compare all weights, before and after they were evicted, and what they answer."""
        for _ in range(2):
            for (name, ours), plain in zip(
                self.ours.named_parameters(), self.plain.parameters(), strict=True
            ):
                assert same_bits(ours.detach().clone(), plain.detach()), name
            assert same_bits(self.ours.offset.clone(), self.plain.offset)
            self.run()
            self.manager.release("m", evict=True)
            self.manager.acquire("m")

    def end(self) -> None:
        stats = self.manager.stats()
        assert stats.peak <= stats.cap
        self.manager.release("m", evict=True)
        assert pinned_pages(self.manager) == 0
        assert self.manager.stats().used == 0


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(pager: str) -> Iterator[Pair]:
    pair = Pair(pager)
    yield pair
    pair.ours.zero_grad()
    pair.end()


# ---- what only asks ----------------------------------------------------------------------------


def test_a_weight_is_a_parameter_to_all_who_ask(pair: Pair) -> None:
    ours, plain = pair.weights()
    assert isinstance(ours, nn.Parameter)
    assert isinstance(ours, Tensor)
    assert torch.is_tensor(ours)
    assert ours is pair.ours.layers[2].weight
    assert ours in set(pair.ours.parameters())
    assert {ours: 1}[ours] == 1
    assert hash(ours) == id(ours)
    for ask in (
        lambda w: (w.shape, w.dtype, w.device, w.ndim, w.nbytes, w.stride(), w.layout, len(w)),
        lambda w: (w.is_leaf, w.requires_grad, w.grad, w.grad_fn, w.is_contiguous(), w.numel()),
        lambda w: (w.size(), w.size(0), w.dim(), w.element_size(), w.is_floating_point()),
    ):
        assert ask(ours) == ask(plain)


def test_what_only_asks_loads_nothing(pair: Pair) -> None:
    pair.manager.pager.synchronize()  # what is loaded ahead is there
    before = pair.manager.stats().models["m"].memory
    for weight in pair.ours.parameters():
        _ = weight.shape, weight.dtype, weight.device, weight.requires_grad, weight.grad
        _ = weight.detach(), weight.t(), weight.view(-1), weight.data, weight.numel()
        hash(weight)
    assert pair.manager.stats().models["m"].memory == before


# ---- reads -------------------------------------------------------------------------------------

MASK = torch.arange(WIDTH) % 3 == 0
INDEX = torch.tensor([5, 1, 99])
READS: dict[str, Callable[[Any], object]] = {
    "sum": lambda w: w.sum(),
    "norm": lambda w: (w.norm(), torch.linalg.norm(w), w.square().mean().sqrt()),
    "matmul": lambda w: (X @ w, w @ X.T, F.linear(X, w), torch.mm(X, w), X.matmul(w.T)),
    "arithmetic": lambda w: (w + 1, 1 - w, w * w, 2 / w, -w, abs(w), w**2, w // 1, w % 1),
    "comparison": lambda w: (w > 0, w == w, torch.isnan(w).any(), bool((w == w).all())),
    "equal": lambda w: (torch.equal(w, w), torch.allclose(w, w)),
    "row": lambda w: w[3] * 1,
    "part": lambda w: w[1:9:2, ::3].clone(),
    "index": lambda w: (w[INDEX], w[MASK], w[:, INDEX], w[None, ..., 0] + 0),
    "gather": lambda w: (w.index_select(0, INDEX), torch.take(w, INDEX), F.embedding(INDEX, w)),
    "iteration": lambda w: [row.sum() for row in w],
    "unbind": lambda w: [row.clone() for row in w.unbind(1)[:3]],
    "item": lambda w: (w[0, 0].item(), float(w.detach()[1, 1]), w[:2, :2].tolist()),
    "cat": lambda w: (torch.cat([w, w]), torch.stack([w[0], w[1]]), torch.hstack((w, w))),
    "contiguous": lambda w: w.t().contiguous(),
    "view as integers": lambda w: w.detach().view(torch.int32).sum(),
    "to": lambda w: (w.double(), w.to(torch.bfloat16), w.half()),
    "like": lambda w: (torch.zeros_like(w), w.new_zeros(3), torch.empty_like(w).shape),
    "numpy": lambda w: torch.tensor(w.detach().numpy()),
    "array": lambda w: torch.tensor(np.asarray(w.detach().numpy())),
    "numpy of a part": lambda w: torch.tensor(w.detach()[3:5, ::2].numpy()),
    "numpy without gradients": torch.no_grad()(lambda w: torch.tensor(w.numpy())),
    "array without gradients": torch.no_grad()(lambda w: torch.tensor(np.asarray(w))),
    "numpy by force": lambda w: torch.tensor(w.numpy(force=True)),
    "dlpack": lambda w: torch.from_dlpack(w.detach()),
    "dlpack by method": lambda w: torch.utils.dlpack.from_dlpack(w.detach().__dlpack__()),
    "dlpack of numpy": lambda w: torch.from_numpy(np.from_dlpack(w.detach()).copy()),
    "clone": lambda w: w.detach().clone(),
    "deepcopy": lambda w: copy.deepcopy(w).detach(),
    "copy": lambda w: copy.copy(w).detach(),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)).detach(),
    "where": lambda w: torch.where(w > 0, w, torch.zeros(())),
    "einsum": lambda w: torch.einsum("ij,bj->bi", w, X),
    "out": lambda w: torch.add(w.detach(), 1, out=torch.empty(WIDTH, WIDTH)),
    "in lists": lambda w: torch._foreach_norm([w.detach(), w.detach()[:2]]),
    "sort": lambda w: (w.sort(), w.max(0), torch.topk(w, 3)),
    "einops of storage": lambda w: w.detach().as_strided((4, 4), (WIDTH, 1)) + 0,
}


@pytest.mark.parametrize("name", READS)
def test_reads_between_passes_are_right(pair: Pair, name: str) -> None:
    read = READS[name]
    for index in (0, 3, 5, 2):
        ours, plain = pair.weights(index)
        assert same_bits(read(ours), read(plain))
    pair.run()


@pytest.mark.parametrize("name", READS)
def test_what_was_read_stays_as_it_is(pair: Pair, name: str) -> None:
    ours, plain = pair.weights()
    found = READS[name](ours)
    pair.run()
    assert same_bits(found, READS[name](plain))


VIEWS: dict[str, Callable[[Any], Any]] = {
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "row": lambda w: w[3],
    "row of data": lambda w: w.data[3],
    "part": lambda w: w.detach()[2:5, 1::2],
    "flat": lambda w: w.view(-1)[1000:2000],
    "flattened": lambda w: w.detach().flatten(),
    "reshaped": lambda w: w.reshape(WIDTH // 2, -1)[7],
    "rows": lambda w: w.unbind(0)[4],
    "iterated": lambda w: list(w)[9],
    "split": lambda w: w.split(16)[3],
    "chunk": lambda w: torch.chunk(w, 4)[1],
    "expanded": lambda w: w[0].expand(3, WIDTH),
    "of another dtype": lambda w: w.detach().view(torch.int32),
    "strided": lambda w: w.as_strided((3, 4), (5, 1), 7),
    "the same, asked to move": lambda w: w.to("cpu"),
    "the same, contiguous": lambda w: w.contiguous(),
    "the same, as float": lambda w: w.float(),
    "squeezed": lambda w: w.detach()[None].squeeze(0)[1],
    "diagonal": lambda w: torch.diagonal(w),
    "parameter": lambda w: nn.Parameter(w.detach()),
    "parameter of data": lambda w: nn.Parameter(w.data),
    "dlpack": lambda w: torch.from_dlpack(w.detach()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_may_be_read_later(pair: Pair, name: str) -> None:
    ours, plain = pair.weights()
    view, wanted = VIEWS[name](ours), VIEWS[name](plain)
    for _ in range(2):
        pair.run()
        assert same_bits(view.detach() + 0, wanted.detach() + 0)
        pair.manager.release("m", evict=True)
        pair.manager.acquire("m")


def test_views_taken_while_all_is_in_place_may_be_read_later(pager: str) -> None:
    pair = Pair(pager, cap=1024 * KIB)
    pair.run()
    views = {name: view(pair.weights()[0]) for name, view in VIEWS.items()}
    pair.manager.release("m", evict=True)
    pair.manager.set_cap(512 * KIB)
    pair.manager.acquire("m")
    pair.run()
    for name, view in views.items():
        wanted = VIEWS[name](pair.weights()[1])
        assert same_bits(view.detach() + 0, wanted.detach() + 0), name
    del views, view
    pair.end()


# ---- writes ------------------------------------------------------------------------------------

NOISE = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))


def _set(w: Any) -> None:
    w[3] = 7.0
    w[5:7, ::2] = NOISE[5:7, ::2]
    w[MASK] = 0.5


def _add(w: Any) -> None:
    w += NOISE


def _of_row(w: Any) -> None:
    row = w[11]
    row.mul_(3)


def _of_detached_row(w: Any) -> None:
    w.detach()[11].add_(NOISE[0])


WRITES: dict[str, Callable[[Any], object]] = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(NOISE),
    "zero_": lambda w: w.zero_(),
    "setting": _set,
    "adding": _add,
    "of a row": _of_row,
    "of a detached row": _of_detached_row,
    "of data": lambda w: w.data.mul_(2),
    "copy into data": lambda w: w.data.copy_(NOISE),
    "of data's row": lambda w: w.data[4].fill_(2.5),
    "setting data's row": lambda w: w.data.__setitem__(4, 2.5),
    "of detached": lambda w: w.detach().add_(1),
    "of a flat view": lambda w: w.view(-1)[3:90].zero_(),
    "out": lambda w: torch.add(NOISE, 1, out=w.data),
    "initialization": lambda w: nn.init.constant_(w, 0.25),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "index_copy_": lambda w: w.index_copy_(0, INDEX, NOISE[:3]),
    "scatter": lambda w: w.detach().scatter_(0, INDEX[:, None], 9.0),
    "clamp_": lambda w: torch.clamp_(w, -0.01, 0.01),
    "fill by function": lambda w: torch.fill_(w, 3.0),
    "of the transposed": lambda w: w.t().mul_(NOISE),
}


@pytest.mark.parametrize("name", WRITES)
def test_changes_between_passes_survive_eviction(pair: Pair, name: str) -> None:
    for index in (4, 1):
        ours, plain = pair.weights(index)
        with torch.no_grad():
            WRITES[name](ours)
            WRITES[name](plain)
        pair.run()
    pair.check()


@pytest.mark.parametrize("name", ["mul_", "of a detached row", "of a row", "setting"])
def test_changes_while_all_is_in_place_survive_eviction(pager: str, name: str) -> None:
    pair = Pair(pager, cap=1024 * KIB)
    ours, plain = pair.weights()
    with torch.no_grad():
        WRITES[name](ours)
        WRITES[name](plain)
    pair.check()
    pair.end()


def test_buffers_can_be_changed_too(pair: Pair) -> None:
    for each in (pair.ours, pair.plain):
        each.offset.add_(1)
        each.offset[3:9] = 4.0
        each.offset.data.mul_(2)
    pair.check()


def test_load_state_dict_survives_eviction(pair: Pair) -> None:
    other = build(Net, seed=9).state_dict()
    for each in (pair.ours, pair.plain):
        each.load_state_dict(other)
    pair.check()


def test_own_state_dict_can_be_loaded(pair: Pair) -> None:
    pair.ours.load_state_dict(pair.ours.state_dict())
    pair.check()


def test_weights_are_copied_from_one_managed_model_to_another(pager: str) -> None:
    pair = Pair(pager, cap=384 * KIB)
    other = build(Net, seed=9)
    pair.manager.register(
        "other", lambda: Net().eval(), state_of(other), writable=pager == "managed"
    )
    source = pair.manager.acquire("other")
    with torch.no_grad():
        assert same_bits(source(X), other(X))
        for ours, plain, theirs, wanted in zip(
            pair.ours.parameters(),
            pair.plain.parameters(),
            source.parameters(),
            other.parameters(),
            strict=True,
        ):
            ours.copy_(theirs)
            plain.copy_(wanted)
            assert same_bits(ours + 2 * theirs, plain + 2 * wanted)
        assert same_bits(pair.ours.layers(X), other.layers(X))
    pair.ours.load_state_dict(source.state_dict())
    pair.plain.load_state_dict(other.state_dict())
    pair.manager.release("other", evict=True)
    pair.check()
    pair.end()


# ---- saving and copying ------------------------------------------------------------------------


def test_state_dict_is_right_now_and_later(pair: Pair) -> None:
    state = pair.ours.state_dict()
    assert list(state) == list(pair.plain.state_dict())
    for _ in range(2):
        assert all(same_bits(state[name] + 0, each) for name, each in state_of(pair.plain).items())
        pair.run()


def test_state_dict_goes_through_files(pair: Pair, tmp_path: Path) -> None:
    torch.save(pair.ours.state_dict(), tmp_path / "m.pt")
    save_file(pair.ours.state_dict(), tmp_path / "m.safetensors")
    torch.save(pair.ours.layers[2].weight, tmp_path / "weight.pt")
    wanted = state_of(pair.plain)
    assert same_bits(dict(torch.load(tmp_path / "m.pt", weights_only=True)), wanted)
    loaded = load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == wanted.keys()
    assert all(same_bits(loaded[name], wanted[name]) for name in wanted)
    weight = torch.load(tmp_path / "weight.pt", weights_only=True)
    assert same_bits(weight.detach(), wanted["layers.2.weight"])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_ordinary_models(pair: Pair, way: Callable[[nn.Module], nn.Module]) -> None:
    twin = way(pair.ours)
    pair.run()
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    assert same_bits(dict(twin.state_dict()), state_of(pair.plain))
    with torch.no_grad():
        assert same_bits(twin(X), pair.plain(X))
        next(twin.parameters()).zero_()
    pair.check()


def test_text_of_a_weight_shows_its_values(pair: Pair) -> None:
    ours, plain = pair.weights()
    numbers = str(plain.detach()).split("tensor(")[1].split(",")[0]
    pair.run()
    assert numbers in repr(ours)
    assert numbers in str(ours.detach())
    assert "Linear" in repr(pair.ours)


# ---- gradients ---------------------------------------------------------------------------------


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_backward_later_is_right(pair: Pair) -> None:
    ours, plain = pair.ours(X), pair.plain(X)
    pair.run()
    pair.manager.release("m", evict=True)
    pair.manager.acquire("m")
    ours.square().sum().backward()
    plain.square().sum().backward()
    assert same_bits(gradients(pair.ours), gradients(pair.plain))


def test_gradients_of_reads_between_passes(pair: Pair) -> None:
    found = []
    for module in (pair.ours, pair.plain):
        module.zero_grad()
        w, v = module.layers[1].weight, module.layers[4].weight
        loss = (w @ v).square().sum() + (w[3] * v.T[5]).sum() + w.norm()
        if module is pair.ours:
            pair.run()
        loss.backward()
        found.append(gradients(module))
    assert same_bits(found[0], found[1])


def test_gradients_can_be_assigned_and_accumulated(pair: Pair) -> None:
    for module in (pair.ours, pair.plain):
        weight = module.layers[0].weight
        weight.grad = NOISE.clone()
        module(X).sum().backward()
        weight.grad.mul_(0.5)
    assert same_bits(gradients(pair.ours), gradients(pair.plain))
    pair.ours.requires_grad_(False)
    assert not pair.ours(X).requires_grad
    pair.ours.requires_grad_(True)
    assert pair.ours(X).requires_grad


def test_weight_changed_between_forward_and_backward_is_an_error_as_ever(pair: Pair) -> None:
    for module in (pair.plain, pair.ours):
        out = module(X)
        with torch.no_grad():
            module.layers[3].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        module.zero_grad()
    pair.check()


class Marker:
    """Goes with the graph that it is a note on."""


def test_graphs_go_with_their_results(pager: str) -> None:
    def make() -> nn.Module:
        # Operations that save what they return.
        return nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Softmax(-1))

    manager = MemoryManager(cap=1 << 20, device="cpu", pager=pager, page_size=64 * KIB)
    manager.register("m", make, state_of(build(make)))
    with manager.use("m") as module:
        for _ in range(6):
            marker = Marker()
            kept = weakref.ref(marker)
            result = module(torch.ones(1, 8))
            result.grad_fn.metadata["marker"] = marker
            del marker
            assert kept() is not None
            del result
            gc.collect()
            assert kept() is None


def test_hooks_for_saved_tensors_see_all(pair: Pair) -> None:
    counts = []
    for module in (pair.plain, pair.ours):
        packed: list[Tensor] = []

        def pack(tensor: Tensor, packed: list[Tensor] = packed) -> int:
            packed.append(tensor.detach().clone())
            return len(packed) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i, packed=packed: packed[i]):
            out = module(X)
        pair.run()
        out.sum().backward()
        counts.append(len(packed))
    assert counts[0] == counts[1]
    assert same_bits(gradients(pair.ours), gradients(pair.plain))


def test_hooks_that_keep_saved_tensors_as_they_are(pair: Pair) -> None:
    for module in (pair.plain, pair.ours):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            out = module(X)
        pair.run()
        out.sum().backward()
    assert same_bits(gradients(pair.ours), gradients(pair.plain))


def test_functional_call_with_own_and_other_parameters(pair: Pair) -> None:
    def calls(module: nn.Module) -> list[Tensor]:
        own = dict(module.named_parameters())
        return [
            torch.func.functional_call(module, {name: f(each) for name, each in own.items()}, (X,))
            for f in (lambda p: p, lambda p: 2 * p, lambda p: p.detach())
        ]

    with torch.no_grad():
        for _ in range(2):
            assert same_bits(calls(pair.ours), calls(pair.plain))
            pair.run()


# ---- leaving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_that_leave_take_their_values_with_them(pager: str, in_place: bool) -> None:
    pair = Pair(pager, cap=1024 * KIB if in_place else CAP)
    view = pair.ours.layers[2].weight.detach()
    wanted = pair.plain.layers[2].weight.detach().clone()
    pair.ours.double()
    pair.plain.double()
    x = X.double()
    with torch.no_grad(), pytest.warns(ParameterMovedWarning, match="12 parameters"):
        assert same_bits(pair.manager.acquire("m")(x), pair.plain(x))
    assert same_bits(view + 0, wanted)
    with torch.no_grad():
        for _ in range(3):
            assert same_bits(pair.ours(x), pair.plain(x))
    assert same_bits(dict(pair.ours.state_dict()), state_of(pair.plain))
    assert same_bits(copy.deepcopy(pair.ours)(x).detach(), pair.plain(x).detach())
    pair.ours(x).sum().backward()
    pair.plain(x).sum().backward()
    assert same_bits(gradients(pair.ours), gradients(pair.plain))
    del view
    for _ in range(2):
        pair.manager.release("m", evict=True)
    assert pair.manager.stats().used == 0


def test_backward_after_weights_have_left(pair: Pair) -> None:
    ours, plain = pair.ours(X), pair.plain(X)
    with pytest.warns(ParameterMovedWarning):
        pair.ours.layers[2].weight.data = NOISE.clone()
        pair.manager.acquire("m")
    pair.manager.release("m")
    pair.plain.layers[2].weight.data = NOISE.clone()
    pair.run()
    ours.sum().backward()
    plain.sum().backward()
    assert same_bits(gradients(pair.ours), gradients(pair.plain))


def test_unregistered_weights_can_be_read_on(pager: str) -> None:
    pair = Pair(pager)
    ours, plain = pair.weights()
    view, row = ours.detach()[3], plain.detach()[3].clone()
    out, wanted = pair.ours(X), pair.plain(X)
    manager = pair.manager
    manager.release("m")
    manager.unregister("m")
    assert manager.stats().used == 0
    for _ in range(2):
        assert same_bits(ours.sum(), plain.sum())
        assert same_bits(ours[0] * 1, plain[0] * 1)
        assert same_bits(copy.deepcopy(ours).detach(), plain.detach())
        assert same_bits(pickle.loads(pickle.dumps(ours)).detach(), plain.detach())
        assert same_bits(view + 0, row)
        assert same_bits(pair.ours(X), pair.plain(X))
        assert all(
            same_bits(each.clone(), state_of(pair.plain)[name])
            for name, each in pair.ours.state_dict().items()
        )
        assert manager.stats().peak <= CAP
    out.sum().backward()
    wanted.sum().backward()
    assert same_bits(gradients(pair.ours), gradients(pair.plain))
    with torch.no_grad():
        ours.mul_(2)
        plain.mul_(2)
    for _ in range(2):
        assert same_bits(pair.ours(X), pair.plain(X))
    pair.ours.zero_grad()
    assert 0 < manager.stats().used <= manager.stats().peak <= CAP
    del pair, ours, view, out
    gc.collect()
    assert manager.stats().used == 0


def test_unregistered_weights_that_are_read_on_keep_no_room_from_others(pager: str) -> None:
    pair = Pair(pager)
    manager = pair.manager
    manager.release("m")
    manager.unregister("m")
    manager.register("other", lambda: Net().eval(), state_of(pair.plain))
    for _ in range(2):
        with torch.no_grad():
            assert same_bits(pair.ours(X), pair.plain(X))
            with manager.use("other") as other:
                for _ in range(3):
                    assert same_bits(other(X), pair.plain(X))
                assert same_bits(pair.ours(X), pair.plain(X))
    assert manager.stats().peak <= CAP


def test_an_array_is_a_copy_that_cannot_be_written_to(pair: Pair) -> None:
    ours, plain = pair.weights()
    array = ours.detach().numpy()
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    before = array.copy()
    with torch.no_grad():
        ours.zero_()
        plain.zero_()
    assert np.array_equal(array, before)
    pair.check()


def test_what_is_handed_out_are_copies(pair: Pair) -> None:
    ours, plain = pair.weights()
    given = [
        torch.from_dlpack(ours.detach()),
        torch.utils.dlpack.from_dlpack(ours.detach().__dlpack__()),
        copy.deepcopy(ours).detach(),
        pickle.loads(pickle.dumps(ours)).detach(),
    ]
    for each in given:
        assert same_bits(each, plain.detach())
        each.zero_()
    pair.check()


def test_what_is_written_to_the_state_dict_arrives(pair: Pair) -> None:
    for module in (pair.ours, pair.plain):
        state = module.state_dict()
        state["layers.2.weight"].mul_(2)
        state["layers.4.bias"][3] = 5.0
        state["offset"].copy_(NOISE[0])
    pair.check()


def test_sharing_with_other_processes_is_refused(pair: Pair) -> None:
    ours, plain = pair.weights()
    with pytest.raises(ModelError, match="cannot be shared with other processes"):
        ours.share_memory_()
    with pytest.raises(ModelError, match="cannot be shared with other processes"):
        pair.ours.share_memory()
    assert same_bits(ours.detach().clone().share_memory_(), plain.detach())
    pair.check()


# Torch's threads do not outlive a fork, so that the child is told to use none.
FORKED = """
import os
import torch
from penstock import ModelError
from python.run.test_weights_in_use import X, Pair, same_bits

torch.set_num_threads(1)
pair = Pair({pager!r})
weight = pair.weights()[0]
child = os.fork()
if child == 0:
    code = 0
    for use in (lambda: weight.sum(), lambda: weight.data.zero_(), lambda: pair.ours(X)):
        try:
            use()
            code = 1
        except ModelError:
            pass
        except BaseException:
            code = 2
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
pair.check()
pair.end()
"""


def test_a_forked_child_may_neither_read_nor_write(pager: str) -> None:
    tests = str(Path(__file__).parents[2])
    run_python(f"import sys; sys.path.insert(0, {tests!r}){FORKED.format(pager=pager)}")


@pytest.mark.parametrize("host", ["mapped", "stream"])
@pytest.mark.parametrize("name", ["mul_", "copy into data", "of a detached row", "foreach", "out"])
def test_writes_that_could_not_be_kept_are_refused(tmp_path: Path, host: str, name: str) -> None:
    plain = build(Net)
    save_file(state_of(plain), tmp_path / "m.safetensors")
    manager = MemoryManager(cap=CAP, device="cpu", pager="frames", page_size=64 * KIB, host=host)
    manager.register("m", lambda: Net().eval(), tmp_path / "m.safetensors")
    with torch.no_grad(), manager.use("m") as module:
        for passes in (0, 3):
            for _ in range(passes):
                assert same_bits(module(X), plain(X))
            with pytest.raises(ModelError, match=r"'layers\.2\.weight'.*host=.pinned"):
                WRITES[name](module.layers[2].weight)
            assert same_bits(module.layers[2].weight.clone(), plain.layers[2].weight)
        assert same_bits(module(X), plain(X))
    assert pinned_pages(manager) == 0
    assert manager.stats().used == 0


def test_weights_of_a_manager_that_is_gone_can_be_read(pager: str) -> None:
    pair = Pair(pager)
    ours, plain = pair.ours, pair.plain
    manager: MemoryManager = pair.manager
    manager.release("m", evict=True)
    del pair, manager
    gc.collect()
    with torch.no_grad():
        assert same_bits(ours(X), plain(X))
    assert same_bits(dict(ours.state_dict()), state_of(plain))
    assert same_bits(ours.layers[2].weight + 1, plain.layers[2].weight + 1)
