"""Parts of a model that stay, and parts that stream: what moves, what stays, what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from penstock import CapExceededError, MemoryManager, ModelError
from python.support import KIB, PAGERS, build, pinned_pages, same_bits, state_of

PAGE = 64 * KIB
WIDTH = 128
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


class Model(nn.Module):
    """An embedding of three pages, six layers of a page, a head of two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6))
        self.head = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


PAGES = 11
EMBED, LAYER_0, HEAD = [0, 1, 2], [3], [9, 10]


class Rig:
    def __init__(self, pager: str, cap: int, *, adopt: bool = False, **options: Any) -> None:
        self.plain = build(Model)
        self.manager = MemoryManager(
            cap=cap * PAGE, device="cpu", pager=pager, page_size=PAGE, trace=True
        )
        if adopt:
            self.manager.adopt("m", build(Model), **options)
        else:
            self.manager.register("m", lambda: Model().eval(), state_of(self.plain), **options)

    @property
    def memory(self) -> Any:
        runner = self.manager._models["m"].runner
        assert runner is not None
        return runner.memory

    def in_place(self, pages: list[int]) -> bool:
        """Whether pages need not be loaded to be read."""
        core = self.memory.region.core
        before = self.loads(pages)
        core.begin(pages)
        core.end(pages)
        return self.loads(pages) == before

    def check(self, module: nn.Module, passes: int = 1) -> None:
        with torch.no_grad():
            for _ in range(passes):
                assert same_bits(module(X), self.plain(X))

    def loads(self, pages: list[int]) -> int:
        """Count how often pages were loaded, as the trace has it."""
        spans = self.memory.streamer.timeline()
        return sum(
            first <= page < first + count
            for kind, first, count in ((s.kind.name, s.id, s.count) for s in spans)
            if kind == "load"
            for page in pages
        )


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["registered", "adopted"])
def adopt(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("cap", [5, 6, 8])
def test_what_is_pinned_stays(pager: str, cap: int, adopt: bool) -> None:
    rig = Rig(pager, cap, adopt=adopt, pin=["head", "layers.0"])
    with rig.manager.use("m") as module:
        rig.check(module, 3)
        before = rig.loads(HEAD + LAYER_0)
        for _ in range(5):
            rig.check(module)
            assert rig.in_place(HEAD + LAYER_0)
        assert rig.loads(HEAD + LAYER_0) == before
        assert rig.manager.stats().used <= cap * PAGE
    assert rig.manager.stats().used == 0
    assert pinned_pages(rig.manager) == 0


def test_patterns_reach_into_what_they_match(pager: str) -> None:
    rig = Rig(pager, 8, pin=["embed"])
    assert list(rig.memory.rules.keep) == EMBED
    rig = Rig(pager, 9, pin=["layers.*", "emb*.1"], stream=["head"])
    assert list(rig.memory.rules.keep) == [1, *range(3, 9)]
    assert list(rig.memory.rules.stream) == HEAD


def test_what_streams_does_so_where_there_is_room(pager: str, adopt: bool) -> None:
    rig = Rig(pager, PAGES + 4, adopt=adopt, stream=["embed*"])
    with rig.manager.use("m") as module:
        rig.check(module, 4)
        streamed, stayed = rig.loads(EMBED), rig.loads(list(range(3, PAGES)))
        rig.check(module, 5)
        assert rig.loads(EMBED) >= streamed + 5 * len(EMBED) - 3, "but for what is ahead"
        assert rig.loads(list(range(3, PAGES))) == stayed
        if pager == "frames":
            assert rig.manager.stats().used < PAGES * PAGE, "they take less room"
    assert rig.manager.stats().used == 0


@pytest.mark.parametrize("cap", [4, 6, 9, PAGES])
def test_pinned_and_streamed_parts_share_a_cap(pager: str, cap: int) -> None:
    rig = Rig(pager, cap, pin=["head"], stream=["embed"])
    with rig.manager.use("m") as module:
        rig.check(module, 6)
        assert rig.in_place(HEAD)
        rig.manager.set_cap(4 * PAGE)
        rig.check(module, 4)
        assert rig.in_place(HEAD)
    assert rig.manager.stats().used == 0


def test_what_is_pinned_counts_when_a_cap_is_divided(pager: str) -> None:
    rig = Rig(pager, 7, pin=["head"])
    other = build(Model, 1)
    rig.manager.register("n", lambda: Model().eval(), state_of(other), pin=["head"])
    with torch.no_grad(), rig.manager.use("m") as m, rig.manager.use("n") as n:
        for _ in range(4):
            rig.check(m)
            assert same_bits(n(X), other(X))
            assert rig.in_place(HEAD)
    assert rig.manager.stats().used == 0


@pytest.mark.parametrize("option", ["pin", "stream"])
def test_a_pattern_that_matches_nothing_is_refused(pager: str, adopt: bool, option: str) -> None:
    with pytest.raises(ModelError, match=r"'lm_\*' matches no module of model 'm'.*'embed'"):
        Rig(pager, 8, adopt=adopt, **{option: ["head", "lm_*"]})
    with pytest.raises(TypeError, match=r"str or Pattern, not str 'head': write \['head'\]"):
        Rig(pager, 8, adopt=adopt, **{option: "head"})


def test_regular_expressions_match_whole_names(pager: str, adopt: bool) -> None:
    rig = Rig(pager, 8, adopt=adopt, pin=["head", re.compile(r"layers\.[03]")])
    with torch.no_grad(), rig.manager.use("m") as model:
        for _ in range(3):
            rig.check(model)
        assert rig.memory.rules.keep == (3, 6, 9, 10)
    with pytest.raises(ModelError, match=r"re.compile\('ayers'\) matches no module of model 'm'"):
        Rig(pager, 8, adopt=adopt, stream=[re.compile("ayers")])
    with pytest.raises(TypeError, match="pin is a list of str or Pattern, not list"):
        Rig(pager, 8, adopt=adopt, pin=[re.compile(b"head")])


def test_contradictions_are_refused(pager: str) -> None:
    with pytest.raises(ModelError, match=r"module 'layers.3' of model 'm' cannot be pinned and"):
        Rig(pager, 8, pin=["layers.*"], stream=["*.3"])


def test_what_cannot_fit_is_refused_with_the_figures(pager: str) -> None:
    with pytest.raises(CapExceededError, match=r"384\.00 KiB pinned: .* takes 512\.00 KiB") as e:
        Rig(pager, 7, pin=["layers*"])
    assert (e.value.requested, e.value.cap) == (8 * PAGE, 7 * PAGE)
    Rig(pager, 8, pin=["layers*"])


def test_parts_of_a_module_that_is_offloaded(pager: str) -> None:
    plain, model = build(Model), build(Model)
    options: dict[str, Any] = {"device": "cpu", "pager": pager, "page_size": PAGE}
    with pytest.raises(ModelError, match="matches no module"):
        penstock.offload(model, cap=6 * PAGE, pin=["tail"], **options)
    with pytest.raises(CapExceededError, match="pinned"):
        penstock.offload(model, cap=6 * PAGE, pin=["layers"], **options)
    assert penstock.manager_of(model) is None
    penstock.offload(model, cap=6 * PAGE, pin=["head"], stream=["embed"], **options)
    manager = penstock.manager_of(model)
    assert manager is not None
    with torch.no_grad():
        for _ in range(4):
            assert same_bits(model(X), plain(X))
    assert manager.stats().models["model"].memory.resident_bytes >= len(HEAD) * PAGE
    assert manager.stats().peak <= 6 * PAGE
    penstock.restore(model)
    assert same_bits(model.state_dict(), plain.state_dict())
