"""Layers of a checkpoint under a cap, by a function of one's own: there is no module.

python examples/layers.py --cap 16MiB
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import penstock

PATTERN = "model.layers.{}"


def layer(x: torch.Tensor, weights: Mapping[str, torch.Tensor], index: int) -> torch.Tensor:
    """Pass `x`, of shape (rows, width), through one layer."""
    hidden = functional.silu(functional.linear(x, weights["up.weight"]))
    return functional.layer_norm(
        x + functional.linear(hidden, weights["down.weight"]), x.shape[-1:], weights["norm.weight"]
    )


def write_checkpoint(path: Path, width: int, depth: int) -> None:
    """Write random layers; yours is the checkpoint of a real model."""
    state = {}
    for index in range(depth):
        name = PATTERN.format(index)
        state[f"{name}.up.weight"] = torch.randn(2 * width, width) / width**0.5
        state[f"{name}.down.weight"] = torch.randn(width, 2 * width) / width**0.5
        state[f"{name}.norm.weight"] = torch.ones(width)
    save_file(state, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all layers of a checkpoint under a cap and from ordinary memory, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cap", default="16MiB", help="device memory for weights")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=8)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(2, options.width, device=device)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        path = Path(directory, "model.safetensors")
        write_checkpoint(path, options.width, options.depth)
        with penstock.LayerStreamer(path, PATTERN, cap=options.cap, device=device) as layers:
            found = layers.run_pass(x, layer)
            print(layers.report())
        state, wanted = load_file(path, device), x
        for index in range(options.depth):
            head = PATTERN.format(index) + "."
            names = [name for name in state if name.startswith(head)]
            weights = {name.removeprefix(head): state[name] for name in names}
            wanted = layer(wanted, weights, index)
    print("the same bits:", torch.equal(found, wanted))


if __name__ == "__main__":
    main()
