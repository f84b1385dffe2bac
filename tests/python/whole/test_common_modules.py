"""Every module and every optimizer that torch tests itself with, bit by bit as in ordinary memory.

Torch's own lists (`torch.testing._internal`) say how each module is built and called, and with what
options each optimizer is tried. Copies of a module lie side by side in a container, and are paged
under a cap below their weights. Some cases of each are run, always the same; `--all-modules` runs
all.
"""

from __future__ import annotations

import copy
import importlib
import sys
import unittest
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from random import Random
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import penstock
from python.support import KIB, PAGERS, same_bits

SEED = 2026
CASES = 3  # of each module with each pager, where not all are asked for
OPTIONS = 6  # of each optimizer with each pager
PAGE = {"managed": 4 * KIB, "frames": 64 * KIB}
COPIES = 3
BALLAST = 6  # pages of other weights, which make these modules more than the cap

# The lists have modules that warn where they are built or called as the lists say.
pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def undone() -> Iterator[None]:
    """Undo what importing torch's lists does to the process."""
    flags = torch.backends.flags_frozen.__globals__
    thawed = flags["__allow_nonbracketed_mutation_flag"]
    profile = hypothesis.settings.get_current_profile_name()
    # Torch's helpers derive a class from one of this package, and use no more of it here.
    stand_in = ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    lacking = find_spec("expecttest") is None
    if lacking:
        sys.modules["expecttest"] = stand_in
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if lacking:
            del sys.modules["expecttest"]
        flags["__allow_nonbracketed_mutation_flag"] = thawed
        hypothesis.settings.load_profile(profile)


with undone():
    MODULES = importlib.import_module("torch.testing._internal.common_modules").module_db
    OPTIMIZERS = importlib.import_module("torch.testing._internal.common_optimizers").optim_db


def some(cases: list[Any], count: int, config: pytest.Config) -> list[Any]:
    """Choose cases, the same ones every time, unless all are asked for."""
    if config.getoption("--all-modules") or len(cases) <= count:
        return cases
    return [cases[i] for i in sorted(Random(SEED).sample(range(len(cases)), count))]


def test_the_lists_leave_the_process_as_it_was() -> None:
    assert not torch.backends.flags_frozen()
    assert not hypothesis.settings.get_current_profile_name().startswith("pytorch")


# ---- modules ------------------------------------------------------------------------------------


class Ballast(nn.Module):
    def __init__(self, page: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(page // 4))

    def forward(self) -> torch.Tensor:
        return self.weight.square().sum()


class SideBySide(nn.Module):
    """Copies of a module, each with values of its own, between weights that take their room."""

    def __init__(self, copies: list[nn.Module], page: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copies)
        self.ballast = nn.ModuleList(Ballast(page) for _ in range(BALLAST))

    def forward(self, calls: list[tuple[Any, Any]]) -> object:
        outs = []
        for i, (module, (args, kwargs)) in enumerate(zip(self.copies, calls, strict=True)):
            outs += [self.ballast[i](), module(*args, **kwargs), self.ballast[-i - 1]()]
        return outs


def nbytes_of(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(-(-t.nbytes // 64) * 64 for t in tensors)


def fresh(value: object) -> object:
    """Copy what a module is given, leaf by leaf, so that each call has inputs of its own."""

    def copied(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return tree_map(copied, value)


def tensors_in(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def results(model: nn.Module, calls: list[tuple[Any, Any]], training: bool) -> list[object]:
    """Run passes without and with gradients; return all that a user could see of them."""
    model.train(training)
    seen: list[object] = []
    for number, mode in enumerate((torch.no_grad, torch.inference_mode, torch.no_grad)):
        torch.manual_seed(number)
        with mode():
            seen.append(copied(model(fresh(calls))))
    for number in range(2):
        torch.manual_seed(number)
        given = fresh(calls)
        outs = model(given)
        needed = [t for t in tensors_in(outs) if t.requires_grad]
        torch.autograd.backward(needed, [torch.ones_like(t) for t in needed])
        seen.append(copied(outs))
        seen.append([copied(t.grad) for t in tensors_in(given) if t.is_leaf])
        seen.append([copied(p.grad) for p in model.parameters()])
    seen.append(copied(dict(model.state_dict())))
    return seen


def copied(value: object) -> object:
    """Detach and copy the tensors of a structure, in the form of a list where torch has its own."""
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        value = tuple(value)
    return tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, value)


def side_by_side(info: Any, given: Any, training: bool, page: int) -> tuple[SideBySide, list[Any]]:
    build, call = given.constructor_input, given.forward_input
    copies, calls = [], []
    for seed in range(COPIES):
        torch.manual_seed(seed)
        module = info.module_cls(*build.args, **build.kwargs).train(training)
        module.to(torch.float32)
        if info.is_lazy:  # its first call is what makes its weights
            module(*fresh(call.args), **fresh(call.kwargs))
        copies.append(module)
        calls.append((call.args, call.kwargs))
    return SideBySide(copies, page), calls


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_modules_of_torchs_own_list(info: Any, pager: str, pytestconfig: pytest.Config) -> None:
    torch.manual_seed(SEED)
    cases = [
        (training, number, given)
        for training in (False, True)
        for number, given in enumerate(
            info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
            )
        )
    ]
    tried, wrong = 0, []
    for training, number, given in some(cases, CASES, pytestconfig):
        plain, calls = side_by_side(info, given, training, PAGE[pager])
        needed = max(map(nbytes_of, plain.copies))
        if needed == 0:
            continue
        tried += 1
        paged = copy.deepcopy(plain)
        cap = PAGE[pager] * (-(-needed // PAGE[pager]) + 3)
        assert cap < nbytes_of(plain)
        penstock.offload(paged, cap=cap, device="cpu", pager=pager, page_size=PAGE[pager])
        wanted = results(plain, calls, training)
        try:
            same, said = same_bits(results(paged, calls, training), wanted), "other bits"
        except Exception as error:
            same, said = False, f"{type(error).__name__}: {error}"
        if not same:
            wrong.append(f"input {number}, training={training}, {given.desc or 'as it is'}: {said}")
    assert not wrong, "\n".join(wrong)
    if not tried:
        pytest.skip("has no weights")


# ---- optimizers ---------------------------------------------------------------------------------


class Sparse(nn.Module):
    """What the optimizer of sparse gradients is for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        tables = (nn.Embedding(width, width, sparse=True) for _ in range(12))
        self.tables = nn.ModuleList(tables)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(0, self.tables[0].num_embeddings, 7)
        return torch.stack([table(ids) for table in self.tables]).sum(0) * x[0]


def network(info: Any, pager: str) -> nn.Module:
    width, layers = (32, 12) if pager == "managed" else (128, 6)
    torch.manual_seed(SEED)
    if info.only_supports_sparse_grads:
        return Sparse(width)
    return nn.Sequential(
        *(
            nn.Linear(width, width, bias=info.optim_cls is not torch.optim.Muon)
            for _ in range(layers)
        )
    )


def option_sets(info: Any) -> list[tuple[str, dict[str, Any]]]:
    """List the options that torch tries, one tensor after the other, and by lists of tensors."""
    ways = [name for name in ("foreach", "fused") if name in info.supported_impls]
    if "cpu" not in info.supports_fused_on and "fused" in ways:
        ways.remove("fused")
    sets = []
    for given in info.optim_inputs_func(device="cpu"):
        for way in (None, *ways):
            options = {**given.kwargs, **{name: name == way for name in ways}}
            sets.append((f"{given.desc}, {way or 'one by one'}", options))
    return sets


def train(info: Any, model: nn.Module, options: dict[str, Any]) -> list[object]:
    optimizer = info.optim_cls(model.parameters(), **copy.deepcopy(options))
    width = next(model.parameters()).shape[-1]
    losses: list[object] = []
    for number in range(3):
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(number))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        if info.step_requires_closure:
            losses.append(optimizer.step(closure).detach())
        else:
            losses.append(closure().detach())
            optimizer.step()
    states = [list(state.values()) for state in optimizer.state.values()]
    return [losses, copied(states), copied(dict(model.state_dict()))]


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.optim_cls.__name__)
def test_optimizers_of_torchs_own_list(info: Any, pager: str, pytestconfig: pytest.Config) -> None:
    wrong = []
    for name, options in some(option_sets(info), OPTIONS, pytestconfig):
        plain = network(info, pager)
        paged = copy.deepcopy(plain)
        try:
            wanted = train(info, plain, options)
        except (RuntimeError, ValueError):  # not for CPUs, or not together
            continue
        cap = 5 * PAGE[pager]
        assert cap < nbytes_of(paged)
        penstock.offload(paged, cap=cap, device="cpu", pager=pager, page_size=PAGE[pager])
        try:
            same, said = same_bits(train(info, paged, options), wanted), "other bits"
            same = same and penstock.manager_of(paged).stats().peak <= cap
            penstock.restore(paged)
            same = same and same_bits(dict(paged.state_dict()), dict(plain.state_dict()))
        except Exception as error:
            same, said = False, f"{type(error).__name__}: {error}"
        if not same:
            wrong.append(f"{name} {options}: {said}")
    assert not wrong, "\n".join(wrong)
