"""The progress line, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest

from ims3_ray import progress
from ims3_ray.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def work(clock: Clock, stream: io.StringIO, price: float = 0.0) -> str:
    """A hundred images: 30 s of start-up, then two images a second."""
    with Progress("generate", 100, "images", stream, price) as bar:
        clock.now += 30
        for _ in range(10):
            bar.advance(10)
            clock.now += 5
    return stream.getvalue()


def test_a_log_gets_a_plain_line_now_and_then_with_rate_and_time_left(clock: Clock):
    lines = work(clock, io.StringIO()).splitlines()
    assert lines[0] == "generate: 100 images"
    assert lines[1] == "generate: 10/100 images"
    assert lines[2] == "generate: 40/100 images, 2.0/s, 0:30 left"
    assert lines[-1] == "generate: done in 80.0 s, 1.2 images/s"
    assert len(lines) == 5


def test_a_terminal_sees_one_line_that_is_rewritten(clock: Clock):
    shown = work(clock, Terminal())
    assert shown.count("\n") == 1
    assert "\r\x1b[2Kgenerate: 50/100 images, 2.0/s, 0:25 left" in shown
    assert shown.endswith("generate: done in 80.0 s, 1.2 images/s\n")


def test_with_a_price_it_says_what_was_spent_and_what_is_to_come(clock: Clock):
    lines = work(clock, io.StringIO(), price=360.0).splitlines()  # 0.1 a second
    assert lines[2] == "generate: 40/100 images, 2.0/s, 0:30 left, 4.50 spent, 3.00 to come"
    assert lines[-1] == "generate: done in 80.0 s, 1.2 images/s, 8.00 spent"


def test_what_fails_is_said_to_have_stopped(clock: Clock):
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress("generate", 10, "images", stream):
        raise RuntimeError
    assert stream.getvalue().splitlines()[-1] == "generate: stopped in 0.0 s"


def test_slow_things_keep_their_digits_and_long_ones_their_hours(clock: Clock):
    stream = io.StringIO()
    with Progress("evaluate", 1000, "students", stream) as bar:
        for _ in range(2):
            bar.advance(1)
            clock.now += 20
    assert "evaluate: 2/1000 students, 0.05/s, 5:32:40 left" in stream.getvalue()
