"""The managed pager and the manager on a real GPU."""

import gc
import threading

import pytest
import torch
from torch import nn

import penstock

pytestmark = pytest.mark.gpu

MIB = 1 << 20


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("table", torch.arange(width) * 0.01, persistent=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x) + self.table)))


class Tied(nn.Module):
    def __init__(self, width: int = 1024, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2000, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.head = nn.Linear(width, 2000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.blocks(self.embedding(ids))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(1)
    model = Tied().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, 2000, (2, 24), device="cuda")
    with torch.no_grad():
        return state, ids, model.cuda()(ids)


@pytest.mark.parametrize("cap", ["64MiB", "96MiB", "1GiB"])
def test_output_is_bit_identical_under_any_cap(reference, cap):
    state, ids, wanted = reference
    manager = penstock.MemoryManager(cap=cap, device="cuda", pager="managed")
    manager.register("m", lambda: Tied().eval(), state)
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(5):
            assert torch.equal(model(ids), wanted)
        assert model.head.weight is model.embedding.weight
    stats = manager.stats()
    assert stats.peak <= stats.cap
    assert stats.used == 0


def test_a_step_that_cannot_fit_is_refused_and_the_manager_stays_usable(reference):
    state, ids, _ = reference
    manager = penstock.MemoryManager(cap="8MiB", device="cuda", pager="managed")
    manager.register("m", lambda: Tied().eval(), state)
    with (
        torch.no_grad(),
        manager.use("m") as model,
        pytest.raises(penstock.CapExceededError, match="blocks"),
    ):
        model(ids)
    assert manager.stats().used == 0


def test_other_streams_wait_for_their_pages(reference):
    state, ids, wanted = reference
    manager = penstock.MemoryManager(cap="64MiB", device="cuda", pager="managed")
    manager.register("m", lambda: Tied().eval(), state)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.no_grad(), manager.use("m") as model:
        for i in range(9):
            with torch.cuda.stream(streams[i % 3]):
                out = model(ids)
            streams[i % 3].synchronize()
            assert torch.equal(out, wanted)


def test_written_pages_survive_eviction():
    pager = penstock.Pager(cap="64MiB", device="cuda")
    region = pager.reserve("32MiB", writable=True)
    tensor = region.tensor(0, (8 * MIB,), torch.float32)
    pager.prefetch(region)
    wanted = torch.randn(8 * MIB, device="cuda")
    tensor.copy_(wanted)
    torch.cuda.synchronize()
    assert pager.evict(region) == 32 * MIB
    assert torch.equal(tensor, wanted)


def add_to_weight(module, args, output):
    module.weight.add_(0.125)


def test_weights_that_are_changed_in_place_survive_eviction(reference):
    state, ids, wanted = reference
    manager = penstock.MemoryManager(cap="64MiB", device="cuda", pager="managed")
    manager.register("m", lambda: Tied().eval(), state)
    plain = Tied().eval()
    plain.load_state_dict(state)
    plain = plain.cuda()
    with torch.no_grad(), manager.use("m") as model:
        for _ in range(3):
            assert torch.equal(model(ids), wanted)
        for changed in (plain, model):  # between passes, some resident and some not
            for parameter in changed.parameters():
                parameter.mul_(0.75)
        handles = [
            module.register_forward_hook(add_to_weight)
            for changed in (plain, model)
            for module in (changed.blocks[0].up, changed.blocks[1].down)
        ]
        for _ in range(4):  # and inside of steps
            assert torch.equal(model(ids), plain(ids))
        for handle in handles:
            handle.remove()
    for _ in range(2):
        with torch.no_grad(), manager.use("m") as model:  # evicted, and loaded again
            assert torch.equal(model(ids), plain(ids))
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), plain.state_dict()[name].cpu()), name


def test_a_tensor_outlives_pager_and_manager():
    pager = penstock.Pager(cap="8MiB", device="cuda")
    tensor = pager.reserve("4MiB").tensor(0, (MIB,), torch.float32)
    tensor.fill_(2.0)
    del pager
    gc.collect()
    assert tensor.sum().item() == 2.0 * MIB


DTYPES = (
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32),
    *(torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64),
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_zero_copy(dtype):
    pager = penstock.Pager(cap="8MiB", device="cuda")
    region = pager.reserve("1MiB")
    source = torch.randint(0, 2, (3, 4096), dtype=torch.uint8).to(dtype)
    region.core.write(4096, source.contiguous().view(torch.uint8).numpy())
    tensor = region.tensor(4096, (3, 4096), dtype)
    assert tensor.data_ptr() == region.address + 4096
    assert torch.equal(tensor.cpu().view(torch.uint8), source.view(torch.uint8))


def test_two_models_in_two_threads_share_one_cap(reference):
    state, ids, wanted = reference
    manager = penstock.MemoryManager(cap="128MiB", device="cuda", pager="managed")
    for name in "ab":
        manager.register(name, lambda: Tied().eval(), state)
    wrong, peaks = [], []

    def run(name):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                with manager.use(name) as model:
                    torch.cuda.current_stream().synchronize()
                    same = torch.equal(model(ids), wanted)
                if not same:
                    wrong.append(name)
                peaks.append(manager.stats().peak)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong
    assert max(peaks) <= 128 * MIB
