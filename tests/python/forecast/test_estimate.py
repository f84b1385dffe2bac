"""Estimates beside what really runs on the host device: least caps, plans, and bytes moved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import penstock
from penstock.errors import (
    CapExceededError,
    CheckpointError,
    DeviceError,
    ModelError,
)
from penstock.forecast import estimate as estimate_module
from penstock.forecast.parts import open_parts
from penstock.forecast.passes import plan_pass
from penstock.forecast.target import find_target
from python.support import KIB, MIB, PAGERS, build, mlp, state_of

HERE = {"device": "cpu", "link": "10GB/s", "disk": "1GB/s", "compute": "1TFLOPS"}
ENOUGH = 24  # passes until a plan is settled, and measured since


def embedding_and_head() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 96), nn.Linear(96, 200), nn.Linear(200, 50))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.layers = mlp(64, 128, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(ids)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(48, 64, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


ZOO: list[tuple[Callable[[], nn.Module], torch.Tensor]] = [
    (embedding_and_head, torch.arange(4)),
    (Tied, torch.arange(8)),
    (Recurrent, torch.ones(1, 3, 48)),
    (encoder, torch.ones(1, 3, 64)),
    (Attention, torch.ones(1, 3, 64)),
    (lambda: nn.Sequential(nn.Conv1d(16, 32, 5), nn.Conv1d(32, 8, 3)), torch.ones(1, 16, 20)),
    (lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)), torch.ones(64)),
    (lambda: nn.Sequential(*(weight_norm(nn.Linear(124, 124)) for _ in range(3))), torch.ones(124)),
]


def run(
    builder: Callable[[], nn.Module],
    weights: Any,
    given_input: torch.Tensor,
    *,
    cap: int,
    passes: int = 2,
    **options: Any,
) -> tuple[penstock.MemoryManager, list[int]]:
    """Run passes, compare them with plain torch, and return the bytes that each of them loaded."""
    manager = penstock.MemoryManager(cap=cap, device="cpu", progress=False, **options)
    manager.register("m", lambda: builder().eval(), weights)
    loaded = []
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(passes):
            before = manager.stats().models["m"].memory.loaded_bytes
            model(given_input)
            loaded.append(manager.stats().models["m"].memory.loaded_bytes - before)
        assert manager.stats().peak <= cap
    return manager, loaded


def refuses(builder: Callable[[], nn.Module], weights: Any, x: torch.Tensor, **how: Any) -> bool:
    try:
        run(builder, weights, x, **how)
    except CapExceededError:
        return True
    except ValueError as error:  # a cap below a page
        return str(error).startswith("page_size is")
    return False


# ---- the least cap -----------------------------------------------------------------------------


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("page_size", ["64KiB", "256KiB", None], ids=str)
@pytest.mark.parametrize("index", range(len(ZOO)))
def test_the_least_cap_runs(pager: str, page_size: str | None, index: int) -> None:
    builder, x = ZOO[index]
    weights = state_of(build(builder))
    how = {"pager": pager, "page_size": page_size}
    for module in (builder, None):
        found = penstock.estimate(weights, module, **HERE, **how)
        assert found.fits
        run(builder, weights, x, cap=found.least_cap, **how)
    # Of a module, places are known: then a byte less is refused, where one operation reads most.
    exact = penstock.estimate(weights, builder, **HERE, **how).least_cap
    assert exact <= found.least_cap
    if builder is not Recurrent:  # whose layers are read one after the other on the CPU
        assert refuses(builder, weights, x, cap=exact - 1, **how)


models = st.tuples(
    st.lists(st.integers(1, 400), min_size=2, max_size=7),  # widths
    st.lists(st.booleans(), min_size=6, max_size=6),  # biases
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=models,
    pager=st.sampled_from(PAGERS),
    page_size=st.sampled_from([64 * KIB, 128 * KIB, None]),
    share=st.floats(0, 1.2),
)
def test_what_is_said_to_fit_runs_and_what_is_not_is_refused(
    model: tuple[list[int], list[bool]], pager: str, page_size: int | None, share: float
) -> None:
    widths, biases = model

    def builder() -> nn.Module:
        layers = zip(pairwise(widths), biases, strict=False)
        return nn.Sequential(*(nn.Linear(*shape, bias=bias) for shape, bias in layers))

    weights, x = state_of(build(builder)), torch.ones(2, widths[0])
    how: dict[str, Any] = {"pager": pager, "page_size": page_size}
    least = penstock.estimate(weights, builder, **HERE, **how).least_cap
    assert refuses(builder, weights, x, cap=least - 1, **how) or least == 1
    cap = least + int(share * sum(tensor.nbytes for tensor in weights.values()))
    for module in (builder, None):
        found = penstock.estimate(weights, module, cap=cap, **HERE, **how)
        assert found.fits or (module is None and cap < found.least_cap)
        assert 0 <= found.resident <= cap
    run(builder, weights, x, cap=cap, **how)


def test_larger_pages_under_larger_caps_do_not_make_the_least_cap_a_lie() -> None:
    """An operation takes more whole pages where these are larger: caps above have to work, too."""
    builder = lambda: mlp(700, 300, 700)  # noqa: E731
    weights, x = state_of(build(builder)), torch.ones(1, 700)
    least = penstock.estimate(weights, builder, pager="frames", **HERE).least_cap
    sizes = [
        start for start, _ in find_target("cpu", "frames", None, link_is_given=True).page_sizes
    ]
    above = [cap for start in sizes for cap in (start - 1, start, start + 1) if cap >= least]
    for cap in (least, least + 1, *above[:9]):
        run(builder, weights, x, cap=cap, pager="frames")
    assert refuses(builder, weights, x, cap=least - 1, pager="frames")


# ---- what streams ------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [64 * KIB, 128 * KIB, None], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8])
def test_bytes_that_stream_are_those_of_the_real_plan(share: float, page_size: int | None) -> None:
    """By the times that its steps took, the plan is the manager's, and so are the bytes it moves.

    By estimated times it may share some frames more or less, and so keep some pages less or more.
    """
    builder = lambda: mlp(*[192] * 13)  # noqa: E731
    weights, x = state_of(build(builder)), torch.ones(1, 192)
    how: dict[str, Any] = {"pager": "frames", "page_size": page_size}
    least = penstock.estimate(weights, builder, **HERE, **how)
    cap = int(least.least_cap + share * (least.nbytes - least.least_cap))
    manager, _ = run(builder, weights, x, cap=cap, passes=0, host="pinned", **how)
    runner = manager._models["m"].runner
    assert runner is not None
    loaded = []
    with torch.no_grad(), manager.use("m") as module:
        for number in range(ENOUGH + 3):
            if number == ENOUGH:
                runner.plan()  # times may have been corrected without a new plan
            before = manager.stats().models["m"].memory.loaded_bytes
            module(x)
            loaded.append(manager.stats().models["m"].memory.loaded_bytes - before)
        figures = manager.stats().models["m"].memory
    assert loaded[-1] == loaded[-2] == figures.planned_bytes
    times = runner._planning._times.of(runner._expected)
    assert len(times) == 12
    target = find_target("cpu", "frames", page_size, link_is_given=True)
    size = target.page_size(cap)
    laid = open_parts(weights, builder, None)[0].laid(size)
    resident, streamed, ring, _ = plan_pass(
        laid, laid.steps, target, manager.pager.link_rate, cap, cap // size, times
    )
    assert streamed == figures.planned_bytes
    assert ring == figures.ring_bytes
    assert resident + ring <= cap
    guessed = penstock.estimate(weights, builder, cap=cap, **HERE, **how)
    assert guessed.streamed >= laid.page_count * size - cap  # what can never stay
    assert guessed.resident + guessed.streamed >= guessed.nbytes
    assert abs(guessed.streamed - streamed) <= max(ring, guessed.at.ring)


@pytest.mark.parametrize("pager", PAGERS)
def test_nothing_streams_where_all_of_it_fits(pager: str) -> None:
    builder = lambda: mlp(64, 128, 64)  # noqa: E731
    weights = state_of(build(builder))
    found = penstock.estimate(weights, builder, cap="64MiB", pager=pager, **HERE)
    assert (found.streamed, found.bound) == (0, "compute")
    assert found.resident >= found.nbytes
    _, loaded = run(builder, weights, torch.ones(1, 64), cap=64 * MIB, passes=3, pager=pager)
    assert loaded[1:] == [0, 0]
    whole = found.caps[-1]
    assert whole.streamed == 0
    _, loaded = run(builder, weights, torch.ones(1, 64), cap=whole.cap, passes=3, pager=pager)
    assert loaded[1:] == [0, 0]


def test_more_cap_is_never_slower_with_pages_of_one_size() -> None:
    weights = state_of(build(lambda: mlp(*[192] * 13)))
    found = penstock.estimate(weights, pager="frames", page_size="64KiB", **HERE)
    moved = [row.streamed for row in found.caps]
    assert moved == sorted(moved, reverse=True)
    assert [row.cap for row in found.caps] == sorted(row.cap for row in found.caps)
    assert all(row.fits for row in found.caps)
    assert found.caps[0].cap == found.least_cap == found.cap


# ---- training ----------------------------------------------------------------------------------


def train(
    module: nn.Module, x: torch.Tensor, steps: int, *, frozen: bool = False
) -> Iterator[torch.Tensor]:
    """Take steps of AdamW by lists, or none where weights are frozen; yield the losses."""
    given = x.clone().requires_grad_(frozen)
    if frozen:
        module.requires_grad_(False)
    optimizer = None if frozen else torch.optim.AdamW(module.parameters(), lr=0.01, foreach=True)
    for _ in range(steps):
        loss = module(given).square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        yield loss.detach()


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("training", ["all", "frozen"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_training_runs_and_moves_what_is_said(training: str, share: float, pager: str) -> None:
    builder = lambda: mlp(*[192] * 11)  # noqa: E731
    weights, x = state_of(build(builder)), torch.ones(4, 192)
    how: dict[str, Any] = {"pager": pager, "page_size": "64KiB"}
    least = penstock.estimate(weights, builder, training=training, **HERE, **how)
    cap = least.least_cap + int(share * (least.nbytes - least.least_cap))
    found = penstock.estimate(weights, builder, cap=cap, training=training, **HERE, **how)
    assert found.fits
    assert found.beside == (3 * found.nbytes if training == "all" else 0)
    frozen = training == "frozen"
    plain = build(builder)
    plain.load_state_dict(weights)
    wanted = torch.stack(list(train(plain, x, ENOUGH, frozen=frozen)))
    manager = penstock.MemoryManager(cap=cap, device="cpu", progress=False, **how)
    manager.register("m", builder, weights, writable=True)
    with manager.use("m") as model:
        assert torch.equal(torch.stack(list(train(model, x, ENOUGH, frozen=frozen))), wanted)
        figures = manager.stats().models["m"].memory
    assert manager.stats().peak <= cap
    if pager == "managed":
        return  # whose plan has room for larger batches, and moves less
    sweeps = 4 if training == "all" else 2
    layer = -(-4 * 193 * 192 // (64 * KIB)) + 1
    rings = (figures.ring_bytes + found.at.ring) * sweeps
    assert figures.planned_bytes > (sweeps - 1) * (found.nbytes - cap)
    assert abs(found.streamed - figures.planned_bytes) <= rings + 2 * layer * 64 * KIB


@pytest.mark.parametrize("host", ["stream", "mapped"])
def test_training_needs_memory_that_keeps_writes(host: str) -> None:
    weights = state_of(build(lambda: mlp(64, 64)))
    how: dict[str, Any] = {"pager": "frames", "host": host, **HERE}
    assert penstock.estimate(weights, training="frozen", **how).fits
    found = penstock.estimate(weights, training="all", **how)
    assert not found.fits
    assert 'host="pinned"' in found.problem


# ---- experts -----------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, 128, 160))
        self.down = nn.Parameter(torch.randn(8, 160, 128))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return x @ self.up[expert] @ self.down[expert]


class Routed(nn.Module):
    """Reads experts one by one, others with each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.number = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.number += 3
        return self.experts(x, self.number % 8) + self.experts(x, (self.number + 1) % 8)


@pytest.mark.parametrize("pager", PAGERS)
def test_experts_that_are_indexed_need_room_for_one(pager: str) -> None:
    weights, x = state_of(build(Routed)), torch.ones(2, 128)
    how: dict[str, Any] = {"pager": pager, "page_size": "64KiB"}
    found = penstock.estimate(weights, Routed, **HERE, **how)
    assert found.least_cap_indexed is not None
    assert 128 * 160 * 4 <= found.least_cap_indexed <= 128 * 160 * 4 + 128 * KIB
    assert found.least_cap >= 8 * 128 * 160 * 4
    assert any("one by one" in note for note in found.notes)
    run(Routed, weights, x, cap=found.least_cap_indexed, passes=9, **how)
    names_alone = penstock.estimate(weights, **HERE, **how).least_cap_indexed
    assert names_alone is not None and names_alone >= found.least_cap_indexed
    assert refuses(Routed, weights, x, cap=found.least_cap_indexed - 1, passes=9, **how)


def test_models_without_experts_have_no_such_cap() -> None:
    assert penstock.estimate(state_of(mlp(4, 4)), **HERE).least_cap_indexed is None


# ---- rates -------------------------------------------------------------------------------------


def test_what_takes_the_longest_is_said() -> None:
    weights = state_of(build(lambda: mlp(*[256] * 9)))
    how: dict[str, Any] = {"pager": "frames", "device": "cpu", "page_size": "64KiB"}

    def bound(**rates: str) -> tuple[str, float]:
        told = {"link": "10GB/s", "disk": "5GB/s", "compute": "1000TFLOPS", **rates}
        found = penstock.estimate(weights, host="stream", host_budget="64MiB", **told, **how)
        assert found.seconds is not None
        return found.bound, found.seconds

    assert bound(link="1MB/s")[0] == "link"
    assert bound(disk="1MB/s")[0] == "disk"
    name, seconds = bound(compute="0.001GFLOPS")
    assert name == "compute"
    assert seconds >= 2 * 8 * 256 * 256 / 1e6
    assert bound(link="1MB/s")[1] > bound(link="2MB/s")[1] > bound(link="2GB/s")[1]


def test_a_pass_of_more_tokens_computes_more() -> None:
    weights = state_of(build(lambda: mlp(*[256] * 9)))
    few = penstock.estimate(weights, **HERE, tokens=2)
    many = penstock.estimate(weights, **HERE, tokens=20_000, batch=10)
    assert many.tokens == 200_000
    assert few.seconds is not None and many.seconds is not None
    assert many.seconds > few.seconds
    assert many.bound == "compute"


def test_rates_are_measured_where_none_is_given(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(state_of(build(lambda: mlp(256, 512, 256))), path)
    found = penstock.estimate(path, device="cpu")
    assert found.link > 0
    assert found.compute is not None and found.compute > 0
    assert found.memory is not None and found.memory > 0
    assert found.load_seconds is None or found.load_seconds > 0


# ---- a GPU that is not here --------------------------------------------------------------------


def gpu(**options: Any) -> penstock.Estimate:
    weights = state_of(build(lambda: mlp(1024, 2048, 1024)))
    options = {"device": "cuda", "link": "25GB/s", **options}
    return penstock.estimate(weights, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_takes_the_rate_of_its_link() -> None:
    with pytest.raises(DeviceError, match="--link"):
        gpu(link=None)
    found = gpu(disk="3GB/s")
    assert (found.device, found.pager) == ("cuda", "frames")
    assert found.at.page_size >= 2 * MIB
    assert found.compute is None
    assert sum("in no time" in note or "take no time" in note for note in found.notes) == 2
    quick, slow = gpu(memory="1TB/s", cap="1GiB"), gpu(memory="1GB/s", cap="1GiB")
    assert quick.seconds is not None and slow.seconds is not None
    assert slow.seconds == pytest.approx(1000 * quick.seconds)
    assert found.pinned == found.host >= found.nbytes
    # Page tables of pinned memory are charged, too.
    assert found.least_cap % (2 * MIB) == 0
    assert found.least_cap >= 2 * 1024 * 2048 * 2 + 2 * MIB
    assert found.seconds is not None
    assert all(row.fits for row in found.caps)
    assert found.caps[-1].streamed == 0  # page tables are charged there as well
    with pytest.raises(ValueError, match="60%"):
        gpu(cap="60%")


# ---- host memory -------------------------------------------------------------------------------


def test_host_memory_is_that_of_the_tier_that_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    builder = lambda: mlp(*[256] * 30)  # noqa: E731
    save_file(state_of(build(builder)), path)
    how: dict[str, Any] = {"pager": "frames", "page_size": "64KiB"}
    for host, budget in (("auto", None), ("auto", "2MiB"), ("stream", "3MiB"), ("mapped", None)):
        told = {**how, "host": host, "host_budget": budget}
        found = penstock.estimate(path, builder, cap="2MiB", **HERE, **told)
        manager, _ = run(builder, path, torch.ones(256), cap=2 * MIB, **told)
        figures = manager.stats().models["m"].memory
        # Buffers of the ring are as large as pages need them, which is a little less.
        assert 0 <= found.pinned - figures.pinned_bytes <= found.pinned // 8
        chosen = next(each for each in found.settings if each.name == "host")
        assert chosen.value == figures.host_tier
        assert chosen.why
    assert penstock.estimate(path, host="stream", host_budget="2MiB", **HERE, **how).host <= 2 * MIB
    with pytest.raises(CapExceededError, match="host_budget"):
        penstock.estimate(path, host="pinned", host_budget="1MiB", **HERE, **how)


def test_what_the_host_has_no_room_for_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = state_of(build(lambda: mlp(64, 64)))
    monkeypatch.setattr(estimate_module, "available_host_bytes", lambda: 10)
    found = penstock.estimate(weights, host="pinned", pager="frames", **HERE)
    assert not found.fits
    assert 'host="pinned" takes' in found.problem


def test_a_spill_file_that_has_no_room_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("penstock.forecast.estimate.shutil.disk_usage", lambda path: usage)
    found = penstock.estimate(state_of(build(lambda: mlp(64, 64))), pager="managed", **HERE)
    assert not found.fits
    assert "PENSTOCK_SPILL_DIR" in found.problem


# ---- pipelines ---------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    parts = {"text_encoder": ["transformers", "T"], "unet": ["diffusers", "U"]}
    index = {"_class_name": "P", "tokenizer": ["transformers", "Tok"], "none": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **parts}))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    for name, width in (("text_encoder", 64), ("unet", 256)):
        (tmp_path / name).mkdir()
        tensors = state_of(build(lambda width=width: mlp(width, width, width)).half())
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def test_a_pipeline_is_its_parts_one_after_the_other(pipeline: Path) -> None:
    how: dict[str, Any] = {"pager": "frames", "page_size": "64KiB", **HERE}
    found = penstock.estimate(pipeline, **how)
    text, unet = found.at.parts
    assert (text.name, unet.name) == ("text_encoder", "unet")
    # diffusers' own models become float32; transformers' stay as they are.
    assert unet.nbytes == 4 * 2 * (256 * 256 + 256)
    assert text.nbytes == 2 * 2 * (64 * 64 + 64)
    assert any("float32" in note for note in found.notes)
    assert found.least_cap_by.startswith("unet")
    assert found.streamed == text.streamed + unet.streamed
    alone = penstock.estimate(pipeline / "unet", dtype=torch.float32, **how)
    assert found.least_cap == alone.least_cap
    half = penstock.estimate(pipeline, dtype=torch.float16, **how)
    assert half.nbytes == sum(part.nbytes for part in half.at.parts) < found.nbytes
    together = penstock.estimate(pipeline, cap="64MiB", **how)
    assert together.streamed == 0
    assert together.resident >= together.nbytes


@pytest.mark.parametrize("pager", PAGERS)
def test_a_pipeline_runs_under_its_least_cap(pipeline: Path, pager: str) -> None:
    how: dict[str, Any] = {"pager": pager, "page_size": "64KiB"}
    found = penstock.estimate(pipeline, **how, **HERE)
    manager = penstock.MemoryManager(cap=found.least_cap, device="cpu", progress=False, **how)
    manager.register("text_encoder", lambda: mlp(64, 64, 64), pipeline / "text_encoder")
    unet = pipeline / "unet"
    manager.register("unet", lambda: mlp(256, 256, 256), unet, dtype=torch.float32)
    manager.acquire_on_call("text_encoder", "unet")
    with torch.no_grad():
        for _ in range(3):
            manager.module("text_encoder")(torch.ones(2, 64, dtype=torch.float16))
            manager.module("unet")(torch.ones(2, 256))
    stats = manager.stats()
    assert stats.peak <= found.least_cap
    assert sum(model.nbytes for model in stats.models.values()) >= found.nbytes


def test_a_pipeline_has_no_module_of_its_own(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="leave it out"):
        penstock.estimate(pipeline, lambda: mlp(2, 2), **HERE)


def test_a_dtype_that_the_configuration_gives_is_said(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    for says, noted in (("bfloat16", False), ("float32", True)):
        (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": says}))
        found = penstock.estimate(tmp_path, **HERE)
        assert any("config.json" in note for note in found.notes) is noted
        assert found.nbytes == 32
    assert penstock.estimate(tmp_path, dtype=torch.float32, **HERE).nbytes == 64


def test_a_pipeline_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "U"]}')
    with pytest.raises(CheckpointError, match="no part with weights"):
        penstock.estimate(tmp_path, **HERE)
    (tmp_path / "model_index.json").write_text("nothing")
    with pytest.raises(CheckpointError, match="not JSON"):
        penstock.estimate(tmp_path, **HERE)


# ---- what cannot be ----------------------------------------------------------------------------


def test_a_cap_that_is_too_small_says_the_numbers_and_the_least_one() -> None:
    weights = state_of(build(lambda: mlp(256, 256)))
    found = penstock.estimate(weights, cap="64KiB", pager="frames", page_size="64KiB", **HERE)
    assert not found.fits
    assert "0.weight" in found.problem
    assert str(found.least_cap) in found.problem
    assert found.seconds is None
    assert (found.resident, found.streamed) == (0, 0)
    assert found.as_dict()["fits"] is False


def test_a_cap_below_a_page_is_refused_as_a_manager_refuses_it() -> None:
    weights = {"a": torch.ones(3)}
    for pager in PAGERS:
        how: dict[str, Any] = {"pager": pager, "page_size": "128KiB"}
        found = penstock.estimate(weights, cap="64KiB", **HERE, **how)
        assert not found.fits
        assert found.least_cap == 128 * KIB
        assert "page" in found.problem
        with pytest.raises(ValueError, match="page_size"):
            penstock.MemoryManager(cap="64KiB", device="cpu", **how)
        assert penstock.estimate(weights, cap="128KiB", **HERE, **how).fits


def test_no_weights_at_all() -> None:
    found = penstock.estimate({}, **HERE)
    assert (found.nbytes, found.least_cap, found.streamed, found.host) == (0, 1, 0, 0)
    assert found.fits


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tokens": 0}, ValueError, "tokens"),
        ({"batch": True}, TypeError, "batch"),
        ({"batch": -1}, ValueError, "batch"),
        ({"caps": 5}, TypeError, "caps"),
        ({"token": 5}, TypeError, "tokens"),
        ({"training": "some"}, ValueError, "frozen"),
        ({"link": "fast"}, ValueError, "25GB/s"),
        ({"compute": -1}, ValueError, "400TFLOPS"),
        ({"host": "moon"}, ValueError, "host tier"),
        ({"pager": "moon"}, ValueError, "pager kind"),
        ({"page_size": "3KiB"}, ValueError, "power of two"),
        ({"cap": "much"}, ValueError, "no size"),
        ({"device": "tpu"}, ValueError, "tpu"),
    ],
    ids=str,
)
def test_values_that_cannot_be(options: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        penstock.estimate({"a": torch.ones(3)}, **{**HERE, **options})


def test_weights_that_do_not_fit_the_module_are_refused_as_they_would_be() -> None:
    with pytest.raises(CheckpointError, match="unexpected"):
        penstock.estimate({"a": torch.ones(3)}, lambda: mlp(2, 2), **HERE)
    with pytest.raises(ModelError):
        penstock.estimate(state_of(mlp(2, 2)), mlp(2, 2), **HERE)
