"""The kinds of work of a soak: each is done over and over, with results that are compared."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import penstock

MIB = 1 << 20
STREAMS = 4
# What libraries say where torch's refusal was on the way to them.
REFUSALS = ("out of memory", "the cap is", "unable to find an engine", "alloc_failed")

Work = Callable[[random.Random], None]
Compare = Callable[[bool, str], None]
"""Told whether a result is what it should be, and which one it is."""


def is_refusal(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, penstock.CapExceededError)):
        return True
    return isinstance(error, RuntimeError) and any(r in str(error).lower() for r in REFUSALS)


def tensors(compare: Compare) -> Work:
    """Make tensors with a value on some stream; look at them later, on another."""
    side = [torch.cuda.Stream() for _ in range(STREAMS)]
    held: list[tuple[torch.Tensor, int, torch.cuda.Event]] = []

    def work(choose: random.Random) -> None:
        stream = choose.choice(side)
        with torch.cuda.stream(stream):
            if held and (len(held) > 16 or choose.random() < 0.5):
                tensor, value, ready = held.pop(choose.randrange(len(held)))
                stream.wait_event(ready)
                wrong = (tensor != value).sum()
                tensor.record_stream(stream)
                del tensor  # while the comparison may still run
                compare(wrong.item() == 0, "a tensor")
                return
            try:
                tensor = torch.empty(
                    int(2 ** choose.uniform(4, 26)), dtype=torch.uint8, device="cuda"
                )
            except (RuntimeError, penstock.CapExceededError):
                held.clear()
                raise
            value = choose.randrange(256)
            tensor.fill_(value)
            ready = torch.cuda.Event()
            ready.record(stream)
            held.append((tensor, value, ready))

    return work


def matmul(choose: random.Random) -> None:
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    m, k, n = (choose.choice([8, 64, 257, 1024, 3000]) for _ in range(3))
    a = torch.randn(m, k, device="cuda", dtype=dtype)
    b = torch.randn(k, n, device="cuda", dtype=dtype)
    F.linear(a, b.t(), torch.zeros(n, device="cuda", dtype=dtype)).sum().item()


def convolution(choose: random.Random) -> None:
    channels, size = choose.choice([3, 32, 128]), choose.choice([16, 65, 128])
    dtype = choose.choice([torch.float32, torch.float16])
    weight = torch.randn(64, channels, 3, 3, device="cuda", dtype=dtype, requires_grad=True)
    image = torch.randn(choose.choice([1, 8]), channels, size, size, device="cuda", dtype=dtype)
    F.conv2d(image, weight, padding=1).square().mean().backward()
    torch.cuda.current_stream().synchronize()


def attention(choose: random.Random) -> None:
    dtype = choose.choice([torch.float16, torch.bfloat16, torch.float32])
    length, width = choose.choice([17, 256, 1500]), choose.choice([64, 128])
    q = torch.randn(2, 8, length, width, device="cuda", dtype=dtype, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q, is_causal=choose.random() < 0.5).sum().backward()
    torch.cuda.current_stream().synchronize()


def graphs(compare: Compare) -> Work:
    def work(choose: random.Random) -> None:
        width = choose.choice([256, 1024])
        weight = torch.randn(width, width, device="cuda")
        x = torch.randn(choose.choice([8, 64]), width, device="cuda")

        def run() -> torch.Tensor:
            y = x
            for _ in range(6):
                y = torch.tanh(y @ weight * 0.03)
            return y

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        side.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            y = run()
        captured.replay()
        wanted = y.clone()
        for _ in range(10):
            noise = torch.full((choose.randrange(1, 4 * MIB),), 7.0, device="cuda")
            captured.replay()
            compare(torch.equal(y, wanted), "a graph's result")
            compare(bool((noise == 7.0).all()), "a tensor beside a graph")

    return work


def models(capped: bool, compare: Compare, note: Callable[[str], None]) -> Work:
    """Have a model come, run and go; its passes are compared with its weights used one by one."""
    manager = penstock.MemoryManager(device="cuda", progress=False) if capped else None

    def work(choose: random.Random) -> None:
        width, depth = choose.choice([512, 1024, 2048]), choose.choice([8, 16, 32])
        generator = torch.Generator().manual_seed(choose.randrange(1 << 30))
        state = {}
        for i in range(depth):
            state[f"{i}.weight"] = torch.randn(width, width, generator=generator) * 0.02
            state[f"{i}.bias"] = torch.randn(width, generator=generator)

        def build() -> nn.Module:
            return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).eval()

        def passes(model: nn.Module) -> None:
            for _ in range(choose.randrange(2, 10)):
                x = torch.randn(choose.choice([4, 64, 4096]), width, device="cuda")
                y = model(x)
                wanted = x
                for i in range(depth):
                    wanted = F.linear(
                        wanted, state[f"{i}.weight"].cuda(), state[f"{i}.bias"].cuda()
                    )
                compare(torch.equal(y, wanted), f"a pass of {depth} x {width}")

        note(f"a model of {depth} x {width}")
        with torch.no_grad():
            if manager is None:
                model = build()
                model.load_state_dict(state)
                passes(model.cuda())
                return
            name = "model"
            manager.register(name, build, state)
            try:
                with manager.use(name) as bound:
                    passes(bound)
            finally:
                manager.unregister(name)

    return work


def exhaust(choose: random.Random) -> None:
    """Ask for more until it is refused; the refusal is the result."""
    held = []
    while True:
        held.append(
            torch.empty(choose.choice([2, 16, 64, 200]) * MIB, dtype=torch.uint8, device="cuda")
        )


def compiled() -> None:
    step = torch.compile(lambda a, b: torch.relu(a @ b) + 1)
    a = torch.randn(256, 256, device="cuda")
    torch.testing.assert_close(step(a, a), torch.relu(a @ a) + 1)
