"""Turns: one at a time, in order, nobody waits for ever."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import pytest

from penstock.errors import ScheduleError
from penstock.turns import Turn, Turns
from python.support import within


def turns(count: int) -> list[Turn]:
    shared = Turns()
    return [Turn(shared, f"m{i}") for i in range(count)]


def started(work: Callable[[], object], errors: list[BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_first_come_first_served() -> None:
    (turn,) = turns(1)
    served: list[int] = []

    def wait(number: int) -> None:
        assert not turn.take(sys._getframe())
        served.append(number)
        turn.give_back()

    turn.take(sys._getframe())
    assert turn.mine
    threads = []
    for number in range(5):
        threads.append(started(lambda number=number: wait(number), []))
        until(lambda number=number: len(turn._queue) == number + 1)
    turn.give_back()
    for thread in threads:
        thread.join(10)
    assert served == list(range(5))
    assert not turn.mine


def test_a_circle_is_an_error_and_not_a_hang() -> None:
    first, second = turns(2)
    errors: list[BaseException] = []
    holding = threading.Event()

    def other() -> None:
        second.take(sys._getframe())
        holding.set()
        first.take(sys._getframe())
        first.give_back()
        second.give_back()

    first.take(sys._getframe())
    thread = started(other, errors)
    holding.wait(10)
    until(lambda: bool(first._queue))
    with pytest.raises(ScheduleError, match="'m1' is being run by a thread that waits for this"):
        second.take(sys._getframe())
    first.give_back()
    thread.join(10)
    assert not errors
    assert not thread.is_alive()
    assert not second.take(sys._getframe())


def test_a_turn_that_was_left_is_taken_over() -> None:
    (turn,) = turns(1)

    def leave() -> None:
        turn.take(sys._getframe())

    started(leave, []).join(10)
    assert within(10, lambda: turn.take(sys._getframe())), "from one that will not give it back"
    assert turn.seize(sys._getframe())
    assert turn.mine
    assert not turn.seize(sys._getframe()), "this function still runs"
    turn.give_back()
    assert not turn.seize(sys._getframe()), "nobody has it"


def test_a_waiter_that_is_interrupted_leaves_the_queue() -> None:
    class Interrupt(BaseException):
        pass

    (turn,) = turns(1)
    turn.take(sys._getframe())
    interrupted = threading.Event()

    def left() -> bool:
        if interrupted.is_set():
            raise Interrupt
        return False

    turn.left = left
    errors: list[BaseException] = []
    thread = started(lambda: turn.take(sys._getframe()), errors)
    until(lambda: len(turn._queue) == 1)
    interrupted.set()
    thread.join(10)
    assert isinstance(errors[0], Interrupt)
    assert not turn._queue
    del turn.left
    turn.give_back()
    assert not turn.take(sys._getframe())
