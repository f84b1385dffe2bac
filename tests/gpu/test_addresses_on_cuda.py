"""Kernels on a real GPU that take addresses of paged tensors: Triton's, registered or not, and
those that inductor makes."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn

import penstock

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

WIDTH = 1024  # a weight is 4 MiB
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


@pytest.fixture(params=["managed", "frames"])
def pager(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def doubled(weight):
    triton = pytest.importorskip("triton")
    from python.triton_double import double

    made = torch.empty(weight.shape, device="cuda")
    double[(triton.cdiv(weight.numel(), 1024),)](weight, made, weight.numel(), BLOCK=1024)
    return made


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ doubled(weight).T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ doubled(weight), 2 * grad.T @ x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x):
        return Doubled.apply(x, self.weight)


def two(pager, cap, make):
    plain = nn.Sequential(*(make() for _ in range(10)))
    paged = penstock.offload(copy.deepcopy(plain), cap=cap, pager=pager, page_size="2MiB")
    return plain.cuda(), paged, X.cuda()


@pytest.mark.parametrize("cap", ["24MiB", "96MiB"])
def test_triton_kernels_find_weights(pager, cap):
    plain, paged, x = two(pager, cap, Layer)
    for _ in range(4):
        outputs = []
        for model in (plain, paged):
            model.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
        assert torch.equal(*outputs)
    assert all(map(torch.equal, plain.parameters(), paged.parameters()))


@pytest.mark.parametrize("cap", ["24MiB", "96MiB"])
def test_registered_triton_kernels_find_weights(pager, cap):
    plain, paged, x = two(pager, cap, lambda: nn.Linear(WIDTH, WIDTH, bias=False))

    def function(module, x):
        return nn.functional.linear(x, doubled(module.weight))

    for layer in plain:
        layer.forward = MethodType(function, layer)
    manager = penstock.manager_of(paged)
    (name,) = manager.stats().models
    with manager.register_kernel("[0-9]", function, model=name), torch.no_grad():
        for _ in range(4):
            assert torch.equal(plain(x), paged(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x))) * self.gate.sum(0)


def test_kernels_of_inductor_find_weights(pager):
    plain, paged, x = two(pager, "40MiB", Block)
    run, run_paged = torch.compile(plain), torch.compile(paged)
    for _ in range(3):
        outputs = []
        for model, call in ((plain, run), (paged, run_paged)):
            model.zero_grad()
            outputs.append(call(x))
            outputs[-1].square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
        assert torch.equal(*outputs)
    assert all(map(torch.equal, plain.parameters(), paged.parameters()))


def test_an_array_interface_is_refused():
    _, paged, _ = two("frames", "24MiB", Layer)
    with pytest.raises(penstock.ModelError, match="not to be shared"):
        _ = paged[0].weight.__cuda_array_interface__
