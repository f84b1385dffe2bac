"""Fuzz whole programs: a model in ordinary memory and its paged twin run the same one, bit by bit.

A trial draws from its seed the structure of a model (chains, branches, residuals, loops, parts that
are shared or picked by the data, early exits) over many kinds of operations that read weights, a
host tier, a pager, a page size and a cap, and a program of several actions: passes, training steps,
writes, exchanges, copies. Both models run the program. Whatever it returns, every weight, buffer
and gradient must have the same bits; what torch refuses for the plain model must be refused for the
twin with the same class of error; and all that holds once the model has been restored, too.

    python tests/fuzz/fuzz_models.py --seed 7                        # one trial, each action said
    python tests/fuzz/fuzz_models.py --seed 1 --trials 500 --jobs 2  # many, in worker processes
    python tests/fuzz/fuzz_models.py --seed 1 --trials 500 --plain   # judges this file: no paging

A trial that ends in `CapExceededError` is refused, not wrong; where more than 5 in 100 trials are,
the run fails, since the caps are drawn to be enough for the largest operation.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import io
import itertools
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

sys.path.insert(0, str(Path(__file__).parents[1]))

import penstock
from python.support import KIB, raw

Tensor = torch.Tensor

SLOWEST_ALLOWED = 120.0
BATCH = 25
MOST_REFUSED = 0.05
TOKENS = 6  # of the middle dimension of what models are given
ROWS = 96  # of embeddings
EXPERTS = 6


# ---- kinds of operations that read weights -------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A way to read weights: what makes them for a width, what it does to (batch, 6, width)."""

    make: Callable[[int], dict[str, Any]]
    run: Callable[[Any, Tensor], Tensor]
    writes: bool = False  # whether a pass writes to weights or buffers
    deferred: bool = True  # whether it can be built without memory, for weights from a file


KINDS: dict[str, Kind] = {}
Run = Callable[[Any, Tensor], Tensor]


def kind(name: str, make: Callable[[int], dict[str, Any]], **options: bool) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        KINDS[name] = Kind(make, run, **options)
        return run

    return add


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5)


def square(d: int) -> dict[str, Any]:
    return {"w": weight(d, d), "v": weight(d)}


def pair(d: int) -> dict[str, Any]:
    return {"a": nn.Linear(d, d), "b": nn.Linear(d, d)}


def one(make: Callable[[int], nn.Module]) -> Callable[[int], dict[str, Any]]:
    return lambda d: {"f": make(d)}


def picked(x: Tensor, count: int) -> int:
    """Choose by the data, so that other values take other paths."""
    return int(x.detach().double().nan_to_num(0, 0, 0).abs().sum().clamp(max=1e9) * 1000) % count


def ids_of(x: Tensor, count: int) -> Tensor:
    values = x.detach().float().sum(-1).nan_to_num(0, 0, 0).clamp(-1e3, 1e3)
    return (values * 37).long() % count


class Piece(nn.Module):
    """One kind of reading, around which is a residual that keeps values small."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.kind = name
        for key, value in KINDS[name].make(width).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(key, value, persistent=not key.startswith("passing"))
            else:
                setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.tanh(KINDS[self.kind].run(self, x).to(x.dtype))


for _name, _make in {
    "linear": lambda d: nn.Linear(d, d),
    "linear without bias": lambda d: nn.Linear(d, d, bias=False),
    "perceptron": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)),
    "layer norm": nn.LayerNorm,
    "rms norm": nn.RMSNorm,
    "rnn": lambda d: nn.RNN(d, d, nonlinearity="relu", batch_first=True),
    "gru": lambda d: nn.GRU(d, d // 2, bidirectional=True, batch_first=True),
    "lstm": lambda d: nn.LSTM(d, d // 2, 2, batch_first=True, bidirectional=True, dropout=0.1),
    "encoder layer": lambda d: nn.TransformerEncoderLayer(d, 4, 2 * d, batch_first=True),
    "encoder layer, norm first": lambda d: nn.TransformerEncoderLayer(
        d, 4, d, batch_first=True, norm_first=True, activation="gelu"
    ),
    "linear in bfloat16": lambda d: nn.Sequential(Cast(torch.bfloat16), nn.Linear(d, d).bfloat16()),
    "linear in half": lambda d: nn.Sequential(Cast(torch.float16), nn.Linear(d, d).half()),
    "linear in double": lambda d: nn.Sequential(Cast(torch.float64), nn.Linear(d, d).double()),
}.items():

    @kind(_name, one(_make))
    def _(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        return y[0] if isinstance(y, tuple) else y


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


# Modules over (batch, channels, ...): a token is a place.
for _name, _make, _writes in (
    ("conv1d", lambda d: nn.Conv1d(d, d, 3, padding=1, groups=2), False),
    ("conv1d by channel", lambda d: nn.Conv1d(d, d, 3, padding=1, groups=d), False),
    ("conv1d transposed", lambda d: nn.ConvTranspose1d(d, d, 3, padding=1, groups=4), False),
    ("prelu", nn.PReLU, False),
    ("group norm", lambda d: nn.GroupNorm(4, d), False),
    ("instance norm", lambda d: nn.InstanceNorm1d(d, affine=True), False),
    (
        "instance norm with statistics",
        lambda d: nn.InstanceNorm1d(d, affine=True, track_running_stats=True),
        True,
    ),
    ("batch norm", nn.BatchNorm1d, True),
    ("batch norm without weights", lambda d: nn.BatchNorm1d(d, affine=False), True),
    ("batch norm, cumulative", lambda d: nn.BatchNorm1d(d, momentum=None), True),
):

    @kind(_name, one(_make), writes=_writes)
    def _(m: Any, x: Tensor) -> Tensor:
        return m.f(x.mT).mT


for _name, _make in {
    "conv2d": lambda d: nn.Conv2d(d, d, 3, padding=1, groups=4),
    "conv2d, channels last": lambda d: nn.Conv2d(d, d, (1, 3), padding=(0, 1), groups=2).to(
        memory_format=torch.channels_last
    ),
    "conv2d transposed": lambda d: nn.ConvTranspose2d(d, d, 3, padding=1, groups=4),
    "conv3d": lambda d: nn.Conv3d(d, d, 3, padding=1, groups=8),
    "conv3d transposed": lambda d: nn.ConvTranspose3d(d, d, (1, 3, 3), padding=(0, 1, 1), groups=8),
}.items():

    @kind(_name, one(_make))
    def _(m: Any, x: Tensor) -> Tensor:
        form = (1, 2, 3) if "3d" in m.kind else (2, 3)
        return m.f(x.mT.unflatten(-1, form)).flatten(2).mT


@kind("batch norm in two dimensions", one(nn.BatchNorm2d), writes=True)
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(x.mT.unflatten(-1, (2, 3))).flatten(2).mT


@kind(
    "batch norm as a function", lambda d: {"v": weight(d), "r": torch.zeros(d), "s": torch.ones(d)}
)
def _(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x.mT, m.r, m.s, m.v, m.v, training=False).mT


@kind("lstm with projection", one(lambda d: nn.LSTM(d, d, proj_size=d // 2, batch_first=True)))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(x)[0].repeat(1, 1, 2)


@kind("lstm, packed", one(lambda d: nn.LSTM(d, d, batch_first=True)))
def _(m: Any, x: Tensor) -> Tensor:
    lengths = torch.arange(len(x)).remainder(TOKENS) + 1
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(m.f(packed)[0], True, total_length=TOKENS)[0]


@kind("rnn cell", one(lambda d: nn.RNNCell(d, d)))
def _(m: Any, x: Tensor) -> Tensor:
    state = None
    for token in x.unbind(1):
        state = m.f(token, state)
    return state[:, None]


KINDS["gru cell"] = Kind(one(lambda d: nn.GRUCell(d, d)), KINDS["rnn cell"].run)


@kind("lstm cell", one(lambda d: nn.LSTMCell(d, d)))
def _(m: Any, x: Tensor) -> Tensor:
    state = m.f(x[:, 0])
    return m.f(x[:, 1], state)[0][:, None]


@kind("attention", one(lambda d: nn.MultiheadAttention(d, 4, batch_first=True)))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(x, x, x, need_weights=len(x) % 2 == 0)[0]


@kind(
    "attention across",
    one(lambda d: nn.MultiheadAttention(d, 4, 0.1, True, True, kdim=d // 2, vdim=d // 4)),
)
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(x, x[..., ::2], x[..., ::4])[0]


@kind("decoder layer", one(lambda d: nn.TransformerDecoderLayer(d, 4, d, batch_first=True)))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(x, x.flip(1))


@kind("attention as a function", lambda d: {"qkv": weight(3 * d, d), "out": weight(d, d)})
def _(m: Any, x: Tensor) -> Tensor:
    q, k, v = F.linear(x, m.qkv).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ m.out


@kind("attention whose keys are weights", lambda d: {"k": weight(9, d), "u": weight(9, d)})
def _(m: Any, x: Tensor) -> Tensor:
    k, u = (t.expand(len(x), 9, -1) for t in (m.k, m.u))
    return F.scaled_dot_product_attention(x, k, u)


@kind("embedding", one(lambda d: nn.Embedding(ROWS, d, padding_idx=0)))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(ids_of(x, ROWS))


@kind(
    "embedding that bounds its rows",
    one(lambda d: nn.Embedding(ROWS, d, max_norm=0.9)),
    writes=True,
)
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(ids_of(x, ROWS))


@kind("embedding bag", one(lambda d: nn.EmbeddingBag(ROWS, d, mode="sum")))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(ids_of(x, ROWS))[:, None]


@kind("embedding bag, largest", one(lambda d: nn.EmbeddingBag(ROWS, d, mode="max")))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(ids_of(x, ROWS))[:, None]


@kind("bilinear", one(lambda d: nn.Bilinear(d // 4, d // 8, d)))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(x[..., : x.shape[-1] // 4].contiguous(), x[..., : x.shape[-1] // 8].contiguous())


@kind("linear of a transposed weight", square)
def _(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w.T, m.v)


@kind("matmul", square)
def _(m: Any, x: Tensor) -> Tensor:
    return x @ m.w * m.v


@kind("mm and mv", square)
def _(m: Any, x: Tensor) -> Tensor:
    return (x.flatten(0, 1).mm(m.w) + torch.mv(m.w, m.v)).view_as(x)


@kind("addmm", square)
def _(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.v, x.flatten(0, 1), m.w.t(), beta=0.5).view_as(x)


@kind("addmv, outer and addr", square)
def _(m: Any, x: Tensor) -> Tensor:
    return torch.addmv(m.v, m.w, m.v) + torch.addr(m.w, m.v, m.v)[0] + torch.outer(m.v, m.v)[3]


@kind("bmm", lambda d: {"w": weight(4, d // 4, d // 4)})
def _(m: Any, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    return torch.bmm(heads, m.w).permute(1, 0, 2).reshape_as(x)


@kind("baddbmm", lambda d: {"w": weight(4, d // 4, d // 4), "v": weight(4, 1, d // 4)})
def _(m: Any, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    return torch.baddbmm(m.v, heads, m.w.mT).permute(1, 0, 2).reshape_as(x)


@kind("einsum", square)
def _(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("btd,ed,e->bte", x, m.w, m.v)


@kind("tensordot and multi_dot", square)
def _(m: Any, x: Tensor) -> Tensor:
    y = torch.tensordot(x, m.w, dims=([2], [1])).to(m.w.dtype)
    return torch.linalg.multi_dot([y.flatten(0, 1), m.w, m.w]).view_as(x)


@kind("index_select", lambda d: {"w": weight(ROWS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    return m.w.index_select(0, ids_of(x, ROWS).flatten()).view_as(x)


@kind("gather", lambda d: {"w": weight(ROWS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    ids = ids_of(x, ROWS).view(-1, 1).expand(-1, x.shape[-1])
    return m.w.gather(0, ids).view_as(x)


@kind("take and take_along_dim", lambda d: {"w": weight(ROWS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    order = m.w.detach()[:4].argsort(-1)
    return m.w.take(ids_of(x, m.w.numel()))[..., None] + m.w[:4].take_along_dim(order, 1).sum(0)


@kind("rows by index", lambda d: {"w": weight(ROWS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    return m.w[ids_of(x, ROWS)] + m.w[-1] + m.w[[2, 5, 7]].sum(0) + m.w[..., None, 3, :]


@kind("rows by mask", lambda d: {"w": weight(ROWS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    return m.w[m.w[:, 0] > 0].sum(0) + m.w.masked_select(m.w > 0.1).sum()


@kind("slices", lambda d: {"w": weight(2 * d, 2 * d)})
def _(m: Any, x: Tensor) -> Tensor:
    d = x.shape[-1]
    return x @ m.w[:d, ::2] + F.linear(x, m.w[d:, d:]) + m.w.narrow(0, 3, 2).select(0, 1)[:d]


@kind("stacked experts", lambda d: {"w": weight(EXPERTS, d, d), "v": weight(EXPERTS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    rows = [
        F.linear(row, m.w[e], m.v[e]) for row in x for e in (picked(row, EXPERTS), len(x) % EXPERTS)
    ]
    return torch.stack(rows[::2]) + torch.stack(rows[1::2])


@kind(
    "experts in a list",
    lambda d: {"r": nn.Linear(d, 4), "e": nn.ModuleList(nn.Linear(d, d) for _ in range(4))},
)
def _(m: Any, x: Tensor) -> Tensor:
    scores = m.r(x).mean(1)
    best = scores.detach().argmax(-1).tolist()
    return torch.stack(
        [m.e[i](row) * score[i] for i, row, score in zip(best, x, scores, strict=True)]
    )


@kind("cat", pair)
def _(m: Any, x: Tensor) -> Tensor:
    both = F.linear(x, torch.cat([m.a.weight, m.b.weight]), torch.cat([m.a.bias, m.b.bias]))
    return both[..., ::2]


@kind("stack", pair)
def _(m: Any, x: Tensor) -> Tensor:
    return x @ torch.stack([m.a.weight, m.b.weight]).mean(0) + torch.stack((m.a.bias, m.b.bias))[1]


@kind("hstack and broadcast", pair)
def _(m: Any, x: Tensor) -> Tensor:
    wide = torch.hstack([m.a.weight, m.b.weight])[:, :: wide_step(m)]
    return x @ wide.mT + sum(torch.broadcast_tensors(m.a.bias, m.b.weight[:2]))[1]


def wide_step(m: Any) -> int:
    return 2 if m.a.weight.shape == m.b.weight.shape else 1


@kind("as_strided", square)
def _(m: Any, x: Tensor) -> Tensor:
    d = x.shape[-1]
    return x @ m.w.as_strided((d, d), (1, d)) + m.w.as_strided((d,), (d + 1,), 0)


@kind("view, reshape, flatten, unflatten", square)
def _(m: Any, x: Tensor) -> Tensor:
    w = m.w.view(4, -1).reshape(-1, 2).flatten().unflatten(0, m.w.shape)
    return x @ w.t().reshape(m.w.shape) + m.v.view(1, 1, -1)


@kind("permute, movedim, squeeze", square)
def _(m: Any, x: Tensor) -> Tensor:
    return (x[:, :, None] @ m.w.unsqueeze(0).permute(0, 2, 1)).squeeze(2) + m.v[None].movedim(
        0, 1
    ).mT


@kind("expand, repeat, tile", square)
def _(m: Any, x: Tensor) -> Tensor:
    many = m.w.expand(len(x), -1, -1)
    return torch.bmm(x, many) + m.v.repeat(TOKENS, 1) + m.v.tile(2)[: len(m.v)]


@kind("chunk, split, unbind", lambda d: {"w": weight(3 * d, d), "v": weight(3, d)})
def _(m: Any, x: Tensor) -> Tensor:
    up, gate, down = m.w.chunk(3)
    a, b, c = m.v.unbind()
    parts = m.w.split(x.shape[-1] // 2)
    return F.linear(F.silu(F.linear(x, gate, a)) * F.linear(x, up, b), down, c) + parts[-1][0]


@kind("flip, roll, rot90", square)
def _(m: Any, x: Tensor) -> Tensor:
    return x @ (m.w.flip(0) + m.w.roll(1, 1) + torch.rot90(m.w)) + m.v.flip(0)


@kind("triangles and diagonals", square)
def _(m: Any, x: Tensor) -> Tensor:
    return x @ m.w.tril() + m.w.triu(1).sum(0) + m.w.diagonal() + torch.diag(m.v)[0] + m.w.trace()


@kind("unfold and pad", square)
def _(m: Any, x: Tensor) -> Tensor:
    return x @ F.pad(m.w, (1, -1)) + m.v.unfold(0, 4, 4).sum() + F.pad(m.v, (0, 2), value=1.0)[2:]


@kind("fft of a weight", square)
def _(m: Any, x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.v), n=x.shape[-1])


@kind("complex weights", lambda d: {"c": weight(d, d, dtype=torch.complex64)}, deferred=False)
def _(m: Any, x: Tensor) -> Tensor:
    y = torch.complex(x, x.flip(1)) @ m.c.mH + m.c.conj()[0]
    return y.real + y.imag + torch.view_as_real(m.c)[0, :, 1]


def codes(d: int) -> dict[str, Any]:
    values = torch.randint(-99, 99, (d, d)).to(torch.int8)
    return {"q": nn.Parameter(values, requires_grad=False), "scale": torch.rand(d, 1) / 99}


@kind("int8 weights", codes)
def _(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.q.to(x.dtype) * m.scale)


@kind(
    "integer and boolean buffers", lambda d: {"i": torch.arange(d), "b": torch.arange(d) % 3 == 0}
)
def _(m: Any, x: Tensor) -> Tensor:
    return torch.where(m.b, x[..., m.i.flip(0)], x * m.i)


@kind("buffers that are not saved", lambda d: {"passing": torch.linspace(0, 1, d), "v": weight(d)})
def _(m: Any, x: Tensor) -> Tensor:
    return x * m.passing + m.v


@kind(
    "buffers that a pass writes",
    lambda d: {"n": torch.tensor(0), "mean": torch.zeros(d)},
    writes=True,
)
def _(m: Any, x: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.n += 1
            m.mean.lerp_(x.mean((0, 1)), 0.1)
            m.mean[:3] = m.n.to(m.mean.dtype)
    return x - m.mean.clone() * m.n.clone()


@kind("where and masks", square)
def _(m: Any, x: Tensor) -> Tensor:
    mask = m.w > 0
    return (
        x @ torch.where(mask, m.w, m.v)
        + m.w.masked_fill(mask, 0.5)[0]
        + m.w.clamp(min=-0.1).minimum(m.v.max())[1]
    )


@kind("scatter_add and index_add", lambda d: {"w": weight(TOKENS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    order = ids_of(x[0], TOKENS)
    base = torch.zeros_like(m.w).index_add(0, order, m.w)
    return x + base.scatter_add(0, order[:, None].expand_as(m.w), m.w)


@kind("scatter and index_copy onto a weight", lambda d: {"w": weight(TOKENS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    ids = torch.tensor([1, 4])
    return m.w.index_copy(0, ids, x[0, :2].to(m.w.dtype)) + m.w.scatter(
        0, ids[:, None].expand(2, x.shape[-1]), 0.3
    )


@kind("cumsum, cumprod, diff", square)
def _(m: Any, x: Tensor) -> Tensor:
    return x @ m.w.cumsum(0) + m.v.cumprod(0) + m.v.diff(prepend=m.v[:1]) + m.w.logcumsumexp(1)[0]


@kind("sort, topk, kthvalue, median", square)
def _(m: Any, x: Tensor) -> Tensor:
    largest = m.w.topk(3, dim=0).values.sum(0)
    return m.w.sort(0).values[5] + largest + m.w.kthvalue(4, 0).values + m.w.median(0).values + x


@kind("reductions", square)
def _(m: Any, x: Tensor) -> Tensor:
    y = m.w.norm() + m.w.std(0) + m.w.var(1) + m.w.mean(0) + m.w.amax(0) + m.w.abs().sum()
    return x * (y + m.w.prod(0) + m.w.min() + torch.linalg.vector_norm(m.w, 1, 0)) / len(m.v)


@kind("softmax and logsumexp of weights", square)
def _(m: Any, x: Tensor) -> Tensor:
    return x @ m.w.softmax(-1) + m.w.logsumexp(0) + F.log_softmax(m.v, 0) + F.normalize(m.w)[2]


@kind("argmax, argsort, searchsorted, quantile", square)
def _(m: Any, x: Tensor) -> Tensor:
    places = torch.searchsorted(m.v.detach().sort().values, x.detach().clamp(-1, 1).contiguous())
    return places.to(x.dtype) + m.w.argmax(0) - m.v.argsort() + m.v.quantile(0.3)


@kind("linear algebra", lambda d: {"w": weight(16, 16), "v": weight(d)})
def _(m: Any, x: Tensor) -> Tensor:
    spd = m.w @ m.w.mT + 3 * torch.eye(16)
    solved = torch.linalg.solve(spd, m.v[:16]) + torch.linalg.cholesky(spd)[3] + spd.inverse()[0]
    return (
        x + m.v + solved.sum() + torch.linalg.det(spd).log() + torch.linalg.qr(m.w.detach()).R[0, 0]
    )


@kind("kron and cdist", lambda d: {"w": weight(4, 4), "v": weight(9, d)})
def _(m: Any, x: Tensor) -> Tensor:
    return torch.cdist(x, m.v).sum(-1, keepdim=True) + torch.kron(m.w, m.w).sum() + m.v[0]


@kind("interpolate a weight", lambda d: {"w": weight(1, d, 4)})
def _(m: Any, x: Tensor) -> Tensor:
    return F.interpolate(m.w, size=TOKENS, mode="linear", align_corners=False).mT


@kind("one hot", lambda d: {"w": weight(ROWS, d)})
def _(m: Any, x: Tensor) -> Tensor:
    return F.one_hot(ids_of(x, ROWS), ROWS).to(m.w.dtype) @ m.w


@kind(
    "loss with weights of classes",
    lambda d: {"v": nn.Parameter(torch.rand(8), False), "f": nn.Linear(d, 8)},
)
def _(m: Any, x: Tensor) -> Tensor:
    loss = F.cross_entropy(m.f(x).flatten(0, 1), ids_of(x, 8).flatten(), m.v, label_smoothing=0.1)
    return x * loss


@kind("adaptive softmax", one(lambda d: nn.AdaptiveLogSoftmaxWithLoss(d, 40, [8, 20])))
def _(m: Any, x: Tensor) -> Tensor:
    return x * m.f(x.flatten(0, 1), ids_of(x, 40).flatten()).loss


@kind("weight norm", one(lambda d: parametrizations.weight_norm(nn.Linear(d, d))))
def _(m: Any, x: Tensor) -> Tensor:
    return m.f(x)


KINDS["spectral norm"] = Kind(
    one(lambda d: parametrizations.spectral_norm(nn.Linear(d, d))), KINDS["weight norm"].run, True
)
KINDS["orthogonal"] = Kind(
    one(lambda d: nn.Sequential(nn.Linear(d, 16), parametrizations.orthogonal(nn.Linear(16, d)))),
    KINDS["weight norm"].run,
    deferred=False,
)


class Symmetric(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width))

    def forward(self, w: Tensor) -> Tensor:
        return (w.triu() + w.triu(1).mT) * self.gain


def symmetric(d: int) -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(d, d), "weight", Symmetric(d))


KINDS["parametrization with weights"] = Kind(one(symmetric), KINDS["weight norm"].run)


@kind("parametrization, cached", one(symmetric))
def _(m: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        return m.f(m.f(x))


@kind("checkpoint", pair)
def _(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda y: m.b(torch.tanh(m.a(y))), x, use_reentrant=False)


@kind("checkpoint, reentrant", pair)
def _(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda y: m.b(torch.tanh(m.a(y))), x, use_reentrant=True)


@kind("checkpoint in sequence", pair)
def _(m: Any, x: Tensor) -> Tensor:
    return checkpoint_sequential([m.a, nn.Tanh(), m.b, m.a], 2, x, use_reentrant=False)


@kind("functional_call", pair)
def _(m: Any, x: Tensor) -> Tensor:
    mixed = {"weight": m.a.weight * 0.5 + m.b.weight, "bias": m.b.bias}
    return torch.func.functional_call(m.a, mixed, (x,))


class Scaled(torch.autograd.Function):
    """Saves a weight for backward, and reads it there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, (grad.flatten(0, 1).mT @ x.flatten(0, 1)) * w.sign().abs()


@kind("autograd function", square)
def _(m: Any, x: Tensor) -> Tensor:
    return Scaled.apply(x, m.w)


def quadratic(w: Tensor, row: Tensor) -> Tensor:
    return (torch.tanh(row @ w)).square().sum()


@kind("func.grad", square)
def _(m: Any, x: Tensor) -> Tensor:
    return torch.func.grad(quadratic)(m.w, x[0, 0]).sum(0) + m.v


@kind("func.vmap", square)
def _(m: Any, x: Tensor) -> Tensor:
    y = torch.func.vmap(lambda row: F.linear(row, m.w, m.v))(x)
    return y + torch.func.vmap(torch.dot)(m.w, m.w.flip(0))


@kind("func.vmap of func.grad", lambda d: {"w": weight(d, 8)})
def _(m: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(quadratic), (None, 0))(m.w, x[0]).sum((0, 2))


@kind("func.jvp and vjp", lambda d: {"w": weight(d, 8), "u": weight(d, 8)})
def _(m: Any, x: Tensor) -> Tensor:
    row = x[0, 0].detach()
    _, pull = torch.func.vjp(lambda w: quadratic(w, row), m.w.detach())
    turned = torch.func.jvp(lambda w: quadratic(w, row), (m.w.detach(),), (m.u.detach(),))[1]
    return x * turned + pull(torch.tensor(1.0))[0].sum()


@kind("func.jacrev", lambda d: {"w": weight(8, 8)})
def _(m: Any, x: Tensor) -> Tensor:
    return x * torch.func.jacrev(lambda w: torch.tanh(x[0, 0, :8].detach() @ w))(m.w).sum()


@kind("double backward", lambda d: {"w": weight(d, 8)})
def _(m: Any, x: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled():
        return x * quadratic(m.w, x[0, 0])
    with torch.enable_grad():
        w = m.w if m.w.requires_grad else m.w.detach().requires_grad_()
        (slope,) = torch.autograd.grad(quadratic(w, x[0, 0]), w, create_graph=True)
    return x * slope.square().sum()


@kind("autocast", pair)
def _(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.b(m.a(m.a(x))) @ m.a.weight
    return y.float()


@kind("tied weights", lambda d: {"e": nn.Embedding(ROWS, d), "h": nn.Linear(d, ROWS, bias=False)})
def _(m: Any, x: Tensor) -> Tensor:
    return F.linear(m.h(x + m.e(ids_of(x, ROWS))).softmax(-1), m.e.weight.T)


@kind(
    "parameters in lists and dicts",
    lambda d: {
        "p": nn.ParameterList(weight(d, d) for _ in range(3)),
        "q": nn.ParameterDict({"scale": weight(d), "shift": weight(d)}),
    },
)
def _(m: Any, x: Tensor) -> Tensor:
    for w in m.p:
        x = torch.tanh(x @ w)
    return x * m.q["scale"] + m.q["shift"]


@kind("adapters", lambda d: {"f": nn.Linear(d, d), "down": weight(d, 4), "up": weight(4, d)})
def _(m: Any, x: Tensor) -> Tensor:
    merged = m.f.weight.detach() + (m.down @ m.up).mT
    return m.f(x) + x @ m.down @ m.up + F.linear(x, merged)


@kind("standardized weights", lambda d: {"f": nn.Conv1d(d, d, 1), "v": weight(d, 1, 1)})
def _(m: Any, x: Tensor) -> Tensor:
    w = m.f.weight
    w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5) * m.v
    return F.conv1d(x.mT, w, m.f.bias).mT


@kind("data and detached weights", square)
def _(m: Any, x: Tensor) -> Tensor:
    return (
        F.linear(x, m.w.data, m.v) + m.w.detach()[1] + m.v.data.clone() + m.w.detach().numpy().sum()
    )


@kind("scalars of weights", square)
def _(m: Any, x: Tensor) -> Tensor:
    large = bool(m.v.detach().sum() > 0)
    return x * m.v[0].item() + sum(m.v.tolist()[:3]) + m.v if large else x * float(m.w[0, 1])


@kind("out arguments", square)
def _(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = torch.empty_like(m.w)
        torch.mul(m.w, 2, out=out)
        torch.mm(m.w.detach(), m.w.detach(), out=out)
        torch.add(out, m.w, out=out)
    return F.linear(x, out) + m.v


@kind("copies in the pass", square)
def _(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w[0] = 0.5
    w.mul_(0.9).add_(m.v)
    return x @ w + copy.deepcopy(m.v).detach() + torch.empty_like(m.v).copy_(m.v)


@kind("random numbers like weights", square)
def _(m: Any, x: Tensor) -> Tensor:
    return (
        F.dropout(m.w, 0.2, m.training)[0]
        + torch.rand_like(m.v) * m.v
        + torch.bernoulli(m.v.sigmoid())
    )


@kind("arithmetic of weights", square)
def _(m: Any, x: Tensor) -> Tensor:
    y = torch.addcmul(m.v, m.w[0], m.w[1]) + torch.lerp(m.w[2], m.v, 0.3) + m.w[3] / (m.v.abs() + 1)
    return (
        x * y + torch.atan2(m.w[4], m.v) + m.w[5].float().pow(2).sigmoid() + (m.v > 0) + -m.v.exp()
    )


@kind("in-place on activations", square)
def _(m: Any, x: Tensor) -> Tensor:
    y = x @ m.w
    y += m.v
    y[:, 0].mul_(m.w[0])
    return y.addmm_(m.v[None], m.w) if y.dim() == 2 else y.clamp_(max=3.0)


@kind("quick exit by a weight", pair)
def _(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return y if picked(y, 2) else m.b(y)


# ---- models --------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Loop(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = super().forward(x)
        return x


class Branch(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).mean(0)


class Residual(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(super().forward(x))


class Picking(Chain):
    """Runs the part that the data picks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[picked(x, len(self.parts))](x)


class EarlyExit(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
            if picked(x, 3) == 0:
                break
        return x


class Checkpointed(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


NODES = (Chain, Chain, Loop, Branch, Residual, Picking, EarlyExit, Checkpointed)


def grow(random: Random, names: list[str], width: int, made: list[nn.Module]) -> nn.Module:
    """Build a tree of nodes whose leaves are pieces of these kinds; some nodes are in it twice."""
    if len(names) == 1:
        node: nn.Module = Piece(names[0], width)
    else:
        count = random.randint(2, min(4, len(names)))
        places = [0, *sorted(random.sample(range(1, len(names)), count - 1)), len(names)]
        groups = [names[a:b] for a, b in itertools.pairwise(places)]
        parts = [grow(random, group, width, made) for group in groups]
        if made and random.random() < 0.2:
            parts.append(random.choice(made))
        node = random.choice(NODES)(parts)
        if isinstance(node, Checkpointed) and not all(map(can_run_twice, pieces_of(node))):
            node = Chain(parts)
    made.append(node)
    return node


def pieces_of(module: nn.Module) -> list[Piece]:
    return [each for each in module.modules() if isinstance(each, Piece)]


def can_run_twice(piece: Piece) -> bool:
    """Whether a pass can be repeated by a checkpoint, which transforms of torch.func refuse."""
    return not KINDS[piece.kind].writes and not piece.kind.startswith(("func", "double"))


class Model(nn.Module):
    """A drawn body, and weights of the root itself."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width) + 0.1 * torch.randn(width))
        self.register_buffer("shift", 0.1 * torch.randn(width))
        self.body = body
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x * self.gain + self.shift))


@dataclass(frozen=True)
class Setting:
    """All that a seed decides, but for what the actions draw."""

    seed: int
    width: int
    kinds: list[str]
    ties: int
    tier: str
    pager: str
    page_size: int
    room: float  # how far the cap is from barely enough, 0, to all, 1
    verify: bool
    actions: list[str]

    def build(self) -> Model:
        torch.manual_seed(self.seed)
        random = Random(self.seed)
        model = Model(grow(random, list(self.kinds), self.width, []), self.width)
        for _ in range(self.ties):
            tie(model, random)
        return model.eval()

    @property
    def read_only(self) -> bool:
        return self.tier in ("mapped", "stream")

    def cap(self, model: nn.Module) -> int:
        """Choose a cap that is enough for the largest operation: one that reads a whole piece."""
        page = self.page_size
        largest = max(map(nbytes_of, [*pieces_of(model), model.head, _own(model)]))
        scattered = 2 * (self.ties + sum(self.actions.count(name) for name in SCATTERING))
        least = -(-largest // page) + 2 + scattered
        everything = max(least, -(-nbytes_of(model) // page) + 2)
        return page * (least + math.ceil(self.room * (everything - least)))


def _own(model: nn.Module) -> nn.Module:
    own = nn.Module()
    own.gain, own.shift = model.gain, model.shift
    return own


def nbytes_of(module: nn.Module) -> int:
    tensors = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
    return sum(-(-t.nbytes // 64) * 64 for t in tensors.values())


def draw(seed: int) -> Setting:
    random = Random(f"setting {seed}")
    tier = random.choice(["offload"] * 6 + ["pinned", "managed", "mapped", "stream"])
    pager = {"offload": random.choice(["frames", "managed"]), "managed": "managed"}.get(
        tier, "frames"
    )
    page_size = 64 * KIB if pager == "frames" else random.choice([4, 16, 64]) * KIB
    read_only = tier in ("mapped", "stream")
    usable = [
        name
        for name, each in KINDS.items()
        if (tier == "offload" or each.deferred) and not (read_only and each.writes)
    ]
    actions = [
        name
        for name, each in ACTIONS.items()
        if not (read_only and each.writes) and (tier == "offload" or not each.offloaded_only)
    ]
    chosen = random.choices(
        actions, [ACTIONS[name].often for name in actions], k=random.randint(4, 9)
    )
    if not read_only and not any(name.startswith("train") for name in chosen):
        chosen.insert(random.randrange(len(chosen)), "train")
    return Setting(
        seed=seed,
        width=random.choice([64, 96, 128] if page_size == 64 * KIB else [32, 64]),
        kinds=random.sample(usable, random.randint(4, 10)),
        ties=random.choice([0, 0, 1, 2]),
        tier=tier,
        pager=pager,
        page_size=page_size,
        room=random.choice([0, 0, 0, 0.1, 0.3, 0.6, 1.0]),
        verify=pager == "frames" and random.random() < 0.3,
        actions=["pass", *chosen],
    )


# ---- worlds: a model, and what its user has beside it --------------------------------------------


@dataclass
class World:
    """A model, plain or paged, with the optimizer, the average and the tensors of its user."""

    setting: Setting
    model: Model
    manager: penstock.MemoryManager | None = None
    optimizer: torch.optim.Optimizer | None = None
    average: dict[str, Tensor] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None

    @property
    def name(self) -> str:
        return "model" if self.setting.tier == "offload" else "m"

    def offload(self) -> None:
        setting = self.setting
        penstock.offload(
            self.model,
            cap=setting.cap(self.model),
            device="cpu",
            pager=setting.pager,
            page_size=setting.page_size,
            verify=setting.verify,
        )
        self.manager = penstock.manager_of(self.model)

    def register(self, directory: Path) -> None:
        setting = self.setting
        path = directory / "model.safetensors"
        plain = self.model
        save_file({name: t.clone().contiguous() for name, t in plain.state_dict().items()}, path)
        self.manager = penstock.MemoryManager(
            cap=setting.cap(plain),
            device="cpu",
            pager=setting.pager,
            host="auto" if setting.pager == "managed" else setting.tier,
            page_size=setting.page_size,
            verify=setting.verify,
        )
        writable = setting.pager == "managed"
        self.manager.register("m", setting.build, path, writable=writable)
        self.model = self.manager.acquire("m")

    def restore(self) -> None:
        """End paging. What was registered from a file has no other place, and is only let go."""
        if self.manager is None:
            return
        if self.setting.tier == "offload":
            penstock.restore(self.model)
        else:
            self.manager.release("m", evict=True)
            self.manager.unregister("m")
        self.manager = None


def names_of(world: World, fits: Callable[[Tensor], bool] = lambda p: True) -> list[str]:
    return [name for name, p in world.model.named_parameters() if fits(p)]


def floating(p: Tensor) -> bool:
    return p.is_floating_point()


def single(p: Tensor) -> bool:
    return p.dtype == torch.float32 and p.requires_grad


def slot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def alike(model: nn.Module, random: Random) -> tuple[str, str] | None:
    """Draw two parameters of the same form that can change places; None where there are none."""
    names = [
        name
        for name, p in model.named_parameters()
        if "parametrizations" not in name and p.requires_grad
    ]
    forms: dict[object, list[str]] = {}
    for name in names:
        p = model.get_parameter(name)
        forms.setdefault((p.shape, p.dtype, p.stride()), []).append(name)
    pairs = [group for group in forms.values() if len(group) > 1]
    return tuple(random.sample(random.choice(pairs), 2)) if pairs else None


def tie(model: nn.Module, random: Random) -> None:
    names = alike(model, random)
    if names is not None:
        (to, attribute), (source, other) = (slot(model, name) for name in names)
        setattr(to, attribute, getattr(source, other))


def snapshot(value: object) -> object:
    """Copy every tensor of a structure, as it is now; nothing of it is on paged memory."""
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, value)


def state_of(model: nn.Module) -> dict[str, object]:
    """Copy all of a model: weights, buffers, gradients, and which names share a tensor."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    return {
        "state": snapshot(dict(model.state_dict())),
        "buffers": snapshot(dict(model.named_buffers())),
        "gradients": snapshot({name: p.grad for name, p in named.items()}),
        "needs": {name: p.requires_grad for name, p in named.items()},
        "ties": {name: first.setdefault(id(p), name) for name, p in named.items()},
        "parameters": all(isinstance(p, nn.Parameter) for p in named.values()),
    }


def difference(found: object, wanted: object) -> str | None:
    """Say where two structures differ, in form, type or any bit; None where they do not."""
    ours, our_form = tree_flatten(found)
    theirs, their_form = tree_flatten(wanted)
    if our_form != their_form:
        return f"another structure: {str(our_form)[:200]} for {str(their_form)[:200]}"
    paths = [str(path) for path, _ in torch.utils._pytree.tree_flatten_with_path(wanted)[0]]
    wrong = [path for path, a, b in zip(paths, ours, theirs, strict=True) if not _same(a, b)]
    return f"{len(wrong)} of {len(ours)} differ: {', '.join(wrong[:5])}" if wrong else None


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and a == b


# ---- actions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """One step of a program. It draws the same for both worlds, and returns what is compared."""

    run: Callable[[World, Random], object]
    often: int = 1
    writes: bool = True  # whether it needs weights that can be written to
    offloaded_only: bool = False
    pure: bool = False  # whether nothing has changed where torch refuses it


ACTIONS: dict[str, Action] = {}
Act = Callable[[World, Random], object]


def action(name: str, **options: Any) -> Callable[[Act], Act]:
    def add(run: Act) -> Act:
        ACTIONS[name] = Action(run, **options)
        return run

    return add


def inputs(world: World, random: Random) -> Tensor:
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    return torch.randn(random.randint(2, 4), TOKENS, world.setting.width, generator=generator)


def loss_of(world: World, random: Random) -> Tensor:
    out = world.model(inputs(world, random))
    return (out * torch.arange(1, 17).cos()).square().mean()


@action("pass", often=4, writes=False)
def _(world: World, random: Random) -> object:
    x = inputs(world, random)
    mode = random.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    with mode():
        return [world.model(x) for _ in range(random.randint(1, 4))]


@action("pass in another thread", writes=False)
def _(world: World, random: Random) -> object:
    x = inputs(world, random)
    outs: list[object] = []

    def work() -> None:
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                outs.append(world.model(x))
        except BaseException as error:
            outs.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(outs[0], BaseException):
        raise outs[0]
    return outs


@action("pass with hooks that read weights", writes=False)
def _(world: World, random: Random) -> object:
    seen: list[Tensor] = []

    def read(module: nn.Module, *_: object) -> None:
        seen.extend(p.detach().abs().sum() for p in module.parameters(recurse=False))

    modules = list(world.model.modules())
    handles = [m.register_forward_hook(read) for m in random.sample(modules, len(modules) // 2)]
    handles += [
        m.register_forward_pre_hook(read) for m in random.sample(modules, len(modules) // 3)
    ]
    with torch.no_grad():
        out = world.model(inputs(world, random))
    for handle in handles:
        handle.remove()
    return out, seen


@action("pass under autocast", writes=False)
def _(world: World, random: Random) -> object:
    x = inputs(world, random)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        return world.model(x), world.model(x)


ACTIONS["pass under autocast"] = Action(ACTIONS["pass under autocast"].run, writes=False, pure=True)


@action("functional call of the whole", writes=False, pure=True)
def _(world: World, random: Random) -> object:
    chosen = random.sample(names := names_of(world, floating), min(3, len(names)))
    with torch.no_grad():
        other = {name: world.model.get_parameter(name) * 0.5 for name in chosen}
        x = inputs(world, random)
        return torch.func.functional_call(world.model, other, (x,)), world.model(x)


def some_piece(world: World, random: Random) -> Piece:
    return random.choice(pieces_of(world.model))


@action("func.grad of a piece", writes=False, pure=True)
def _(world: World, random: Random) -> object:
    piece, x = some_piece(world, random), inputs(world, random)

    def value(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(piece, weights, (x,)).square().mean()

    own = {name: p for name, p in piece.named_parameters() if p.is_floating_point()}
    if random.random() < 0.5:
        return torch.func.grad(value)({name: p.detach() for name, p in own.items()})
    return torch.func.grad(value)(own)


@action("func.vmap of a piece", writes=False, pure=True)
def _(world: World, random: Random) -> object:
    piece, x = some_piece(world, random), inputs(world, random)
    own = {name: p.detach() for name, p in piece.named_parameters() if p.is_floating_point()}

    def scaled(gain: Tensor) -> Tensor:
        weights = {name: p * gain for name, p in own.items()}
        return torch.func.functional_call(piece, weights, (x,))

    return torch.func.vmap(scaled, randomness="same")(torch.linspace(0.5, 1.5, 3))


@action("read weights", often=2, writes=False)
def _(world: World, random: Random) -> object:
    model = world.model
    named = list(model.named_parameters())
    vector = [p.detach() for _, p in named if p.dtype == torch.float32]
    ways: dict[str, Callable[[], object]] = {
        "sums": lambda: [p.detach().float().abs().sum() for _, p in named if floating(p)],
        "numpy": lambda: [torch.from_numpy(t.numpy().copy()) for t in vector],
        "lists": lambda: [t.flatten()[:5].tolist() for t in vector],
        "one vector": lambda: nn.utils.parameters_to_vector(vector),
        "norms": lambda: torch._foreach_norm(vector),
        "total norm": lambda: nn.utils.get_total_norm(vector),
        "sums by list": lambda: torch._foreach_add(torch._foreach_mul(vector, 2.0), 1.0),
        "clones": lambda: [t.clone() for t in vector],
        "sorted": lambda: [t.flatten().sort().values[:9] for t in vector],
        "dtypes": lambda: [t.to(torch.float64) for t in vector] + [t.bfloat16() for t in vector],
        "comparisons": lambda: [torch.equal(a, b) for a, b in itertools.pairwise(vector)],
        "state": lambda: dict(model.state_dict()),
        "rows": lambda: [t[-1:] for t in vector if t.dim()],
        "stacked": lambda: torch.stack([t.mean() for t in vector]),
        "formatted": lambda: [str(t) for t in vector],
        "bytes": lambda: [
            bytes(t.view(torch.uint8).flatten()[:8].tolist()) for t in vector if t.dim()
        ],
    }
    return ways[random.choice(list(ways))]()


@action("deepcopy", writes=False)
def _(world: World, random: Random) -> object:
    other = copy.deepcopy(world.model)
    x = inputs(world, random)
    with torch.no_grad():
        before = other(x)
        for p in other.parameters():
            if p.is_floating_point():
                p.mul_(0.5)
        return state_of(other), before, other(x), world.model(x), copy.deepcopy(world.model.gain)


@action("save and load", writes=False)
def _(world: World, random: Random) -> object:
    file = io.BytesIO()
    whole = random.random() < 0.5 and not any(
        map(parametrize.is_parametrized, world.model.modules())
    )
    torch.save(world.model if whole else world.model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=not whole)
    if not whole:
        return dict(loaded)
    with torch.no_grad():
        return state_of(loaded), loaded(inputs(world, random))


@action("keep views and weights", often=2, writes=False)
def _(world: World, random: Random) -> object:
    for name in random.sample(names := names_of(world, floating), min(3, len(names))):
        p = world.model.get_parameter(name)
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda p: p,
            lambda p: p.detach(),
            lambda p: p.data,
            lambda p: p.detach().flatten()[:7],
            lambda p: p.detach().reshape(-1)[1:],
            lambda p: p.mT[:2] if p.dim() > 1 else p[:3],
        ]
        kept = random.choice(ways)(p)
        world.kept.append(kept)
    return world.kept[-1]


@action("evict", writes=False)
def _(world: World, random: Random) -> object:
    if world.manager is not None:
        world.manager.release(world.name, evict=True)
        world.manager.acquire(world.name)
    with torch.no_grad():
        return world.model(inputs(world, random))


@action("change the cap", writes=False)
def _(world: World, random: Random) -> object:
    share = random.random()
    if world.manager is not None:
        least = world.setting.cap(world.model)
        world.manager.set_cap(least + int(share * nbytes_of(world.model)))
    with torch.no_grad():
        return world.model(inputs(world, random))


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], bool]] = {
    "SGD": (torch.optim.SGD, {}, True),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, True),
    "damped momentum": (
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.1, "maximize": True},
        True,
    ),
    "Adam": (torch.optim.Adam, {}, True),
    "Adam with AMSGrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.01}, True),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, True),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}, True),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}, False),
    "Adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}, False),
    "NAdam": (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}, False),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1}, False),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.1}, False),
    "ASGD": (torch.optim.ASGD, {"weight_decay": 0.1, "t0": 1}, False),
    "Rprop": (torch.optim.Rprop, {}, False),
    "Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}, False),
}


def optimizer_of(world: World, random: Random) -> torch.optim.Optimizer:
    name = random.choice(list(OPTIMIZERS))
    make, options, can_fuse = OPTIMIZERS[name]
    ways = [{"foreach": False}, {"foreach": True}] + ([{"fused": True}] * 2 if can_fuse else [])
    fits = [
        p
        for p in world.model.parameters()
        if p.requires_grad and p.dtype in (torch.float32, torch.float64)
    ]
    if random.random() < 0.3:
        groups: Any = [{"params": fits[::2], "lr": 0.01}, {"params": fits[1::2]}]
    else:
        groups = fits
    return make(groups, lr=random.choice([0.01, 0.003]), **options, **random.choice(ways))


def average_weights(world: World, random: Random) -> None:
    """Follow the weights with an average, one by one or all in one operation."""
    weights = {name: p.detach() for name, p in world.model.named_parameters() if single(p)}
    if any(t.shape != weights[n].shape for n, t in world.average.items() if n in weights):
        world.average.clear()
    for name, p in weights.items():
        world.average.setdefault(name, torch.zeros_like(p, memory_format=torch.contiguous_format))
    averages = [world.average[name] for name in weights]
    if random.random() < 0.5:
        torch._foreach_lerp_(averages, list(weights.values()), 0.1)
    else:
        for a, p in zip(averages, weights.values(), strict=True):
            a.lerp_(p, 0.1)


def train(world: World, random: Random, *, autocast: bool = False) -> object:
    model = world.model.train()
    if world.optimizer is None or random.random() < 0.3:
        world.optimizer = optimizer_of(world, random)
    losses, norms = [], []
    clip, to_none, averaged = random.random() < 0.5, random.random() < 0.5, random.random() < 0.4
    for _ in range(random.randint(1, 3)):
        world.optimizer.zero_grad(set_to_none=to_none)
        for _ in range(random.choice([1, 1, 2])):
            mode = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
            with mode:
                loss = loss_of(world, random)
            loss.backward()
            losses.append(loss)
        if clip:
            foreach = random.choice([None, True, False])
            norms.append(nn.utils.clip_grad_norm_(list(model.parameters()), 0.5, foreach=foreach))
        world.optimizer.step()
        if averaged:
            average_weights(world, random)
    model.eval()
    optimizer_state = [list(each.values()) for each in world.optimizer.state.values()]
    return losses, norms, dict(world.average), optimizer_state


@action("train", often=6)
def _(world: World, random: Random) -> object:
    return train(world, random)


@action("train under autocast")
def _(world: World, random: Random) -> object:
    return train(world, random, autocast=True)


@action("gradients without an optimizer", often=2, pure=True)
def _(world: World, random: Random) -> object:
    fits = [p for p in world.model.parameters() if single(p)]
    grads = torch.autograd.grad(loss_of(world, random), fits, allow_unused=True)
    with torch.no_grad():
        for p, grad in zip(fits, grads, strict=True):
            if grad is not None:
                p -= 0.01 * grad
    return grads


@action("write in place", often=3)
@torch.no_grad()
def _(world: World, random: Random) -> object:
    ways: list[Callable[[Tensor], object]] = [
        lambda p: p.mul_(0.9),
        lambda p: p.copy_(torch.randn(p.shape)),
        lambda p: p.data.add_(0.1),
        lambda p: p.detach().clamp_(-0.2, 0.2),
        lambda p: p.data.copy_(torch.ones(p.shape)),
        lambda p: p.uniform_(-0.1, 0.1),
        lambda p: p.normal_(0, 0.1),
        lambda p: nn.init.trunc_normal_(p, std=0.1),
        lambda p: p.view(-1)[3:9].zero_(),
        lambda p: p[:1].add_(1.0),
        lambda p: p.data.__setitem__(0, 0.3),
        lambda p: p.masked_fill_(p > 0.1, 0.1),
        lambda p: p.index_fill_(0, torch.tensor([0]), 0.25),
        lambda p: torch.add(p, 1.0, out=p),
        lambda p: p.lerp_(torch.zeros(p.shape), 0.5),
        lambda p: p.addcmul_(p, p, value=0.1),
        lambda p: p.sub_(p.mean()),
        lambda p: p.t_().t_() if p.dim() == 2 else p.neg_(),
        lambda p: torch._foreach_mul_([p, p.detach().clone()], 0.5),
        lambda p: p.set_(torch.full(p.shape, 0.2)),
        lambda p: p.flatten()[0].item(),
    ]
    for name in random.choices(names_of(world, lambda p: single(p) and p.dim() > 0), k=3):
        random.choice(ways)(world.model.get_parameter(name))
    return world.model(inputs(world, random))


@action("write to a buffer")
@torch.no_grad()
def _(world: World, random: Random) -> object:
    names = [name for name, b in world.model.named_buffers() if b.is_floating_point()]
    path, attribute = slot(world.model, random.choice(names))
    buffer = getattr(path, attribute)
    way = random.randrange(3)
    if way == 0:
        buffer.mul_(0.5)
    elif way == 1:
        buffer.data = torch.rand(buffer.shape)
    else:
        setattr(path, attribute, torch.rand(buffer.shape))
    return world.model(inputs(world, random))


@action("set data", often=2)
@torch.no_grad()
def _(world: World, random: Random) -> object:
    for name in random.choices(names_of(world, single), k=2):
        p = world.model.get_parameter(name)
        world.kept.append(p.data)
        p.data = torch.randn(p.shape) * 0.1
    return world.model(inputs(world, random))


@action("exchange weights", often=2)
@torch.no_grad()
def _(world: World, random: Random) -> object:
    names = alike(world.model, random)
    if names is not None:
        (a, first), (b, second) = (slot(world.model, name) for name in names)
        p, q = getattr(a, first), getattr(b, second)
        if random.random() < 0.5:
            setattr(a, first, q)
            setattr(b, second, p)
        else:
            p.data, q.data = q.data, p.data
    return world.model(inputs(world, random))


@action("tie weights")
def _(world: World, random: Random) -> object:
    tie(world.model, random)
    with torch.no_grad():
        return world.model(inputs(world, random))


@action("untie weights")
def _(world: World, random: Random) -> object:
    named = list(world.model.named_parameters(remove_duplicate=False))
    counts = Counter(id(p) for _, p in named)
    shared = [
        name
        for name, p in named
        if counts[id(p)] > 1 and "parametrizations" not in name and single(p)
    ]
    if shared:
        module, attribute = slot(world.model, random.choice(shared))
        setattr(module, attribute, nn.Parameter(getattr(module, attribute).detach().clone()))
    with torch.no_grad():
        return world.model(inputs(world, random))


@action("replace a parameter", often=2)
def _(world: World, random: Random) -> object:
    fits = [name for name in names_of(world, single) if "parametrizations" not in name]
    for name in random.choices(fits, k=2):
        module, attribute = slot(world.model, name)
        old = getattr(module, attribute)
        world.kept.append(old)
        setattr(module, attribute, nn.Parameter(torch.randn(old.shape) * 0.1))
    if random.random() < 0.5:
        world.optimizer = None
    with torch.no_grad():
        return world.model(inputs(world, random))


@action("swap tensors", pure=True)
def _(world: World, random: Random) -> object:
    # A recurrent layer refers weakly to its weights, which torch then refuses to swap; one that was
    # built without memory refers to those that it had before.
    names = [
        name
        for name in names_of(world, single)
        if not isinstance(slot(world.model, name)[0], nn.RNNBase)
    ]
    p = world.model.get_parameter(random.choice(names))
    other = nn.Parameter(torch.randn(p.shape) * 0.1)
    world.optimizer = None
    world.model.zero_grad()
    del world.kept[:]
    torch.utils.swap_tensors(p, other)
    with torch.no_grad():
        return world.model(inputs(world, random)), other


WITHOUT_BIAS = ("linear", "perceptron", "conv1d", "layer norm", "experts in a list", "adapters")


@action("remove a bias")
def _(world: World, random: Random) -> object:
    parts = [piece for piece in pieces_of(world.model) if piece.kind in WITHOUT_BIAS]
    modules = [m for part in [*parts, world.model.head] for m in part.modules()]
    fits = [m for m in modules if getattr(m, "bias", None) is not None]
    if not fits:
        return None
    module = random.choice(fits)
    world.kept.append(module.bias)
    if random.random() < 0.5:
        module.bias = None
    else:
        del module.bias
        module.register_parameter("bias", None)
    world.optimizer = None
    with torch.no_grad():
        return world.model(inputs(world, random))


@action("replace a module")
def _(world: World, random: Random) -> object:
    nodes = [m for m in world.model.modules() if isinstance(m, Chain)]
    if nodes:
        node = random.choice(nodes)
        place = random.randrange(len(node.parts))
        world.kept.extend(p.detach()[..., :1] for p in node.parts[place].parameters() if p.dim())
        fresh = Piece(random.choice(["linear", "matmul", "layer norm", "gru"]), world.setting.width)
        node.parts[place] = fresh.eval()
        world.optimizer = None
    with torch.no_grad():
        return world.model(inputs(world, random))


@action("move a weight to another module")
def _(world: World, random: Random) -> object:
    fits = [name for name in names_of(world, single) if "parametrizations" not in name]
    module, attribute = slot(world.model, random.choice(fits))
    p = getattr(module, attribute)
    world.model.moved = p
    setattr(module, attribute, nn.Parameter(torch.zeros(p.shape)))
    world.optimizer = None
    with torch.no_grad():
        return world.model(inputs(world, random)) + world.model.moved.sum()


@action("write through a state dict")
@torch.no_grad()
def _(world: World, random: Random) -> object:
    state = world.model.state_dict()
    names = [name for name, t in state.items() if t.dtype == torch.float32]
    for name in random.sample(names, min(3, len(names))):
        state[name].mul_(0.5)
    return world.model(inputs(world, random))


@action("load a state dict", often=2)
@torch.no_grad()
def _(world: World, random: Random) -> object:
    state = {
        name: t.detach() * 0.9 if t.is_floating_point() else t.detach().clone()
        for name, t in world.model.state_dict().items()
    }
    assign = random.random() < 0.3
    if assign:
        world.optimizer = None
    return str(world.model.load_state_dict(state, assign=assign)), world.model(
        inputs(world, random)
    )


@action("change a weight before backward", pure=True)
def _(world: World, random: Random) -> object:
    """Torch refuses most of these; where no operation has saved the weight, it does not."""
    world.model.zero_grad()
    loss = loss_of(world, random)
    names = names_of(world, lambda p: single(p) and p.dim() > 1)
    with torch.no_grad():
        for name in random.sample(names, min(3, len(names))):
            world.model.get_parameter(name).mul_(0.9)
    try:
        loss.backward()
    finally:
        world.model.zero_grad()
    return loss


@action("leave a graph open")
def _(world: World, random: Random) -> object:
    world.loss = loss_of(world, random)
    return world.loss


@action("close the open graph", pure=True)
def _(world: World, random: Random) -> object:
    loss, world.loss = world.loss, None
    world.model.zero_grad()
    if loss is None:
        loss = loss_of(world, random)
    try:
        loss.backward()
        return [p.grad for p in world.model.parameters()]
    finally:
        world.model.zero_grad()


@action("freeze and thaw")
def _(world: World, random: Random) -> object:
    names = names_of(world, single)
    frozen = [world.model.get_parameter(name) for name in random.sample(names, len(names) // 3)]
    world.model.zero_grad()
    outs = []
    for needs in (False, True):
        for p in frozen:
            p.requires_grad_(needs)
        world.model.head.weight.requires_grad_(True)
        loss = loss_of(world, random)
        loss.backward()
        outs.append([p.grad for p in world.model.parameters()])
    return snapshot(outs)


@action("restore and offload again", offloaded_only=True)
def _(world: World, random: Random) -> object:
    world.model.zero_grad()
    world.loss = None
    again = random.random() < 0.8
    if again:
        world.kept.clear()  # views that there were before do not follow weights onto pages
    if world.manager is not None:
        world.restore()
        if again:
            world.offload()
    with torch.no_grad():
        return world.model(inputs(world, random))


@action("apply and convert")
def _(world: World, random: Random) -> object:
    model = world.model
    way = random.randrange(4)
    world.optimizer = None
    if way == 0:
        model.to("cpu").float() if not mixed(model) else model.to("cpu")
    elif way == 1:
        model.apply(
            lambda m: m.reset_parameters() if type(m) in (nn.Linear, nn.LayerNorm) else None
        )
    elif way == 2 and not mixed(model):
        model.double().float()
    else:
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(fits := [p for p in model.parameters() if single(p)])
            * 0.9,
            fits,
        )
    with torch.no_grad():
        return model(inputs(world, random))


def mixed(model: nn.Module) -> bool:
    return any(p.dtype != torch.float32 for p in model.parameters())


SCATTERING = ("exchange weights", "tie weights", "move a weight to another module")


# ---- trials --------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """How a trial ended: ok, wrong, refused, or ended by an error that torch raises for both."""

    seed: int
    state: str
    note: str = ""
    actions: int = 0
    errors: int = 0  # of torch's own, the same for both


class Refused(Exception):
    """The cap is too small for an operation."""


def outcome(world: World, name: str, seed: str) -> tuple[object, BaseException | None]:
    torch.manual_seed(hash_of(seed))
    try:
        return snapshot(ACTIONS[name].run(world, Random(seed))), None
    except penstock.CapExceededError as error:
        raise Refused(f"{name}: {error}") from error
    except penstock.PenstockError:
        raise
    except Exception as error:
        if world.setting.read_only and "leaf" in str(error):
            raise
        return None, error


def hash_of(seed: str) -> int:
    return Random(seed).randrange(1 << 40)


def run_trial(
    seed: int, *, plain_twin: bool = False, most_actions: int | None = None, say: bool = False
) -> Verdict:
    """Run one trial, and judge it; what Penstock must not raise, it raises."""
    setting = draw(seed)
    if say:
        print(setting)
    wanted, twin = World(setting, setting.build()), World(setting, setting.build())
    verdict = Verdict(seed, "ok")
    with tempfile.TemporaryDirectory() as directory:
        try:
            if not plain_twin and setting.tier == "offload":
                twin.offload()
            elif not plain_twin:
                twin.register(Path(directory))
            for number, name in enumerate(setting.actions[:most_actions]):
                if say:
                    print(f"  {number}: {name}", flush=True)
                found = step(wanted, twin, name, number, verdict)
                if found or verdict.state == "ended":
                    verdict.state = "wrong" if found else "ended"
                    verdict.note = f"action {number} ({name}): {found or verdict.note}"
                    return verdict
            verdict.note = at_the_end(wanted, twin) or ""
            verdict.state = "wrong" if verdict.note else "ok"
        except Refused as refusal:
            verdict.state, verdict.note = "refused", str(refusal)
        except penstock.CapExceededError as error:
            verdict.state, verdict.note = "refused", f"outside of actions: {error}"
    return verdict


def step(wanted: World, twin: World, name: str, number: int, verdict: Verdict) -> str | None:
    """Run an action in both worlds; say what differs."""
    text = f"{verdict.seed} {number}"
    ours, error = outcome(wanted, name, text)
    theirs, other = outcome(twin, name, text)
    verdict.actions += 1
    if type(error) is not type(other):
        if other is not None:
            detail = "".join(traceback.format_exception(other)[-8:])
            return f"raises {type(other).__name__}: {other}\n{detail}"
        return f"does not raise {type(error).__name__}: {error}"
    if error is not None:
        verdict.errors += 1
        if not ACTIONS[name].pure:
            verdict.state, verdict.note = "ended", f"{type(error).__name__}: {error}"
        return None
    found = difference(theirs, ours)
    if found is None and Random(text).random() < 0.4:
        found = difference(state_of(twin.model), state_of(wanted.model))
    return found


def at_the_end(wanted: World, twin: World) -> str | None:
    """Compare everything, before and after the model is restored; say what differs."""
    setting = wanted.setting
    stages = [("at the end", lambda world: None), ("once restored", lambda world: world.restore())]
    for stage, before in stages:
        for world in (wanted, twin):
            before(world)
        pairs = [
            ("state", state_of(twin.model), state_of(wanted.model)),
            ("kept tensors", snapshot(twin.kept), snapshot(wanted.kept)),
            ("averages", snapshot(twin.average), snapshot(wanted.average)),
        ]
        for what, found, right in pairs:
            if differs := difference(found, right):
                return f"{stage}, {what}: {differs}"
    after = ["pass"] if setting.tier != "offload" else ["pass", "close the open graph", "train"]
    for number, name in enumerate(after):
        found = step(wanted, twin, name, 1000 + number, Verdict(setting.seed, "ok"))
        if found:
            return f"once restored, {name}: {found}"
    kinds = [[type(p) for p in world.model.parameters()] for world in (wanted, twin)]
    if setting.tier == "offload" and kinds[0] != kinds[1]:
        return f"once restored, parameters are {set(kinds[1])}"
    return difference(state_of(twin.model), state_of(wanted.model))


def judged(seed: int, **options: Any) -> Verdict:
    """Run a trial so that whatever it raises is a verdict."""
    try:
        return run_trial(seed, **options)
    except Exception:
        return Verdict(seed, "wrong", traceback.format_exc(limit=-12))


def prepare() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    measuring = sys.modules.get("penstock.memory.link_rate")
    if hasattr(measuring, "_SAMPLE"):
        measuring._SAMPLE = 1 << 20  # each manager measures the link


# ---- many trials, in processes of their own ------------------------------------------------------


def work(seeds: Sequence[int], plain_twin: bool) -> None:
    """Be a worker: run trials, and write a line before and after each."""
    for seed in seeds:
        print(json.dumps({"begins": seed}), flush=True)
        print(json.dumps(vars(judged(seed, plain_twin=plain_twin))), flush=True)


def batch(seeds: Sequence[int], plain_twin: bool) -> Iterator[Verdict]:
    """Run trials in a worker; where it dies or hangs, fail the trial, and go on with another."""
    left = list(seeds)
    while left:
        command = [sys.executable, __file__, "--worker", ",".join(map(str, left))]
        command += ["--plain"] * plain_twin
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as worker,
        ):
            seed, hung = left[0], False
            for found, killed in lines_of(worker):
                hung = killed
                if found is None:
                    continue
                seed = found.get("begins", seed)
                if "state" in found:
                    left.remove(found["seed"])
                    seed = left[0] if left else seed
                    yield Verdict(**found)
            code = worker.wait()
            if left:
                said.seek(0)
                tail = said.read().decode(errors="replace")[-3000:]
                how = f"hangs for {SLOWEST_ALLOWED:.0f} s" if hung else f"process ends with {code}"
                left.remove(seed)
                yield Verdict(seed, "wrong", f"{how}\n{tail}")


def lines_of(worker: subprocess.Popen[str]) -> Iterator[tuple[dict[str, Any] | None, bool]]:
    """Give each line of a worker, and at the end None with whether it was killed for hanging."""
    assert worker.stdout is not None
    while True:
        clock = threading.Timer(SLOWEST_ALLOWED, worker.kill)
        clock.start()
        line = worker.stdout.readline()
        hung = clock.finished.is_set()
        clock.cancel()
        if not line:
            yield None, hung
            return
        if line.startswith("{"):
            yield json.loads(line), False


def run_many(seeds: Sequence[int], jobs: int, plain_twin: bool) -> list[Verdict]:
    size = max(1, min(BATCH, -(-len(seeds) // jobs)))
    parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]

    def run(part: Sequence[int]) -> list[Verdict]:
        verdicts = []
        for verdict in batch(part, plain_twin):
            verdicts.append(verdict)
            if verdict.state in ("wrong", "refused"):
                print(f"seed {verdict.seed}: {verdict.state}: {verdict.note}", flush=True)
        return verdicts

    with ThreadPoolExecutor(jobs) as pool:
        return list(itertools.chain.from_iterable(pool.map(run, parts)))


def report(verdicts: Sequence[Verdict]) -> int:
    """Print how trials ended; return the exit status."""
    counts = Counter(verdict.state for verdict in verdicts)
    settings = [draw(verdict.seed) for verdict in verdicts]
    kinds = {name for setting in settings for name in setting.kinds}
    actions = {name for setting in settings for name in setting.actions}
    print(
        f"{len(verdicts)} trials, {sum(verdict.actions for verdict in verdicts)} actions: "
        f"{counts['ok']} ok, {counts['ended']} ended by an error of torch's own, "
        f"{counts['refused']} refused, {counts['wrong']} wrong; "
        f"{sum(verdict.errors for verdict in verdicts)} errors of torch's own were the same; "
        f"{len(kinds)} of {len(KINDS)} kinds, {len(actions)} of {len(ACTIONS)} actions"
    )
    if wrong := [str(verdict.seed) for verdict in verdicts if verdict.state == "wrong"]:
        print(f"wrong: {' '.join(wrong)}; again: python {Path(__file__).name} --seed N")
    too_many = counts["refused"] > max(1, MOST_REFUSED * len(verdicts))
    return 1 if wrong or too_many else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of the first trial")
    parser.add_argument("--trials", type=int, help="how many; without it one, in this process")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes at a time")
    parser.add_argument("--actions", type=int, help="end a single trial after this many")
    parser.add_argument("--plain", action="store_true", help="page nothing: judges the fuzzer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    prepare()
    if options.worker is not None:
        work([int(seed) for seed in options.worker.split(",")], options.plain)
        return 0
    started = time.perf_counter()
    if options.trials is None:
        single = {"plain_twin": options.plain, "most_actions": options.actions, "say": True}
        verdicts = [judged(options.seed, **single)]
        print(f"{verdicts[0].state}: {verdicts[0].note}")
    else:
        seeds = range(options.seed, options.seed + options.trials)
        verdicts = run_many(seeds, options.jobs, options.plain)
    status = report(verdicts)
    print(f"{time.perf_counter() - started:.1f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
