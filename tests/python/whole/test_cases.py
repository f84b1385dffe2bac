"""What users do to paged weights besides calling the model: it is right, or it is refused.

Each test does the same to a plain model and to a paged one, and wants the same bits. Its group says
what a user would lose otherwise.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import penstock
from penstock.errors import ModelError, PenstockError
from python.support import KIB, MIB, PAGERS, build, run_python, same_bits, within

# Whoever replaces a weight's memory by other memory may be told so; here that is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::penstock.ParameterMovedWarning")

Tensor = torch.Tensor
WIDTH = 128  # one linear layer is a page of 64 KiB and a little
CAP = "320KiB"
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
HOSTS = ("pinned", "mapped", "stream", "managed")


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return request.param


def layers(count: int = 6, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


class Blocks(nn.Module):
    """Layers under a name, so that a model can get others beside them."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.b = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.b:
            x = torch.tanh(block(x))
        return x


def offloaded(model: nn.Module, pager: str, cap: int | str = CAP) -> Any:
    return penstock.offload(model, cap=cap, device="cpu", pager=pager, page_size="64KiB")


def manager(model: nn.Module) -> penstock.MemoryManager:
    found = penstock.manager_of(model)
    assert found is not None
    return found


def two(builder: Callable[[], nn.Module], pager: str, cap: int | str = CAP) -> tuple[Any, Any]:
    """Build a model twice, and page one of them."""
    return build(builder), offloaded(build(builder), pager, cap)


def evict(model: nn.Module) -> None:
    manager(model).release("model", evict=True)
    manager(model).acquire("model")


def registered(
    builder: Callable[[], nn.Module], host: str, tmp_path: Path, cap: int | str = CAP
) -> tuple[Any, penstock.MemoryManager]:
    """Build a model plainly, and register it from its checkpoint as "m"."""
    plain = build(builder)
    path = tmp_path / "m.safetensors"
    save_file({name: t.clone() for name, t in plain.state_dict().items()}, path)
    mm = penstock.MemoryManager(
        cap=cap,
        device="cpu",
        pager="managed" if host == "managed" else "frames",
        host="auto" if host == "managed" else host,
        page_size="64KiB",
    )
    mm.register("m", lambda: builder().eval(), path)
    return plain, mm


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_models(found: nn.Module, wanted: nn.Module) -> bool:
    return same_bits(state_of(found), state_of(wanted))


def same_gradients(found: nn.Module, wanted: nn.Module) -> bool:
    ours, theirs = ([p.grad for p in model.parameters()] for model in (found, wanted))
    return same_bits(ours, theirs)


# ---- writes survive -----------------------------------------------------------------------------


def item_set(weight: Tensor) -> None:
    weight.data[0] = 9.0


def swapped(weight: Tensor) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 0.5))


def set_data(weight: Tensor) -> None:
    weight.data = weight.detach() * 0.5


WRITES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda w: w.mul_(0.5),
    "data": lambda w: w.data.mul_(0.5),
    "detach": lambda w: w.detach().mul_(0.5),
    "item of data": item_set,
    "rows": lambda w: w[5:9].add_(1.0),
    "columns of a transposed view": lambda w: w.T[3].fill_(0.5),
    "copy_": lambda w: w.copy_(torch.ones(WIDTH, WIDTH)),
    "out": lambda w: torch.mul(w, 0.5, out=w.data),
    "init": lambda w: nn.init.constant_(w, 0.25),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([3]), torch.ones(1, WIDTH)),
    "masked_fill_": lambda w: w.masked_fill_(w > 0, 0.5),
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    "set data": set_data,
    "swap_tensors": swapped,
}


@torch.no_grad()
@pytest.mark.parametrize("cap", ["320KiB", "8MiB"])
@pytest.mark.parametrize("passes", [0, 1, 5])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_passes_stays(write: str, passes: int, cap: str, pager: str) -> None:
    plain, paged = two(layers, pager, cap)
    for _ in range(passes):
        paged(X)
    for model in (plain, paged):
        WRITES[write](model[2].weight)
    assert same_bits(paged(X), plain(X))
    evict(paged)
    assert same_bits(paged(X), plain(X))
    assert same_models(paged, plain)
    assert same_models(penstock.restore(paged), plain)


@torch.no_grad()
def test_a_write_through_a_state_dict_arrives(pager: str) -> None:
    plain, paged = two(layers, pager)
    paged(X)
    for model in (plain, paged):
        state = model.state_dict()
        state["1.weight"].mul_(0.5)
        state["3.bias"].fill_(1.0)
    assert same_bits(paged(X), plain(X))
    evict(paged)
    assert same_bits(paged(X), plain(X))


@torch.no_grad()
def test_a_write_to_a_buffer_stays(pager: str) -> None:
    def builder() -> nn.Module:
        return nn.Sequential(*layers(), nn.BatchNorm1d(WIDTH), *layers())

    plain, paged = two(builder, pager)
    for model in (plain, paged):
        model.train()
        for _ in range(3):
            model(X)
        model.eval()
        model[6].running_mean.add_(1.0)
        model[6].running_var.data = model[6].running_var * 2
    evict(paged)
    assert same_bits(paged(X), plain(X))
    assert same_models(paged, plain)


PATCHES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda w, values: w.copy_(values),
    "data.copy_": lambda w, values: w.data.copy_(values),
    "data": lambda w, values: setattr(w, "data", values.clone()),
    "swap_tensors": lambda w, values: torch.utils.swap_tensors(w, nn.Parameter(values.clone())),
}


@torch.no_grad()
@pytest.mark.parametrize("warm", [0, 4])
@pytest.mark.parametrize("patch", [*PATCHES, "parameter"])
def test_weights_are_patched_and_put_back_many_times(patch: str, warm: int, pager: str) -> None:
    """As adapters are merged and taken out again."""
    plain, paged = two(layers, pager)
    for _ in range(warm):
        paged(X)

    def put(layer: nn.Linear, values: Tensor) -> None:
        if patch == "parameter":
            layer.weight = nn.Parameter(values.clone())
        else:
            PATCHES[patch](layer.weight, values)

    for cycle in range(3):
        delta = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(cycle))
        before = {i: plain[i].weight.detach().clone() for i in (1, 4)}
        for change in (delta, torch.zeros(WIDTH, WIDTH)):
            for model, i in itertools.product((plain, paged), before):
                put(model[i], before[i] + change)
            for _ in range(2):
                assert same_bits(paged(X), plain(X))
    assert same_models(paged, plain)
    assert same_models(penstock.restore(paged), plain)


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_a_loaded_state_dict_is_what_runs(swap: bool, assign: bool, pager: str) -> None:
    plain, paged = two(layers, pager)
    paged(X)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for model in (plain, paged):
            state = {name: t.detach() + 1 for name, t in model.state_dict().items()}
            model.load_state_dict(state, assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for _ in range(3):
        assert same_bits(paged(X), plain(X))
    assert same_models(penstock.restore(paged), plain)


FUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_updates_of_whole_lists_are_kept(name: str, by_layer: bool, pager: str) -> None:
    plain, paged = two(layers, pager)
    outs: list[list[Tensor]] = []
    for model in (plain, paged):
        groups = [{"params": list(layer.parameters())} for layer in model]
        optimizer = FUSED[name](groups if by_layer else model.parameters())
        outs.append([])
        for _ in range(3):
            optimizer.zero_grad()
            out = model(X)
            out.square().mean().backward()
            optimizer.step()
            outs[-1].append(out.detach())
    assert same_bits(outs[1], outs[0])
    assert same_models(paged, plain)
    assert same_models(copy.deepcopy(paged), plain)
    assert manager(paged).stats().peak <= 320 * KIB
    assert same_models(penstock.restore(paged), plain)


# ---- readers that go past torch's dispatcher ----------------------------------------------------


@pytest.mark.parametrize("passes", [0, 3])
def test_numpy_gives_a_copy_that_cannot_be_written_to(passes: int, pager: str) -> None:
    plain, paged = two(layers, pager)
    with torch.no_grad():
        for _ in range(passes):
            paged(X)
    array = paged[1].weight.detach().numpy()
    assert (array == plain[1].weight.detach().numpy()).all()
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 7.0
    with torch.no_grad():
        for _ in range(3):
            assert same_bits(paged(X), plain(X))
        paged[1].weight.zero_()
    assert (array == plain[1].weight.detach().numpy()).all(), "a copy stays as it was"


def test_copies_and_pickles_are_plain_and_of_their_own(pager: str) -> None:
    plain, paged = two(layers, pager)
    with torch.no_grad():
        paged(X)
    file = io.BytesIO()
    torch.save(paged, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(paged),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(paged)),
    ):
        assert penstock.manager_of(copied) is None
        assert {type(p) for p in copied.parameters()} == {nn.Parameter}
        assert same_models(copied, plain)
        with torch.no_grad():
            copied[0].weight.zero_()
            assert same_bits(paged(X), plain(X))
        copied(X).sum().backward()
    one = pickle.loads(pickle.dumps(paged[2].weight))
    assert type(one) is nn.Parameter
    assert same_bits(one, plain[2].weight)
    assert same_bits(copy.deepcopy(paged[2].weight), plain[2].weight)


def test_states_that_were_saved_are_those_of_the_plain_model(pager: str) -> None:
    plain, paged = two(layers, pager)
    with torch.no_grad():
        paged(X)
        for model in (plain, paged):
            model[4].weight.mul_(0.5)
    file = io.BytesIO()
    torch.save(paged.state_dict(), file)
    file.seek(0)
    assert same_bits(dict(torch.load(file, weights_only=True)), state_of(plain))
    found = load_bytes(save_bytes(dict(paged.state_dict())))
    assert same_bits({name: found[name] for name in plain.state_dict()}, state_of(plain))


def test_other_ways_to_read_are_right_or_refused(pager: str) -> None:
    plain, paged = two(layers, pager)
    with torch.no_grad():
        paged(X)
    ours, theirs = paged[1].weight, plain[1].weight
    assert ours.tolist() == theirs.tolist()
    assert ours[3, 5].item() == theirs[3, 5].item()
    assert str(ours) == str(theirs)
    assert same_bits(torch.tensor(ours.detach().tolist()), theirs.detach())
    assert same_bits(nn.utils.parameters_to_vector(paged.parameters()).detach(), flat(plain))
    try:
        shared = torch.from_dlpack(ours.detach())
    except (PenstockError, BufferError):
        return
    assert same_bits(shared.clone(), theirs.detach())


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- what left stays right ----------------------------------------------------------------------


def take_view(model: Any) -> Tensor:
    return model.b[0].weight.detach()[:3]


def take_replaced(model: Any) -> Tensor:
    weight = model.b[0].weight
    model.b[0].weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    return weight


def take_module(model: Any) -> Tensor:
    module = model.b[5]
    model.b = nn.ModuleList(model.b[:5])
    return module.weight


def take_moved(model: Any) -> Tensor:
    model.tail = nn.Linear(WIDTH, WIDTH, bias=False)
    model.tail.weight = model.b[0].weight
    model.b[0].weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    return model.tail.weight


def take_data(model: Any) -> Tensor:
    data = model.b[2].weight.data
    with torch.no_grad():
        model.b[2].weight.data = torch.ones(WIDTH, WIDTH)
    return data


def take_state(model: Any) -> Tensor:
    return model.state_dict()["b.3.weight"]


TAKEN = (take_view, take_replaced, take_module, take_moved, take_data, take_state)


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
def test_what_a_user_kept_is_right_after_restore(
    take: Callable[[Any], Tensor], passes: int, pager: str
) -> None:
    plain, paged = two(Blocks, pager)
    with torch.no_grad():
        for _ in range(passes):
            paged(X)
    ours, theirs = take(paged), take(plain)
    with torch.no_grad():
        assert same_bits(ours, theirs)
        assert same_bits(paged(X), plain(X))
    penstock.restore(paged)
    gc.collect()
    assert same_bits(ours, theirs)
    assert same_models(paged, plain)
    with torch.no_grad():
        assert same_bits(paged(X), plain(X))
        ours.mul_(2)
        theirs.mul_(2)
    assert same_bits(ours, theirs)
    del paged
    gc.collect()
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
def test_what_a_user_kept_is_right_after_give_back(
    take: Callable[[Any], Tensor], pager: str
) -> None:
    plain, paged = build(Blocks), build(Blocks)
    mm = penstock.MemoryManager(cap=CAP, device="cpu", pager=pager, page_size="64KiB")
    mm.adopt("m", paged)
    with torch.no_grad(), mm.use("m"):
        paged(X)
        ours, theirs = take(paged), take(plain)
    mm.give_back("m")
    del mm
    gc.collect()
    assert same_bits(ours, theirs)
    assert same_models(paged, plain)


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
@pytest.mark.parametrize("host", HOSTS)
def test_what_a_user_kept_is_right_after_unregister(
    host: str, take: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    plain, mm = registered(Blocks, host, tmp_path)
    with torch.no_grad(), mm.use("m") as model:
        model(X)
        ours, theirs = take(model), take(plain)
    mm.unregister("m")
    (tmp_path / "m.safetensors").unlink()
    assert same_bits(ours, theirs)
    with torch.no_grad():
        assert same_bits(model(X), plain(X))
    del mm, model
    gc.collect()
    assert same_bits(ours, theirs)


def test_a_model_outlives_all_names_of_its_manager(pager: str) -> None:
    plain, paged = two(Blocks, pager)
    weights = [p.detach() for p in paged.parameters()]
    del paged
    gc.collect()
    assert same_bits(weights, [p.detach() for p in plain.parameters()])


@pytest.mark.parametrize("warm", [0, 3])
def test_a_graph_that_is_open_at_restore_gives_its_gradients(warm: int, pager: str) -> None:
    plain, paged = two(Blocks, pager)
    for _ in range(warm):
        paged(X)
    loss = paged(X).sum()
    penstock.restore(paged)
    loss.backward()
    plain(X).sum().backward()
    assert same_gradients(paged, plain)


def test_gradients_stay_at_restore(pager: str) -> None:
    plain, paged = two(Blocks, pager)
    for model in (plain, paged):
        model(X).sum().backward()
    penstock.restore(paged)
    assert same_gradients(paged, plain)


@torch.no_grad()
def test_a_tensor_that_was_exchanged_for_a_weight_is_right(pager: str) -> None:
    plain, paged = two(layers, pager)
    paged(X)
    ours, theirs = (nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(2))
    torch.utils.swap_tensors(paged[2].weight, ours)
    torch.utils.swap_tensors(plain[2].weight, theirs)
    for _ in range(3):
        assert same_bits(paged(X), plain(X))
    assert same_bits(ours, theirs)
    penstock.restore(paged)
    assert same_bits(ours, theirs)


# ---- exchanges, ties, removals ------------------------------------------------------------------


def exchange(model: Any) -> None:
    model[2].weight, model[4].weight = model[4].weight, model[2].weight


def exchange_data(model: Any) -> None:
    model[2].weight.data, model[4].weight.data = model[4].weight.data, model[2].weight.data


def tie_late(model: Any) -> None:
    model[2].weight = model[4].weight


def tie_chain(model: Any) -> None:
    model[2].bias = model[3].bias
    model[5].bias = model[2].bias


def delete_bias(model: Any) -> None:
    del model[2].bias
    model[2].register_parameter("bias", None)


def bias_to_none(model: Any) -> None:
    model[2].bias = None


def bias_to_attribute(model: Any) -> None:
    del model[2].bias
    model[2].__dict__["bias"] = None


def delete_buffer(model: Any) -> None:
    del model[2].extra


def buffer_to_none(model: Any) -> None:
    model[2].extra = None


def weight_to_tensor(model: Any) -> None:
    weight = model[2].weight.detach().clone()
    del model[2].weight
    model[2].weight = weight


def weight_to_buffer(model: Any) -> None:
    weight = model[2].weight.detach().clone()
    del model[2].weight
    model[2].register_buffer("weight", weight)


def rename(model: Any) -> None:
    model[2].other = model[2].weight
    del model[2].weight
    model[2].__dict__["weight"] = model[2].other


def remove_module(model: Any) -> None:
    model[2] = nn.Identity()


def delete_module(model: Any) -> None:
    del model[2]


def cut(model: Any) -> None:
    del model[3:]


def quantize(model: Any) -> None:
    layer = model[2]
    codes = (layer.weight.detach() * 100).to(torch.int8)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.forward = lambda x: F.linear(x, layer.weight.float() * 0.01, layer.bias)


def enlarge(model: Any) -> None:
    model[5].weight = nn.Parameter(torch.cat([model[5].weight.detach(), torch.ones(32, WIDTH)]))
    model[5].bias = nn.Parameter(torch.cat([model[5].bias.detach(), torch.ones(32)]))


CHANGES = (
    exchange,
    exchange_data,
    tie_late,
    tie_chain,
    delete_bias,
    bias_to_none,
    bias_to_attribute,
    delete_buffer,
    buffer_to_none,
    weight_to_tensor,
    weight_to_buffer,
    rename,
    remove_module,
    delete_module,
    cut,
    quantize,
    enlarge,
)


def with_buffer() -> nn.Module:
    model = layers()
    model[2].register_buffer("extra", torch.randn(WIDTH))
    return model


def ties_of(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: first.setdefault(id(t), name) for name, t in named}


@torch.no_grad()
@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_was_changed_runs_and_is_restored(
    change: Callable[[Any], None], warm: int, pager: str
) -> None:
    plain, paged = two(with_buffer, pager)
    for _ in range(warm):
        paged(X)
    change(plain)
    change(paged)
    for _ in range(4):
        assert same_bits(paged(X), plain(X))
    assert list(paged.state_dict()) == list(plain.state_dict())
    assert same_models(paged, plain)
    assert ties_of(paged) == ties_of(plain)
    penstock.restore(paged)
    assert same_models(paged, plain)
    assert ties_of(paged) == ties_of(plain)
    assert same_bits(paged(X), plain(X))
    assert {type(p) for p in paged.parameters()} <= {nn.Parameter}


@torch.no_grad()
@pytest.mark.parametrize("change", [exchange, exchange_data, tie_late, tie_chain])
def test_give_back_keeps_what_was_exchanged(change: Callable[[Any], None], pager: str) -> None:
    plain, paged = build(layers), build(layers)
    mm = penstock.MemoryManager(cap=CAP, device="cpu", pager=pager, page_size="64KiB")
    mm.adopt("m", paged)
    with mm.use("m"):
        paged(X)
        change(plain)
        change(paged)
        assert same_bits(paged(X), plain(X))
    mm.give_back("m")
    assert same_models(paged, plain)
    assert ties_of(paged) == ties_of(plain)
    assert same_bits(paged(X), plain(X))


def share_buffer(a: nn.Module, b: nn.Module, first: bool, second: bool) -> None:
    shared = torch.randn(WIDTH)
    a.register_buffer("t", shared, persistent=first)
    b.register_buffer("t", shared, persistent=second)


def share_bias(a: Any, b: nn.Module, *, persistent: bool, data: bool) -> None:
    a.t = a.bias
    b.register_buffer("t", a.bias.data if data else a.bias, persistent=persistent)


def share_attribute(a: Any, b: nn.Module) -> None:
    a.t = a.weight
    object.__setattr__(b, "t", a.weight)


SHARED: dict[str, Callable[[Any, Any], None]] = {
    "saved buffer": lambda a, b: share_buffer(a, b, True, True),
    "saved and passing": lambda a, b: share_buffer(a, b, True, False),
    "passing buffer": lambda a, b: share_buffer(a, b, False, False),
    "parameter as a buffer": lambda a, b: share_bias(a, b, persistent=True, data=False),
    "parameter as a passing buffer": lambda a, b: share_bias(a, b, persistent=False, data=False),
    "data of a parameter": lambda a, b: share_bias(a, b, persistent=True, data=True),
    "data, passing": lambda a, b: share_bias(a, b, persistent=False, data=True),
    "plain attribute": share_attribute,
}


@torch.no_grad()
@pytest.mark.parametrize("name", SHARED)
def test_one_tensor_under_two_names_stays_one(name: str, pager: str) -> None:
    def builder() -> nn.Module:
        model = layers()
        SHARED[name](model[0], model[1])
        return model

    plain, paged = two(builder, pager)
    one = plain[0].t is plain[1].t
    assert (paged[0].t is paged[1].t) == one
    paged(X)
    for each in (plain, paged):
        each[0].t.mul_(2.0)
    assert same_bits(paged[1].t.detach(), plain[1].t.detach())
    assert same_bits(paged(X), plain(X))
    penstock.restore(paged)
    assert (paged[0].t is paged[1].t) == one
    for each in (plain, paged):
        each[0].t.mul_(2.0)
    assert same_bits(paged[1].t.detach(), plain[1].t.detach())


@torch.no_grad()
def test_parameters_that_overlap_in_memory_still_do(pager: str) -> None:
    def builder() -> nn.Module:
        model = layers()
        large = torch.randn(2 * WIDTH, WIDTH)
        model[0].weight = nn.Parameter(large[:WIDTH])
        model[1].weight = nn.Parameter(large[WIDTH // 2 : WIDTH // 2 + WIDTH])
        return model

    plain, paged = two(builder, pager)
    for _ in range(2):
        paged(X)
    for each in (plain, paged):
        each[0].weight[WIDTH // 2 :].add_(1.0)
    assert same_bits(paged(X), plain(X))
    assert same_models(paged, plain)


@torch.no_grad()
def test_parameter_deleted_before_the_first_call(pager: str) -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = layers()
            self.gains = nn.ParameterDict({"x": nn.Parameter(torch.full((WIDTH,), 2.0))})

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.gains.get("x", 1)

    plain, paged = two(Optional, pager)
    for model in (plain, paged):
        del model.gains["x"]
    assert same_bits(paged(X), plain(X))
    assert same_models(penstock.restore(paged), plain)


# ---- processes ----------------------------------------------------------------------------------

FORK = """
import os, signal, torch, penstock
from penstock.errors import ModelError
from torch import nn

torch.set_num_threads(1)
x = torch.ones(2, 128)
ACTS = {{
    "write": lambda m: [p.zero_() for p in m.parameters()],
    "write to data": lambda m: m[2].weight.data.fill_(1.0),
    "read": lambda m: m[2].weight.detach().clone(),
    "pass": lambda m: m(x),
}}

def child(model, act):
    signal.alarm(20)  # a child that hangs is ended, and so found
    try:
        with torch.no_grad():
            act(model)
        return 1
    except ModelError:
        return 0 if (torch.ones(3) * 2).sum() == 6 else 2  # what is not paged works
    except BaseException as error:
        print("not a ModelError but", repr(error), flush=True)
        return 3

failed = []
for cap in ("320KiB", "8MiB"):
    for passes in (0, 4):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(6))).eval()
        wanted = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            right = model(x)
        penstock.offload(model, cap=cap, device="cpu", pager={pager!r}, page_size="64KiB")
        with torch.no_grad():
            for _ in range(passes):
                model(x)
        for name, act in ACTS.items():
            pid = os.fork()
            if pid == 0:
                os._exit(child(model, act))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status:
                failed.append((cap, passes, name, "the child ends with", status))
        with torch.no_grad():
            if not torch.equal(model(x), right):
                failed.append((cap, passes, "the parent's output has changed"))
        penstock.restore(model)
        if not all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted)):
            failed.append((cap, passes, "the parent's weights have changed"))
assert not failed, failed
"""


def test_a_forked_child_is_refused_and_changes_nothing(pager: str) -> None:
    run_python(FORK.format(pager=pager), seconds=400)


# ---- views --------------------------------------------------------------------------------------


@torch.no_grad()
def test_views_share_memory_with_their_weight(pager: str) -> None:
    plain, paged = two(layers, pager)
    views = [
        [
            model[1].weight.detach()[2:5],
            model[1].weight.data.T,
            model[3].weight.detach().view(-1)[7:700:3],
            model[3].weight.detach().as_strided((4, 4), (WIDTH + 1, 1), 9),
            model[4].bias.detach().expand(3, WIDTH),
        ]
        for model in (plain, paged)
    ]
    for _ in range(3):
        assert same_bits(paged(X), plain(X))
        assert same_bits(views[1], views[0])
    for model, kept in zip((plain, paged), views, strict=True):
        kept[0].add_(1.0)
        kept[1][3].mul_(0.5)
        kept[2].zero_()
        kept[3].fill_(0.1)
        model[4].bias.add_(1.0)
    assert same_bits(views[1], views[0])
    assert same_bits(paged(X), plain(X))
    evict(paged)
    assert same_bits(views[1], views[0])
    assert same_bits(paged(X), plain(X))


class Stacked(nn.Module):
    """Experts in one tensor, of which a pass reads those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(12, WIDTH, WIDTH) / 11)

    def forward(self, x: Tensor, chosen: tuple[int, ...]) -> Tensor:
        for expert in chosen:
            x = torch.tanh(F.linear(x, self.experts[expert]))
        return x


def test_an_expert_that_is_read_needs_room_for_itself_alone(pager: str) -> None:
    plain, paged = two(Stacked, pager, "256KiB")  # of 768 KiB
    with torch.no_grad():
        for chosen in ((0, 3), (11,), (5, 5, 2), tuple(range(12))):
            assert same_bits(paged(X, chosen), plain(X, chosen))
    for model in (plain, paged):
        model(X, (1, 7, 4)).sum().backward()
    assert same_gradients(paged, plain)
    assert manager(paged).stats().peak <= 256 * KIB


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in range(8):
            setattr(self, f"w{i}", nn.Parameter(torch.randn(WIDTH, WIDTH) / 11))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(8):
            x = torch.tanh(x @ getattr(self, f"w{i}"))
        return x


def test_a_root_with_many_weights_needs_room_for_one_operation(pager: str) -> None:
    plain, paged = two(Root, pager, "192KiB")  # three of eight
    with torch.no_grad():
        for _ in range(3):
            assert same_bits(paged(X), plain(X))
    for model in (plain, paged):
        model(X).sum().backward()
    assert same_gradients(paged, plain)


# ---- torch.func ---------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[[Any], Tensor], Any], object]] = {
    "grad": lambda f, ps: torch.func.grad(f)(ps),
    "vjp": lambda f, ps: torch.func.vjp(f, ps)[1](torch.tensor(1.0)),
    "jvp": lambda f, ps: torch.func.jvp(f, (ps,), (ps,)),
    "vmap": lambda f, ps: torch.func.vmap(lambda s: f({k: v * s for k, v in ps.items()}))(
        torch.ones(3)
    ),
    "grad of grad": lambda f, ps: torch.func.grad(
        lambda q: sum(g.square().sum() for g in torch.func.grad(f)(q).values())
    )(ps),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own jvp
@pytest.mark.parametrize("own", [False, True], ids=["other weights", "own weights"])
@pytest.mark.parametrize("passes", [0, 1, 5])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_the_same_bits(name: str, passes: int, own: bool, pager: str) -> None:
    plain, paged = two(Blocks, pager)
    results = []
    for model in (plain, paged):
        with torch.no_grad():
            for _ in range(passes):
                model(X)

        def value(weights: Any, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, weights, (X,)).square().mean()

        source = model if own else plain
        weights = {name: p.detach() for name, p in source.named_parameters()}
        results.append(TRANSFORMS[name](value, weights))
        with torch.no_grad():
            results.append(model(X))
    assert same_bits(results[2:], results[:2])


@pytest.mark.filterwarnings("error")
@torch.no_grad()
@pytest.mark.parametrize("passes", [0, 1, 5])
def test_functional_call_with_some_weights_exchanged(passes: int, pager: str) -> None:
    """It warns of nothing, either: a warning is an error here."""
    plain, paged = two(Blocks, pager)
    for _ in range(passes):
        paged(X)
    other = {"b.2.weight": torch.full((WIDTH, WIDTH), 0.01)}
    for _ in range(3):
        found, wanted = (torch.func.functional_call(model, other, (X,)) for model in (paged, plain))
        assert same_bits(found, wanted)
        assert same_bits(paged(X), plain(X))


# ---- torch's own errors -------------------------------------------------------------------------


class Mistaken(Blocks):
    """Writes to an activation that backward needs."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(super().forward(x))
        z = (y * y).sum()
        y.mul_(3.0)
        return z


MODIFIED = "modified by an inplace operation"


@pytest.mark.parametrize("passes", [0, 3])
def test_an_activation_that_was_changed_before_backward(passes: int, pager: str) -> None:
    plain, paged = two(Mistaken, pager)
    with torch.no_grad():
        for _ in range(passes):
            paged(X)
    for model in (plain, paged, paged):
        with pytest.raises(RuntimeError, match=MODIFIED):
            model(X.clone().requires_grad_()).backward()


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_of_a_registered_model(host: str, tmp_path: Path) -> None:
    _, mm = registered(Mistaken, host, tmp_path)
    with mm.use("m") as model:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=MODIFIED):
                model(X.clone().requires_grad_()).backward()


@pytest.mark.parametrize("passes", [0, 3])
def test_a_weight_that_was_changed_before_backward(passes: int, pager: str) -> None:
    plain, paged = two(Blocks, pager)
    with torch.no_grad():
        for _ in range(passes):
            paged(X)
    for model in (plain, paged):
        loss = model(X).sum()
        with torch.no_grad():
            model.b[3].weight.mul_(0.5)
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()
        model.zero_grad()
    for model in (plain, paged):
        model(X).sum().backward()
    assert same_gradients(paged, plain)


REFUSED: dict[str, Callable[[Any], object]] = {
    "leaf changed in place": lambda m: m[0].weight.mul_(2),
    "view of a leaf changed in place": lambda m: m[0].weight[0].mul_(2),
    "numpy with a gradient": lambda m: m[0].weight.numpy(),
    "shapes that do not fit": lambda m: torch.ones(2, 3) @ m[0].weight,
    "dtypes that do not fit": lambda m: torch.ones(2, WIDTH).double() @ m[0].weight,
    "index out of range": lambda m: m[0].weight[WIDTH],
    "view of another size": lambda m: m[0].weight.view(3, 5),
    "data of another dtype": lambda m: setattr(m[0].weight, "data", torch.zeros(2).char()),
    "unknown name in a state dict": lambda m: m.load_state_dict({"no": torch.ones(1)}),
    "graph used twice": lambda m: [loss.backward() for loss in [m(X).sum()] * 2],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_in_its_words(name: str, pager: str) -> None:
    plain, paged = two(layers, pager)
    said = []
    for model in (plain, paged):
        with pytest.raises(Exception) as caught:
            REFUSED[name](model)
        said.append((caught.type, str(caught.value)))
    assert said[1] == said[0]
    with torch.no_grad():
        assert same_bits(paged(X), plain(X))


# ---- the first pass -----------------------------------------------------------------------------


def attention() -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True)


FIRST: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], object]]] = {
    "gru": (lambda: nn.GRU(WIDTH, WIDTH, batch_first=True), lambda m, x: m(x)),
    "lstm": (lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), lambda m, x: m(x)),
    "attention": (attention, lambda m, x: m(x, x, x)),
    "attention without its weights": (attention, lambda m, x: m(x, x, x, need_weights=False)),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True),
        lambda m, x: m(x),
    ),
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    FIRST["linear cross entropy"] = (
        lambda: nn.LinearCrossEntropyLoss(WIDTH, 50),
        lambda m, x: m(x.flatten(0, 1), torch.arange(15)),
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", FIRST)
def test_the_first_pass_has_the_bits_of_all_others(
    name: str, mode: Callable[[], Any], training: bool, pager: str
) -> None:
    builder, call = FIRST[name]
    plain, paged = two(builder, pager, "3MiB")
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    plain.train(training)
    paged.train(training)
    with mode():
        wanted = call(plain, x)
        for _ in range(3):
            assert same_bits(call(paged, x), wanted)


def test_the_fused_encoder_kernel_is_chosen_as_ever(
    pager: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.ModuleList(
                nn.Transformer(64, 4, 2, 1, 256, batch_first=True) for _ in range(4)
            )

        def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
            return [t(a, b) for t in self.t]

    plain, paged = two(Copies, pager, "640KiB")
    calls = [0]
    fused = torch._transformer_encoder_layer_fwd

    def counted(*arguments: object, **options: object) -> Tensor:
        calls[0] += 1
        return fused(*arguments, **options)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    a, b = torch.randn(2, 5, 64), torch.randn(2, 4, 64)
    with torch.no_grad():
        wanted = plain(a, b)
        often = calls[0]
        assert often > 0
        for _ in range(3):
            calls[0] = 0
            assert same_bits(paged(a, b), wanted)
            assert calls[0] == often


# ---- passes that fail ---------------------------------------------------------------------------


def assert_the_thread_is_clean() -> None:
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    found = torch.func.grad(lambda w: (w * w).sum())(torch.ones(3))
    assert same_bits(found, torch.full((3,), 2.0))


class Failing(Blocks):
    fails = True

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.b):
            x = block(x)
            if number == 3 and self.fails:
                raise ValueError("half way")
        return x


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_that_fails_leaves_nothing(host: str, training: bool, tmp_path: Path) -> None:
    plain, mm = registered(Failing, host, tmp_path)
    with mm.use("m") as model:
        for _ in range(3):
            with torch.set_grad_enabled(training), pytest.raises(ValueError, match="half way"):
                model(X)
            assert_the_thread_is_clean()
    assert mm.stats().used == 0
    plain.fails = False
    with torch.no_grad(), mm.use("m") as model:
        model.fails = False
        assert same_bits(model(X), plain(X))
    assert mm.stats().used == 0


@pytest.mark.parametrize("host", ["mapped", "stream"])
def test_a_write_that_a_host_tier_refuses_leaves_nothing(host: str, tmp_path: Path) -> None:
    def builder() -> nn.Module:
        return nn.Sequential(*layers(2), nn.BatchNorm1d(WIDTH), *layers(3))

    plain, mm = registered(builder, host, tmp_path)
    with mm.use("m") as model:
        model.train()
        for _ in range(3):
            with pytest.raises(PenstockError):
                model(X)
            assert_the_thread_is_clean()
        model.eval()
        with torch.no_grad():
            assert same_bits(model(X), plain(X))
    assert mm.stats().used == 0


INTERRUPTED = """
import faulthandler, gc, random, signal, torch, penstock
from torch import nn

faulthandler.dump_traceback_later(60, exit=True)  # says where it hangs
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(10))).eval()
x = torch.ones(2, 128)
draw, armed, hits = random.Random(0), False, 0

class Hit(KeyboardInterrupt):
    pass

def hit(*_):
    if armed:
        raise Hit

signal.signal(signal.SIGALRM, hit)
mm = penstock.MemoryManager(cap="448KiB", device="cpu", pager={pager!r}, page_size="64KiB")
with torch.no_grad():
    right = model(x)
    mm.adopt("m", model)
    for _ in range(200):
        with mm.use("m"):
            try:
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 6e-4))
                    for _ in range(20):
                        {what}
                finally:
                    armed = False
            except Hit:
                hits += 1
        used = mm.stats().used
        assert used == 0, f"{{used}} bytes in use after {{hits}} interrupts"
    assert hits > 10, hits
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    with mm.use("m"):
        assert torch.equal(model(x), right)
    mm.give_back("m")
    assert torch.equal(model(x), right)
gc.collect()
assert mm.stats().used == 0
"""


@pytest.mark.parametrize("what", ["[layer.weight.sum() for layer in model]", "model(x)"])
def test_interrupted_work_gives_its_pages_back(what: str, pager: str) -> None:
    run_python(INTERRUPTED.format(what=what, pager=pager), seconds=90)


# ---- what is refused ----------------------------------------------------------------------------


def test_a_model_around_an_offloaded_one_is_refused(pager: str) -> None:
    plain, paged = two(layers, pager)
    outer = nn.Sequential(paged, nn.Linear(WIDTH, WIDTH))
    for model in (outer, paged, nn.Sequential(paged[2], nn.ReLU())):
        with pytest.raises(ModelError):
            offloaded(model, pager)
    assert penstock.manager_of(outer) is None
    with torch.no_grad():
        assert same_bits(paged(X), plain(X))
    copied = copy.deepcopy(outer)
    assert {type(p) for p in copied.parameters()} == {nn.Parameter}
    copied(X).sum().backward()
    assert same_models(penstock.restore(paged), plain)
    offloaded(outer, pager)
    with torch.no_grad():
        assert same_bits(outer[0](X), plain(X))


def test_a_model_that_shares_a_weight_with_a_paged_one_is_refused(pager: str) -> None:
    plain, paged = two(layers, pager)
    other = build(layers)
    other[3].weight = paged[1].weight
    before = state_of(other)
    with pytest.raises(ModelError):
        offloaded(other, pager)
    mm = penstock.MemoryManager(cap=CAP, device="cpu", pager=pager, page_size="64KiB")
    with pytest.raises(ModelError):
        mm.adopt("other", other)
    assert same_bits(state_of(other), before)
    assert other[3].weight is paged[1].weight
    with torch.no_grad():
        assert same_bits(paged(X), plain(X))
    assert same_models(penstock.restore(paged), plain)


class Wrapped(torch.Tensor):
    """Holds its values in tensors of its own, as quantized weights of other packages do."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return Wrapped(args[0].codes, args[0].scale)

        def unwrapped(value: object) -> object:
            return value.codes.float() * value.scale if isinstance(value, Wrapped) else value

        plain = torch.utils._pytree.tree_map(unwrapped, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def test_wrapper_subclasses_are_refused_and_nothing_has_changed(pager: str) -> None:
    model = build(layers)
    scale = torch.tensor(0.01)
    codes = (model[2].weight.detach() / scale).round().to(torch.int8)
    model[2].weight = nn.Parameter(Wrapped(codes, scale), requires_grad=False)
    parameters = list(model.parameters())
    with torch.no_grad():
        wanted = model(X)
    with pytest.raises(ModelError):
        offloaded(model, pager)
    assert penstock.manager_of(model) is None
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model[2].weight, Wrapped)
    assert model[2].weight.codes is codes
    assert {type(p) for p in model.parameters() if not isinstance(p, Wrapped)} == {nn.Parameter}
    with torch.no_grad():
        assert same_bits(model(X), wanted)


class Marked(torch.Tensor):
    """A subclass that holds its values as any tensor does."""


@torch.no_grad()
def test_subclasses_without_a_form_of_their_own_keep_class_and_attributes(pager: str) -> None:
    def builder() -> nn.Module:
        model = layers()
        model[4].weight = nn.Parameter(model[4].weight.detach().as_subclass(Marked))
        model[4].weight.tag = "t"
        return model

    plain, paged = two(builder, pager)
    for _ in range(3):
        ours, theirs = paged(X), plain(X)
        assert type(ours) is type(theirs)
        assert same_bits(ours.as_subclass(Tensor), theirs.as_subclass(Tensor))
    penstock.restore(paged)
    assert type(paged[4].weight) is type(plain[4].weight)
    assert paged[4].weight.tag == "t"


def test_int8_weights_by_hand(pager: str) -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.randn(WIDTH, WIDTH) / 11
            self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
            codes = (weight / self.scale).round().to(torch.int8)
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.bias = nn.Parameter(torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    plain, paged = two(lambda: nn.Sequential(*(Quantized() for _ in range(12))), pager, "128KiB")
    with torch.no_grad():
        for _ in range(4):
            assert same_bits(paged(X), plain(X))
    for model in (plain, paged):
        model(X.clone().requires_grad_()).sum().backward()
    assert same_gradients(paged, plain)


# ---- bringing in again --------------------------------------------------------------------------


def loaded_bytes(mm: penstock.MemoryManager) -> int:
    memory = mm.stats().models["m"].memory
    assert memory is not None
    return memory.loaded_bytes


def comes_in(mm: penstock.MemoryManager, begin: Callable[[], object], nbytes: int) -> bool:
    """Tell whether so many bytes are loaded soon after something has been begun."""
    before, end = loaded_bytes(mm), time.monotonic() + 5
    begin()
    while time.monotonic() < end:
        if loaded_bytes(mm) - before >= nbytes:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("cap", ["1MiB", "8MiB"])
@pytest.mark.parametrize("how", ["prefetch", "acquire", "reserve"])
@pytest.mark.parametrize("host", ["pinned", "managed"])
def test_a_model_is_brought_in_after_it_was_used(
    host: str, how: str, cap: str, tmp_path: Path
) -> None:
    if how == "reserve" and cap == "1MiB":
        pytest.skip("a reservation is for the whole model")
    plain, mm = registered(lambda: Blocks(24), host, tmp_path, cap=cap)  # 1.5 MiB

    def use() -> None:
        with torch.no_grad(), mm.use("m") as model:
            assert same_bits(model(X), plain(X))

    use()
    use()
    assert comes_in(mm, lambda: getattr(mm, how)("m"), MIB // 4)
    if how == "acquire":
        mm.release("m", evict=True)
    use()


# ---- room ---------------------------------------------------------------------------------------


class Segments(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.body = nn.Sequential(
            *itertools.chain.from_iterable((nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(12))
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_checkpointed_segment_needs_no_more_than_a_plain_one(
    reentrant: bool | None, pager: str
) -> None:
    plain, paged = two(lambda: Segments(reentrant), pager, "256KiB")  # of 792 KiB
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (plain, paged)]
    for _ in range(3):
        for model, optimizer in zip((plain, paged), optimizers, strict=True):
            optimizer.zero_grad()
            model(X.clone().requires_grad_()).sum().backward()
        assert same_gradients(paged, plain)
        for optimizer in optimizers:
            optimizer.step()
    assert same_models(paged, plain)
    assert manager(paged).stats().peak <= 256 * KIB


class WithTable(nn.Module):
    """A table of sixteen pages, and checkpointed layers behind it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.table = nn.Embedding(512, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(8)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_pages_are_given_back_when_their_last_reader_is_gone(reentrant: bool) -> None:
    plain = build(lambda: WithTable(reentrant)).train()
    paged = copy.deepcopy(plain)
    penstock.offload(paged, cap=18 * 4 * KIB, device="cpu", pager="managed", page_size=4 * KIB)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (plain, paged)]
    ids = torch.arange(8)
    for _ in range(4):
        losses = []
        for model, optimizer in zip((plain, paged), optimizers, strict=True):
            loss = model(ids)
            loss.backward()
            optimizer.step()  # while the loss, and so the graph, is alive
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert same_bits(losses[1], losses[0])
    assert same_models(paged, plain)


# ---- models that write or read where they are made ----------------------------------------------


class Initializing(nn.Module):
    """Draws into a parametrized weight in its constructor, as wav2vec2 does."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=4)
        self.conv = parametrizations.weight_norm(conv, dim=2)
        nn.init.normal_(self.conv.weight, std=0.1)
        self.mask = nn.Parameter(torch.empty(WIDTH).uniform_())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[None].mT).mT + self.mask


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_a_constructor_may_draw_into_its_weights(host: str, tmp_path: Path) -> None:
    plain, mm = registered(Initializing, host, tmp_path, cap="1MiB")
    with mm.use("m") as model:
        for _ in range(3):
            assert same_bits(model(X), plain(X))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_passes(backend: str, training: bool, pager: str) -> None:
    plain, paged = two(Blocks, pager)

    def run() -> None:
        torch.set_num_threads(1)
        torch._dynamo.reset()
        compiled = torch.compile(paged, backend=backend)
        for number in range(4):
            for model, call in ((plain, plain), (paged, compiled)):
                model.zero_grad()
                with torch.set_grad_enabled(training):
                    out = call(X)
                if training:
                    out.sum().backward()
                model.result = out.detach()
            assert same_bits(paged.result, plain.result)
            assert same_gradients(paged, plain)
            if number == 2:
                with torch.no_grad():
                    for model in (plain, paged):
                        model.b[2].weight.mul_(0.5)

    within(120, run)


def test_inference_mode_reads_and_other_modes_afterwards(pager: str) -> None:
    plain, paged = two(Blocks, pager)
    with torch.inference_mode():
        assert same_bits(paged(X), plain(X))
        assert same_bits(paged.b[1].weight[2:4].clone(), plain.b[1].weight[2:4].clone())
        kept = paged.b[1].weight.sum()
    for model in (plain, paged):
        model(X).sum().backward()
    assert same_gradients(paged, plain)
    assert kept.item() == plain.b[1].weight.sum().item()


def test_this_process_is_the_one_that_began() -> None:
    """No test above may have gone on in a child."""
    assert os.environ.get("PYTEST_CURRENT_TEST")
