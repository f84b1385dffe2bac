"""Skeletons: modules as their builder makes them, but without memory for parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from penstock.errors import ModelError
from penstock.loading.skeleton import build_skeleton, set_payload
from python.support import build, run_python, state_of, within

REGISTER = nn.Module.register_parameter


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    yield
    left = nn.Module.register_parameter
    nn.Module.register_parameter = REGISTER  # whatever happens, other tests are not to suffer
    assert left is REGISTER
    assert not nn.Linear(2, 2).weight.is_meta


class Rich(nn.Module):
    """All ways to hold a tensor, with what a constructor computes from others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.items = nn.ParameterList([torch.ones(2), nn.Parameter(torch.ones(3))])
        self.named = nn.ParameterDict({"a": torch.ones(4), "b": nn.Parameter(torch.ones(5))})
        self.register_parameter("nothing", None)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(4.0) ** 2, persistent=False)
        self.register_buffer("mask", torch.ones(3, 3).tril().bool())
        self.register_buffer("none", None)


def test_parameters_keep_everything_but_their_memory() -> None:
    skeleton, real = build_skeleton(Rich), Rich()
    ours, theirs = dict(skeleton.named_parameters()), dict(real.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert parameter.is_meta, name
        assert type(parameter) is type(theirs[name])
        assert parameter.shape == theirs[name].shape
        assert parameter.dtype == theirs[name].dtype
        assert parameter.requires_grad == theirs[name].requires_grad
        assert parameter.is_leaf
    assert skeleton.nothing is None


def test_buffers_are_real_and_right() -> None:
    skeleton, real = build_skeleton(Rich), Rich()
    ours, theirs = dict(skeleton.named_buffers()), dict(real.named_buffers())
    assert list(ours) == list(theirs)
    for name, buffer in ours.items():
        assert buffer.device.type == "cpu"
        assert torch.equal(buffer, theirs[name]), name
    assert skeleton.state_dict().keys() == real.state_dict().keys()  # persistent or not
    assert skeleton.none is None


def test_model_of_many_times_the_memory_is_built() -> None:
    layers = 40
    skeleton = build_skeleton(
        lambda: nn.Sequential(*(nn.Linear(1 << 15, 40960, bias=False) for _ in range(layers)))
    )
    nbytes = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    assert nbytes == layers * (5 << 30) == 200 << 30
    assert all(p.is_meta for p in skeleton.parameters())


def test_parameter_larger_than_the_memory_is_built() -> None:
    skeleton = build_skeleton(lambda: nn.Linear(163840, 327680))
    assert skeleton.weight.is_meta
    assert skeleton.weight.numel() * 4 == 200 << 30


def test_initialization_is_not_run_on_memory() -> None:
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(5, 5))
            nn.init.normal_(self.weight)
            seen.append(self.weight)

    assert build_skeleton(Watching).weight is seen[0]
    assert seen[0].is_meta


@pytest.mark.parametrize(
    "fill",
    [
        nn.init.normal_,
        nn.init.kaiming_uniform_,
        nn.init.trunc_normal_,
        nn.init.xavier_uniform_,
        nn.init.orthogonal_,
        nn.init.zeros_,
        lambda weight: weight.data.normal_(),
    ],
)
def test_what_initializes_finds_a_parameter_and_buffers_get_their_values(
    fill: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(5, 5))
            assert fill(self.weight).shape == (5, 5)
            self.register_buffer("table", nn.init.constant_(torch.empty(3), 2.0).mul_(2))

    skeleton = build_skeleton(Filled)
    assert skeleton.weight.is_meta
    assert torch.equal(skeleton.table, torch.full((3,), 4.0))


# ---- ties --------------------------------------------------------------------------------------


class TiedByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def tied(self) -> list[nn.Parameter]:
        return [self.embedding.weight, self.head.weight]


class TiedBeforeRegistering(TiedByAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.embedding.weight = self.head.weight = nn.Parameter(torch.ones(5, 4))


class TiedInContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.ones(3))
        self.items = nn.ParameterList([shared, torch.ones(2), shared])
        self.named = nn.ParameterDict({"x": shared, "y": torch.ones(2)})

    def tied(self) -> list[nn.Parameter]:
        return [self.items[0], self.items[2], self.named["x"]]


@pytest.mark.parametrize("builder", [TiedByAttribute, TiedBeforeRegistering, TiedInContainers])
def test_tied_parameters_stay_one_object(builder: Callable[[], nn.Module]) -> None:
    skeleton = build_skeleton(builder)
    first, *others = skeleton.tied()
    assert others
    assert all(other is first for other in others)
    assert len(list(skeleton.parameters())) == len(list(builder().parameters()))


# ---- what parameters carry ---------------------------------------------------------------------


class Quantized(nn.Parameter):
    """A parameter with a class and facts of its own, as quantization libraries make them."""


class WithQuantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Quantized(torch.ones(4), requires_grad=False)
        self.weight.bits = 8
        later = nn.Parameter(torch.ones(2))
        later.shard = (0, 2)
        self.later = later
        self.later.after = "set when it was registered"


def test_classes_and_attributes_of_parameters_are_kept() -> None:
    skeleton = build_skeleton(WithQuantized)
    assert type(skeleton.weight) is Quantized
    assert skeleton.weight.bits == 8
    assert not skeleton.weight.requires_grad
    assert type(skeleton.later) is nn.Parameter
    assert (skeleton.later.shard, skeleton.later.after) == ((0, 2), "set when it was registered")


def test_new_payload_keeps_the_object_and_what_it_carries() -> None:
    module = WithQuantized()
    held, alias = module.weight, [module.weight]
    memory = torch.arange(4.0)
    set_payload(held, memory)
    assert module.weight is held
    assert type(held) is Quantized
    assert held.bits == 8
    assert not held.requires_grad
    assert alias[0].data_ptr() == memory.data_ptr()


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda make: make.__name__)
def test_recurrent_layers_hold_the_parameters_that_they_run_with(make: type[nn.RNNBase]) -> None:
    skeleton = build_skeleton(lambda: make(3, 4, num_layers=2, bidirectional=True))
    assert all(p.is_meta for p in skeleton.parameters())
    named = [getattr(skeleton, name) for name in skeleton._flat_weights_names]
    assert len(named) == 16
    assert all(ours is theirs for ours, theirs in zip(skeleton._flat_weights, named, strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
    ],
    ids=["weight norm", "spectral norm", "spectral norm, old form"],
)
def test_parametrized_layers_are_built(wrap: Callable[[nn.Module], nn.Module]) -> None:
    def builder() -> nn.Module:
        return wrap(nn.Linear(4, 3))

    skeleton, real = build_skeleton(builder), build(builder)
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in real.named_parameters()]
    assert skeleton.state_dict().keys() == state_of(real).keys()


def test_builder_may_change_dtype_and_mode() -> None:
    skeleton = build_skeleton(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half())
    assert {p.dtype for p in skeleton.parameters()} == {torch.float16}
    assert skeleton[1].running_var.dtype == torch.float16
    assert not build_skeleton(lambda: nn.Linear(2, 2).eval().requires_grad_(False)).training


# ---- modules that are skeletons already --------------------------------------------------------


def test_module_made_on_meta_is_taken_as_it_is() -> None:
    with torch.device("meta"):
        module = nn.TransformerEncoderLayer(8, 2)
    assert build_skeleton(module) is module


def test_builder_may_make_its_module_on_meta() -> None:
    def builder() -> nn.Module:
        with torch.device("meta"):
            return nn.Linear(3, 2)

    assert build_skeleton(builder).weight.is_meta


# ---- refusals ----------------------------------------------------------------------------------


def test_real_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match=r"2 parameters .* 'weight'.* pass a builder"):
        build_skeleton(nn.Linear(2, 2))
    module = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="2 parameters have memory"):
        build_skeleton(lambda: module)


def test_meta_buffers_are_refused_because_their_values_are_lost() -> None:
    with torch.device("meta"):
        module = Rich()
    with pytest.raises(ModelError, match=r"1 buffers are on meta \(first: 'table'\)"):
        build_skeleton(module)


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.LazyLinear(4), lambda: nn.Sequential(nn.LazyConv2d(4, 3)), nn.LazyBatchNorm1d],
    ids=["linear", "convolution", "norm"],
)
def test_lazy_modules_are_refused(make: Callable[[], nn.Module], on_meta: bool) -> None:
    with torch.device("meta" if on_meta else "cpu"), pytest.raises(ModelError):
        build_skeleton(make() if on_meta else make)


@pytest.mark.parametrize("result", [None, {}, nn.Linear, torch.ones(2)])
def test_builder_that_returns_no_module_is_refused(result: object) -> None:
    with pytest.raises(ModelError, match=rf"returned {type(result).__name__}, not a torch"):
        build_skeleton(lambda: result)


class Viewed(nn.Module):
    """Takes a view of its parameter, through autograd, before it registers it."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(4))
        self.view = weight.view(2, 2)
        self.weight = weight


def test_parameter_that_cannot_be_given_up_is_a_typed_error() -> None:
    with pytest.raises(ModelError, match="weight"):
        build_skeleton(Viewed)


# ---- the rest of the process -------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_builder_that_fails_leaves_torch_as_it_was(error: BaseException) -> None:
    def builder() -> nn.Module:
        nn.Linear(2, 2)
        raise error

    with pytest.raises(type(error)) as caught:
        build_skeleton(builder)
    assert caught.value is error
    assert nn.Module.register_parameter is REGISTER
    assert build_skeleton(lambda: nn.Linear(2, 2)).weight.is_meta  # and can be tried again


def test_other_threads_build_real_modules_meanwhile() -> None:
    inside, built = threading.Event(), threading.Event()

    def builder() -> nn.Module:
        inside.set()
        assert built.wait(30)
        return nn.Linear(4, 4)

    made: list[nn.Module] = []

    def other() -> None:
        assert inside.wait(30)
        made.append(nn.Linear(3, 3))
        built.set()

    thread = threading.Thread(target=other)
    thread.start()
    skeleton = within(60, lambda: build_skeleton(builder))
    thread.join()
    assert skeleton.weight.is_meta
    assert not made[0].weight.is_meta
    assert made[0](torch.ones(3)).isfinite().all()


def test_builders_in_several_threads_all_give_skeletons() -> None:
    start = threading.Barrier(4)
    skeletons: list[nn.Module] = []

    def work() -> None:
        start.wait(30)
        skeletons.append(build_skeleton(lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True)))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(skeletons) == 4
    assert all(p.is_meta for skeleton in skeletons for p in skeleton.parameters())


def test_builder_may_build_another_skeleton() -> None:
    said = run_python(
        """
from torch import nn
from penstock.loading.skeleton import build_skeleton

inner = []

def builder():
    inner.append(build_skeleton(lambda: nn.Linear(2, 2)))
    return nn.Linear(3, 3)

outer = build_skeleton(builder)
print(inner[0].weight.is_meta, outer.weight.is_meta, nn.Linear(1, 1).weight.is_meta)
""",
        seconds=30,
    )
    assert said.split() == ["True", "True", "False"]
