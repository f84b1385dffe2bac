"""The caching allocator: any sequence of calls against a reference, and the functions for torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock import _core
from penstock._core import Budget, CachingAllocator, FramePool, HostDevice, Tag
from penstock.errors import CapExceededError

FRAME = 64 << 10
ALIGNMENT = 512
SIZES = st.one_of(
    st.sampled_from([1, 512, 4096, FRAME, 1 << 20]),
    st.integers(1, 4 * FRAME),
    st.integers(1 << 20, (1 << 20) + 8 * FRAME),
)


@dataclass(frozen=True)
class Block:
    address: int
    nbytes: int
    mark: int
    pool: tuple[int, int]

    def write(self) -> None:
        ctypes.memset(self.address, self.mark, self.nbytes)

    def intact(self) -> bool:
        return ctypes.string_at(self.address, self.nbytes) == bytes([self.mark]) * self.nbytes


class AllocatorMachine(RuleBasedStateMachine):
    """On the host's null stream, whose work is done when it is given."""

    @initialize(frames=st.integers(0, 60))
    def make(self, frames: int) -> None:
        self.device = HostDevice()
        self.budget = Budget(frames * FRAME)
        self.pool = FramePool(self.device, self.budget, FRAME)
        self.allocator = CachingAllocator(self.pool, 32 * FRAME, 64 * FRAME)
        self.blocks: list[Block] = []
        self.marks = 0
        self.current = (0, 0)
        self.uses: dict[tuple[int, int], int] = {}
        self.refused = 0
        self.weights = 0

    @rule(nbytes=SIZES)
    def allocate(self, nbytes: int) -> None:
        self.marks = self.marks % 255 + 1
        try:
            address = self.allocator.allocate(nbytes)
        except CapExceededError as error:
            self.refused += 1
            assert (error.requested, error.cap) == (nbytes, self.budget.cap)
            assert self.budget.available < nbytes
            return
        assert address % ALIGNMENT == 0
        self.blocks.append(Block(address, nbytes, self.marks, self.current))
        self.blocks[-1].write()

    @rule(data=st.data(), recorded=st.booleans())
    @precondition(lambda self: self.blocks)
    def free(self, data: st.DataObject, recorded: bool) -> None:
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        assert block.intact()
        if recorded:
            self.allocator.record_stream(block.address, 0)
        self.allocator.free(block.address)
        with pytest.raises(ValueError, match="live block"):
            self.allocator.free(block.address)

    @rule()
    def empty_cache(self) -> None:
        self.allocator.empty_cache()
        if not self.blocks and not any(self.uses.values()) and self.current == (0, 0):
            assert self.budget.stats().used_by_tag["activations"] == 0

    @rule(nbytes=st.integers(0, 6 * FRAME))
    def give_back(self, nbytes: int) -> None:
        before = self.budget.stats().used
        given = self.allocator.give_back(nbytes)
        assert before - self.budget.stats().used == given

    @rule(frames=st.integers(0, 60))
    def set_cap(self, frames: int) -> None:
        fits = self.budget.stats().used <= frames * FRAME
        assert self.budget.try_set_cap(frames * FRAME) == fits

    @rule(frames=st.integers(1, 8))
    def want_room_for_weights(self, frames: int) -> None:
        if self.pool.make_room(frames * FRAME):
            assert self.budget.try_charge(Tag.weights, frames * FRAME)
            self.weights += frames * FRAME

    @rule()
    def release_weights(self) -> None:
        self.budget.release(Tag.weights, self.weights)
        self.weights = 0

    @rule(number=st.integers(1, 2))
    @precondition(lambda self: self.current == (0, 0))
    def begin_pool(self, number: int) -> None:
        self.current = (number, 7)
        self.allocator.begin_pool(self.current, [0])
        self.uses[self.current] = self.uses.get(self.current, 0) + 1

    @rule()
    @precondition(lambda self: self.current != (0, 0))
    def end_pool(self) -> None:
        self.allocator.end_pool(self.current)
        self.current = (0, 0)

    @rule(number=st.integers(1, 2))
    def release_pool(self, number: int) -> None:
        pool = (number, 7)
        if self.uses.get(pool, 0) == 0:
            with pytest.raises(ValueError, match="pool"):
                self.allocator.release_pool(pool)
            return
        self.uses[pool] -= 1
        self.allocator.release_pool(pool)

    @invariant()
    def figures_agree(self) -> None:
        stats = self.allocator.stats()
        ledger = self.budget.stats()
        assert ledger.used <= ledger.cap
        assert stats["reserved_bytes.all.current"] == ledger.used_by_tag["activations"]
        assert stats["allocation.all.current"] == len(self.blocks)
        rounded = sum(-(-block.nbytes // ALIGNMENT) * ALIGNMENT for block in self.blocks)
        assert stats["allocated_bytes.all.current"] == rounded
        assert stats["requested_bytes.all.current"] == sum(block.nbytes for block in self.blocks)
        assert stats["num_ooms"] == self.refused
        for name in ("allocated_bytes", "reserved_bytes", "active", "segment"):
            sides = [stats[f"{name}.{side}.current"] for side in ("small_pool", "large_pool")]
            assert stats[f"{name}.all.current"] == sum(sides)

    @invariant()
    def blocks_are_listed_and_apart(self) -> None:
        live = self.allocator.live_blocks()
        assert [(b.address, b.requested, b.pool) for b in live] == [
            (b.address, b.nbytes, b.pool) for b in self.blocks_by_age(live)
        ]
        ends = sorted((b.address, b.address + b.nbytes) for b in live)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))

    def blocks_by_age(self, live: list[_core.LiveBlock]) -> list[Block]:
        mine = {block.address: block for block in self.blocks}
        assert len(live) == len(mine)
        return [mine[block.address] for block in live]

    def teardown(self) -> None:
        for block in getattr(self, "blocks", []):
            assert block.intact()


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAllocatorMachine = AllocatorMachine.TestCase


# ---- the functions that torch calls -------------------------------------------------------------

DEVICE = 5


@pytest.fixture
def allocator() -> Iterator[CachingAllocator]:
    pool = FramePool(HostDevice(), Budget(8 * FRAME), FRAME)
    made = CachingAllocator(pool, 8 * FRAME, 8 * FRAME)
    _core.install_torch_allocator(DEVICE, made)
    yield made
    if _core.installed_torch_allocator(DEVICE) is not None:
        _core.uninstall_torch_allocator(DEVICE)


@pytest.fixture
def functions() -> ctypes.CDLL:
    library = ctypes.CDLL(_core.__file__)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.penstock_malloc.argtypes = [size, number, pointer]
    library.penstock_malloc.restype = pointer
    library.penstock_free.argtypes = [pointer, size, number, pointer]
    library.penstock_free.restype = None
    library.penstock_record_stream.argtypes = [pointer, pointer]
    library.penstock_record_stream.restype = None
    library.penstock_empty_cache.argtypes = []
    library.penstock_empty_cache.restype = None
    library.penstock_base_alloc.argtypes = [pointer, ctypes.POINTER(size)]
    library.penstock_base_alloc.restype = pointer
    library.penstock_largest_block.argtypes = [ctypes.c_int]
    library.penstock_largest_block.restype = size
    return library


def test_symbols_serve_the_installed_allocator(
    allocator: CachingAllocator, functions: ctypes.CDLL
) -> None:
    address = functions.penstock_malloc(1000, DEVICE, None)
    assert [block.address for block in allocator.live_blocks()] == [address]
    ctypes.memset(address, 1, 1000)
    size = ctypes.c_size_t()
    assert functions.penstock_base_alloc(address, ctypes.byref(size)) == address
    assert size.value == 1024
    functions.penstock_record_stream(address, None)
    with pytest.raises(ValueError, match="in use"):
        _core.uninstall_torch_allocator(DEVICE)
    functions.penstock_free(address, 1000, DEVICE, None)
    assert allocator.live_blocks() == []
    functions.penstock_empty_cache()
    assert allocator.stats()["reserved_bytes.all.current"] == 0
    assert functions.penstock_malloc(0, DEVICE, None) is None
    functions.penstock_free(None, 0, DEVICE, None)


def test_largest_block_can_be_had(allocator: CachingAllocator, functions: ctypes.CDLL) -> None:
    largest = functions.penstock_largest_block(DEVICE)
    address = functions.penstock_malloc(largest, DEVICE, None)
    assert functions.penstock_largest_block(DEVICE) == 0
    functions.penstock_free(address, largest, DEVICE, None)  # cached from now on
    assert functions.penstock_largest_block(DEVICE) == largest > 0
    assert functions.penstock_largest_block(DEVICE + 1) == 0


def test_every_symbol_is_exported(functions: ctypes.CDLL) -> None:
    for name in ("malloc", "free", "record_stream", "empty_cache", "base_alloc"):
        assert hasattr(functions, f"penstock_{name}")
    for name in ("begin_pool", "end_pool", "release_pool"):
        assert hasattr(functions, f"penstock_{name}")


def test_installing_twice_is_refused(allocator: CachingAllocator) -> None:
    assert _core.installed_torch_allocator(DEVICE) is allocator
    with pytest.raises(ValueError, match="device 5 has an allocator already"):
        _core.install_torch_allocator(DEVICE, allocator)
    assert _core.uninstall_torch_allocator(DEVICE) is allocator
    assert _core.installed_torch_allocator(DEVICE) is None
    with pytest.raises(ValueError, match="has no allocator"):
        _core.uninstall_torch_allocator(DEVICE)


def test_wrong_frees_do_not_raise_in_hooks(
    allocator: CachingAllocator, functions: ctypes.CDLL
) -> None:
    functions.penstock_free(4096, 0, DEVICE, None)
    functions.penstock_record_stream(4096, None)
    functions.penstock_free(4096, 0, DEVICE + 1, None)
    assert allocator.allocate(10) != 0
    for block in allocator.live_blocks():
        allocator.free(block.address)


def test_allocator_gives_room_to_others() -> None:
    budget = Budget(4 * FRAME)
    pool = FramePool(HostDevice(), budget, FRAME)
    allocator = CachingAllocator(pool)
    allocator.free(allocator.allocate(3 * FRAME))
    assert not budget.try_charge(Tag.weights, 3 * FRAME)
    assert pool.make_room(3 * FRAME)
    assert budget.try_charge(Tag.weights, 3 * FRAME)
    with pytest.raises(CapExceededError, match="weights"):
        allocator.allocate(2 * FRAME)
