"""Training under a cap of a third of weights, gradients and states: the bits are plain torch's."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.checkpoint import checkpoint

import penstock
from penstock import CapExceededError, ModelError
from penstock.dispatch import torch_dispatch
from penstock.training.states import PagedStates
from python.support import KIB, PAGERS, build, mlp, same_bits

WIDTH = 128  # a weight of 64 KiB, the least that a page of frames has
PAGE = 64 * KIB
LAYERS = 16

Make = Callable[[Any], Optimizer]


def network(*, bias: bool = True) -> nn.Module:
    layers = [nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(LAYERS)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def batch(number: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    return (model(batch(number)) - 1).square().mean()


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def train(model: nn.Module, optimizer: Optimizer, steps: range = range(4)) -> list[torch.Tensor]:
    losses = []
    for number in steps:
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def values(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Copy all that training has made: weights, buffers, gradients, states and options."""
    found = {
        "model": dict(model.state_dict()),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "optimizer": optimizer.state_dict(),
    }
    return copy.deepcopy(found)


def everything(model: nn.Module, optimizer: Optimizer) -> int:
    """Count the bytes of weights, gradients and states of an optimizer that has stepped."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [*model.state_dict().values(), *trained]
    for states in optimizer.state.values():
        tensors += [each for each in states.values() if isinstance(each, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.dim())


@dataclass
class Pair:
    """A plain model and optimizer, and the same prepared under a cap of a third of everything."""

    plain: nn.Module
    plain_optimizer: Optimizer
    model: nn.Module
    optimizer: Optimizer

    @property
    def both(self) -> list[tuple[nn.Module, Optimizer]]:
        return [(self.plain, self.plain_optimizer), (self.model, self.optimizer)]

    @property
    def stats(self) -> penstock.ManagerStats:
        manager = penstock.manager_of(self.model)
        assert manager is not None
        return manager.stats()

    def check(self) -> None:
        """Compare all, and see that the cap held and that nothing left the memory."""
        assert same_bits(values(self.model, self.optimizer), values(*self.both[0]))
        stats = self.stats
        assert 0 < stats.peak <= stats.cap and stats.suppressed_errors == 0
        for tensor in paged_tensors(self.model, self.optimizer):
            assert torch_dispatch.is_keyed(tensor) or not tensor.numel()


def paged_tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from (each.grad for each in model.parameters() if each.grad is not None)
    for states in optimizer.state.values():
        for value in states.values():
            if isinstance(value, torch.Tensor) and value.dim():
                yield value


def prepared(
    make: Make,
    builder: Callable[[], nn.Module] = network,
    *,
    pager: str = "frames",
    part: float = 1 / 3,
    cap: int | None = None,
    before: Callable[[nn.Module, Optimizer], None] | None = None,
) -> Pair:
    """Make a pair.

    Parameters
    ----------
    part
        The cap, as a part of weights, gradients and states, if it is not given.
    before
        Called for both before one is prepared.
    """
    plain = build(builder).train()
    trial = copy.deepcopy(plain)
    tried = make(trial)
    for parameter in trial.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    tried.step()
    cap = cap or int(everything(trial, tried) * part)
    model = copy.deepcopy(plain)
    pair = Pair(plain, make(plain), model, make(model))
    for each in pair.both:
        if before is not None:
            before(*each)
    found = penstock.training.prepare(
        model, pair.optimizer, cap=cap, device="cpu", pager=pager, page_size="64KiB"
    )
    assert found == (model, pair.optimizer)
    return pair


def of(kind: Any, **options: Any) -> Make:
    return lambda model: kind(model.parameters(), **options)


O = torch.optim  # noqa: E741
OPTIMIZERS: dict[str, Make] = {
    "SGD": of(O.SGD, lr=0.1),
    "SGD, foreach": of(O.SGD, lr=0.1, foreach=True),
    "SGD, momentum": of(O.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "SGD, momentum, foreach": of(O.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD, momentum, fused": of(O.SGD, lr=0.1, momentum=0.9, fused=True),
    "Adam": of(O.Adam, lr=0.01, amsgrad=True, weight_decay=0.01),
    "Adam, foreach": of(O.Adam, lr=0.01, amsgrad=True, foreach=True),
    "Adam, fused": of(O.Adam, lr=0.01, amsgrad=True, fused=True),
    "Adam, lr in a tensor": of(O.Adam, lr=torch.tensor(0.01), foreach=False),
    "AdamW": of(O.AdamW, lr=0.01, maximize=True),
    "AdamW, foreach": of(O.AdamW, lr=0.01, foreach=True),
    "AdamW, fused": of(O.AdamW, lr=0.01, fused=True),
    "Adagrad": of(O.Adagrad, lr=0.01, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adagrad, foreach": of(O.Adagrad, lr=0.01, foreach=True),
    "Adagrad, fused": of(O.Adagrad, lr=0.01, fused=True),
    "Adadelta": of(O.Adadelta),
    "Adadelta, foreach": of(O.Adadelta, weight_decay=0.1, foreach=True),
    "Adamax": of(O.Adamax, lr=0.01),
    "Adamax, foreach": of(O.Adamax, lr=0.01, foreach=True),
    "Adafactor": of(O.Adafactor, lr=0.01),
    "Adafactor, foreach": of(O.Adafactor, lr=0.01, foreach=True),
    "ASGD": of(O.ASGD, lr=0.01),
    "ASGD, foreach": of(O.ASGD, lr=0.01, weight_decay=0.1, foreach=True),
    "NAdam": of(O.NAdam, lr=0.01),
    "NAdam, foreach": of(O.NAdam, lr=0.01, decoupled_weight_decay=True, foreach=True),
    "RAdam": of(O.RAdam, lr=0.01),
    "RAdam, foreach": of(O.RAdam, lr=0.01, weight_decay=0.1, foreach=True),
    "RMSprop": of(O.RMSprop, lr=0.01, centered=True, momentum=0.9),
    "RMSprop, foreach": of(O.RMSprop, lr=0.01, centered=True, momentum=0.9, foreach=True),
    "Rprop": of(O.Rprop, lr=0.01),
    "Rprop, foreach": of(O.Rprop, lr=0.01, foreach=True),
}
if hasattr(O, "Muon"):
    OPTIMIZERS["Muon"] = of(O.Muon, lr=0.01)


def adamw_of(model: nn.Module) -> Optimizer:
    return adamw(model.parameters())


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_the_bits_of_plain_torch(name: str, pager: str) -> None:
    pair = prepared(OPTIMIZERS[name], lambda: network(bias=name != "Muon"), pager=pager)
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()
    for states in pair.optimizer.state.values():
        assert "step" not in states or not torch_dispatch.is_keyed(states["step"])


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_least_cap_that_a_refusal_names_is_enough(name: str, pager: str) -> None:
    """It comes before anything changes: a step that fails midway is half done."""
    pair, cap, refused = None, PAGE, 0
    while pair is None:
        try:
            pair = prepared(
                OPTIMIZERS[name], lambda: network(bias=name != "Muon"), pager=pager, cap=cap
            )
        except CapExceededError as error:
            assert error.requested > cap
            cap, refused = error.requested, refused + 1
    assert refused > 0
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


def test_no_optimizer_is_forgotten() -> None:
    tried = {name.split(",")[0] for name in OPTIMIZERS}
    refused = {"LBFGS", "SparseAdam"}
    made = {
        name for name in O.__all__ if isinstance(getattr(O, name), type) and name != "Optimizer"
    }
    assert made == tried | refused


# ---- what programs do around a step ----------------------------------------------------------


def accumulating(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for number in range(8):
        loss = loss_of(model, number) / 2
        loss.backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
        yield loss


def clipping(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for number in range(4):
        loss_of(model, number).backward()
        yield nn.utils.clip_grad_norm_(model.parameters(), 0.01, foreach=number % 2 == 0)
        nn.utils.clip_grad_value_(model.parameters(), 1e-4)
        optimizer.step()
        optimizer.zero_grad(set_to_none=number < 2)


def scheduling(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    schedulers: list[Any] = [
        lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
        lr_scheduler.StepLR(optimizer, 2),
    ]
    for number in range(4):
        yield from train(model, optimizer, range(number, number + 1))
        for each in schedulers:
            each.step()
        yield torch.tensor([group["lr"] for group in optimizer.param_groups])


def scaling(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for number in range(5):
        loss = loss_of(model, number) * (float("inf") if number == 2 else 1)
        scaler.scale(loss).backward()
        if number % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss
        yield torch.tensor(scaler.get_scale())


def with_closures(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for number in range(4):

        def closure(number: int = number) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert isinstance(loss, torch.Tensor)
        yield loss


def checkpointing(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    assert isinstance(model, nn.Sequential)
    for number in range(4):
        out = batch(number)
        for at in range(0, len(model), 4):
            out = checkpoint(model[at : at + 4], out, use_reentrant=False)
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def keeping_gradients(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Gradients that somebody keeps, and views of them, are not those that come later."""
    kept: list[torch.Tensor | None] = []
    for number in range(4):
        loss_of(model, number).backward()
        if number % 2 == 0:
            kept += [each.grad for each in model.parameters()]
            kept += [each.grad[0] for each in model.parameters() if each.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    yield from (each for each in kept if each is not None)


def reading_gradients(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for number in range(4):
        loss = loss_of(model, number)
        some = [model[0].weight, model[-2].weight]  # type: ignore[index]
        yield from torch.autograd.grad(loss, some, retain_graph=True)
        loss.backward()
        for each in model.parameters():
            assert each.grad is not None
            each.grad.mul_(0.5)
        model[2].weight.grad = torch.ones_like(model[2].weight)  # type: ignore[index]
        model[4].weight.grad = None  # type: ignore[index]
        optimizer.step()
        yield from (each.grad.clone() for each in model.parameters() if each.grad is not None)
        model.zero_grad()


def keeping_gradients_in_one(model: nn.Module, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Gradients that are views of one tensor stay so, in ordinary memory."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(each.numel() for each in parameters))
    for each, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        each.grad = part.view_as(each)
    for number in range(4):
        loss_of(model, number).backward()
        flat.mul_(0.5)
        yield flat.clone()
        optimizer.step()
        flat.zero_()


PROGRAMS = {
    each.__name__: each
    for each in (
        accumulating,
        clipping,
        scheduling,
        scaling,
        with_closures,
        checkpointing,
        keeping_gradients,
        reading_gradients,
        keeping_gradients_in_one,
    )
}


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW, foreach", "AdamW, fused"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_have_the_bits_of_plain_torch(program: str, name: str) -> None:
    def run(model: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
        return [each.detach() for each in PROGRAMS[program](model, optimizer)]

    pair = prepared(OPTIMIZERS[name])
    theirs, ours = (run(*each) for each in pair.both)
    assert same_bits([each.clone() for each in ours], theirs)
    for model, _ in pair.both:
        model.zero_grad()  # whatever is left
    pair.check()


def test_groups_frozen_parts_unused_parameters_and_scalars() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen, self.last = (mlp(*[WIDTH] * 7) for _ in range(3))
            self.frozen.requires_grad_(False)
            self.unused = nn.Linear(WIDTH, WIDTH)
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.none = nn.Parameter(torch.empty(0, 3))
            self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
            self.tied.weight = self.first[0].weight
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner: torch.Tensor = self.first(x) * self.scale + self.none.sum()
            return self.norm(self.last(self.frozen(self.tied(inner))))

    def make(model: nn.Module) -> Optimizer:
        assert isinstance(model, Parts)
        rest = [each for name, each in model.named_parameters() if not name.startswith("last")]
        groups = [
            {"params": rest},
            {"params": model.last.parameters(), "lr": 0.1, "betas": (0, 0.5)},
        ]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    pair = prepared(make, Parts)
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


def test_other_layouts_and_dtypes() -> None:
    def builder() -> nn.Module:
        layers = [nn.Conv2d(32, 64, 3), nn.Conv2d(64, 32, 3), nn.Conv2d(32, 64, 3)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 6 * 6, WIDTH))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(torch.bfloat16)

    pair = prepared(adamw_of, builder, part=1 / 2)
    for number in range(3):
        x = torch.randn(2, 32, 12, 12, generator=torch.Generator().manual_seed(number))
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        for model, optimizer in pair.both:
            model(x).square().mean().backward()
            optimizer.step()
        strides = [[each.grad.stride() for each in m.parameters()] for m, _ in pair.both]  # type: ignore[union-attr]
        assert strides[0] == strides[1]
        for _, optimizer in pair.both:
            optimizer.zero_grad()
    pair.check()


# ---- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW, foreach"])
def test_the_first_step_makes_states_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = prepared(OPTIMIZERS[name])
    most, settle = 0, PagedStates.settle

    def watch(self: PagedStates, parameters: list[nn.Parameter]) -> None:
        nonlocal most
        states = [value for each in pair.optimizer.state.values() for value in each.values()]
        made = [each for each in states if isinstance(each, torch.Tensor) and each.dim()]
        ordinary = sum(each.nbytes for each in made if not torch_dispatch.is_keyed(each))
        most = max(most, ordinary)
        settle(self, parameters)

    monkeypatch.setattr(PagedStates, "settle", watch)
    assert same_bits(*(train(*each, range(1)) for each in pair.both))
    assert 0 < most <= max(pair.stats.cap // 8, WIDTH * WIDTH * 8)
    pair.check()


def test_hooks_of_steps_run_once_and_see_the_groups() -> None:
    def hook(model: nn.Module, optimizer: Optimizer) -> None:
        def halve(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] /= 2
                group["calls"] = group.get("calls", 0) + len(group["params"])
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(2)

        optimizer.register_step_pre_hook(halve)
        optimizer.register_step_post_hook(halve)

    pair = prepared(adamw_of, before=hook)
    hook(*pair.both[0])
    hook(*pair.both[1])
    assert same_bits(*(train(*each) for each in pair.both))
    assert pair.optimizer.param_groups[0]["calls"] == 4 * 4 * 2 * LAYERS
    pair.check()


def test_schedulers_of_before_and_after_find_that_steps_are_taken() -> None:
    schedulers: list[Any] = []

    def schedule(model: nn.Module, optimizer: Optimizer) -> None:
        schedulers.append(lr_scheduler.ExponentialLR(optimizer, 0.5))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = prepared(adamw_of, before=schedule)
        for each in pair.both:
            schedule(*each)
        for number in range(3):
            assert same_bits(*(train(*each, range(number, number + 1)) for each in pair.both))
            for scheduler in schedulers:
                scheduler.step()
        pair.check()
        penstock.restore(pair.model)
        assert same_bits(*(train(*each) for each in pair.both))
        penstock.training.prepare(
            pair.model, pair.optimizer, cap="1MiB", device="cpu", page_size="64KiB"
        )
        assert same_bits(*(train(*each) for each in pair.both))
        pair.check()


def test_optimizers_and_models_are_copied_as_ordinary_ones() -> None:
    pair = prepared(adamw_of)
    for each in pair.both:
        train(*each)
        loss_of(each[0], 9).backward()
    for copied in (copy.deepcopy, lambda both: torch.load(saved(both), weights_only=False)):
        theirs, (model, optimizer) = (copied(each) for each in pair.both)
        assert penstock.manager_of(model) is None
        assert same_bits(values(model, optimizer), values(*theirs))
        for tensor in paged_tensors(model, optimizer):
            assert not torch_dispatch.is_keyed(tensor)
    pair.check()


@pytest.mark.parametrize("name", ["AdamW", "AdamW, foreach", "AdamW, fused"])
def test_steps_bring_in_what_they_need_once(name: str) -> None:
    """Weights come for the forward pass, for backward and for the step; gradients and states."""
    pair = prepared(OPTIMIZERS[name])
    total = 4 * sum(each.nbytes for each in pair.model.parameters())
    moved = [0]
    for number in range(12):
        train(*pair.both[1], range(number, number + 1))
        moved.append(pair.stats.loaded_bytes)
    passes = [after - before for before, after in pairwise(moved)]
    assert max(passes) < 4 * total  # the first ones bring in some of it too soon
    assert passes[-1] < 5 / 4 * total  # a third stays


# ---- saving and loading ----------------------------------------------------------------------


def saved(what: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW, foreach", "AdamW, fused", "Adafactor"])
def test_training_resumes_from_state_dicts_with_the_same_bits(name: str, pager: str) -> None:
    pair = prepared(OPTIMIZERS[name], pager=pager)
    for each in pair.both:
        train(*each, range(2))
    files = [[saved(part.state_dict()) for part in each] for each in pair.both]
    wanted = train(*pair.both[0], range(2, 4))
    for from_ours in (True, False):
        fresh = prepared(OPTIMIZERS[name], pager=pager)  # into which both are loaded
        train(*fresh.both[from_ours], range(5, 6))  # one has states already
        for model, optimizer in fresh.both:
            for part, file in zip((model, optimizer), files[from_ours], strict=True):
                file.seek(0)
                part.load_state_dict(torch.load(file))
        for each in fresh.both:
            assert same_bits(train(*each, range(2, 4)), wanted)
            assert same_bits(values(*each), values(*pair.both[0]))
        fresh.check()


def test_what_state_dicts_share_with_optimizers_is_as_in_plain_torch() -> None:
    pair = prepared(adamw_of)
    shared = []
    for each in pair.both:
        train(*each, range(1))
        before = each[1].state_dict()  # its tensors are those of the optimizer
        other = copy.deepcopy(before)
        train(*each, range(1, 2))
        after = copy.deepcopy(before)
        each[1].load_state_dict(other)  # the optimizer has others now
        train(*each, range(2, 3))
        shared.append(copy.deepcopy([before, after, other]))
        each[1].load_state_dict(each[1].state_dict())
        del before, other  # whose places were taken as long as they were there
        train(*each, range(3, 4))
    assert same_bits(shared[0], shared[1])
    pair.check()


def test_states_of_another_dtype_are_converted_on_their_way_in() -> None:
    """As those are put in place at once that torch would copy to the device."""
    pair = prepared(adamw_of)
    for each in pair.both:
        train(*each)
    given = copy.deepcopy(pair.plain_optimizer.state_dict())
    for states in given["state"].values():
        states["exp_avg"] = states["exp_avg"].double() / 3
        states["exp_avg_sq"] = states["exp_avg_sq"].t() / 3
    kept = copy.deepcopy(given)
    held = pair.optimizer.state_dict()["state"]
    before = copy.deepcopy(held)
    for _, optimizer in pair.both:
        optimizer.load_state_dict(copy.deepcopy(given))
    assert same_bits(given, kept)
    assert same_bits(values(*pair.both[1]), values(*pair.both[0]))
    assert same_bits(*(train(*each) for each in pair.both))
    assert same_bits(copy.deepcopy(held), before)
    del held  # whose places were taken as long as it was there
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


def test_what_somebody_keeps_is_not_moved_while_others_read_it() -> None:
    """Another thread reads old gradients while new ones come; its address must stay good."""
    pair = prepared(adamw_of)
    model, optimizer = pair.both[1]
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    kept = [parameter.grad for parameter in model.parameters()]
    addresses = [each.untyped_storage().data_ptr() for each in kept if each is not None]
    before = copy.deepcopy(kept)
    optimizer.zero_grad()
    train(model, optimizer, range(2, 5))
    assert addresses == [each.untyped_storage().data_ptr() for each in kept if each is not None]
    assert same_bits(copy.deepcopy(kept), before)
    del kept
    loss_of(model, 6).backward()
    assert all(torch_dispatch.is_keyed(parameter.grad) for parameter in model.parameters())


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    pair = prepared(adamw_of)
    for each in pair.both:
        train(*each)
    good = pair.optimizer.state_dict()
    other = copy.deepcopy(good)
    other["param_groups"][0]["params"] = other["param_groups"][0]["params"][1:]
    with pytest.raises(ValueError, match="size of optimizer's group"):
        pair.optimizer.load_state_dict(other)
    for name, value in (("max_exp_avg_sq", torch.ones(WIDTH)), ("exp_avg", torch.ones(3))):
        other = copy.deepcopy(good)
        other["state"][1][name] = value
        with pytest.raises(ModelError, match=f"(?s){name}.*penstock.restore"):
            pair.optimizer.load_state_dict(other)
    pair.check()
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


def test_an_optimizer_that_has_stepped_can_be_prepared() -> None:
    def begin(model: nn.Module, optimizer: Optimizer) -> None:
        train(model, optimizer, range(7, 9))

    pair = prepared(OPTIMIZERS["SGD, momentum"], before=begin)
    pair.check()
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


# ---- going back ------------------------------------------------------------------------------


@pytest.mark.parametrize("pager", PAGERS)
def test_restore_gives_back_both_with_all_they_have(pager: str) -> None:
    pair = prepared(adamw_of, pager=pager)
    for each in pair.both:
        train(*each)
        loss_of(each[0], 9).backward()
    held = [[parameter.grad for parameter in model.parameters()] for model, _ in pair.both]
    kept = [optimizer.state_dict()["state"] for _, optimizer in pair.both]  # shared with it
    assert penstock.restore(pair.model) is pair.model
    assert penstock.manager_of(pair.model) is None
    assert "step" not in vars(pair.optimizer)
    for tensor in paged_tensors(pair.model, pair.optimizer):
        assert not torch_dispatch.is_keyed(tensor)
    assert same_bits(values(*pair.both[1]), values(*pair.both[0]))
    assert same_bits(*(train(*each) for each in pair.both))
    assert same_bits(values(*pair.both[1]), values(*pair.both[0]))
    assert same_bits(*copy.deepcopy(held))
    assert same_bits(*copy.deepcopy(kept))
    penstock.training.prepare(
        pair.model, pair.optimizer, cap="700KiB", device="cpu", pager=pager, page_size="64KiB"
    )
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


# ---- errors ----------------------------------------------------------------------------------


def test_an_error_in_backward_leaves_all_usable() -> None:
    pair = prepared(adamw_of)
    for model, optimizer in pair.both:
        train(model, optimizer)

        def fail(gradient: torch.Tensor) -> None:
            raise ZeroDivisionError("in the midst")

        hook = model[12].weight.register_hook(fail)  # type: ignore[index]
        with pytest.raises(ZeroDivisionError, match="in the midst"):
            loss_of(model, 9).backward()
        hook.remove()
    gradients = [each.grad for each in pair.model.parameters()]
    assert any(each is None for each in gradients) and any(each is not None for each in gradients)
    pair.check()
    for _, optimizer in pair.both:
        optimizer.zero_grad()
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


def test_an_error_in_a_step_leaves_all_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = prepared(adamw_of)
    for each in pair.both:
        train(*each)
        loss_of(each[0], 4).backward()
    groups = pair.optimizer.param_groups
    with monkeypatch.context() as patch:
        patch.setattr(PagedStates, "settle", lambda self, run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pair.optimizer.step()
    assert pair.optimizer.param_groups is groups
    pair.optimizer.load_state_dict(copy.deepcopy(pair.plain_optimizer.state_dict()))
    pair.model.load_state_dict(pair.plain.state_dict())
    pair.check()
    for each in pair.both:
        each[1].step()
        each[1].zero_grad()
    assert same_bits(*(train(*each) for each in pair.both))
    pair.check()


def more_momentum(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["momentum"] = 0.9


def more_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": [model[-2].weight], "momentum": 0.9})  # type: ignore[index]


@pytest.mark.parametrize("change", [more_momentum, more_parameters])
def test_a_step_that_needs_other_states_is_refused_before_it_begins(
    change: Callable[[nn.Module, Optimizer], None],
) -> None:
    """Half of it done would be done twice when it is repeated."""

    def sgd(model: nn.Module) -> Optimizer:
        return torch.optim.SGD(list(model.parameters())[:-2], lr=0.1)

    pair = prepared(sgd, cap=1 << 20)
    for model, optimizer in pair.both:
        train(model, optimizer)
        change(model, optimizer)
        loss_of(model, 4).backward()
    before = values(pair.model, pair.optimizer)
    with pytest.raises(ModelError, match=r"'momentum_buffer' for .*, for which no room was made"):
        pair.optimizer.step()
    assert same_bits(values(pair.model, pair.optimizer), before)
    penstock.restore(pair.model)
    for _, optimizer in pair.both:
        optimizer.step()
    assert same_bits(values(*pair.both[1]), values(*pair.both[0]))


@pytest.mark.filterwarnings("ignore")  # dynamo's
@pytest.mark.parametrize("part", ["backward", "step", "all"])
def test_compiled_steps_have_the_bits_of_those_of_plain_torch(part: str) -> None:
    """Gradients of a compiled graph stay in ordinary memory."""
    pair = prepared(adamw_of, cap=1 << 20)
    losses = []
    for model, optimizer in pair.both:
        torch._dynamo.reset()

        def backward(number: int, model: nn.Module = model) -> torch.Tensor:
            loss = loss_of(model, number)
            loss.backward()
            return loss.detach()

        def whole(number: int, optimizer: Optimizer = optimizer) -> torch.Tensor:
            loss = backward(number)
            optimizer.step()
            return loss

        compiled = {"backward": backward, "step": optimizer.step, "all": whole}
        call = torch.compile(compiled[part], backend="aot_eager")
        for number in range(3):
            if part == "all":
                losses.append(call(number))
            else:
                losses.append((call if part == "backward" else backward)(number))
                (call if part == "step" else optimizer.step)()
            optimizer.zero_grad()
    assert same_bits(losses[:3], losses[3:])
    assert same_bits(values(*pair.both[1]), values(*pair.both[0]))


def test_hooks_that_take_gradients_leave_none_to_page() -> None:
    def take(model: nn.Module, optimizer: Optimizer) -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_take)

    def _take(parameter: torch.Tensor) -> None:
        parameter.data.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]
        parameter.grad = None

    pair = prepared(adamw_of, before=take)
    for each in pair.both:
        loss_of(each[0], 0).backward()
    pair.check()


def test_what_cannot_be_paged_is_refused_before_anything_changes() -> None:
    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    def refused(make: Callable[[nn.Module], Any], match: str, kind: Any = ModelError) -> None:
        model = network()
        optimizer = make(model)
        before = values(model, optimizer) if isinstance(optimizer, Optimizer) else None
        with pytest.raises(kind, match=match):
            penstock.training.prepare(model, optimizer, cap="1MiB", device="cpu", page_size="64KiB")
        assert penstock.manager_of(model) is None
        if before is not None:
            assert same_bits(values(model, optimizer), before)
            assert not any(torch_dispatch.is_keyed(each) for each in model.parameters())

    def replaced(model: nn.Module) -> Optimizer:
        optimizer = of(O.SGD)(model)
        optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
        return optimizer

    def with_gradients(model: nn.Module) -> Optimizer:
        loss_of(model, 0).backward()
        return of(O.SGD)(model)

    refused(of(O.LBFGS), "LBFGS steps on all parameters at once")
    refused(of(O.SparseAdam), "sparse gradients")
    refused(of(Mine), "Mine is not an optimizer of torch.optim")
    refused(of(O.Adam, differentiable=True), "differentiable=True in parameter group 0")
    refused(lambda _: adamw(network().parameters()), "parameter 0 of group 0 of the AdamW.*128")
    refused(lambda _: "adam", "is Optimizer, not str", TypeError)
    refused(replaced, "SGD is not an optimizer of torch.optim, or has a step of its own")
    refused(with_gradients, "has a gradient: call model.zero_grad")
    pair = prepared(adamw_of)
    with pytest.raises(ModelError, match="offloaded already"):
        penstock.training.prepare(pair.model, pair.optimizer, cap="1MiB", device="cpu")
    lazy = nn.LazyLinear(3)
    with pytest.raises(ModelError, match=r"(?i)lazy"):
        penstock.training.prepare(lazy, of(O.SGD)(lazy), cap="1MiB", device="cpu")
    capturable = of(O.Adam)(network())
    capturable.param_groups[0]["capturable"] = True
    refused(lambda _: capturable, "capturable=True")


def test_a_cap_that_is_too_small_is_refused_before_anything_changes() -> None:
    model = network()
    optimizer = adamw_of(model)
    before = values(model, optimizer)
    with pytest.raises(CapExceededError, match="raise it"):
        penstock.training.prepare(
            model, optimizer, cap="64KiB", device="cpu", pager="frames", page_size="64KiB"
        )
    assert penstock.manager_of(model) is None and "step" not in vars(optimizer)
    assert same_bits(values(model, optimizer), before)


def test_gradients_that_cannot_be_paged_are_refused_in_backward() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(WIDTH, WIDTH, sparse=True)
            self.rest = mlp(*[WIDTH] * 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.rest(self.table(torch.arange(4)) + x)
            return out

    model = Table()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penstock.training.prepare(model, optimizer, cap="1MiB", device="cpu", page_size="64KiB")
    with pytest.raises(ModelError, match=r"gradient of table.weight is sparse"):
        loss_of(model, 0).backward()
    model.table.sparse = False
    optimizer.zero_grad()
    train(model, optimizer)
    with pytest.raises(ModelError, match="create_graph=True"):
        loss_of(model, 0).backward(create_graph=True)


def test_what_comes_after_preparing_is_refused_in_the_step() -> None:
    pair = prepared(adamw_of)
    pair.optimizer.add_param_group({"params": [late := nn.Parameter(torch.ones(3))]})
    late.sum().backward()
    loss_of(pair.model, 0).backward()
    before = values(pair.model, pair.optimizer)
    with pytest.raises(ModelError, match=r"parameter 0 of group 1.*prepare again"):
        pair.optimizer.step()
    assert same_bits(values(pair.model, pair.optimizer), before)
    late.grad = None
    pair.optimizer.step()
    pair = prepared(of(O.SGD, lr=0.1))
    pair.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ModelError, match=r"'momentum_buffer' for '0.weight'.*prepare again"):
        train(pair.model, pair.optimizer)


def test_the_report_has_a_row_for_each_kind() -> None:
    pair = prepared(adamw_of)
    train(*pair.both[1])
    nbytes = sum(each.nbytes for each in pair.model.parameters())
    model = pair.stats.models["model"]
    assert model.nbytes == nbytes
    assert dict(model.beside) == dict.fromkeys(("gradient", "exp_avg", "exp_avg_sq"), nbytes)
    report = str(pair.stats).splitlines()
    for kind in model.beside:
        assert any(line.startswith(f"    {kind}: ") for line in report)
    manager = penstock.manager_of(pair.model)
    assert manager is not None
    assert "exp_avg_sq of 0.weight" in manager.schedule("model")
    assert pair.stats.cap * 3 <= 4 * nbytes and nbytes > 8 * 64 * KIB
