"""Keyed tensors: which operations are seen with which bytes, and that their bits are plain torch's.

A process has one table of paging functions, so each test that installs one runs in a process of its
own; `PRELUDE` is what they begin with.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock import built_libraries as built
from penstock.dispatch import torch_dispatch
from penstock.errors import DeviceError
from python.support import run_python

PRELUDE = """
import copy, ctypes, threading, warnings
import torch
from torch import nn
from torch.nn import functional as F
from penstock.dispatch import torch_dispatch as td

warnings.simplefilter("error")
torch.manual_seed(0)
SIZE, POINTER = ctypes.c_size_t, ctypes.c_void_p


class Range(ctypes.Structure):
    _fields_ = [("address", POINTER), ("nbytes", SIZE), ("written", ctypes.c_bool)]


class Operation(ctypes.Structure):
    _fields_ = [("id", POINTER), ("name", ctypes.c_char_p), ("stream", POINTER),
                ("in_backward", ctypes.c_bool)]


BEGIN = ctypes.CFUNCTYPE(POINTER, ctypes.POINTER(Operation), ctypes.POINTER(Range), SIZE,
                         ctypes.POINTER(ctypes.py_object))
END = ctypes.CFUNCTYPE(None, POINTER, ctypes.POINTER(ctypes.py_object))
BEGIN_AT_ONCE = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Operation), ctypes.POINTER(Range),
                                 SIZE, ctypes.POINTER(POINTER))
END_AT_ONCE = ctypes.CFUNCTYPE(ctypes.c_bool, POINTER)
PARTS = ctypes.CFUNCTYPE(SIZE, ctypes.POINTER(Range), SIZE)
HOLD = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.POINTER(Operation), ctypes.POINTER(Range),
                        ctypes.c_uint64, ctypes.c_bool, ctypes.POINTER(ctypes.py_object))
RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.POINTER(ctypes.py_object))


class Api(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("begin", BEGIN), ("end", END),
                ("begin_at_once", BEGIN_AT_ONCE), ("end_at_once", END_AT_ONCE), ("parts", PARTS),
                ("hold_address", HOLD), ("release_addresses", RELEASE)]


class Seen:
    def __init__(self):
        self.limit, self.open, self.events, self.ids = 2**62, 0, [], 0
        self.errors = {}  # by the name of the operation; "end" for the end of any
        self.quick, self.quickly = False, []  # whether there is nothing to wait for, and what was
        self.held = []  # addresses, as (bytes, scope, patient), and threads that let go
        self.api = Api(3, BEGIN(self.begin), END(self.end), BEGIN_AT_ONCE(self.begin_at_once),
                       END_AT_ONCE(self.end_at_once), PARTS(self.parts),
                       HOLD(self.hold_address), RELEASE(self.release_addresses))
        td.install(self.capsule())

    def capsule(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [POINTER, ctypes.c_char_p, POINTER]
        return new(ctypes.addressof(self.api), b"penstock.paging_api", None)

    def set(self, error, value):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
        ctypes.cast(error, ctypes.POINTER(POINTER))[0] = id(value)

    def begin(self, operation, ranges, count, error):
        name = operation[0].name.decode()
        if name in self.errors:
            self.set(error, self.errors[name])
            return None
        found = [(ranges[i].address, ranges[i].nbytes, ranges[i].written) for i in range(count)]
        self.events.append((name, found, operation[0].in_backward, operation[0].stream))
        self.open += 1
        self.ids += 1
        return self.ids

    def end(self, held, error):
        self.open -= 1
        if "end" in self.errors:
            self.set(error, self.errors["end"])

    def begin_at_once(self, operation, ranges, count, held):
        if not self.quick:
            return False
        held[0] = self.begin(operation, ranges, count, None)
        self.quickly.append(held[0])
        return True

    def end_at_once(self, held):
        if held not in self.quickly:
            return False
        self.quickly.remove(held)
        self.end(held, None)
        return True

    def hold_address(self, operation, of, scope, patient, error):
        if "address" in self.errors:
            self.set(error, self.errors["address"])
            return 0
        self.held.append((of[0].address, of[0].nbytes, scope, patient, operation[0].in_backward))
        return 77

    def release_addresses(self, thread, error):
        self.held.append(thread)

    def parts(self, ranges, count):
        return max([self.limit, *(ranges[i].nbytes for i in range(count))])

    def take(self):
        assert self.open == 0
        events, self.events = self.events, []
        return events

    def names(self):
        return [event[0] for event in self.take()]


def keyed(module):
    for parameter in module.parameters():
        parameter.data = td.key(parameter.data)
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = td.key(buffer)
    return module


def pair(module):
    return module, keyed(copy.deepcopy(module))


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


seen = Seen()
x = torch.randn(4, 64)
"""


def check(code: str) -> None:
    run_python(PRELUDE + code, seconds=120)


def test_key_gives_an_alias_that_is_known_by_its_key() -> None:
    plain = torch.arange(12.0).view(3, 4)[1:, ::2]
    tensor = torch_dispatch.key(plain)
    assert torch_dispatch.is_keyed(tensor) and not torch_dispatch.is_keyed(plain)
    assert not torch_dispatch.is_keyed(None)
    assert (tensor.shape, tensor.stride()) == (plain.shape, plain.stride())
    assert tensor.storage_offset() == plain.storage_offset() and tensor.dtype == plain.dtype
    tensor.add_(1)
    assert torch.equal(plain, torch_dispatch.plain(tensor))
    assert not torch_dispatch.is_keyed(torch_dispatch.plain(tensor))


def test_key_keeps_lazy_conjugates_and_is_no_inference_tensor() -> None:
    value = torch.tensor([1 + 2j])
    assert torch.equal(torch_dispatch.key(value.conj()), value.conj())
    with torch.inference_mode():
        assert not torch_dispatch.key(torch.ones(2)).is_inference()


@pytest.mark.parametrize("tensor", [torch.ones(2).to_sparse(), torch.ones(1, device="meta")])
def test_key_takes_strided_tensors_only(tensor: torch.Tensor) -> None:
    if tensor.is_sparse:
        with pytest.raises(ValueError, match="only ordinary strided tensors"):
            torch_dispatch.key(tensor)
    else:
        assert torch_dispatch.storage_range(torch_dispatch.key(tensor)) is None


def test_key_of_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="expected a tensor, not int"):
        torch_dispatch.key(3)  # type: ignore[arg-type]


def test_a_range_is_that_of_the_view() -> None:
    base = torch.zeros(4, 6)
    start = base.data_ptr()
    assert torch_dispatch.storage_range(base) == (start, 96)
    assert torch_dispatch.storage_range(base[1]) == (start + 24, 24)
    assert torch_dispatch.storage_range(base[:, 2]) == (start + 8, 3 * 24 + 4)
    assert torch_dispatch.storage_range(base.t()[1:3]) == (start + 4, 3 * 24 + 8)
    assert torch_dispatch.storage_range(base[0, 0].expand(100)) == (start, 4)
    assert torch_dispatch.storage_range(base[:0]) is None


def test_another_table_is_refused() -> None:
    with pytest.raises(ValueError, match="invalid PyCapsule"):
        torch_dispatch.install(3)
    check("""
seen.api.version = 1
try:
    td.install(seen.capsule())
except ValueError as error:
    assert "version 1" in str(error)
else:
    raise AssertionError("taken")
""")


def test_what_can_be_begun_at_once_is_ended_so() -> None:
    check("""
plain, paged = pair(nn.Sequential(nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 8)))
seen.take()
seen.quick = True
assert torch.equal(plain(x), paged(x))
assert not seen.quickly and seen.names().count("aten::addmm") == 2
seen.quick = False
assert torch.equal(plain(x), paged(x))
assert seen.names().count("aten::addmm") == 2
""")


def test_forward_and_backward_are_seen_with_equal_bits() -> None:
    check("""
plain, paged = pair(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)))
seen.take()
one, other = plain(x), paged(x)
assert torch.equal(one, other)
weight = td.storage_range(paged[0].weight)
first = seen.take()[0]
assert first[0] == "aten::addmm" and (*weight, False) in first[1] and not first[2]
one.square().sum().backward()
other.square().sum().backward()
events = seen.take()
assert {"aten::mm", "aten::native_layer_norm_backward"} <= {event[0] for event in events}
assert all(event[2] for event in events)
assert same([p.grad for p in plain.parameters()], [p.grad for p in paged.parameters()])
""")


def test_views_read_nothing_and_keep_the_key() -> None:
    check("""
w = td.key(torch.randn(64, 64))
views = [
    w.t(), w[3], w[1:3], w.view(-1), w.expand(2, 64, 64), w.unsqueeze(0), w.reshape(-1), w.data,
    w.contiguous(), w.to(torch.float32), w.flatten(), w.permute(1, 0), *w.split(16), *w.chunk(4),
    *w.unbind(0), w.diagonal(), w.unfold(0, 2, 2), w.narrow(0, 1, 2), w.detach(), w.mT,
    w.view(torch.int32), w.as_strided((2, 2), (1, 1)), w.swapaxes(0, 1), w.view_as(w),
]
assert all(map(td.is_keyed, views))
torch.empty_like(w), torch.zeros_like(w), torch.rand_like(w), w.new_empty(3), w.is_set_to(w)
w.requires_grad_()
assert seen.names() == []
row = w.detach()[5] + 1
assert seen.take() == [("aten::add", [(td.storage_range(w)[0] + 5 * 256, 256, False)], False, None)]
""")


def test_results_are_plain() -> None:
    check("""
w = td.key(torch.randn(8, 8))
made = [w.clone(), copy.deepcopy(w), w + 1, w.sum(), w @ w, torch.empty_like(w), w.double()]
assert not any(map(td.is_keyed, made))
""")


def test_running_statistics_are_written_in_training_only() -> None:
    check("""
plain, paged = pair(nn.BatchNorm1d(64))
stats = [(*td.storage_range(paged.running_mean),), (*td.storage_range(paged.running_var),)]
for training in (True, False):
    plain.train(training), paged.train(training)
    seen.take()
    assert torch.equal(plain(x), paged(x))
    ranges = {e[0]: e[1] for e in seen.take()}["aten::native_batch_norm"]
    assert {(*s, training) for s in stats} <= set(ranges)
assert same(plain.buffers(), paged.buffers())
""")


@pytest.mark.parametrize("limit", [2**62, 40000])
def test_optimizers_run_whole_or_in_parts_with_equal_bits(limit: int) -> None:
    check(f"""
seen.limit = {limit}
KINDS = [
    (torch.optim.AdamW, dict(foreach=True)),
    (torch.optim.AdamW, dict(fused=True)),
    (torch.optim.Adam, dict(foreach=True, amsgrad=True)),
    (torch.optim.Adam, dict(fused=True, amsgrad=True)),
    (torch.optim.SGD, dict(foreach=True, momentum=0.9)),
    (torch.optim.SGD, dict(fused=True, momentum=0.9)),
    (torch.optim.Adagrad, dict(fused=True)),
    (torch.optim.RMSprop, dict(foreach=True)),
]
for kind, options in KINDS:
    plain, paged = pair(nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]))
    one, other = [kind(m.parameters(), lr=0.01, **options) for m in (plain, paged)]
    for step in range(3):
        for model, optimizer in ((plain, one), (paged, other)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            for state in other.state.values():
                for key, value in state.items():
                    if value is not None and value.dim() and not td.is_keyed(value):
                        state[key] = td.key(value)
            seen.take()
            optimizer.step()
    assert same(plain.parameters(), paged.parameters()), (kind, options)
    lists = [e for e in seen.take() if e[0].startswith(("aten::_foreach", "aten::_fused"))]
    written = set(r[:2] for e in lists for r in e[1] if r[2])
    assert set(td.storage_range(p.detach()) for p in paged.parameters()) <= written
    elements = 5  # lists of at most so many of an element's tensors; one element may be over
    for event in lists:
        assert len(event[1]) <= elements or sum(r[1] for r in event[1]) <= seen.limit, event
""")


def test_lists_that_return_something_run_in_parts() -> None:
    check("""
plain = [torch.randn(10 + i, 20) for i in range(7)]
paged = [td.key(p.clone()) for p in plain]
other = [p.square() + 1 for p in plain]
seen.limit = 2000
F7 = [float(i) for i in range(7)]
each = {
    "_foreach_norm": lambda l: torch._foreach_norm(l),
    "_foreach_max": lambda l: torch._foreach_max(l),
    "_foreach_mul": lambda l: torch._foreach_mul(l, F7),
    "_foreach_add": lambda l: torch._foreach_add(l, other, alpha=2),
    "_foreach_addcdiv": lambda l: torch._foreach_addcdiv(l, other, other, torch.arange(7.0)),
    "_foreach_addcmul": lambda l: torch._foreach_addcmul(l, other, other, F7),
    "_foreach_lerp": lambda l: torch._foreach_lerp(l, other, 0.3),
    "_foreach_pow": lambda l: torch._foreach_pow(2.0, l),
}
for name, run in each.items():
    expected = run(plain)
    seen.take()
    assert same(run(paged), expected), name
    assert seen.names().count("aten::" + name) == 5, name
found = torch.zeros(1)
paged[3][0, 0] = float("inf")
torch._amp_foreach_non_finite_check_and_unscale_(paged, found, torch.tensor(0.5))
assert found.item() == 1 and torch.equal(paged[6], plain[6] * 0.5)
try:
    torch._foreach_add(paged, other[:3])
except RuntimeError as error:
    assert "same number" in str(error)
""")


def test_joins_run_in_parts_also_for_autograd() -> None:
    check("""
plain = [torch.randn(5, 20) for _ in range(7)]
seen.limit = 900
for join in (torch.cat, torch.stack):
    for dim in (0, 1, -1, -2):
        gradients = []
        for key in (lambda t: t, td.key):
            leaves = [key(p.clone()).requires_grad_() for p in plain]
            for at in (2, 4, 6):
                leaves[at] = leaves[0]  # whose gradients are added in one order
            seen.take()
            result = join(leaves, dim)
            (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
            gradients.append([result.detach(), *(leaf.grad for leaf in leaves)])
        assert same(*gradients)
        assert seen.names().count("aten::" + join.__name__) == 4
odd = [*plain, torch.empty(0)]
assert torch.equal(torch.cat([td.key(p) for p in odd], 1), torch.cat(odd, 1))
mixed = [*plain, plain[0].double()]
assert torch.equal(torch.cat([td.key(p) for p in mixed]), torch.cat(mixed))
""")


MODULES = {
    "lstm": ("nn.LSTM(64, 64, 2)", "m(x[None])[0]"),
    "gru": ("nn.GRU(64, 64)", "m(x[None])[0]"),
    "attention": ("nn.MultiheadAttention(64, 4).eval()", "m(x, x, x)[0]"),
    "encoder": (
        "nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()",
        "m(x[None])",
    ),
    "convolution": ("nn.Conv2d(1, 4, 3)", "m(x[None, None])"),
    "embedding": ("nn.Embedding(64, 4, max_norm=1.0)", "m(torch.arange(4))"),
    "pooling": ("nn.Linear(64, 64)", "F.max_pool1d(m.weight, 2)"),
    "autocast": (
        "nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))",
        "torch.autocast('cpu', torch.bfloat16)(m)(x)",
    ),
}


def test_kernels_that_take_addresses_are_seen() -> None:
    code = "".join(
        f"""
plain, paged = pair({make})
for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
    with context():
        seen.take()
        assert torch.equal(*[{run} for m in (plain, paged)]), {name!r}
    starts = {{r[0] for e in seen.take() for r in e[1]}}
    assert td.storage_range(next(paged.parameters()).detach())[0] in starts, {name!r}
"""
        for name, (make, run) in MODULES.items()
    )
    check(code)


def test_transforms_checkpoints_and_compiled_code_have_equal_bits() -> None:
    check("""
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
plain, paged = pair(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
weights = [dict(m.named_parameters()) for m in (plain, paged)]
assert torch.equal(*[functional_call(plain, w, (x,)) for w in weights])
g = grad(lambda w: functional_call(plain, w, (x,)).square().sum())
assert same(*[g(w).values() for w in weights])
assert torch.equal(*[vmap(lambda row: row * 2)(m[0].weight) for m in (plain, paged)])
assert torch.equal(*[vmap(lambda v: F.linear(v, m[0].weight))(x) for m in (plain, paged)])
seen.take()
gradients = []
for model in (plain, paged):
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    gradients.append([p.grad for p in model.parameters()])
assert same(*gradients)
events = [e for e in seen.take() if e[0] == "aten::addmm"]
assert [e[2] for e in events] == [False, False, True, True]
""")


def test_custom_operators_are_seen_and_what_they_read_beside() -> None:
    check("""
other = td.key(torch.ones(64))

@torch.library.custom_op("penstock_test::two", mutates_args=("w",))
def two(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    w.mul_(2)
    return q @ w + other

w = td.key(torch.eye(64))
assert torch.equal(two(x, w), x * 2 + 1)
events = seen.take()
assert [e[0] for e in events] == ["penstock_test::two", "aten::mul_", "aten::mm", "aten::add"]
assert events[0][1] == [(*td.storage_range(w), True)]
assert events[3][1] == [(*td.storage_range(other), False)]
""")


def test_operators_that_are_defined_anew_or_overridden_are_looked_at_anew() -> None:
    check("""
w = td.key(torch.ones(4, 4))
for schema, written in (("(Tensor a) -> ()", False), ("(Tensor(a!) a) -> ()", True)):
    library = torch.library.Library("penstock_test", "FRAGMENT")
    library.define("again" + schema)
    library.impl("again", lambda a: None, "CPU")
    torch.ops.penstock_test.again(w)
    assert seen.take()[0][1][0][2] is written
    library._destroy()
with torch.no_grad():
    F.pairwise_distance(torch.ones(4, 4), w)
    assert "aten::pairwise_distance" not in seen.names()
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("pairwise_distance", lambda a, b, *others: a, "CPU")
    F.pairwise_distance(torch.ones(4, 4), w)
    assert seen.names() == ["aten::pairwise_distance"]
    library._destroy()
""")


def test_errors_of_begin_and_end_arrive_as_they_are() -> None:
    check("""
class Mine(Exception):
    pass

error = Mine("no room")

def raised(name, run):
    seen.errors = {name: error}
    try:
        run()
    except Mine as caught:
        return caught is error
    finally:
        seen.errors = {}
    return False

model = keyed(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
assert raised("aten::addmm", lambda: model(x))
assert raised("aten::mm", model(x).sum().backward)
loss, results = model(x).sum(), []
thread = threading.Thread(target=lambda: results.append(raised("aten::mm", loss.backward)))
thread.start(), thread.join()
assert results == [True]
w = model[0].weight.detach()
assert raised("end", lambda: w + 1)
seen.limit = 100
assert raised("aten::_foreach_norm", lambda: torch._foreach_norm([td.key(x) for _ in range(3)]))
seen.take()
""")


def test_an_operation_that_raises_lets_go_and_its_error_wins() -> None:
    check("""
w = td.key(torch.ones(4, 4))
for errors in ({}, {"end": ValueError("hidden")}):
    seen.errors = errors
    try:
        w @ torch.ones(3, 3)
    except RuntimeError as error:
        assert "cannot be multiplied" in str(error)
    else:
        raise AssertionError("no error")
assert len(seen.take()) == 2
""")


def test_writes_that_no_schema_tells_of() -> None:
    check("""
w = td.key(torch.full((4, 4), 1e6))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.ops.aten._saturate_weight_to_fp16(w)
assert seen.take()[0][1] == [(*td.storage_range(w), True)]
assert w.max().item() == 65504
""")


def test_what_runs_while_python_ends_is_not_paged() -> None:
    check("""
class Last:
    def __init__(self):
        self.tensor, self.add = td.key(torch.ones(3)), torch.add
    def __del__(self):
        self.add(self.tensor, 1)

import sys
sys.last_of_all = Last()
""")


def test_without_a_table_operations_just_run() -> None:
    assert torch.equal(torch_dispatch.key(torch.ones(3)) + 1, torch.full((3,), 2.0))


def test_a_library_is_built_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = built.build_extension(built.torch_dispatch_sources())
    assert library.parent == tmp_path / "penstock" and library.stat().st_size > 0
    assert built.build_extension(built.torch_dispatch_sources(), library.parent) == library
    script = [sys.executable, built.__file__, str(library.parent)]
    subprocess.run(script, check=True, timeout=300)
    assert list(library.parent.iterdir()) == [library]


def test_without_a_compiler_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(built, "prebuilt_directory", lambda: tmp_path / "none")
    monkeypatch.setattr(torch_dispatch, "_loaded", None)
    with pytest.raises(DeviceError, match=r"torch \d.*no C\+\+ compiler.*set CXX, or reinstall"):
        torch_dispatch.key(torch.ones(1))


def test_addresses_are_held_and_let_go_of_after_a_backward_pass() -> None:
    check("""
w = td.key(torch.randn(4, 8))
td.hold_address(w[1], 5, patient=False)
td.hold_address(torch.ones(3), 5, patient=True)
td.hold_address(td.key(torch.empty(0)), 5, patient=True)
assert seen.held == [(w.untyped_storage().data_ptr() + 32, 32, 5, False, False)]

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        for _ in range(2):
            td.hold_address(w, 6, patient=True)
        return 2 * grad

for _ in range(2):
    seen.held.clear()
    Double.apply(torch.ones(3, requires_grad=True)).sum().backward()
    assert [each if each == 77 else each[2:] for each in seen.held] == (
        [(6, True, True)] * 2 + [77])
seen.errors["address"] = MemoryError("none")
try:
    td.hold_address(w, 5, patient=True)
except MemoryError as error:
    assert str(error) == "none"
else:
    raise AssertionError("held")
""")
