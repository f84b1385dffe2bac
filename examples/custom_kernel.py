"""A kernel of one's own in place of a module's forward, with the weights in place.

python examples/custom_kernel.py --cap 8MiB

On a GPU where Triton is installed, the kernel is one of Triton's; else it is a function of torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import nn

import penstock

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class Scale(nn.Module):
    """Multiplies by weights and adds biases, in two operations; made to be fused."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.bias = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale `x`, of shape (rows, width)."""
        return x * self.weight + self.bias


def scale_by_torch(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Do it in one operation."""
    return torch.addcmul(module.bias, x, module.weight)


if triton is not None:

    @triton.jit
    def scale_kernel(x, weight, bias, result, width, count, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, D103
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        scale = tl.load(weight + at % width, mask=inside)
        shift = tl.load(bias + at % width, mask=inside)
        tl.store(result + at, tl.load(x + at, mask=inside) * scale + shift, mask=inside)

    def scale_by_triton(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Do it in one kernel, which reads the weights by their addresses."""
        x = x.contiguous()
        result = torch.empty_like(x)
        grid = (triton.cdiv(x.numel(), 1024),)
        width = x.shape[-1]
        scale_kernel[grid](x, module.weight, module.bias, result, width, x.numel(), BLOCK=1024)
        return result


def choose(device: torch.device) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Return the kernel for a device."""
    return scale_by_triton if triton is not None and device.type == "cuda" else scale_by_torch


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a model with its own forward, with the kernel, and with its own again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cap", default="8MiB", help="device memory for weights")
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args(arguments)

    width = options.width

    def build() -> nn.Module:
        layers = [(nn.Linear(width, width), Scale(width)) for _ in range(12)]
        return nn.Sequential(*(module for pair in layers for module in pair))

    mm = penstock.MemoryManager(cap=options.cap)
    mm.register("net", build, build().state_dict())
    kernel = choose(mm.device)
    x = torch.ones(4, width, device=mm.device)
    with torch.no_grad(), mm.use("net") as model:
        wanted = model(x)
        with mm.register_kernel(Scale, kernel):  # or a pattern of names: "*.scale"
            found = model(x)
        print(f"{kernel.__name__}: near:", torch.allclose(found, wanted, rtol=1e-3, atol=1e-3))
        print("afterwards the same bits:", torch.equal(model(x), wanted))
    print(mm.report())


if __name__ == "__main__":
    main()
