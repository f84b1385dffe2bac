"""The layers of a checkpoint, for loops of one's own: bits, bytes moved, and what is refused."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import penstock
from penstock import CapExceededError, CheckpointError, LayerStreamer, MemoryManager, ModelError
from python.support import KIB, PAGERS, build, pinned_pages, run_threads, same_bits

WIDTH = 128
DEPTH = 11  # so that "10" comes after "9", and not after "1"
PAGE = 64 * KIB
LAYER = 2  # pages, a matrix on each
PAGES = LAYER * DEPTH
CAPS = (2, 3, 7, 21, 22, 40)  # pages
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
SETTINGS: dict[str, Any] = {"device": "cpu", "page_size": PAGE}

State = dict[str, torch.Tensor]


class Stack(nn.Module):
    """What the names of `checkpoint` are of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYER)))
            for _ in range(DEPTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def checkpoint(seed: int = 0, *, beside: bool = True) -> State:
    state = {f"model.{name}": tensor for name, tensor in build(Stack, seed).state_dict().items()}
    if beside:
        state["model.embed.weight"] = torch.randn(2 * WIDTH, WIDTH)
        state["norm.weight"] = torch.randn(WIDTH, WIDTH)
    return state


def layer_fn(x: torch.Tensor, weights: Mapping[str, torch.Tensor], index: int) -> torch.Tensor:
    x = functional.linear(x, weights["0.weight"])
    return torch.tanh(functional.linear(x, weights["1.weight"]))


def plain(state: State, x: torch.Tensor = X) -> torch.Tensor:
    for index in range(DEPTH):
        head = f"model.layers.{index}."
        names = [name for name in state if name.startswith(head)]
        x = layer_fn(x, {name.removeprefix(head): state[name] for name in names}, index)
    return x


def streamer(weights: Any, *, cap: int = 5, **options: Any) -> LayerStreamer:
    return LayerStreamer(weights, "model.layers.{}", cap=cap * PAGE, **SETTINGS, **options)


def figures(layers: LayerStreamer) -> Any:
    return layers.stats().models["layers"].memory


def memory_of(layers: LayerStreamer) -> Any:
    runner = layers.manager._models["layers"].runner
    assert runner is not None
    return runner.memory


def require_order(layers: LayerStreamer, wanted: torch.Tensor, pinned: int = 0) -> None:
    """See that passes are right, that pages are let go, and that the cap was never crossed."""
    with torch.no_grad():
        assert same_bits(layers.run_pass(X, layer_fn), wanted)
    stats = layers.stats()
    assert stats.peak <= stats.cap
    assert pinned_pages(layers.manager) == pinned


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- bits and bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("cap", CAPS)
@torch.no_grad()
def test_the_bits_are_those_of_a_plain_loop_under_any_cap(pager: str, cap: int) -> None:
    state = checkpoint()
    with streamer(state, cap=cap, pager=pager, verify=True) as layers:
        assert len(layers) == DEPTH
        for _ in range(5):
            require_order(layers, plain(state))
        assert figures(layers).passes == 5
        assert layers.stats().models["layers"].steps == PAGES


@pytest.mark.parametrize("host", ["pinned", "mapped", "stream"])
@torch.no_grad()
def test_checkpoints_wait_on_any_host_tier(host: str, tmp_path: Path) -> None:
    state = checkpoint()
    save_file(state, tmp_path / "model.safetensors")
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        with streamer(weights, pager="frames", host=host, verify=True) as layers:
            for _ in range(4):
                require_order(layers, plain(state))
            assert figures(layers).host_tier == host


def loops(layers: LayerStreamer) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return both ways to run a pass."""

    def loop(x: torch.Tensor) -> torch.Tensor:
        with layers.one_pass():
            for index in range(len(layers)):
                x = layer_fn(x, layers.layer(index), index)
        return x

    return [lambda x: layers.run_pass(x, layer_fn), loop]


@pytest.mark.parametrize("frames", [2, 3, 7, 21])
@torch.no_grad()
def test_a_pass_moves_what_is_not_resident_and_nothing_else(frames: int) -> None:
    state = checkpoint(beside=False)
    with streamer(state, cap=frames, pager="frames") as layers:
        runs = loops(layers)
        for _ in range(12):
            require_order(layers, plain(state))
        counted = 0
        for turn in range(40):
            plan, before = memory_of(layers).plan, figures(layers)
            resident = sum(slot is None for slot in plan.slot)
            assert resident + plan.ring == frames, "the cap is used to the last frame"
            assert same_bits(runs[turn % 2](X), plain(state))
            after = figures(layers)
            assert after.passes == before.passes + 1
            if memory_of(layers).plan is not plan:  # times were corrected
                counted = -2
            elif counted >= 0:
                assert after.planned_bytes == (PAGES - resident) * PAGE
                assert after.loaded_bytes - before.loaded_bytes == (PAGES - resident) * PAGE
                assert after.misses == before.misses
            counted += 1
            if counted == 4:
                break
        assert counted == 4, "the plan never settles"


@torch.no_grad()
def test_its_steps_are_those_of_such_a_module(pager: str) -> None:
    state = checkpoint(beside=False)
    manager = MemoryManager(cap=5 * PAGE, pager=pager, **SETTINGS)
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    manager.register("m", lambda: Stack().eval(), inner)
    with manager.use("m") as model, streamer(state, pager=pager) as layers:
        for run in loops(layers):
            for _ in range(3):
                assert same_bits(run(X), model(X))
            ours = layers.manager._models["layers"].runner
            theirs = manager._models["m"].runner
            assert ours is not None and theirs is not None
            pages = [step[2] for step in ours.schedule()]
            assert pages == [step[2] for step in theirs.schedule()]
            assert pages == [[page] for page in range(PAGES)]


@pytest.mark.parametrize("cap", [21, 22, 40])
@torch.no_grad()
def test_managed_memory_moves_no_more_than_it_must(cap: int) -> None:
    state = checkpoint(beside=False)
    with streamer(state, cap=cap, pager="managed") as layers:
        for _ in range(4):
            require_order(layers, plain(state))
        before = figures(layers).loaded_bytes
        for run in loops(layers):
            for _ in range(4):
                assert same_bits(run(X), plain(state))
        moved = figures(layers).loaded_bytes - before
        if cap >= PAGES:
            assert moved == 0
        else:
            assert 8 * (PAGES - cap) * PAGE <= moved < 8 * PAGES * PAGE


@torch.no_grad()
def test_what_is_beside_the_layers_is_part_of_a_pass(pager: str) -> None:
    state = checkpoint()
    ids = torch.tensor([3, 200, 17])
    wanted = plain(state, functional.embedding(ids, state["model.embed.weight"]))
    wanted = wanted @ state["norm.weight"]
    with streamer(state, pager=pager) as layers:
        embedding = layers.load_static("model.embed.weight")
        for _ in range(5):
            before = figures(layers)
            with layers.one_pass():
                x = layers.run_pass(functional.embedding(ids, embedding), layer_fn)
                x = x @ layers.load_static("norm.weight")
            assert same_bits(x, wanted)
        assert layers.stats().models["layers"].steps == PAGES + 2
        assert figures(layers).misses == before.misses
        assert figures(layers).passes == 5


@torch.no_grad()
def test_static_says_what_there_is_beside_the_layers(pager: str) -> None:
    state = checkpoint()
    with streamer(state, pager=pager) as every, streamer(state, pager=pager, static=[]) as none:
        sizes = [each.stats().models["layers"].nbytes for each in (every, none)]
        assert sizes[0] - sizes[1] == sum(
            state[name].nbytes for name in ("model.embed.weight", "norm.weight")
        )
        with pytest.raises(ModelError, match=r"'norm\.weight' beside the layers; nearest: 'none'"):
            none.load_static("norm.weight")
    chosen = streamer(state, pager=pager, static=["norm.*", re.compile("nothing|model.+")])
    assert same_bits(chosen.load_static("norm.weight"), state["norm.weight"])
    with pytest.raises(ModelError, match=r"nearest: 'norm.weight'"):
        chosen.load_static("norm.weigth")
    with pytest.raises(ModelError, match="is a tensor of layer 10"):
        chosen.load_static("model.layers.10.1.weight")
    with pytest.raises(ModelError, match=r"static: 'lm_head\.\*' matches no tensor of the given"):
        streamer(state, pager=pager, static=["norm.*", "lm_head.*"])


@torch.no_grad()
def test_parts_are_pinned_or_streamed_by_the_names_of_modules(pager: str) -> None:
    state = checkpoint()
    pin = ["model.embed", re.compile(r"model\.layers\.[28]")]
    with streamer(state, cap=8, pager=pager, pin=pin) as layers:
        for _ in range(4):
            require_order(layers, plain(state), pinned=6 if pager == "managed" else 0)
        assert same_bits(layers.load_static("model.embed.weight"), state["model.embed.weight"])
        before = figures(layers).misses
        for _ in range(3):
            for name in ("0.weight", "1.weight"):
                layers.layer(2)[name].sum(), layers.layer(8)[name].sum()
        assert figures(layers).misses == before, "these stay"
    with pytest.raises(CapExceededError, match="pinned"):
        streamer(state, cap=4, pager=pager, pin=pin)


@torch.no_grad()
def test_weights_are_converted_and_given_to_modules(pager: str) -> None:
    state = checkpoint()
    block = nn.Sequential(
        *(nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for _ in range(LAYER)), nn.Tanh()
    )
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    with streamer(state, pager=pager, dtype=torch.bfloat16) as layers:
        for _ in range(3):
            x = layers.run_pass(X.bfloat16(), lambda x, w, _: functional_call(block, w, (x,)))
            assert same_bits(x, plain(half, X.bfloat16()))


@torch.no_grad()
def test_names_may_be_whatever_a_checkpoint_has() -> None:
    names = ("type.weight", "forward.0.training", "weights", "x.0.1", "layer.00.w", "_layers.a.b")
    state = {name: torch.full((3,), float(at)) for at, name in enumerate(names)}
    state["type.0.half.x.y"] = torch.ones(2)
    state["type.0.half.empty"] = torch.ones(0, 2)
    with LayerStreamer(state, "type.{}.half", cap="1MiB", **SETTINGS) as layers:
        assert len(layers) == 1
        assert all(same_bits(layers.load_static(name), state[name]) for name in names)
        wanted = {"x.y": torch.ones(2), "empty": torch.ones(0, 2)}
        assert same_bits(layers.run_pass(None, lambda x, weights, index: weights), wanted)
        assert layers.run_pass(X, lambda x, weights, index: None) is None
        assert figures(layers).passes == 0, "nothing was read in them"


def test_gradients_flow_through_the_layers(pager: str) -> None:
    state = checkpoint()
    ours, theirs = (X.clone().requires_grad_() for _ in range(2))
    plain(state, theirs).square().sum().backward()
    with streamer(state, pager=pager) as layers:
        for _ in range(3):
            ours.grad = None
            layers.run_pass(ours, layer_fn).square().sum().backward()
            assert ours.grad is not None and theirs.grad is not None
            assert same_bits(ours.grad, theirs.grad)
        assert pinned_pages(layers.manager) == 0


# ---- use ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_block_has_its_layer_in_place() -> None:
    state = checkpoint()
    with streamer(state, cap=3, pager="frames") as layers:
        for _ in range(3):
            x = X
            with layers.one_pass():
                for index in range(DEPTH):
                    with layers.block(index) as weights:
                        assert pinned_pages(layers.manager) == 2
                        x = layer_fn(x, weights, index)
            assert same_bits(x, plain(state))
        require_order(layers, plain(state))
    with (
        streamer(state, cap=1, pager="frames", static=[]) as layers,
        pytest.raises(CapExceededError),
        layers.block(0),
    ):
        pass


@torch.no_grad()
def test_an_error_in_a_layer_leaves_all_usable(pager: str) -> None:
    state = checkpoint()

    def failing(x: torch.Tensor, weights: Mapping[str, torch.Tensor], index: int) -> torch.Tensor:
        if index == 6:
            raise RuntimeError("of the user's")
        return layer_fn(x, weights, index)

    with streamer(state, pager=pager) as layers:
        for _ in range(4):
            require_order(layers, plain(state))
        for run in (
            lambda: layers.run_pass(X, failing),
            lambda: layers.run_pass(X[:, :3], layer_fn),
        ):
            with pytest.raises(RuntimeError):
                run()
            assert not layers.manager._models["layers"].runner.is_called
            require_order(layers, plain(state))
        assert layers.stats().models["layers"].steps == PAGES, "it is no order that is expected"


@torch.no_grad()
def test_streamers_and_models_share_a_manager(pager: str) -> None:
    states = [checkpoint(seed) for seed in range(2)]
    model = build(Stack, 2)
    manager = MemoryManager(cap=6 * PAGE, pager=pager, **SETTINGS)
    first, second = (
        LayerStreamer(state, "model.layers.{}", manager=manager, name=name)
        for state, name in zip(states, ("first", "second"), strict=True)
    )
    manager.register("model", lambda: Stack().eval(), model.state_dict())
    for _ in range(3):
        assert same_bits(first.run_pass(X, layer_fn), plain(states[0]))
        assert same_bits(second.run_pass(X, layer_fn), plain(states[1]))
        assert manager.stats().models["first"].acquired == 0
        with manager.use("model") as module:
            assert same_bits(module(X), model(X))
            assert same_bits(first.run_pass(module(X), layer_fn), plain(states[0], model(X)))
    with pytest.raises(ModelError, match="'first' is registered already"):
        LayerStreamer(states[0], "model.layers.{}", manager=manager, name="first")
    with pytest.raises(ValueError, match="leave cap, trace out"):
        LayerStreamer(states[0], "model.layers.{}", manager=manager, cap="1MiB", trace=True)
    first.close()
    assert list(manager.stats().models) == ["second", "model"]
    assert same_bits(second.run_pass(X, layer_fn), plain(states[1]))
    second.close()
    assert manager.stats().peak <= manager.stats().cap


def test_threads_run_passes_at_once(pager: str) -> None:
    state = checkpoint()
    with streamer(state, cap=8, pager=pager, verify=True) as layers:

        def work() -> None:
            with torch.no_grad():
                for _ in range(6):
                    assert same_bits(layers.run_pass(X, layer_fn), plain(state))

        run_threads(work, work, work)
        require_order(layers, plain(state))


@torch.no_grad()
def test_closed_layers_say_so_and_their_memory_goes(pager: str) -> None:
    state = checkpoint()
    layers = streamer(state, pager=pager)
    layers.run_pass(X, layer_fn)
    kept = layers.layer(3)["0.weight"]
    layers.manager.acquire("layers")
    with pytest.raises(ModelError, match="acquired 1x"):
        layers.close()
    require_order(layers, plain(state))
    layers.manager.release("layers")
    with layers.one_pass():
        layer_fn(X, layers.layer(0), 0)
        layers.close()
        layers.close()
    assert same_bits(kept, state["model.layers.3.0.weight"]), "who has a tensor can read it"
    for use in (
        lambda: layers.run_pass(X, layer_fn),
        lambda: layers.layer(0),
        lambda: layers.load_static("norm.weight"),
        lambda: layers.one_pass().__enter__(),
        lambda: layers.block(0).__enter__(),
    ):
        with pytest.raises(ModelError, match="'layers' are closed"):
            use()
    del kept
    assert not layers.stats().models
    assert layers.stats().used_by_tag["weights"] == 0


def test_each_pass_has_a_bar_where_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    state = checkpoint()
    with streamer(state, progress=True) as layers:
        capsys.readouterr()
        require_order(layers, plain(state))
        assert "layers" in capsys.readouterr().err
        assert "layers:" in layers.report()


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "error", "told"),
    [
        ("model.layers", ValueError, "'model.layers' names no layers: write one {}"),
        ("model.{}.{}", ValueError, "'model.{}.{}' names no layers"),
        ("h.{}", CheckpointError, "no tensor in a layer 'h.{}'; it has 'model.layers.{}'"),
        ("model.layers.{}.1.weight", CheckpointError, "no tensor in a layer 'model.layers.{}.1.w"),
    ],
)
def test_patterns_that_name_no_layers(pattern: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        LayerStreamer(checkpoint(), pattern, cap="1MiB", **SETTINGS)


def test_checkpoints_that_lack_something(tmp_path: Path) -> None:
    state = checkpoint()
    for index in (3, 7):
        del state[f"model.layers.{index}.0.weight"], state[f"model.layers.{index}.1.weight"]
    told = r"has a layer 'model\.layers\.10', and lacks 2 of .*first: 'model\.layers\.3'"
    with pytest.raises(CheckpointError, match=told):
        streamer(state)
    state["model.layers.999999999.1.weight"] = X
    with pytest.raises(CheckpointError, match="lacks 999999990 of those before it"):
        streamer(state)
    with pytest.raises(CheckpointError, match="none of its names has an index"):
        streamer({"weight": X})
    with pytest.raises(CheckpointError, match="nowhere"):
        streamer(tmp_path / "nowhere")
    state = checkpoint() | {"model.layers.4.0": X}
    with pytest.raises(CheckpointError, match=r"a tensor 'model.layers.4.0', and others"):
        streamer(state)


def test_what_does_not_fit_is_refused_and_forgotten(pager: str) -> None:
    manager = MemoryManager(cap=PAGE, pager=pager, **SETTINGS)
    state = checkpoint()
    with pytest.raises(CapExceededError, match=r"'layers' has a tensor of 128\.00 KiB"):
        LayerStreamer(state, "model.layers.{}", manager=manager)
    assert not manager.stats().models and manager.stats().used == 0
    with pytest.raises(IndexError, match="no layer 11; there are 11, from 0 on"):
        streamer(state, pager=pager).layer(DEPTH)
    with pytest.raises(IndexError, match="no layer -1"):
        streamer(state, pager=pager).layer(-1)


def test_writes_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    save_file(checkpoint(), tmp_path / "model.safetensors")
    with (
        streamer(tmp_path, pager="frames", host="mapped") as layers,
        torch.no_grad(),
        pytest.raises(ModelError, match=r"write to 'model\.layers\.0\.1\.weight'"),
    ):
        layers.layer(0)["1.weight"].add_(1)
    assert penstock.LayerStreamer is LayerStreamer


def test_leaving_it_is_closing_it() -> None:
    layers = streamer(checkpoint())
    manager, region = weakref.ref(layers.manager), weakref.ref(memory_of(layers))
    require_order(layers, plain(checkpoint()))
    del layers
    gc.collect()
    assert manager() is None and region() is None
