"""The low level: regions, tensors on them, and what is resident, by the ledger and the system."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock
from penstock import CapExceededError, Pager, Region, _core
from penstock.memory.devices import open_device
from python.support import KIB, MIB, run_python, same_bits, within


def make(cap: int | str = "16MiB", page_size: int | str = "2MiB") -> Pager:
    return Pager(cap=cap, device="cpu", page_size=page_size)


def filled(pager: Pager, nbytes: int, *, writable: bool = False) -> tuple[Region, torch.Tensor]:
    """Reserve a region with noise in it, and return it with a copy of the noise."""
    region = pager.reserve(nbytes, writable=writable)
    noise = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    region.core.write(0, noise.numpy())
    return region, noise


def system(region: Region) -> int:
    nbytes = region.core.resident_bytes()
    assert nbytes is not None, "this system does not tell which pages are resident"
    return nbytes


# ---- making one --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cap", "nbytes"), [("1.5MiB", 3 * MIB // 2), ("4KB", 4000), (12345, 12345)]
)
def test_cap_may_be_a_text(cap: int | str, nbytes: int) -> None:
    assert Pager(cap=cap, device="cpu").cap == nbytes


@pytest.mark.parametrize("cap", ["much", 0, -1, "0GiB"])
def test_cap_that_is_no_size_is_refused(cap: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        make(cap)


@pytest.mark.parametrize("size", ["20000000TiB", 1 << 64])
def test_size_beyond_all_machines_is_refused_as_a_value(size: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        make(size)


@pytest.mark.parametrize("page_size", [1024, 5000, "3MiB"])
def test_page_size_must_be_a_power_of_two_of_at_least_4_kib(page_size: int | str) -> None:
    with pytest.raises(ValueError, match="power of two"):
        make(page_size=page_size)


def test_unknown_kind_and_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'swap'.*managed"):
        Pager(cap=1, device="cpu", kind="swap")
    with pytest.raises(ValueError, match=r'"tpu".*"cuda:N"'):
        Pager(cap=1, device="tpu")
    assert Pager(cap=1, device="cpu", kind="auto").kind == "managed"


def test_device_may_be_given_in_every_form() -> None:
    host = _core.HostDevice()
    core, device = open_device(host)
    assert (core, device) == (host, torch.device("cpu"))
    for name in ("cpu", torch.device("cpu"), torch.device("cpu", 0)):
        core, device = open_device(name)
        assert core.info().kind is _core.DeviceKind.host
        assert device == torch.device("cpu")


@pytest.mark.skipif(_core.cuda_device_count() > 0, reason="there is a GPU")
def test_missing_gpu_is_an_error_that_says_so_and_auto_takes_the_host() -> None:
    with pytest.raises(penstock.DeviceError, match='device="cpu"'):
        Pager(cap=1, device="cuda")
    assert Pager(cap=1, device="auto").device == torch.device("cpu")


# ---- regions and tensors -----------------------------------------------------------------------


def test_region_is_sized_and_nothing_of_it_is_resident() -> None:
    pager = make()
    region = pager.reserve("5MiB")
    assert region.nbytes == 5 * MIB
    assert region.address % (2 * MIB) == 0
    assert region.device == torch.device("cpu")
    assert system(region) == 0
    assert pager.budget.stats().used == 0


@pytest.mark.parametrize("nbytes", [0, -1, "nothing"])
def test_region_without_bytes_is_refused(nbytes: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        make().reserve(nbytes)


def test_region_larger_than_the_disk_is_a_device_error_and_costs_nothing() -> None:
    pager = make()
    with pytest.raises(penstock.DeviceError) as caught:
        pager.reserve("1000TiB")
    assert caught.value.call in ("ftruncate", "fallocate")
    assert system(pager.reserve("1MiB")) == 0


def test_tensor_is_the_memory_itself() -> None:
    region, noise = filled(make(), 4 * MIB, writable=True)
    tensor = region.tensor(512, (3, 5, 7), torch.float32)
    assert tensor.data_ptr() == region.address + 512
    assert tensor.shape == (3, 5, 7)
    assert tensor.is_contiguous()
    assert same_bits(tensor, noise[512 : 512 + 420].view(torch.float32).view(3, 5, 7))
    same_bytes = region.tensor(512, (105,), torch.int32)
    tensor[0, 0, 0] = 1.0
    assert same_bytes[0].item() == 0x3F800000


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 1, 2)])
def test_tensor_may_have_any_shape(shape: tuple[int, ...]) -> None:
    region, noise = filled(make(), 4096)
    tensor = region.tensor(8, shape, torch.int16)
    assert same_bits(tensor, noise[8 : 8 + 2 * tensor.numel()].view(torch.int16).view(shape))


@pytest.mark.parametrize(
    ("offset", "count"), [(4096, 1), (4092, 2), (0, 1025), (1 << 40, 1), (-4, 1)]
)
def test_tensor_that_leaves_the_region_is_refused(offset: int, count: int) -> None:
    with pytest.raises(IndexError, match="region of 4096 bytes"):
        make().reserve(4096).tensor(offset, (count,), torch.float32)


def test_tensor_must_be_aligned() -> None:
    with pytest.raises(ValueError, match=r"offset 6 .* multiple of 4.*torch\.float32"):
        make().reserve(4096).tensor(6, (1,), torch.float32)


def test_pages_of_a_range() -> None:
    region = make(page_size=4096).reserve(10000)
    assert region.pages_of(0, 10000) == [0, 1, 2]
    assert region.pages_of(4095, 2) == [0, 1]
    assert region.pages_of(4096, 4096) == [1]
    assert region.pages_of(9999, 1) == [2]
    assert region.pages_of(5000, 0) == []


def test_tensor_outlives_pager_and_region() -> None:
    region, noise = filled(make(), MIB)
    tensor = region.tensor(0, (MIB,), torch.uint8)
    del region
    gc.collect()
    assert same_bits(tensor, noise)


# ---- what is resident --------------------------------------------------------------------------


def test_prefetch_raises_and_evict_lowers_what_the_system_counts() -> None:
    pager = make()
    region, noise = filled(pager, 9 * MIB)  # the last page is half a page
    tensor = region.tensor(0, (9 * MIB,), torch.uint8)
    assert pager.prefetch(region, 0, 1) == 2 * MIB
    pager.synchronize()
    assert system(region) == pager.budget.stats().used == 2 * MIB
    assert pager.prefetch(region, 2 * MIB - 1, 2) == 2 * MIB  # one of the two is there
    assert pager.prefetch(region) == 5 * MIB
    assert pager.prefetch(region) == 0
    pager.synchronize()
    assert system(region) == pager.budget.stats().used == 9 * MIB

    assert pager.evict(region, 8 * MIB) == MIB
    assert pager.evict(region, 8 * MIB) == 0
    assert system(region) == pager.budget.stats().used == 8 * MIB
    assert pager.evict(region, 3 * MIB, 2 * MIB) == 4 * MIB
    assert system(region) == pager.budget.stats().used == 4 * MIB
    assert pager.evict(region) == 4 * MIB
    assert system(region) == pager.budget.stats().used == 0
    assert same_bits(tensor, noise)


@pytest.mark.parametrize("nbytes", [1, 4095, 4097, 2 * MIB + 512, 4 * MIB - 1])
def test_last_page_counts_as_much_as_it_takes(nbytes: int) -> None:
    pager = make()
    region = pager.reserve(nbytes)
    charged = pager.prefetch(region)
    pager.synchronize()
    assert charged == pager.budget.stats().used
    assert nbytes <= system(region) <= charged


def test_other_pages_make_room() -> None:
    pager = make("6MiB")
    region, noise = filled(pager, 20 * MIB)
    tensor = region.tensor(0, (20 * MIB,), torch.uint8)
    for start in range(0, 20 * MIB, 2 * MIB):
        assert pager.prefetch(region, start, 2 * MIB) == 2 * MIB
        pager.synchronize()
        assert system(region) <= 6 * MIB
        part = slice(start, start + 2 * MIB)
        assert same_bits(tensor[part], noise[part])
        assert system(region) == pager.budget.stats().used
    assert pager.budget.stats().used == pager.budget.stats().peak == 6 * MIB


def test_range_larger_than_the_cap_is_refused_with_numbers_and_leaves_all_as_it_was() -> None:
    pager = make("4MiB")
    region, noise = filled(pager, 8 * MIB)
    pager.prefetch(region, 0, 2 * MIB)
    with pytest.raises(CapExceededError, match="Raise the cap") as caught:
        pager.prefetch(region)
    assert caught.value.cap == 4 * MIB
    assert caught.value.requested == 6 * MIB
    assert isinstance(caught.value, MemoryError)
    stats = pager.core.region_stats(region.core)
    assert stats.pinned_pages == 0
    assert stats.resident_bytes == pager.budget.stats().used <= 4 * MIB
    assert pager.prefetch(region, 4 * MIB, 4 * MIB) == 4 * MIB
    assert same_bits(region.tensor(0, (8 * MIB,), torch.uint8), noise)


@pytest.mark.parametrize(
    ("start", "nbytes"),
    [(0, 5 * MIB), (5 * MIB, 1), (5 * MIB, None), (-1, 1), (0, -1)],
)
@pytest.mark.parametrize("call", [Pager.prefetch, Pager.evict], ids=["prefetch", "evict"])
def test_range_outside_the_region_is_refused(
    call: Callable[..., int], start: int, nbytes: int | None
) -> None:
    pager = make()
    region = pager.reserve("4MiB")
    with pytest.raises(IndexError, match="region of 4194304 bytes"):
        call(pager, region, start, nbytes)
    assert pager.budget.stats().used == 0


def test_empty_range_is_nothing() -> None:
    pager = make()
    region = pager.reserve("4MiB")
    assert pager.prefetch(region, MIB, 0) == 0
    assert pager.prefetch(region, 4 * MIB) == 0
    assert pager.evict(region, 0, 0) == 0
    assert system(region) == 0


def test_written_bytes_survive_eviction() -> None:
    pager = make("4MiB")
    region, noise = filled(pager, 8 * MIB, writable=True)
    tensor = region.tensor(0, (2 * MIB,), torch.float32)
    wanted = noise.view(torch.float32).clone()
    for value in range(3):
        for page in range(4):
            pager.prefetch(region, page * 2 * MIB, 2 * MIB)
            part = slice(page * MIB // 2 + value, (page + 1) * MIB // 2, 5)
            tensor[part] = float(value + page)
            wanted[part] = float(value + page)
        pager.evict(region)
        assert system(region) == 0
        assert same_bits(tensor, wanted)
        pager.evict(region)  # what reading brought in is not the ledger's
        assert pager.budget.stats().used == 0


def test_written_frames_survive_wherever_their_pages_go() -> None:
    pager = Pager(cap="128KiB", device="cpu", kind="frames", page_size="64KiB")
    region = pager.reserve("256KiB")
    tensor = region.tensor(0, (64 * KIB,), torch.float32)
    wanted = torch.zeros(64 * KIB)
    for value in range(3):
        for page in range(4):  # of which two have a frame
            pager.prefetch(region, page * 64 * KIB, 64 * KIB)
            part = slice(page * 16 * KIB, (page + 1) * 16 * KIB)
            if value > 0:
                assert same_bits(tensor[part], wanted[part])
            tensor[part] = wanted[part] = torch.randn(16 * KIB)
        if value == 1:
            assert pager.evict(region) == 128 * KIB
            assert pager.budget.stats().used == 0


def test_frames_that_are_only_read_are_copied_one_way() -> None:
    pager = Pager(cap="128KiB", device="cpu", kind="frames", page_size="64KiB")
    for writable in (False, True):
        region = pager.reserve("256KiB", writable=writable)
        for page in range(4):
            pager.prefetch(region, page * 64 * KIB, 64 * KIB)
        pager.evict(region)
        back = region.core.frames_stats().written_back_bytes
        assert back == (256 * KIB if writable else 0)


def test_evict_takes_what_reading_brought_in() -> None:
    pager = make("4MiB")
    region, noise = filled(pager, 8 * MIB)
    assert same_bits(region.tensor(0, (8 * MIB,), torch.uint8), noise)  # nothing was prefetched
    assert system(region) > 0
    pager.evict(region)
    assert system(region) == 0


def test_regions_share_the_cap_and_the_least_recently_used_goes() -> None:
    pager = make("4MiB")
    regions = [filled(pager, 2 * MIB)[0] for _ in range(3)]
    for region in regions:
        pager.prefetch(region)
    pager.synchronize()
    assert [system(region) // MIB for region in regions] == [0, 2, 2]
    pager.prefetch(regions[1])
    pager.prefetch(regions[0])
    pager.synchronize()
    assert [system(region) // MIB for region in regions] == [2, 2, 0]


def test_region_that_goes_gives_its_bytes_back() -> None:
    pager = make("4MiB")
    region = pager.reserve("4MiB")
    pager.prefetch(region)
    del region
    gc.collect()
    assert pager.budget.stats().used == 0
    assert pager.prefetch(pager.reserve("4MiB")) == 4 * MIB


def test_region_of_another_pager_is_refused() -> None:
    said = run_python("""
import penstock

one, other = (penstock.Pager(cap="8MiB", device="cpu") for _ in range(2))
region = one.reserve("4MiB")
for call in (other.prefetch, other.evict):
    try:
        call(region)
    except (penstock.PenstockError, ValueError):
        print("refused")
del region
print(one.budget.stats().used, other.budget.stats().used)
""")
    assert said.split() == ["refused", "refused", "0", "0"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["prefetch", "evict", "write", "read"]),
            st.integers(0, 1),
            st.integers(0, 40 * KIB - 1),
            st.integers(0, 12 * KIB),
        ),
        max_size=40,
    )
)
def test_any_sequence_keeps_the_bytes_and_the_cap(calls: list[tuple[str, int, int, int]]) -> None:
    nbytes = 40 * KIB - 100
    pager = make(20 * KIB, 4096)
    regions, copies = zip(*(filled(pager, nbytes, writable=True) for _ in range(2)), strict=True)
    tensors = [region.tensor(0, (nbytes,), torch.uint8) for region in regions]
    for number, (name, which, start, length) in enumerate(calls):
        region, tensor, mirror = regions[which], tensors[which], copies[which]
        start = min(start, nbytes)
        length = min(length, nbytes - start)
        part = slice(start, start + length)
        if name == "write":
            tensor[part] = mirror[part] = number
        elif name == "read":
            assert torch.equal(tensor[part], mirror[part])
        else:
            getattr(pager, name)(region, start, length)
        counted = sum(pager.core.region_stats(r.core).resident_bytes for r in regions)
        assert counted == pager.budget.stats().used <= 20 * KIB
    assert all(map(torch.equal, tensors, copies))


def test_threads_that_want_all_at_once_stay_under_the_cap() -> None:
    pager = make("8MiB", "64KiB")
    shared, noise = filled(pager, 16 * MIB)
    tensor = shared.tensor(0, (16 * MIB,), torch.uint8)
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            start = int(torch.randint(0, 15 * MIB, (), generator=generator))
            part = slice(start, start + MIB)
            if seed == 3:
                pager.evict(shared, start, MIB)
            else:
                pager.prefetch(shared, start, MIB)
            if not torch.equal(tensor[part], noise[part]):
                wrong.append(f"bytes at {start}")
            if pager.budget.stats().used > 8 * MIB:
                wrong.append("cap")

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert pager.budget.stats().peak <= 8 * MIB
    within(30, lambda: pager.evict(shared))
    assert pager.budget.stats().used == 0


# ---- the link ----------------------------------------------------------------------------------


def test_link_is_measured_once_and_again_where_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    go_on = threading.Event()

    def measure(device: _core.Device, nbytes: int) -> float:
        asked.append(nbytes)
        assert go_on.wait(60)
        if len(asked) == 1:
            raise RuntimeError("the link broke")
        return 5e9

    monkeypatch.setattr(_core, "measure_link_rate", measure)
    pager = make()
    first = pager._link.begin()  # on a thread of its own
    assert pager._link.begin() is first
    go_on.set()
    with pytest.raises(RuntimeError, match="the link broke"):
        first.result(60)
    with pager.measuring_link():
        pass
    assert len(asked) == 2
    assert pager.link_rate == 5e9
    assert len(asked) == 2


# ---- fork --------------------------------------------------------------------------------------

FORK = """
import os, signal, sys
import penstock

pager = penstock.Pager(cap="8MiB", device="cpu")
region = pager.reserve("8MiB")
pager.prefetch(region, 0, 2 << 20)
pager.synchronize()
sys.stdout.flush()
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends a child that hangs
    calls = {
        "prefetch": lambda: pager.prefetch(region, 4 << 20),
        "evict": lambda: pager.evict(region),
        "synchronize": lambda: pager.synchronize(),
    }
    for name, call in calls.items():
        try:
            call()
        except penstock.PenstockError as error:
            print(name, "after the fork" in str(error), flush=True)
    print("reads", region.tensor(0, (1,), __import__("torch").uint8).item(), flush=True)
    del region, pager
    sys.exit(7)
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status))
print("parent", pager.prefetch(region), pager.evict(region))
"""


def test_forked_child_gets_errors_and_ends_and_the_parent_goes_on() -> None:
    assert run_python(FORK).splitlines() == [
        "prefetch True",
        "evict True",
        "synchronize True",
        "reads 0",
        "child 7",
        f"parent {6 * MIB} {8 * MIB}",
    ]


@pytest.mark.parametrize("kind", ["managed", "frames"])
def test_pages_above_the_cap_are_refused_at_once_with_the_numbers(kind: str) -> None:
    with pytest.raises(ValueError, match=r"page_size is 2\.00 MiB, and the cap 1\.00 MiB"):
        penstock.MemoryManager(cap="1MiB", device="cpu", pager=kind, page_size="2MiB")
    assert penstock.Pager(cap="2MiB", device="cpu", kind=kind, page_size="2MiB").cap == 2 << 20
