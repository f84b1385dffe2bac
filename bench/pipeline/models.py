"""The four modules of a video pipeline, in bf16, in the shapes of real ones.

The text encoder is an encoder like T5's, the denoiser a transformer like Wan's (self-attention,
cross-attention to the text, modulation by the time), and the upscalers are residual convolutions:
over the picture, which is doubled in height and width, and over the time, which is doubled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

STAGES = ("encoder", "denoiser", "spatial", "temporal")
_GROUPS = 32
_PATCH = 2
_TIME_WIDTH = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the modules, and of what runs through them: by default those of the benchmark.

    Parameters
    ----------
    text_tokens, frames, side
        Tokens of a prompt; frames and edge of the latents, in latent pixels.
    """

    vocabulary: int = 96_000
    text_width: int = 4096
    text_inner: int = 10_240
    text_layers: int = 24
    text_heads: int = 64
    text_tokens: int = 128
    width: int = 5120
    inner: int = 13_824
    layers: int = 40
    heads: int = 40
    channels: int = 16
    frames: int = 2
    side: int = 16
    spatial_width: int = 1024
    spatial_layers: int = 20
    temporal_width: int = 1536
    temporal_layers: int = 24

    def scaled(self, factor: float) -> Shape:
        """Return the same with another depth."""
        depths = ("text_layers", "layers", "spatial_layers", "temporal_layers")
        return replace(
            self, **{name: max(2, round(getattr(self, name) * factor)) for name in depths}
        )


SMALL = Shape(
    vocabulary=512,
    text_width=256,
    text_inner=512,
    text_layers=4,
    text_heads=4,
    text_tokens=8,
    width=256,
    inner=704,
    layers=8,
    heads=4,
    side=4,
    spatial_width=64,
    spatial_layers=3,
    temporal_width=64,
    temporal_layers=3,
)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Attend by heads: (batch, tokens, width) each, and so the result."""
    parts = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention with four projections, and norms of queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Attend from `x` to `context`."""
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context))
        return self.o(_attend(q, k, self.v(context), self.heads))


class EncoderLayer(nn.Module):
    """Self-attention and a gated feed-forward network, each behind a norm."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode by one more layer."""
        y = self.norm1(x)
        x = x + self.o(_attend(self.q(y), self.k(y), self.v(y), self.heads))
        y = self.norm2(x)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


class Encoder(nn.Module):
    """Token ids (batch, tokens) to text (batch, tokens, text_width)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.text_width)
        self.blocks = nn.ModuleList(
            EncoderLayer(shape.text_width, shape.text_inner, shape.text_heads)
            for _ in range(shape.text_layers)
        )
        self.norm = nn.RMSNorm(shape.text_width, 1e-6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Encode a prompt."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DenoiserLayer(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, modulated by the time."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(6, width))
        self.norm1, self.norm3 = (
            nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(2)
        )
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.attention = Attention(width, heads)
        self.cross = Attention(width, heads)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Denoise by one more layer; `time` is (batch, 6, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).split(1, dim=1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attention(y, y) * gate1
        x = x + self.cross(self.norm2(x), text)
        y = self.norm3(x) * (1 + scale2) + shift2
        return x + self.down(F.gelu(self.up(y), approximate="tanh")) * gate2


class Denoiser(nn.Module):
    """Latents (batch, channels, frames, side, side), times and text to a velocity."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        patch = shape.channels * _PATCH**2
        width = shape.width
        self.embed = nn.Linear(patch, width)
        self.text = nn.Linear(shape.text_width, width)
        self.time1, self.time2 = nn.Linear(_TIME_WIDTH, width), nn.Linear(width, width)
        self.time6 = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            DenoiserLayer(width, shape.inner, shape.heads) for _ in range(shape.layers)
        )
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, patch)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Predict the velocity of latents at times (batch)."""
        batch, channels, frames, height, width = x.shape
        x = x.unflatten(4, (-1, _PATCH)).unflatten(3, (-1, _PATCH))
        x = self.embed(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))
        t = self.time6(F.silu(self.time2(F.silu(self.time1(_waves(time).to(x.dtype))))))
        t = t.unflatten(1, (6, -1))
        text = F.gelu(self.text(text))
        for block in self.blocks:
            x = block(x, t, text)
        x = self.head(self.norm(x))
        x = x.view(batch, frames, height // _PATCH, width // _PATCH, channels, _PATCH, _PATCH)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels, frames, height, width)


def _waves(time: torch.Tensor) -> torch.Tensor:
    """Embed times (batch) in sines and cosines: (batch, 256)."""
    half = _TIME_WIDTH // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32)
    angles = time.float()[:, None] * 1000 * torch.exp(-math.log(10_000) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ConvolutionLayer(nn.Module):
    """Two convolutions beside which the input goes through."""

    def __init__(self, convolution: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, width), nn.GroupNorm(_GROUPS, width)
        self.conv1, self.conv2 = convolution(), convolution()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refine."""
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class Upscaler(nn.Module):
    """Residual convolutions between one that widens and one whose channels the result is made of.

    Parameters
    ----------
    convolution
        `nn.Conv1d` or `nn.Conv2d`.
    factor
        How many channels of the last one make one of the result.
    """

    def __init__(
        self,
        convolution: type[nn.Conv1d] | type[nn.Conv2d],
        channels: int,
        width: int,
        layers: int,
        factor: int,
    ) -> None:
        super().__init__()
        self.embed = convolution(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            ConvolutionLayer(lambda: convolution(width, width, 3, padding=1), width)
            for _ in range(layers)
        )
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.head = convolution(width, channels * factor, 3, padding=1)

    def refine(self, x: torch.Tensor) -> torch.Tensor:
        """Run through all convolutions."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Spatial(Upscaler):
    """Latents (1, channels, frames, side, side) to twice the side, each frame by itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(nn.Conv2d, shape.channels, shape.spatial_width, shape.spatial_layers, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Upscale."""
        y = F.pixel_shuffle(self.refine(x[0].transpose(0, 1)), 2)
        return y.transpose(0, 1)[None]


class Temporal(Upscaler):
    """Latents (1, channels, frames, side, side) to twice the frames, each pixel by itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(nn.Conv1d, shape.channels, shape.temporal_width, shape.temporal_layers, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Upscale."""
        _, channels, frames, height, width = x.shape
        y = self.refine(x[0].permute(2, 3, 0, 1).reshape(-1, channels, frames))
        y = y.view(height, width, channels, 2, frames)
        return y.permute(2, 4, 3, 0, 1).reshape(1, channels, 2 * frames, height, width)


_CLASSES: dict[str, type[nn.Module]] = {
    "encoder": Encoder,
    "denoiser": Denoiser,
    "spatial": Spatial,
    "temporal": Temporal,
}


def builder(stage: str, shape: Shape) -> Callable[[], nn.Module]:
    """Return what builds a stage's module, as `MemoryManager.register` takes it."""
    return lambda: _CLASSES[stage](shape).to(torch.bfloat16).eval().requires_grad_(False)
