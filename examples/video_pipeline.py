"""A video pipeline of four stages under one cap: encode, denoise, upscale in space and in time.

python examples/video_pipeline.py --cap 24MiB --steps 8

The modules are small stand-ins with random weights. With real ones, the names of their checkpoints
go where the state dicts are; the rest stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import penstock


class Encoder(nn.Module):
    """Tokens (prompts, tokens) to text (prompts, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(12))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode prompts."""
        x = self.embed(tokens).mean(1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Denoiser(nn.Module):
    """Frames (frames, width), the time and a text (width) to a velocity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(8)
        )

    def forward(self, x: torch.Tensor, time: float, text: torch.Tensor) -> torch.Tensor:
        """Predict where the frames are to go."""
        y = x + time
        for block in self.blocks:
            y = y + torch.tanh(block(y + text))
        return y


class Upscaler(nn.Module):
    """Rows of an axis to twice as many: pixels of a frame, or frames of a video."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Double the last axis."""
        return x.repeat_interleave(2, -1) + torch.tanh(self.layers(x))


def make_clip(mm: penstock.MemoryManager, prompts: torch.Tensor, steps: int) -> torch.Tensor:
    """Make a clip from a prompt and what it is not to be, tokens (2, tokens)."""
    with mm.keep_resident("encoder"):  # from one prompt to the next
        texts = []
        for prompt in prompts:
            with mm.use("encoder") as encode:
                texts.append(encode(prompt[None])[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, len(texts[0]), generator=generator).to(mm.device)
    with mm.use("denoiser") as denoise:  # larger than the cap: what does not fit streams
        for step in range(steps):
            wanted, unwanted = (denoise(x, 1 - step / steps, text) for text in texts)
            x = x - (unwanted + 2 * (wanted - unwanted)) / steps
    with mm.guest("spatial") as upscale:  # in what is not reserved, and gone afterwards
        x = upscale(x)
    with mm.use("temporal") as upscale:  # it is there already
        return upscale(x.T).T


def main(arguments: Sequence[str] | None = None) -> None:
    """Make two clips, and say what was moved for the second one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cap", default="24MiB", help="device memory for weights")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    width = options.width
    builders = {
        "encoder": lambda: Encoder(width),
        "denoiser": lambda: Denoiser(width),
        "spatial": lambda: Upscaler(width),
        "temporal": lambda: Upscaler(16),
    }
    mm = penstock.MemoryManager(cap=options.cap, pager="frames")
    for name, builder in builders.items():
        mm.register(name, builder, builder().state_dict())
    mm.reserve("temporal")  # small, and used for each clip: it stays
    tokens = torch.randint(0, 1000, (2, 8)).to(mm.device)
    with torch.no_grad():
        first = make_clip(mm, tokens, options.steps)
        before = {name: model.memory.loaded_bytes for name, model in mm.stats().models.items()}
        second = make_clip(mm, tokens, options.steps)
    for name, model in mm.stats().models.items():
        moved = (model.memory.loaded_bytes - before[name]) / 2**20
        print(f"{name}: {model.nbytes / 2**20:.1f} MiB, moved {moved:.1f} MiB for the second clip")
    print(f"{len(second)} frames of {second.shape[1]}, the same bits:", torch.equal(first, second))
    print(mm.report())


if __name__ == "__main__":
    main()
