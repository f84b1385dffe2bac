"""Public functions with wrong arguments: an error that names what is wrong, and nothing changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from penstock import MemoryManager, PenstockError
from python.support import PAGERS, build, manager_with, mlp, pinned_pages, state_of, within

WRONG = (
    None,
    True,
    -1,
    0,
    10**30,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "8 GB GB",
    "a\0b",
    "ü" * 5000,
    b"bytes",
    [],
    ["8 GB GB"],
    [None],
    {},
    {"weight": None},
    {1: torch.ones(2)},
    object(),
    object,
    torch.ones(2),
    torch.float16,
    Path("nowhere"),
    lambda: None,
    lambda: torch.ones(2),
)
ERRORS = (TypeError, ValueError, IndexError, OSError, PenstockError)
# What Penstock makes and hands out, or raises: figures without rules of their own.
RECORDS = {name for name in penstock.__all__ if name.endswith(("Error", "Warning", "Stats"))} | {
    "Candidate",
    "CappedScope",
    "Estimate",
    "Holder",
    "Kernel",
    "Policy",
    "PressureEvent",
    "PressureHandle",
    "Trial",
    "Tuned",
    "__version__",
}


def three() -> nn.Sequential:
    return mlp(160, 160, 160, 160)


class House:
    """A manager with a model "m", and right arguments for each of its methods."""

    def __init__(self, pager: str) -> None:
        self.state = state_of(build(three))
        self.manager = manager_with(three, self.state, cap="256KiB", pager=pager, trace=True)
        self.loaded = build(three)
        self.x = torch.ones(2, 160)
        with torch.no_grad():
            self.wanted = self.loaded(self.x)

    def right(self, method: str) -> dict[str, Any]:
        """Return arguments that a method takes."""
        rules = {"pin": ["0"], "stream": ["1"]}
        register = {
            "name": "n",
            "module_or_builder": three,
            "weights": self.state,
            "dtype": None,
            "strict": True,
            "writable": False,
            "exist_ok": False,
        }
        known: dict[str, dict[str, Any]] = {
            "acquire_on_call": {"names": "m"},
            "adopt": {"name": "n", "module": self.loaded, **rules},
            "hold": {"name": "m", "part": self.manager.module("m")[0]},  # type: ignore[index]
            "keep_resident": {"names": "m"},
            "register": register | rules,
            "register_kernel": {"modules": "0", "function": print, "model": "m"},
            "release": {"name": "m", "evict": True},
            "report": {},
            "reserve": {"name": "m", "priority": penstock.Priority.PRIMARY},
            "set_cap": {"cap": "256KiB"},
            "stats": {},
            "timeline": {"path": "trace.json"},
        }
        if method == "release":
            self.manager.acquire("m")
        return known.get(method, {"name": "m"})

    def require_order(self) -> None:
        """See that the manager works on, with the right bits, and that its ledger balances."""
        manager = self.manager
        while manager.stats().models["m"].acquired:
            manager.release("m", evict=True)
        with torch.no_grad(), manager.use("m") as model:
            assert torch.equal(model(self.x), self.wanted)
        stats = manager.stats()
        assert stats.peak <= stats.cap == 256 << 10
        assert pinned_pages(manager) == 0
        assert list(stats.models) == ["m"]
        manager.unregister("m")
        assert manager.stats().used_by_tag["weights"] == 0


def refuse(call: Callable[..., Any], right: dict[str, Any], name: str, value: object) -> bool:
    """Call with a wrong value for one argument; return whether it was refused, as it has to be."""
    given = {**right, name: value}
    rest = [given.pop("names")] if "names" in given else []
    try:
        found = call(*rest, **given)
        if isinstance(found, AbstractContextManager):
            with found:
                pass
    except ERRORS as error:
        names = (name.rstrip("s"), "builder", repr(value)[:30], str(value).strip("[]'")[:30])
        names += (type(value).__name__, getattr(value, "__name__", ""))
        names += ("Is a directory: '.'",) if value == "" else ()
        assert any(each and each in str(error) for each in names), f"names nothing: {error!r}"
        return True
    return False


def refuse_all(
    make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]], names: set[str]
) -> list[str]:
    faults = []
    for name in sorted(names):
        call, right = make()
        for value in WRONG:
            try:
                if not within(30, partial(refuse, call, right, name, value)):
                    call, right = make()  # it was right, and changed something
            except BaseException as error:
                faults.append(f"{name}={value!r:.60}: {type(error).__name__}: {error}")
    return faults


METHODS = [
    name
    for name in dir(MemoryManager)
    if name[0] != "_" and isinstance(inspect.getattr_static(MemoryManager, name), FunctionType)
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what is no path may be one


@pytest.fixture(autouse=True)
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"times": [1.0] * 3, "moved_bytes": 0, "peak_bytes": 0, "device": ""}
    monkeypatch.setattr("penstock.tuning.tune.run_for_json", lambda *_: row)


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_a_manager(method: str, pager: str) -> None:
    house = House(pager)

    def make() -> tuple[Callable[..., Any], dict[str, Any]]:
        nonlocal house
        house = House(pager)
        return getattr(house.manager, method), house.right(method)

    faults = []
    for name in house.right(method):
        faults += refuse_all(make, {name})
        house.require_order()
    assert not faults, "\n".join(faults)


def offloaded() -> nn.Module:
    return penstock.offload(build(three), cap="256KiB", device="cpu", page_size="64KiB")


def a_pager(kind: str = "frames") -> penstock.Pager:
    return penstock.Pager(cap="1MiB", device="cpu", kind=kind, page_size="64KiB")


def a_region(pager: penstock.Pager) -> penstock.Region:
    return pager.reserve("256KiB")


SETTINGS = {
    "cap": "256KiB",
    "device": "cpu",
    "pager": "frames",
    "host": "pinned",
    "host_budget": "1GiB",
    "page_size": "64KiB",
    "trace": False,
    "verify": False,
    "progress": None,
    "policy": None,
}
CUDA = {"set_cap", "capped", "memory_stats", "memory_summary", "on_pressure"}


def to_train() -> dict[str, Any]:
    model = build(three)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"pin": ["0"], "stream": ["1"], **SETTINGS, "cap": "1MiB"}
    return {"model": model, "optimizer": optimizer, **options}


def right_arguments(name: str) -> dict[str, Any]:
    """Return arguments that a public function or class takes, but for a GPU."""
    pager = a_pager()
    known: dict[str, dict[str, Any]] = {
        "FarthestUse": {},
        "LayerStreamer": {
            "weights": state_of(build(three)),
            "pattern": "{}",
            "manager": None,
            "name": "n",
            "static": None,
            "dtype": None,
            "pin": ["0"],
            "stream": ["1"],
            **SETTINGS,
        },
        "LazyModule": {
            "manager": House("frames").manager,
            "name": "n",
            "module_or_builder": three,
            "weights": state_of(build(three)),
            "pin": ["0"],
            "dtype": None,
        },
        "MemoryManager": SETTINGS,
        "Pager": {"cap": "1MiB", "device": "cpu", "kind": "frames", "page_size": "64KiB"},
        "Priority": {"value": "primary"},
        "Region": {"core": a_region(pager).core, "device": pager.device},
        "capped": {"cap": "1MiB", "device": "cuda", "page_size": None},
        "estimate": {
            "weights": state_of(build(three)),
            "module": three,
            "cap": "1MiB",
            "caps": ["1MiB"],
            "tokens": 1,
            "batch": 1,
            "training": None,
            "dtype": None,
            "link": "1GB/s",
            "disk": "1GB/s",
            "compute": None,
            "memory": None,
            "device": "cpu",
            "pager": "frames",
            "host": "pinned",
            "host_budget": None,
            "page_size": "64KiB",
        },
        "manager_of": {"model": offloaded()},
        "memory_stats": {"device": "cuda"},
        "memory_summary": {"device": "cuda"},
        "offload": {"model": build(three), "pin": ["0"], "stream": ["1"], **SETTINGS},
        "on_pressure": {"callback": print, "device": "cuda"},
        "record_stacks": {},  # see below
        "restore": {"model": offloaded()},
        "training.prepare": to_train(),
        "tune": {
            "setup": "module:function",
            "cap": "1MiB",
            "candidates": [{}],
            "arguments": {"width": 8},
            "passes": 3,
            "slower": 2.0,
            "pause": 0.0,
            "time_limit": 1.0,
            "tell": None,
            "device": "cpu",
            "pager": "frames",
            "host": "pinned",
            "page_size": "64KiB",
        },
        "set_cap": {
            "cap": "1MiB",
            "device": "cuda",
            "page_size": None,
            "reserve": None,
            "overflow": None,
            "overflow_limit": None,
        },
    }
    return known[name]


def functions() -> list[str]:
    modules = {name for name in penstock.__all__ if isinstance(getattr(penstock, name), ModuleType)}
    inside = {f"{name}.{each}" for name in modules for each in getattr(penstock, name).__all__}
    return sorted({*penstock.__all__} - RECORDS - modules | inside)


@pytest.mark.parametrize("name", functions())
def test_public_names(name: str) -> None:
    call = attrgetter(name)(penstock)
    faults = []
    for each in right_arguments(name):
        faults += refuse_all(lambda: (call, right_arguments(name)), {each})
    if name in CUDA and not torch.cuda.is_available():  # that is said of all values
        faults = [fault for fault in faults if "hard cap" not in fault and "CUDA" not in fault]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("kind", PAGERS)
@pytest.mark.parametrize("cls", [penstock.Pager, penstock.Region])
def test_methods_of_the_low_level(cls: type, kind: str) -> None:
    def right(method: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        pager = a_pager(kind)
        region = a_region(pager)
        known: dict[str, dict[str, Any]] = {
            "reserve": {"nbytes": 4096, "writable": True},
            "empty_tier": {"nbytes": 4096},
            "prefetch": {"region": region, "start": 0, "nbytes": 4096, "stream": 0},
            "evict": {"region": region, "start": 0, "nbytes": 4096},
            "plan": {
                "page_count": 4,
                "steps": [[0], [1], [2], [3]],
                "frames": 2,
                "seconds": [0.1, 0.1, 0.1, 0.1],
                "keep": [0],
                "stream": [1],
                "least_ring": 1,
            },
            "tensor": {"offset": 0, "shape": [2], "dtype": torch.float32},
            "holds": {"tensor": torch.ones(2)},
            "extent": {"tensor": torch.ones(2)},
            "pages_of": {"start": 0, "nbytes": 4096},
        }
        return getattr(pager if cls is penstock.Pager else region, method), known.get(method, {})

    faults = []
    for method in vars(cls):
        if isinstance(vars(cls)[method], FunctionType) and method[0] != "_":
            _, names = right(method)
            for fault in refuse_all(partial(right, method), set(names)):
                faults.append(f"{method}: {fault}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("pager", PAGERS)
def test_methods_of_a_layer_streamer(pager: str) -> None:
    options = {"device": "cpu", "pager": pager, "page_size": "64KiB"}
    layers = penstock.LayerStreamer(state_of(build(three)), "{}", cap="256KiB", **options)
    right: dict[str, dict[str, Any]] = {
        "run_pass": {"x": None, "layer_fn": lambda x, weights, index: weights["bias"].sum()},
        "layer": {"index": 0},
        "block": {"index": 0},
        "load_static": {"name": "none"},
    }
    faults = []
    for method, given in right.items():
        for name in {*given} - {"x"}:  # which is the function's business
            for fault in refuse_all(
                partial(lambda *each: each, getattr(layers, method), given), {name}
            ):
                faults.append(f"{method}: {fault}")
    assert not faults, "\n".join(faults)
    assert pinned_pages(layers.manager) == 0


def test_stacks_are_recorded_by_a_truth_and_end_in_their_thread() -> None:
    for value in (each for each in WRONG if not isinstance(each, bool)):
        with pytest.raises(TypeError, match="enabled is bool"):
            penstock.record_stacks(value)  # type: ignore[arg-type]
    penstock.record_stacks()
    try:
        with pytest.raises(ValueError, match=r"record_stacks\(False\) there"):
            within(30, lambda: penstock.record_stacks(False))
    finally:
        penstock.record_stacks(False)


@pytest.mark.parametrize("name", ["load", "register"])
def test_front_end_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from penstock.integrations import transformers as front_end

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")

    def right() -> dict[str, Any]:
        if name == "load":
            return {"directory": tmp_path / "model", **SETTINGS, **more}
        manager = MemoryManager(cap="256KiB", device="cpu", page_size="64KiB")
        return {"manager": manager, "name": "n", "directory": tmp_path / "model", **more}

    more = {
        "dtype": None,
        "config": None,
        "model_class": None,
        "trust_remote_code": False,
        "strict": True,
    }
    call = getattr(front_end, name)
    faults = refuse_all(lambda: (call, right()), set(right()))
    assert not faults, "\n".join(faults)


def test_front_end_of_diffusers(tmp_path: Path) -> None:
    from penstock.integrations import diffusers as front_end

    manager = MemoryManager(cap="256KiB", device="cpu", page_size="64KiB")
    right = {"manager": manager, "directory": tmp_path, "prefix": "", "dtype": None}
    faults = refuse_all(lambda: (front_end.register, right), set(right))
    right = {"directory": tmp_path, **SETTINGS, "dtype": None}
    faults += refuse_all(lambda: (front_end.load, right), set(right))
    # Values of the right types come to nothing here, for want of the package or of a pipeline.
    faults = [fault for fault in faults if "diffusers" not in fault and "model_index" not in fault]
    assert not faults, "\n".join(faults)
