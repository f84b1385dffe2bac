"""What happens in processes of their own, under a hard cap: `python hard_cap_scenes.py NAME`."""

import gc
import os
import random
import subprocess
import sys
import threading
import warnings
from collections import Counter
from datetime import timedelta

import torch
import torch.nn.functional as F
from scenes import driver_used, held_by_others, outside
from torch import nn

import penstock
from penstock import _core
from penstock.bench.peers import capture
from penstock.cap.hard_cap import HardCap
from penstock.cap.process import current_cap
from penstock.cap.torch_hook import hook_torch

MIB = 1 << 20


def cap_at(room):
    """Set a cap that leaves so many MiB beside what the process holds otherwise."""
    penstock.set_cap("8GiB", page_size="2MiB")
    hard_cap = current_cap("cuda")
    warm_up()
    torch.cuda.empty_cache()
    hard_cap.watch.look(timedelta(seconds=10))
    penstock.set_cap(outside(hard_cap) + room * MIB)
    hard_cap.pager.budget.reset_peaks()
    return hard_cap


def warm_up():
    """Have the kernels loaded that scenes use, since they count too."""
    for rows in (4, 64, 6144):
        x = torch.randn(rows, 1024, device="cuda")
        w = torch.randn(1024, 1024, device="cuda")
        for _ in range(2):
            x = torch.tanh(F.linear(x, w, w[0]) @ w * 0.03)
        torch.equal(x, x.clone())
    bits = torch.empty(1000, dtype=torch.uint8, device="cuda").fill_(3)
    (bits != 3).sum().item()
    torch.full((1000,), 7.0, device="cuda").eq(7.0).all().item()
    torch.cuda.synchronize()


def figures():
    hard_cap = cap_at(256)
    kept = torch.ones(1000, device="cuda")
    start = torch.cuda.memory_allocated()
    a = torch.empty(10 * MIB, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - start == 10 * MIB
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated()
    assert torch.cuda.memory_reserved() >= torch.cuda.memory_allocated()
    assert (
        "10240 KiB" in torch.cuda.memory_summary() or "PyTorch CUDA" in torch.cuda.memory_summary()
    )
    del a
    assert torch.cuda.memory_allocated() == start
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == start
    assert torch.cuda.mem_get_info()[0] > 0
    try:
        torch.cuda.memory_snapshot()
    except RuntimeError as error:
        assert "memory_stats" in str(error)
    else:
        raise AssertionError("a snapshot of what?")
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved

    for attempt in range(100):
        held = []
        try:
            while True:
                held.append(torch.empty((7 + attempt) * MIB, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError as error:
            assert str(error).startswith("CUDA out of memory. Tried to allocate"), error
            assert "the cap is" in str(error), error
        # Libraries' workspaces are live blocks too.
        free = hard_cap.pager.cap - outside(hard_cap) - torch.cuda.memory_allocated()
        assert free < (7 + attempt + 24) * MIB, free
        del held
    assert torch.cuda.memory_allocated() == start
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap
    assert torch.cuda.memory_stats()["num_ooms"] == 100
    try:
        penstock.set_cap(outside(hard_cap))
    except penstock.CapExceededError as error:
        assert "in use" in str(error)
    else:
        raise AssertionError("a tensor is there")
    penstock.set_cap(outside(hard_cap) + start + 300 * MIB)
    torch.empty(280 * MIB, dtype=torch.uint8, device="cuda")
    assert kept.sum().item() == 1000


def step(choose, stream, held):
    """Make a tensor and fill it, or look whether an older one is still what it was."""
    with torch.cuda.stream(stream):
        if held and choose.random() < 0.5:
            tensor, value, ready = held.pop(choose.randrange(len(held)))
            stream.wait_event(ready)
            wrong = (tensor != value).sum()
            tensor.record_stream(stream)
            del tensor  # while the comparison may still run
            assert wrong.item() == 0
            return
        tensor = torch.empty(int(2 ** choose.uniform(4, 24)), dtype=torch.uint8, device="cuda")
        value = choose.randrange(256)
        tensor.fill_(value)
        ready = torch.cuda.Event()
        ready.record(stream)
        held.append((tensor, value, ready))


def streams():
    hard_cap = cap_at(512)
    cap = hard_cap.pager.cap
    base = held_by_others(hard_cap)
    failures = []
    refused = []
    most = [0]

    def work(seed):
        choose = random.Random(seed)
        side = [torch.cuda.Stream() for _ in range(4)]
        held = []
        try:
            for i in range(8000):
                if i >= 400 and refused:  # memory was short
                    break
                try:
                    step(choose, choose.choice(side), held)
                except torch.OutOfMemoryError:
                    refused.append(seed)
                    held.clear()
                most[0] = max(most[0], driver_used() - base)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    torch.cuda.synchronize()
    gc.collect()
    assert most[0] <= cap, (most, cap)  # by the driver, everything included
    assert refused
    assert hard_cap.pager.budget.stats().peak >= 0.97 * cap
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap


def graph():
    cap_at(512)
    weight = torch.randn(1024, 1024, device="cuda")
    x = torch.randn(64, 1024, device="cuda")

    def run():
        y = x
        for _ in range(8):
            y = torch.tanh(y @ weight * 0.03)
        return y

    captured, y = capture(run)
    captured.replay()
    torch.cuda.synchronize()
    wanted = y.clone()
    noise = [torch.full((n * 1000,), 7.0, device="cuda") for n in range(1, 300)]
    x_before = x.clone()
    for _ in range(5):
        x.copy_(x_before)
        captured.replay()
        del noise
        noise = [torch.full((n * 1000,), 7.0, device="cuda") for n in range(1, 300)]
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)
        assert all(bool((n == 7.0).all()) for n in noise)
    del captured, y
    gc.collect()
    torch.cuda.empty_cache()


def pools():
    """A pool of the user's is counted, and keeps its memory until nobody has it any more."""
    hard_cap = cap_at(256)
    size = 32 * MIB

    def held():
        return hard_cap.pager.budget.stats().used_by_tag["activations"]

    before = held()
    pool = torch.cuda.MemPool()
    assert pool.use_count() == 1
    with torch.cuda.use_mem_pool(pool):
        inside = torch.full((size,), 3, dtype=torch.uint8, device="cuda")
        assert pool.use_count() == 2
        try:
            torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            assert str(error).startswith("CUDA out of memory. Tried to allocate"), error
        else:
            raise AssertionError("it is larger than the cap")
    outside_of_it = torch.full((size,), 4, dtype=torch.uint8, device="cuda")
    by_address = {block.address: block for block in hard_cap.allocator.live_blocks()}
    assert by_address[inside.data_ptr()].pool == tuple(pool.id)
    assert by_address[outside_of_it.data_ptr()].pool == (0, 0)
    assert held() >= before + 2 * size
    address = inside.data_ptr()
    del inside
    torch.cuda.empty_cache()
    assert held() >= before + 2 * size, "the pool keeps its memory"
    elsewhere = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert elsewhere.data_ptr() != address
    with torch.cuda.use_mem_pool(pool):
        again = torch.full((size,), 5, dtype=torch.uint8, device="cuda")
    assert again.data_ptr() == address
    assert again.eq(5).all().item()
    assert outside_of_it.eq(4).all().item()
    functions = ("penstock_malloc", "penstock_free")
    own = torch.cuda.memory.CUDAPluggableAllocator(_core.__file__, *functions)
    try:
        torch.cuda.MemPool(own.allocator())
    except penstock.DeviceError as error:
        assert "past the cap" in str(error), error
    else:
        raise AssertionError("its memory would not be counted")
    del again, outside_of_it, elsewhere, pool
    gc.collect()
    torch.cuda.empty_cache()
    assert held() <= before + 2 * MIB
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap


def reduce_overhead():
    """Graphs of one tree share a pool, whose blocks are put back between them."""
    from torch._inductor.cudagraph_trees import get_container

    hard_cap = cap_at(1024)
    torch.manual_seed(2)
    weights = [torch.randn(512, 512, device="cuda") * 0.04 for _ in range(6)]

    def deep(x):
        kept = []
        for weight in weights:
            x = torch.tanh(x @ weight)
            kept.append(x)
        return x, torch.stack(kept).sum(0)

    def wide(x, y):
        return torch.cat([x, y], dim=1).sin().sum(1), (x * y).exp()

    deep_too = torch.compile(deep, mode="reduce-overhead", dynamic=False)
    wide_too = torch.compile(wide, mode="reduce-overhead", dynamic=False)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    for rows in (64, 96):
        for step in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(rows, 512, device="cuda")
            first = deep_too(x)
            for a, b in zip(first, deep(x), strict=True):
                close(a, b)
            if step > 3:  # another graph, recorded after a replay of the first one
                second = wide_too(*first)
                noise = [torch.full((rows * 512,), float("nan"), device="cuda") for _ in range(8)]
                for a, b in zip(second, wide(*deep(x)), strict=True):
                    close(a, b)
                for a, b in zip(first, deep(x), strict=True):
                    close(a, b)
                del noise, second
            del first
    checkpoints = get_container(0).get_tree_manager().debug_checkpointing_counter
    assert checkpoints > 0, "no checkpoint was asked for: the scene shows nothing"

    def train(model, run):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            loss = run(torch.randn(32, 256, device="cuda")).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    def make():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()

    plain, compiled = make(), make()
    close(train(compiled, torch.compile(compiled, mode="reduce-overhead")), train(plain, plain))
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap


def processes():
    """Tensors that another process could not open are refused where they are sent."""
    cap_at(64)
    tensor = torch.ones(1000, device="cuda")
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()

    def send():
        process = context.Process(target=print, args=(tensor,))
        process.start()

    for refused in (
        lambda: queue.put([tensor]),
        send,
        tensor.untyped_storage()._share_cuda_,
        lambda: context.SimpleQueue().put(nn.Parameter(tensor)),
    ):
        try:
            refused()
        except penstock.DeviceError as error:
            assert "tensor.cpu()" in str(error), error
        else:
            raise AssertionError("another process cannot open it")
    queue.put(tensor.cpu())
    assert queue.get(timeout=60).sum().item() == 1000


def layer_by_layer(state, x):
    """Compute what a sequence of linear layers does, with one of them on the device at a time."""
    for i in range(len(state) // 2):
        w, b = state[f"{i}.weight"].cuda(), state[f"{i}.bias"].cuda()
        x = F.linear(x, w, b)
        del w, b
    return x


def room():
    hard_cap = cap_at(160)
    torch.manual_seed(3)
    width, depth = 1024, 32  # 4 MiB each: 128 MiB

    def make():
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).eval()

    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    manager = penstock.MemoryManager(device="cuda", progress=False)
    manager.register(
        "m", lambda: nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))), state
    )
    assert manager.pager.cap == hard_cap.pager.cap
    with torch.no_grad(), manager.use("m") as bound:
        for rows in (4, 4, 4, 4, 6144, 4, 6144, 6144, *[4] * 24):  # 24 MiB each
            x = torch.randn(rows, width, device="cuda")
            y = bound(x)
            assert torch.equal(y, layer_by_layer(state, x)), rows
            del x, y
            held = manager.stats().models["m"].memory.resident_bytes
            if rows == 6144:
                assert held < 100 * MIB
        assert held >= 100 * MIB, held
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap
    assert stats.peak > 0.9 * stats.cap


def in_place():
    """Weights that are held in place go to tensors, in the midst of operations."""
    hard_cap = cap_at(160)
    torch.manual_seed(3)
    chance = random.Random(3)
    width, depth = 1024, 32  # 4 MiB each: 128 MiB

    def make():
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).eval()

    state = {name: value.clone() for name, value in make().state_dict().items()}
    manager = penstock.MemoryManager(device="cuda", progress=False)
    manager.register("m", make, state)
    stop = threading.Event()
    found = Counter()

    def figures():
        return manager.stats().models["m"].memory

    def take_and_give():
        held = []
        chance = random.Random(4)
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.wait(0.002 * chance.random()):
                try:
                    held.append(torch.empty(chance.randrange(8) + 1, MIB, device="cuda").byte())
                    found["taken"] += 1
                except torch.OutOfMemoryError:
                    held.clear()
                    found["refused"] += 1
                if chance.random() < 0.3:
                    held.clear()

    def run(rows):
        x = torch.randn(rows, width, device="cuda")
        y = bound(x)
        assert torch.equal(y, layer_by_layer(state, x)), rows

    with torch.no_grad(), manager.use("m") as bound:
        for others in (False, True):
            for _ in range(24):
                run(4)
            before = figures().steps_run
            bound(torch.ones(4, width, device="cuda"))
            assert figures().steps_run - before < depth // 2, "nothing is held in place"
            thread = threading.Thread(target=take_and_give) if others else None
            if thread:
                thread.start()
            for _ in range(60):
                try:
                    run(chance.choice((4, 64, 6144)))
                    found["passes"] += 1
                except (torch.OutOfMemoryError, penstock.CapExceededError):
                    found["out of memory"] += 1
                if figures().steps_run - before >= depth:
                    found["by steps"] += 1
                before = figures().steps_run
            if not thread:
                assert not found["out of memory"]  # weights give way, as they do step by step
            else:
                stop.set()
                thread.join(60)
                assert not thread.is_alive()
    print(dict(found))
    assert found["by steps"] > 2
    assert found["passes"] > 60
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap


def neighbours():
    cap_at(1024)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.backends.cudnn.benchmark = True
    if torch.backends.cudnn.benchmark:  # the usual case; else it was said why not
        assert not caught, [str(warning.message) for warning in caught]
    else:
        assert "hard cap" in str(caught[0].message)
        print("cuDNN's benchmark mode is off: torch's allocator could not be extended")
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda()
    image = torch.randn(4, 64, 128, 128, device="cuda", requires_grad=True)
    conv(image).square().mean().backward()
    q = torch.randn(2, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
    F.scaled_dot_product_attention(q, q, q)
    step = torch.compile(lambda a, b: torch.relu(a @ b) + 1)
    a = torch.randn(256, 256, device="cuda")
    torch.testing.assert_close(step(a, a), torch.relu(a @ a) + 1)
    torch.cuda.synchronize()


def benchmark():
    torch.backends.cudnn.benchmark = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hard_cap = cap_at(768)
    assert not [warning for warning in caught if "benchmark" in str(warning.message)]
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = False
    base = held_by_others(hard_cap)
    conv = nn.Conv2d(64, 96, 5, padding=2).cuda()
    image = torch.randn(2, 64, 32, 32, device="cuda")
    wanted = nn.functional.conv2d(image.cpu(), conv.weight.cpu(), conv.bias.cpu(), padding=2)
    torch.testing.assert_close(conv(image).cpu(), wanted, atol=1e-3, rtol=1e-3)
    conv(image.requires_grad_()).sum().backward()  # loads kernels while there is room for them
    refused = 0
    for size in (64, 96, 128, 160, 192, 224):  # each shape is searched for anew
        image = torch.randn(4, 64, size, size, device="cuda", requires_grad=True)
        held = []
        try:  # ever less room for workspaces
            held = [torch.empty(size * MIB, dtype=torch.uint8, device="cuda") for _ in range(3)]
        except torch.OutOfMemoryError:
            refused += 1
        try:
            conv(image).square().mean().backward()
        except torch.OutOfMemoryError:
            refused += 1
            del held
            conv(image).square().mean().backward()
        assert torch.isfinite(image.grad).all()
        assert driver_used() - base <= hard_cap.pager.cap
    assert refused
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap


def overflow():
    hard_cap = cap_at(1024)
    torch.manual_seed(1)
    width, depth, rows = 1024, 24, 4096  # a tensor of 16 MiB for each layer, kept for backward
    layers = [torch.randn(width, width, device="cuda", requires_grad=True) for _ in range(depth)]
    x = torch.randn(rows, width, device="cuda")

    def run():
        y = x
        for weight in layers:
            y = torch.tanh(y @ weight * 0.03)
            assert driver_used() - base <= hard_cap.pager.cap
        y.square().mean().backward()
        torch.cuda.synchronize()
        grads = [weight.grad.cpu() for weight in layers]
        for weight in layers:
            weight.grad = None
        return y.detach().cpu(), grads

    base = held_by_others(hard_cap)
    wanted = run()
    torch.cuda.empty_cache()
    kept = hard_cap.pager.budget.stats()
    cap = kept.used + 160 * MIB
    penstock.set_cap(cap)
    try:
        run()
    except torch.OutOfMemoryError as error:
        assert "the cap is" in str(error)
    else:
        raise AssertionError("it fits: nothing to overflow")
    for weight in layers:
        weight.grad = None
    gc.collect()
    penstock.set_cap(cap, overflow="managed", overflow_limit="2GiB")
    hard_cap.pager.budget.reset_peaks()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        y, grads = run()
        assert torch.equal(y, wanted[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted[1], strict=True))
        assert hard_cap.allocator.overflow_stats().peak > 100 * MIB
        assert torch.cuda.max_memory_allocated() > cap - outside(hard_cap)
    del y, grads
    gc.collect()
    assert penstock.memory_stats().overflow == 0
    torch.cuda.empty_cache()
    assert hard_cap.allocator.overflow_stats().held == 0
    stats = hard_cap.pager.budget.stats()
    assert stats.peak <= stats.cap == cap

    held = []
    try:  # streams, while the host's memory goes round
        side = [torch.cuda.Stream() for _ in range(2)]
        held = [torch.empty(150 * MIB, dtype=torch.uint8, device="cuda")]
        values = []
        for i in range(40):
            stream = side[i % 2]
            with torch.cuda.stream(stream):
                block = torch.full((8 * MIB,), i, dtype=torch.uint8, device="cuda")
            other = side[(i + 1) % 2]
            other.wait_stream(stream)
            with torch.cuda.stream(other):
                values.append((block != i).sum())
            block.record_stream(other)
            del block
        assert not any(value.item() for value in values)
        del values
        while hard_cap.allocator.overflow_stats().live < 64 * MIB:
            held.append(torch.empty(8 * MIB, dtype=torch.uint8, device="cuda"))
        small = [torch.full((1 + i % 700,), i, device="cuda") for i in range(1000)]
        assert all((value == i).all() for i, value in enumerate(small))
    finally:
        held = small = None
    assert driver_used() - base <= hard_cap.pager.cap


def backend():
    """Another allocator, chosen by the environment, is refused before anything is done."""
    program = "import penstock; penstock.set_cap('1GiB')"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran
    assert "DeviceError" in ran.stderr, ran.stderr
    assert "chosen by PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync" in ran.stderr, ran.stderr


def late():
    torch.zeros(1, device="cuda")
    try:
        penstock.set_cap("1GiB")
    except penstock.DeviceError as error:
        assert "before" in str(error)
    else:
        raise AssertionError("torch's allocator was in use")


class Faults:
    """A little of everything that asks the device, with a call of it made to fail."""

    def __init__(self):
        self.device = _core.FaultyDevice(_core.open_device("cuda"))
        self.hard_cap = HardCap("6GiB", device=self.device, page_size="2MiB")
        hook_torch(0, self.hard_cap)
        self.side = [torch.cuda.Stream() for _ in range(2)]
        torch.manual_seed(5)
        self.state = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).state_dict()
        self.wanted = None  # the model's output
        self.manager = None

    def work(self):
        self.tensors()
        self.graph()
        self.model()
        torch.cuda.empty_cache()

    def tensors(self):
        held = []
        for nbytes in (100, 3000, 5 * MIB, 40 * MIB):
            for stream in self.side:
                with torch.cuda.stream(stream):
                    x = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
                    assert x.data_ptr() != 0 and x.numel() == nbytes
                    x.fill_(nbytes % 251)
                    held.append((x, stream))
        for x, stream in held:
            other = self.side[1 - self.side.index(stream)]
            other.wait_stream(stream)
            with torch.cuda.stream(other):
                assert bool((x == x.numel() % 251).all())
            x.record_stream(other)
        del held, x
        torch.empty(200 * MIB, dtype=torch.uint8, device="cuda").fill_(1)
        torch.empty(4 * MIB, dtype=torch.uint8, device="cuda").fill_(1)

    def graph(self):
        x = torch.ones(1000, 1000, device="cuda")
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = (x + 1) * 2
        captured.replay()
        assert bool((y == 4).all())

    def model(self):
        def build():
            return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))

        self.manager = penstock.MemoryManager(device="cuda", progress=False)
        self.manager.register("m", build, self.state)
        x = torch.linspace(-1, 1, 1024, device="cuda")
        with torch.no_grad(), self.manager.use("m") as module:
            for _ in range(3):
                y = module(x).cpu()
                if self.wanted is None:
                    self.wanted = y
                assert torch.equal(y, self.wanted)
        self.manager.unregister("m")
        self.manager = None

    def settle(self):
        """Let go of everything, and look whether the ledger says so."""
        self.device.reset()
        if self.manager is not None and "m" in self.manager.stats().models:
            with torch.no_grad(), self.manager.use("m") as module:
                module(torch.linspace(-1, 1, 1024, device="cuda"))
            self.manager.unregister("m")
        self.manager = None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        by_tag = self.hard_cap.pager.budget.stats().used_by_tag
        return by_tag["weights"], by_tag["activations"], torch.cuda.memory_allocated()

    def fail(self, name, position):
        """Return what a failure of one call came to."""
        self.device.reset()
        self.device.fail_nth_call_of(name, position)
        try:
            self.work()
        except AssertionError:
            raise  # something was wrong, and nothing said so
        except Exception as error:
            texts = []
            while error is not None:
                texts.append(str(error))
                error = error.__cause__ or error.__context__
            assert self.device.fired, (name, position, texts)
            if not any("injected fault" in text for text in texts):
                print(f"{name} #{position}: {texts}", flush=True)
            return "raised"
        return "went on" if self.device.fired else "did not come"


def faults():
    scene = Faults()
    for _ in range(3):  # libraries take their workspaces, and the model's plan settles
        scene.work()
    at_rest = scene.settle()
    assert at_rest[0] == 0, at_rest
    scene.work()
    calls = scene.device.calls()
    print(calls, flush=True)
    for name, count in sorted(calls.items()):
        outcomes = Counter()
        tried = min(count, 48)  # all of them, or evenly spread ones
        for position in sorted({i * (count - 1) // max(1, tried - 1) for i in range(tried)}):
            outcomes[scene.fail(name, position)] += 1
            after = scene.settle()
            assert after == at_rest, (name, position, after, at_rest)
            scene.work()
        print(f"{name}: {count} calls, {dict(outcomes)}", flush=True)
    for name in ("frame_create", "map", "address_reserve", "copy", "host_register"):
        assert calls.get(name), name
    ledger = scene.hard_cap.pager.budget.stats()
    assert ledger.peak <= ledger.cap
    assert scene.settle() == at_rest


if __name__ == "__main__":
    globals()[sys.argv[1]]()
