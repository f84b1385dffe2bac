"""A module of one's own under a cap: whatever it does, its weights stream while it does it.

python examples/own_module.py --cap 16MiB
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import penstock


class Net(nn.Module):
    """What somebody wrote, without a thought of Penstock."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass `x`, of shape (rows, width), through all layers."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a module as it is and under a cap, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cap", default="16MiB", help="device memory for weights")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=12)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Net(options.width, options.depth).to(device)
    x = torch.ones(2, options.width, device=device)
    with torch.no_grad():
        wanted = model(x)
        model = penstock.offload(model, cap=options.cap, device=device)  # the only line it takes
        print("the same bits:", torch.equal(model(x), wanted))
    print(penstock.manager_of(model).report())


if __name__ == "__main__":
    main()
