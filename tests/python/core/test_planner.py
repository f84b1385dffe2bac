"""Plans as Python sees them, and plans of drawn schedules against an executor written here."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock._core import Plan, least_frames, plan
from penstock.errors import CapExceededError

MIB = 1 << 20
PAGE_SIZE = 16 * MIB
LINK_RATE = 55e9

Steps = list[list[int]]


def test_all_pages_stay_where_they_fit() -> None:
    made = plan(3, PAGE_SIZE, [[0], [1, 2]], 3, LINK_RATE, step_seconds=[0.25, 0.5])
    assert made.resident == [0, 1, 2]
    assert made.slot == [None, None, None]
    assert (made.ring, made.frames, made.loads, made.bytes_per_pass) == (0, 3, [], 0)
    assert made.seconds == pytest.approx(0.75)


def test_other_pages_stream_through_the_ring() -> None:
    made = plan(4, PAGE_SIZE, [[0], [1], [2], [3]], 2, LINK_RATE, keep=[2])
    assert made.resident == [2]
    assert made.slot == [0, 0, None, 0]
    assert made.loads == [(0, 0), (1, 1), (3, 3)]
    assert made.bytes_per_pass == 3 * PAGE_SIZE
    assert made.seconds >= made.bytes_per_pass / LINK_RATE


def test_too_few_frames_are_refused_with_the_numbers() -> None:
    steps = [[0, 1, 2], [3]]
    assert least_frames(4, steps, keep=[3]) == 4
    assert least_frames(5, steps) == 3
    with pytest.raises(CapExceededError, match=r"needs 3 frames.*are 2.*raise the cap by 16\.00"):
        plan(4, PAGE_SIZE, steps, 2, LINK_RATE)


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": [[4]]},
        {"keep": [4]},
        {"stream": [4]},
        {"step_seconds": [1.0]},
        {"step_seconds": [1.0, -1.0]},
        {"link_rate": 0.0},
        {"link_rate": -1.0},
        {"link_rate": float("nan")},
        {"page_size": 0},
    ],
    ids=str,
)
def test_contradictions_are_refused(arguments: dict[str, object]) -> None:
    good = {
        "page_count": 4,
        "page_size": PAGE_SIZE,
        "steps": [[0, 1], [2, 3]],
        "frames": 2,
        "link_rate": LINK_RATE,
    }
    plan(**good)
    with pytest.raises(ValueError, match=r"^plan: "):
        plan(**(good | arguments))


# ---- drawn schedules -----------------------------------------------------------------------------


def copies_of_a_pass(made: Plan, steps: Steps) -> int:
    """Carry a plan out for three passes; give the copies of the last one.

    What the plan loads for a step is put on its frames before the step, and then the step has to
    find its pages there. Before the first pass, nothing is in the ring.
    """
    frames: dict[int, int] = {}
    copies = 0
    for number in range(3):
        copies = 0
        loads = list(made.loads)
        for index, pages in enumerate(steps):
            while loads and loads[0][1] == index:
                page, _ = loads.pop(0)
                frames[made.slot[page]] = page
                copies += 1
            for page in pages:
                if made.slot[page] is None:
                    continue
                if number == 0:
                    frames.setdefault(made.slot[page], page)
                assert frames[made.slot[page]] == page, f"step {index} of pass {number}"
        assert not loads, "loads out of the order of steps"
    return copies


def collides(made: Plan, steps: Steps) -> bool:
    slots = [[made.slot[page] for page in {*pages} - {*made.resident}] for pages in steps]
    return any(len({*each}) < len(each) for each in slots)


def assert_in_shape(made: Plan, page_count: int, frames: int, keep: list[int]) -> None:
    assert made.frames == len(made.resident) + made.ring <= frames
    assert made.resident == sorted({*made.resident})
    assert {*keep} <= {*made.resident}
    assert [page for page in range(page_count) if made.slot[page] is None] == made.resident
    assert all(slot < made.ring for slot in made.slot if slot is not None)
    assert made.bytes_per_pass == len(made.loads) * PAGE_SIZE


@st.composite
def cases(draw: st.DrawFn, *, one_place: bool) -> tuple[int, Steps, int, list[float], list[int]]:
    page_count = draw(st.integers(1, 24))
    page = st.integers(0, page_count - 1)
    if one_place:
        order = draw(st.permutations(range(page_count)))
        cuts = sorted(draw(st.lists(st.integers(0, page_count), max_size=12)))
        steps = [list(order[start:end]) for start, end in pairwise(cuts)]
    else:
        steps = draw(st.lists(st.lists(page, max_size=5), max_size=12))
    keep = draw(st.lists(page, max_size=3))
    frames = draw(st.integers(least_frames(page_count, steps, keep), page_count + 1))
    count = len(steps) * draw(st.integers(0, 1))
    seconds = draw(st.lists(st.floats(0, 1e-2), min_size=count, max_size=count))
    return page_count, steps, frames, seconds, keep


@given(cases(one_place=True))
def test_pages_of_one_place_move_the_optimum(
    case: tuple[int, Steps, int, list[float], list[int]],
) -> None:
    page_count, steps, frames, seconds, keep = case
    made = plan(page_count, PAGE_SIZE, steps, frames, LINK_RATE, seconds, keep)
    assert_in_shape(made, page_count, frames, keep)
    assert not collides(made, steps)
    streamed = {page for pages in steps for page in pages} - {*made.resident}
    assert made.frames == min(frames, page_count), "a frame is without use"
    # A page alone in a ring of one frame is never loaded again.
    expected = 0 if len(streamed) == made.ring == 1 else len(streamed)
    assert copies_of_a_pass(made, steps) == len(made.loads) == expected
    assert made.seconds >= max(sum(seconds) * (1 - 1e-9), made.bytes_per_pass / LINK_RATE)


@given(cases(one_place=True), st.data())
def test_pages_that_must_stream_have_no_frame_of_their_own(
    case: tuple[int, Steps, int, list[float], list[int]], data: st.DataObject
) -> None:
    page_count, steps, frames, seconds, keep = case
    stream = data.draw(st.lists(st.integers(0, page_count - 1), max_size=6))
    made = plan(page_count, PAGE_SIZE, steps, frames, LINK_RATE, seconds, keep, stream)
    assert_in_shape(made, page_count, frames, keep)
    assert not collides(made, steps)
    assert copies_of_a_pass(made, steps) == len(made.loads)
    must = {page for pages in steps for page in pages} & {*stream} - {*keep}
    together = max((len({*pages} & must) for pages in steps), default=0)
    moved = {page for page, _ in made.loads}
    # Pages of one step need their frames at once: they cannot stream through fewer.
    assert not must or len(must - moved) <= max(together, 1)
    if len(must) > max(len({*pages}) for pages in [[], *steps]):
        assert must & moved


@given(cases(one_place=False))
def test_every_step_finds_its_pages(
    case: tuple[int, Steps, int, list[float], list[int]],
) -> None:
    page_count, steps, frames, seconds, keep = case
    made = plan(page_count, PAGE_SIZE, steps, frames, LINK_RATE, seconds, keep)
    assert_in_shape(made, page_count, frames, keep)
    assert made.seconds >= max(sum(seconds) * (1 - 1e-9), made.bytes_per_pass / LINK_RATE)
    if collides(made, steps):
        # With more frames than any page has neighbours, there is always one for it.
        together = [
            {other for pages in steps if page in pages for other in pages}
            for page in {*range(page_count)} - {*keep}
        ]
        assert frames - len({*keep}) < max(len(each - {*keep}) for each in together)
    else:
        assert copies_of_a_pass(made, steps) == len(made.loads)
