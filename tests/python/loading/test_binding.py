"""Bound models: ordinary parameters to all who use them, on the memory of a region."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import penstock
from penstock import ParameterMovedWarning
from penstock.manager.manager import MemoryManager
from python.support import (
    MIB,
    build,
    charge_of,
    manager_with,
    mlp,
    raw,
    region_of,
    same_bits,
    state_of,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.complex32, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


class Holder(nn.Module):
    """A parameter and a buffer of one dtype, and neighbours that must stay out of their bytes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(3))
        self.weight = nn.Parameter(torch.zeros(5, 7, dtype=dtype), requires_grad=False)
        self.register_buffer("table", torch.zeros(3, dtype=dtype))
        self.after = nn.Parameter(torch.zeros(3))


class Sample(nn.Module):
    """Tied, shared, buffered, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.arange(8.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(ids) + self.offset))


IDS = torch.arange(9)


@pytest.fixture
def reference() -> nn.Module:
    return build(Sample)


@pytest.fixture
def manager(reference: nn.Module) -> MemoryManager:
    return manager_with(Sample, state_of(reference), cap="1MiB")


def addresses(module: nn.Module) -> dict[str, int]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.data_ptr() for name, tensor in tensors if tensor.numel()}


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- values and places -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_on_the_region_bit_by_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (38 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    if dtype is torch.bool:
        noise %= 2
    flat = noise.view(dtype)  # any bits: signalling NaNs and subnormals too
    state = {
        "before": torch.tensor([1.0, 2.0, 3.0]),
        "weight": flat[:35].reshape(5, 7),
        "table": flat[35:],
        "after": torch.tensor([4.0, 5.0, 6.0]),
    }
    manager = manager_with(lambda: Holder(dtype), state, cap="1MiB")
    module = manager.acquire("m")
    region = region_of(manager)
    assert region is not None
    for name, tensor in state.items():
        held = getattr(module, name)
        assert region.address <= held.data_ptr()
        assert held.data_ptr() + held.nbytes <= region.address + region.nbytes
        assert held.device == torch.device("cpu")
        assert same_bits(held.detach(), tensor), name


def test_module_is_what_the_builder_made(manager: MemoryManager, reference: nn.Module) -> None:
    module = manager.acquire("m")
    assert type(module) is Sample
    for ours, theirs in (
        (module.named_parameters(), reference.named_parameters()),
        (module.named_buffers(), reference.named_buffers()),
        (module.state_dict().items(), reference.state_dict().items()),
    ):
        for (name, tensor), (wanted_name, wanted) in zip(ours, theirs, strict=True):
            assert name == wanted_name
            assert same_bits(tensor.detach(), wanted.detach()), name
            assert isinstance(tensor, type(wanted))
            assert tensor.requires_grad == wanted.requires_grad
            assert tensor.is_leaf
    assert module.head.weight is module.embedding.weight


def test_addresses_never_change(reference: nn.Module) -> None:
    model = build(lambda: mlp(256, 256, 256, 256, 256))
    manager = manager_with(lambda: mlp(256, 256, 256, 256, 256), state_of(model), cap="512KiB")
    first = addresses(manager.acquire("m"))
    manager.release("m", evict=True)
    x = torch.randn(2, 256)
    with torch.no_grad():
        for _ in range(3):
            with manager.use("m") as module:
                assert same_bits(module(x), model(x))
                assert addresses(module) == first
            assert addresses(module) == first
    assert manager.stats().evicted_bytes > 0
    assert manager.stats().models["m"].moved == ()


def test_gradients_can_be_turned_off_and_on(manager: MemoryManager, reference: nn.Module) -> None:
    with manager.use("m") as module:
        module.requires_grad_(False)
        assert not any(p.requires_grad for p in module.parameters())
        assert not module(IDS).requires_grad
        module.requires_grad_(True)
        module(IDS).square().sum().backward()
    reference(IDS).square().sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert same_bits(ours.grad, theirs.grad), name


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("acquired", [True, False])
def test_deep_copy_is_an_ordinary_model(
    manager: MemoryManager, reference: nn.Module, acquired: bool
) -> None:
    module = manager.acquire("m")
    if not acquired:
        manager.release("m")
    twin = copy.deepcopy(module)
    own = addresses(module)
    assert twin.head.weight is twin.embedding.weight
    assert all(own[name] != address for name, address in addresses(twin).items())
    assert same_bits(twin.state_dict(), reference.state_dict())
    manager.pager.synchronize()
    before = manager.stats()
    assert same_bits(twin(IDS), reference(IDS))
    twin.half()
    assert manager.stats() == before  # the copy is none of the manager's business
    assert same_bits(module(IDS), reference(IDS))


def test_pickled_model_is_an_ordinary_model(manager: MemoryManager, reference: nn.Module) -> None:
    with manager.use("m") as module:
        written = pickle.dumps(module)
    twin = pickle.loads(written)
    assert same_bits(twin.state_dict(), reference.state_dict())
    assert same_bits(twin(IDS), reference(IDS))


def test_state_dict_can_be_saved(
    manager: MemoryManager, reference: nn.Module, tmp_path: Path
) -> None:
    with manager.use("m") as module:
        state = module.state_dict()
        del state["head.weight"]  # safetensors wants each tensor once
        save_file(state, tmp_path / "m.safetensors")
        torch.save(module.state_dict(), tmp_path / "m.pt")
    wanted = state_of(reference)
    assert same_bits(torch.load(tmp_path / "m.pt", weights_only=True), reference.state_dict())
    del wanted["head.weight"]
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], wanted[name]) for name in wanted)


def test_loading_into_a_bound_model_stays_on_the_region(reference: nn.Module) -> None:
    manager = manager_with(Sample, state_of(reference), cap="1MiB", writable=True)
    other = build(Sample, seed=5)
    with manager.use("m") as module:
        before = addresses(module)
        module.load_state_dict(other.state_dict())
        assert addresses(module) == before
    with manager.use("m") as module:
        assert same_bits(module(IDS), other(IDS))
        assert not same_bits(module(IDS), reference(IDS))


# ---- leaving the region ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.float64),
        lambda m: m.to(torch.bfloat16),
        lambda m: setattr(m.body[0].weight, "data", torch.zeros(8, 8)),
    ],
    ids=["half", "double", "to float64", "to bfloat16", "new data"],
)
@pytest.mark.parametrize("found_by", ["acquire", "forward"])
def test_parameters_that_leave_are_warned_of_once(
    manager: MemoryManager, change: Callable[[nn.Module], object], found_by: str
) -> None:
    module = manager.acquire("m")
    assert manager.stats().models["m"].moved == ()
    change(module)
    moved = manager.stats().models["m"].moved
    assert moved
    ids = IDS

    def notice() -> None:
        if found_by == "acquire":
            manager.acquire("m")
        else:
            with suppress(RuntimeError):  # dtypes that do not go together
                module(ids)

    with pytest.warns(ParameterMovedWarning) as caught:
        notice()
    (warning,) = caught
    assert f"{len(moved)} parameters" in str(warning.message)
    assert repr(moved[0]) in str(warning.message)
    assert "register(..., dtype=" in str(warning.message)
    with no_warning():
        notice()
    assert moved[0] in manager.report()


def test_tensors_that_are_replaced_are_the_users_business(
    manager: MemoryManager, reference: nn.Module
) -> None:
    module = manager.acquire("m")
    old, new = module.embedding.weight, torch.linspace(-1, 1, 88).view(11, 8)
    with no_warning():
        for each in (module, reference):
            each.embedding.weight = nn.Parameter(new.clone())
            each.body[1].running_mean = torch.ones(8)
        for _ in range(3):
            manager.acquire("m")
            assert same_bits(module(IDS).detach(), reference(IDS).detach())
    assert manager.stats().models["m"].moved == ()
    assert same_bits(module.head.weight.detach(), reference.head.weight.detach())
    assert module.head.weight is old
    module.head.weight = module.embedding.weight
    reference.head.weight = reference.embedding.weight
    with no_warning():
        assert same_bits(module(IDS).detach(), reference(IDS).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_that_stand_in_for_a_call_do_not_leave(
    manager: MemoryManager, reference: nn.Module, dtype: torch.dtype
) -> None:
    module = manager.acquire("m")
    others = {
        name: torch.ones_like(tensor, dtype=dtype)
        for name, tensor in reference.named_parameters()
        if name.startswith("head")
    }
    with no_warning(), suppress(RuntimeError):  # dtypes that do not go together
        torch.func.functional_call(module, others, (IDS,))
    with no_warning():
        manager.acquire("m")
        assert same_bits(module(IDS).detach(), reference(IDS).detach())
    assert manager.stats().models["m"].moved == ()


def test_leaving_later_is_warned_of_too(manager: MemoryManager) -> None:
    module = manager.acquire("m")
    module.body[0].half()
    with pytest.warns(ParameterMovedWarning, match=r"2 parameters .*body\.0\.weight"):
        manager.acquire("m")
    module.body[2].half()
    with pytest.warns(ParameterMovedWarning, match=r"2 parameters .*body\.2\.weight"):
        manager.acquire("m")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float32),
        lambda m: m.float(),
        lambda m: m.cpu(),
        lambda m: m.to("cpu"),
        lambda m: m.train().eval(),
        lambda m: m.requires_grad_(False),
        lambda m: m.load_state_dict(state_of(m)),
    ],
    ids=["to float32", "float", "cpu", "to cpu", "train", "requires_grad_", "load_state_dict"],
)
def test_what_moves_nothing_is_silent(
    manager: MemoryManager, reference: nn.Module, change: Callable[[nn.Module], object]
) -> None:
    module = manager.acquire("m")
    before = addresses(module)
    with no_warning():
        change(module)
        manager.acquire("m")
        assert same_bits(module(IDS).detach(), reference(IDS).detach())
    assert addresses(module) == before
    assert manager.stats().models["m"].moved == ()


def test_warning_that_is_raised_leaves_the_model_as_it_was(manager: MemoryManager) -> None:
    with manager.use("m") as module:
        module.half()
    with no_warning(), pytest.raises(ParameterMovedWarning), manager.use("m"):
        pass
    assert manager.stats().models["m"].acquired == 0
    manager.unregister("m")


# ---- lifetime ----------------------------------------------------------------------------------


def mapped(address: int) -> bool:
    """Return whether an address is mapped in this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in re.match(r"(\w+)-(\w+)", line).groups())
        if first <= address < last:
            return True
    return False


@pytest.mark.parametrize("unregistered", [True, False])
def test_region_lives_as_long_as_the_last_tensor_on_it(
    reference: nn.Module, unregistered: bool
) -> None:
    manager = manager_with(Sample, state_of(reference), cap="1MiB")
    budget = manager.pager.budget
    with torch.no_grad(), manager.use("m") as module:
        module(IDS)
        manager.prefetch("m")
        manager.pager.synchronize()
    weight = module.body[0].weight
    row = weight.detach()[3]
    address = row.data_ptr()
    if unregistered:
        manager.unregister("m")
    del module, weight
    del manager
    gc.collect()
    assert mapped(address)
    assert raw(row) == raw(reference.body[0].weight[3])
    del row
    gc.collect()
    assert not mapped(address)
    assert budget.stats().used == 0


def test_resident_pages_are_given_back_with_the_model(reference: nn.Module) -> None:
    manager = manager_with(lambda: mlp(512, 512), state_of(mlp(512, 512)), cap="8MiB")
    budget = manager.pager.budget
    module = manager.acquire("m")
    module(torch.zeros(1, 512))
    manager.pager.synchronize()
    assert budget.stats().used == charge_of(region_of(manager))
    address = module[0].weight.data_ptr()
    del module, manager
    gc.collect()
    assert budget.stats().used == 0
    assert not mapped(address)


def test_memory_of_an_unregistered_model_goes_at_once(reference: nn.Module) -> None:
    """Not when Python next looks for cycles: it may be many GB."""
    state = state_of(reference)
    manager = manager_with(Sample, state, cap="1MiB")
    with torch.no_grad(), manager.use("m") as module:
        module(IDS)  # whatever the first pass of a process keeps
    gc.collect()
    gc.disable()
    try:
        manager.register("n", lambda: Sample().eval(), state)
        with torch.no_grad(), manager.use("n") as module:
            module(IDS)
            address = module.head.weight.data_ptr()
        manager.unregister("n")
        assert mapped(address)
        del module
        assert not mapped(address)
    finally:
        gc.enable()


def test_many_models_leave_no_mapping_behind(reference: nn.Module) -> None:
    state = state_of(reference)
    manager = penstock.MemoryManager(cap="4MiB", device="cpu")
    seen = set()
    for _ in range(20):
        manager.register("m", lambda: Sample().eval(), state)
        with torch.no_grad(), manager.use("m") as module:
            assert same_bits(module(IDS), reference(IDS))
            seen.add(module.head.weight.data_ptr())
        manager.unregister("m")
        del module
    gc.collect()
    assert not any(mapped(address) for address in seen)
    assert manager.stats().used == 0
    assert manager.stats().peak <= 4 * MIB
