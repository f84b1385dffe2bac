"""Where a model's values come from: matching names and shapes, kinds of files, conversion."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import penstock
from penstock.errors import CheckpointError
from penstock.loading.layout import ALIGNMENT, lay_out
from penstock.loading.slots import find_slots, match
from penstock.loading.weights import open_weights
from python.support import build, manager_with, mlp, raw, same_bits, state_of


def new_manager(cap: str = "64MiB") -> penstock.MemoryManager:
    return penstock.MemoryManager(cap=cap, device="cpu", page_size="64KiB")


def bound(builder: Callable[[], nn.Module], weights: object, **options: object) -> nn.Module:
    """Register a model with the weights and return it, on its region."""
    manager = new_manager()
    manager.register("m", builder, weights, **options)
    return manager.acquire("m")


def assert_holds(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert same_bits(found[name], tensor), name


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.full((2,), 5.0))
        self.register_buffer("positions", torch.arange(4), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


class Shared(nn.Module):
    """One module under two names: both are in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = self.encoder


# ---- matching ----------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_reported_together() -> None:
    state = state_of(build(Buffered))
    del state["linear.bias"], state["mean"]
    state["linear.weight"] = torch.zeros(2, 4)
    state["other"] = state["more"] = torch.zeros(1)
    manager = new_manager()
    with pytest.raises(CheckpointError) as caught:
        manager.register("m", Buffered, state)
    for part in (
        "Buffered",
        "2 missing: linear.bias, mean",
        "2 unexpected: other, more",
        "linear.weight: the weights have [2, 4], the model has [2, 3]",
        "strict=False",
    ):
        assert part in str(caught.value)
    assert not manager.stats().models


def test_lists_of_names_are_cut_but_counted() -> None:
    with pytest.raises(CheckpointError, match=r"30 missing: 0\.weight, .* and 10 more"):
        bound(lambda: mlp(*[2] * 16), {})


def test_unexpected_names_and_missing_buffers_pass_when_not_strict() -> None:
    state = state_of(build(Buffered))
    del state["mean"]
    module = bound(Buffered, {**state, "other": torch.zeros(1)}, strict=False)
    assert_holds(module, {**state, "mean": torch.full((2,), 5.0)})  # as the constructor made it


@pytest.mark.parametrize("strict", [True, False])
def test_missing_parameter_is_refused_in_any_case(strict: bool) -> None:
    state = state_of(build(Buffered))
    del state["linear.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: linear\.weight"):
        bound(Buffered, state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (2, 4), ()])
def test_wrong_shape_is_refused_in_any_case(shape: tuple[int, ...], strict: bool) -> None:
    state = {**state_of(build(Buffered)), "linear.weight": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"size mismatch for linear\.weight"):
        bound(Buffered, state, strict=strict)


@pytest.mark.parametrize("names", [("embedding",), ("head",), ("embedding", "head")])
def test_tied_weights_may_have_any_of_their_names(names: tuple[str, ...]) -> None:
    values = {name: torch.randn(5, 4) for name in names}
    module = bound(Tied, {f"{name}.weight": value for name, value in values.items()})
    assert module.head.weight is module.embedding.weight
    assert same_bits(module.head.weight.detach(), values[names[-1]])  # as load_state_dict would


def test_tied_weight_under_no_name_is_missing_once() -> None:
    with pytest.raises(CheckpointError, match=r"1 missing: embedding\.weight"):
        bound(Tied, {})


def test_misshaped_name_of_a_tie_is_refused() -> None:
    state = {"embedding.weight": torch.zeros(5, 4), "head.weight": torch.zeros(4, 5)}
    with pytest.raises(CheckpointError, match=r"size mismatch for head\.weight"):
        bound(Tied, state)


@pytest.mark.parametrize("names", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_shared_module_may_have_any_of_its_names(names: tuple[str, ...]) -> None:
    state = state_of(build(Shared))
    module = bound(Shared, {k: v for k, v in state.items() if k.split(".")[0] in names})
    assert module.encoder is module.decoder
    assert_holds(module, state)


def test_saved_non_persistent_buffer_is_tolerated_and_not_loaded() -> None:
    state = state_of(build(Buffered))
    module = bound(Buffered, {**state, "positions": torch.zeros(4, dtype=torch.int64)})
    assert torch.equal(module.positions, torch.arange(4))
    assert_holds(module, state)


def test_slots_are_the_tensors_of_the_state_dict() -> None:
    module = build(Buffered)
    names = [name for slot in find_slots(module) for name in slot.names]
    assert sorted(names) == sorted(module.state_dict())


# ---- kinds of weights --------------------------------------------------------------------------


def save_sharded(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({n: state[n].clone() for n in state if weight_map[n] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("form", ["file", "directory", "index", "sharded directory", "text"])
def test_safetensors_are_read(form: str, tmp_path: Path) -> None:
    state = state_of(build(lambda: mlp(65, 129, 33, 7, 1)))
    single = tmp_path / "model.safetensors"
    if "index" in form or "sharded" in form:
        index = save_sharded(tmp_path, state)
        weights = index if form == "index" else tmp_path
    else:
        save_file(state, single)
        weights = {"file": single, "text": str(single), "directory": tmp_path}[form]
    assert_holds(bound(lambda: mlp(65, 129, 33, 7, 1), weights), state)


def test_sharded_checkpoint_with_wrong_tensors_is_refused(tmp_path: Path) -> None:
    index = save_sharded(tmp_path, state_of(build(lambda: mlp(3, 3, 3))))
    with pytest.raises(CheckpointError, match=r"2 missing: 2\.weight, 2\.bias") as caught:
        bound(lambda: mlp(3, 3, 3, 3), index)
    assert str(index) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_torch_file_is_read_and_a_better_form_advised(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(build(Buffered))
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": state}, path)
    with caplog.at_level(logging.WARNING, "penstock"):
        module = bound(Buffered, path)
    assert_holds(module, state)
    (record,) = caplog.records
    assert "safetensors files load faster" in record.getMessage()
    assert str(path) in record.getMessage()


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


def test_torch_file_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"no tensors \(print\).*run code"):
        bound(lambda: nn.Linear(2, 2), path)
    assert "code ran" not in capsys.readouterr().out


def test_mapping_is_copied() -> None:
    state = state_of(build(lambda: mlp(8, 8)))
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    module = bound(lambda: mlp(8, 8), state)
    for tensor in state.values():
        tensor.zero_()
    assert_holds(module, wanted)


BASE = torch.randn(6, 8, dtype=torch.complex64)


@pytest.mark.parametrize(
    "value",
    [
        nn.Parameter(BASE),
        BASE.t().contiguous().t(),
        torch.cat([BASE, BASE], 1)[:, ::2],
        BASE[:1].expand(6, 8),
        BASE.conj(),
        BASE.conj().imag.to(torch.complex64),
        torch._neg_view(BASE),
    ],
    ids=["parameter", "transposed", "strided", "expanded", "conjugate", "imaginary", "negative"],
)
def test_tensor_of_any_form_is_written_as_its_values(value: torch.Tensor) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.complex64))

    weight = bound(Complex, {"weight": value}).weight
    assert weight.is_contiguous()
    assert same_bits(weight.detach(), value.detach())


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2, 2, device="meta"), torch.eye(2).to_sparse(), {"a": 1}, None, 3],
    ids=["meta", "sparse", "dict", "none", "number"],
)
def test_what_has_no_bytes_is_refused_with_its_name(value: object) -> None:
    manager = new_manager()
    with pytest.raises(CheckpointError, match="weight"):
        manager.register("m", lambda: nn.Linear(2, 2, bias=False), {"weight": value})
    assert manager.stats().used == 0


# ---- layout and conversion ---------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [512, 1 << 14, 1 << 20])  # small ones: none, some, all
def test_tensors_are_aligned_and_do_not_overlap(page_size: int) -> None:
    module = build(lambda: nn.Sequential(*(nn.Linear(n, 3) for n in range(1, 60))))
    slots = find_slots(module)
    pairs = match(module, slots, open_weights(module.state_dict()), strict=True)
    placements, nbytes = lay_out(slots, pairs, None, page_size=page_size)
    end = 0
    for placement in sorted(placements, key=lambda p: p.offset):
        assert placement.offset % ALIGNMENT == 0
        assert placement.offset >= end
        end = placement.offset + placement.nbytes
    assert len(placements) == len(module.state_dict())
    assert nbytes >= end


def test_small_tensors_share_a_page_if_it_holds_all_of_them() -> None:
    module = build(lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))))
    slots = find_slots(module)
    pairs = match(module, slots, open_weights(module.state_dict()), strict=True)
    wide, _ = lay_out(slots, pairs, None, page_size=16 << 10)
    assert all(each.offset < 8 * 512 for each in wide if each.slot.names[0].endswith("bias"))
    narrow, _ = lay_out(slots, pairs, None, page_size=2 << 10)  # of which a bias is an eighth
    assert [each.slot.names[0] for each in narrow] == list(module.state_dict())


def test_tensors_are_aligned_as_torch_aligns_them() -> None:
    def builder() -> nn.Module:
        return nn.Sequential(*(nn.Linear(n, 3) for n in range(1, 60)))

    module = bound(builder, state_of(build(builder)))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in module.state_dict().values())


EDGES = [0.0, -0.0, 1 / 3, 65504.0, 65520.0, 1e-8, 5.9e-8, 3.4e38, -3.4e38, float("inf")]
EDGES += [float("-inf"), float("nan"), 1.00390625, 1.01171875, 2**-126, 2**-149, 2049.0]


class Mixed(nn.Module):
    """A parameter or buffer of every kind, converted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.f32 = nn.Parameter(torch.zeros(4, len(EDGES)))
        self.f64 = nn.Parameter(torch.zeros(len(EDGES), dtype=torch.float64))
        self.f16 = nn.Parameter(torch.zeros(len(EDGES), dtype=torch.float16))
        self.bf16 = nn.Parameter(torch.zeros(len(EDGES), dtype=torch.bfloat16))
        self.f8 = nn.Parameter(torch.zeros(16, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.f8_wide = nn.Parameter(torch.zeros(16, dtype=torch.float8_e5m2), requires_grad=False)
        self.i8 = nn.Parameter(torch.zeros(7, dtype=torch.int8), requires_grad=False)
        self.c64 = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.scalar = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("counter", torch.tensor(0))
        self.register_buffer("flags", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(5))

    @staticmethod
    def state() -> dict[str, torch.Tensor]:
        edges = torch.tensor(EDGES, dtype=torch.float64)
        return {
            "f32": torch.stack([edges, -edges, edges / 3, edges * 7]).float(),
            "f64": edges / 7,
            "f16": (edges / 5).half(),
            "bf16": (edges / 5).bfloat16(),
            "f8": torch.arange(16.0).to(torch.float8_e4m3fn),
            "f8_wide": torch.arange(16.0).to(torch.float8_e5m2),
            "i8": torch.arange(-3, 4, dtype=torch.int8),
            "c64": torch.tensor([1 + 2j, 0.1 - 3j, 0j]),
            "empty": torch.zeros(0, 5),
            "scalar": torch.tensor(1 / 3),
            "counter": torch.tensor(2**40 + 1),
            "flags": torch.tensor([True, False, True, True, False]),
            "mean": torch.rand(5),
        }


CONVERTED = {"f32", "f64", "f16", "bf16", "empty", "scalar", "mean"}


@pytest.mark.parametrize("form", ["mapping", "file"])
@pytest.mark.parametrize(
    "dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_conversion_gives_the_bits_of_to(
    dtype: torch.dtype | None, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state: dict[str, torch.Tensor] = Mixed.state()
    weights: object = state
    if form == "file":
        weights = tmp_path / "model.safetensors"
        save_file(state, weights)
    with caplog.at_level(logging.INFO, "penstock"):
        module = bound(Mixed, weights, dtype=dtype)
    converted = CONVERTED if dtype else set()
    assert_holds(module, {n: t.to(dtype) if n in converted else t for n, t in state.items()})

    changed = [name for name in converted if state[name].dtype != dtype]
    announced = [r.getMessage() for r in caplog.records if "converting" in r.getMessage()]
    assert len(announced) == (1 if changed else 0)
    if changed:
        assert f"m: converting {len(changed)} tensors" in announced[0]
        assert f"to {dtype} " in announced[0]
        assert all(str(state[name].dtype) in announced[0] for name in changed)


class Ordered(nn.Module):
    """Weights that are dense, but not row by row."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shape = torch.zeros(2, 3, 5, 4).to(dtype)
        self.turned = nn.Parameter(shape[0, 0].t(), requires_grad=False)
        self.last = nn.Parameter(
            shape.contiguous(memory_format=torch.channels_last), requires_grad=False
        )
        self.register_buffer("table", shape.permute(3, 0, 1, 2))


@pytest.mark.parametrize("form", ["mapping", "file"])
@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (torch.float32, None),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float16),
        (torch.bool, None),
        (torch.uint16, None),
        (torch.float8_e4m3fn, None),
        (torch.float8_e8m0fnu, None),
        (torch.complex64, None),
    ],
    ids=str,
)
def test_order_of_elements_is_that_of_the_module(
    stored: torch.dtype, asked: torch.dtype | None, form: str, tmp_path: Path
) -> None:
    """As load_state_dict leaves it: kernels choose by it how they add up."""
    model = Ordered(stored)
    values = {n: torch.arange(t.numel()).view(t.shape) for n, t in model.state_dict().items()}
    weights: object = {n: v.to(stored) for n, v in values.items()}
    if form == "file":
        save_file(weights, tmp_path / "m.safetensors")
        weights = tmp_path
    module = bound(lambda: Ordered(stored), weights, dtype=asked)
    for name, tensor in module.state_dict().items():
        assert tensor.stride() == model.state_dict()[name].stride()
        converted = values[name].to(stored)
        if asked and stored.is_floating_point:
            converted = converted.to(asked)
        assert same_bits(tensor.detach(), converted), name


def test_dtype_of_the_weights_counts_not_that_of_the_module() -> None:
    state = {name: tensor.bfloat16() for name, tensor in state_of(build(Buffered)).items()}
    module = bound(Buffered, state)
    assert_holds(module, state)
    assert module.linear(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_integer_weights_for_a_float_parameter_need_no_gradient() -> None:
    module = bound(lambda: nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2).to(torch.int8)})
    assert module.weight.dtype == torch.int8
    assert not module.weight.requires_grad


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as they are", "converted"])
def test_tensors_larger_than_any_buffer_are_whole(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    width = 2300  # 20 MiB
    state = {"weight": torch.randn(width, width), "bias": torch.randn(width)}
    save_file(state, tmp_path / "m.safetensors")
    for weights in (state, tmp_path):
        module = bound(lambda: nn.Linear(width, width), weights, dtype=dtype)
        assert_holds(module, {n: t.to(dtype or t.dtype) for n, t in state.items()})


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as they are", "converted"])
def test_file_that_shrinks_before_it_is_read_is_refused(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(build(lambda: mlp(50, 50, 50)))
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    manager = new_manager()
    reserve = manager.pager.reserve

    def truncate_and_reserve(*args: object, **options: object) -> penstock.Region:
        path.write_bytes(whole[: len(whole) // 2])  # the header has been read already
        return reserve(*args, **options)

    monkeypatch.setattr(manager.pager, "reserve", truncate_and_reserve)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        manager.register("m", lambda: mlp(50, 50, 50), path, dtype=dtype)
    assert caught.value.path == path
    assert caught.value.offset is not None
    assert caught.value.offset <= len(whole)
    if dtype:
        assert caught.value.tensor in state
    assert manager.stats().used == 0
    assert not manager.stats().models

    monkeypatch.undo()
    path.write_bytes(whole)
    manager.register("m", lambda: mlp(50, 50, 50), path)
    assert_holds(manager.acquire("m"), state)


def test_filling_makes_nothing_resident() -> None:
    state = state_of(build(lambda: mlp(512, 1024, 512)))
    manager = manager_with(lambda: mlp(512, 1024, 512), state, cap="8MiB", page_size="2MiB")
    stats = manager.stats()
    assert stats.used == stats.peak == stats.loaded_bytes == 0
    assert stats.models["m"].memory.system_resident_bytes == 0
    assert raw(manager.acquire("m")[0].weight) == raw(state["0.weight"])
