"""What is learned of a pass: each module's step, reads beside it, and the order."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from penstock.learning import learn, whole_subtrees
from penstock.steps import Order, Steps


@dataclass
class Call:
    module: int
    parent: Call | None = None
    read: set[int] = field(default_factory=set)


def steps_of(*own: set[int], whole: dict[int, frozenset[int]] | None = None) -> Steps:
    """Make steps of modules, with a page for each tensor."""
    names = [f"m{i}" for i in range(len(own))]
    pages = [[i] for i in range(1 + max((i for each in own for i in each), default=0))]
    return Steps(names, [frozenset(each) for each in own], whole or {}, pages)


def test_what_a_module_reads_is_its_step_inside_of_those_around_it() -> None:
    steps = steps_of({0}, {1}, {2})
    outer = Call(0, None, {0})
    order, changed = learn(steps, [outer, Call(1, outer, {1}), Call(2, outer, {2})], 3)
    assert order == Order(((0, ()), (1, (0,)), (2, (0,))))
    assert not changed, "it is what they hold"
    assert steps.pages_in_use(order) == [[0], [0, 1], [0, 2]]


def test_what_another_module_holds_is_learned_where_it_is_read() -> None:
    steps = steps_of(set(), {0}, {1})
    outer = Call(0)
    order, changed = learn(steps, [outer, Call(1, outer, {0, 1}), Call(2, outer)], 3)
    assert order == Order(((1, ()),))
    assert changed == {1, 2}
    assert steps.tensors(1) == {0, 1}
    assert steps.tensors(2) == set()


def test_what_only_some_calls_read_is_a_step_of_its_own() -> None:
    steps = steps_of({0, 1})
    order, changed = learn(steps, [Call(0, None, {0, 1}), Call(0, None, {0})], 3)
    assert order == Order(((0, ()), (1, (0,)), (0, ())))
    assert changed == {0, 1}
    assert steps.tensors(1) == {1}
    again, changed = learn(steps, [Call(0, None, {0, 1})], 3)
    assert again.steps == [0, 1]
    assert not changed


def test_a_module_that_leaves_its_parts_no_room_reads_piece_by_piece() -> None:
    steps = steps_of({0, 1}, {2, 3})
    outer = Call(0, None, {0, 1})
    order, changed = learn(steps, [outer, Call(1, outer, {2, 3})], 3)
    assert order == Order(((2, ()), (1, ())))
    assert changed == {0, 2}
    assert max(map(len, steps.pages_in_use(order))) == 2


def test_modules_that_look_at_all_of_their_parts_keep_that_together() -> None:
    attention = nn.MultiheadAttention(4, 2)
    modules = list(nn.Sequential(nn.Linear(4, 4), attention).modules())
    own = [frozenset({i}) for i in range(len(modules))]
    whole = whole_subtrees(modules, own)
    at = modules.index(attention)
    assert whole == {at: frozenset({at, modules.index(attention.out_proj)})}
    steps = steps_of(*map(set, own), whole=whole)
    learn(steps, [Call(at, None, {at})], 1)
    assert steps.tensors(at) == whole[at]
