"""The progress line, on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest

from ims3_ray import progress
from ims3_ray.progress import START_UP_S, Course, Progress, following, title_of


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


def test_a_terminal_sees_a_bar_for_the_stage_and_one_for_the_command(clock: Clock):
    """The bars vanish at the end, and lines that are printed meanwhile stay."""
    stream, course = Terminal(), Course({"generate": 60.0, "select": 0.0})
    with following(course):
        course.begin(["generate"])
        with Progress("generate", 100, "images", stream) as bar:
            for _ in range(5):
                bar.advance(10)
                clock.now += 5
                bar._bars._live.refresh()  # type: ignore[union-attr]  # its thread would do it in a moment
            bar.line("a note [of a stage]")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"generate [━╸╺]+ 50/100 images, 2\.0/s, 0:25 left", shown)
    assert "in all" in shown
    assert "about 0:" in shown
    assert "a note [of a stage]\n" in shown
    assert shown.endswith("generate: done in 25.0 s, 2.0 images/s\n")


def test_a_log_says_how_long_the_whole_command_will_take(clock: Clock):
    """Three parts of 100 s each, which take twice as long as expected."""
    course, stream = Course(dict.fromkeys(("a", "b", "c"), 100 - START_UP_S)), io.StringIO()
    assert course.left(0.0) is None
    with following(course):
        for part in ("a", "b"):
            course.begin([part])
            with Progress(part, 10, "units", stream) as bar:
                for _ in range(10):
                    clock.now += 20
                    bar.advance(1)
    lines = stream.getvalue().splitlines()
    assert "a: 5/10 units, 0.05/s, 1:40 left; about 8:20 left in all" in lines
    assert "b: 5/10 units, 0.05/s, 1:40 left; about 5:00 left in all" in lines
    assert Course({}).left(1.0) is None


def test_a_section_of_the_running_parts_is_not_taken_for_all_of_them(clock: Clock):
    """A pool of which the first fifth is made and looked at before the rest."""
    course = Course(dict.fromkeys(("pool", "students"), 100 - START_UP_S))
    course.begin(["pool"])
    course.section(0.0, 0.2)
    assert course.share(0.5) == pytest.approx(0.05)
    course.section(0.2, 1.0)
    assert course.share(0.0) == pytest.approx(0.1)
    assert course.share(0.5) == pytest.approx(0.3)
    course.begin(["students"])
    assert course.share(0.5) == pytest.approx(0.75)


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


def test_work_of_many_titles_has_a_short_one():
    assert title_of(["fine-tune", "fine-tune with minimax"] * 5) == "fine-tune, fine-tune with minimax"
    assert title_of(f"generate {seed}" for seed in range(6)) == "generate 0, generate 1, generate 2 and 3 more"
