"""Progress with rate and time left: a bar for the stage and one for the whole command on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

LOG_EVERY_S = 15.0
TERMINAL_EVERY_S = 0.2
TIME = "minutes"
"""The unit of work whose length is a time, so that its rate says nothing."""
START_UP_S = 5.0
"""Seconds that are added to the expected time of each part of a command, for the start of its processes."""
TELLS = 0.02
"""The share of a command that has to be done before its pace says how long the rest will take."""


def title_of(titles: Iterable[str]) -> str:
    """One title for work of several titles: the first three that differ, and how many more there are."""
    found = list(dict.fromkeys(titles))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


class Course:
    """How far a command is, by the time that its parts are expected to take. It is rough: stages whose workers run side by side
    count as if one after the other, except in the pool."""

    def __init__(self, expected: Mapping[Hashable, float]) -> None:
        """``expected`` holds the seconds of each part that is left to do. They need not be right, but in proportion."""
        self._expected = {part: seconds + START_UP_S for part, seconds in expected.items()}
        self._total = sum(self._expected.values())
        self._done = self._running = 0.0
        self._section = (0.0, 1.0)
        self._began = time.monotonic()

    def begin(self, parts: Iterable[Hashable]) -> None:
        """The parts before are done, and these run now."""
        self._done += self._running
        self._running = sum(self._expected.pop(part, 0.0) for part in parts)
        self._section = (0.0, 1.0)

    def section(self, begin: float, end: float) -> None:
        """Until other parts begin, progress is that from the share ``begin`` to the share ``end`` of the running parts."""
        self._section = (begin, end)

    def share(self, of_running: float) -> float | None:
        """The share of the command that is done when the share ``of_running`` of the running parts, or of their section, is;
        None for a command whose parts are not known."""
        begin, end = self._section
        running = (begin + of_running * (end - begin)) * self._running
        return (self._done + running) / self._total if self._total else None

    def left(self, of_running: float) -> float | None:
        """Seconds to the end at the pace so far; None near the beginning."""
        share = self.share(of_running)
        return (time.monotonic() - self._began) * (1 - share) / share if share is not None and share >= TELLS else None


_course: Course | None = None


@contextmanager
def following(course: Course) -> Iterator[None]:
    """While it lasts, progress also says how far ``course`` is."""
    global _course
    before, _course = _course, course
    try:
        yield
    finally:
        _course = before


class Progress:
    """Shows how many of ``total`` things of a stage are done. Use it as a context manager and call :meth:`advance`.

    ``price`` is the cost of an hour of the stage. If it is given, the cost so far and the cost to come are shown too.
    """

    def __init__(self, title: str, total: float, unit: str, stream: TextIO | None = None, price: float = 0.0) -> None:
        self.title, self.total, self.unit, self.price = title, total, unit, price
        self.done = 0.0
        self._stream = stream or sys.stdout
        self._bars = _Bars(self._stream, title, total) if self._stream.isatty() else None
        self._began = self._shown = time.monotonic()
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> Progress:
        if self._bars is None:
            self.line(f"{self.title}: {self.total:g} {self.unit}")
        else:
            self._bars.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        seconds = self.seconds
        rate = f", {_rate(self.done / seconds)} {self.unit}/s" if self.done and seconds and self.unit != TIME else ""
        verb = "done" if kind is None else "stopped"
        spent = f", {self._cost(seconds)} spent" if self.price else ""
        if self._bars is not None:
            self._bars.stop()
        self.line(f"{self.title}: {verb} in {seconds:.1f} s{rate}{spent}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def advance(self, amount: float) -> None:
        self.at(self.done + amount)

    def at(self, done: float, note: str = "") -> None:
        """Report that ``done`` of ``total`` are finished. The rate is measured from the first report on, without start-up."""
        now = time.monotonic()
        self.done = done
        if self._first is None:
            self._first = (now, done)
        if now - self._shown < (LOG_EVERY_S if self._bars is None else TERMINAL_EVERY_S) or done >= self.total:
            return
        self._shown = now
        text = f"{round(done, 2):g}/{self.total:g} {self.unit}"
        if done > self._first[1]:
            rate = (done - self._first[1]) / max(now - self._first[0], 1e-9)
            left = (self.total - done) / rate
            text += f"{'' if self.unit == TIME else f', {_rate(rate)}/s'}, {_clock(left)} left"
            if self.price:
                text += f", {self._cost(now - self._began)} spent, {self._cost(left)} to come"
        text += note and f", {note}"
        left_in_all = _course.left(done / self.total) if _course is not None else None
        whole = f"about {_clock(left_in_all)} left in all" if left_in_all is not None else ""
        if self._bars is not None:
            self._bars.show(done, text, _course.share(done / self.total) if _course is not None else None, whole)
        else:
            self.line(f"{self.title}: {text}{whole and f'; {whole}'}")

    def _cost(self, seconds: float) -> str:
        return f"{seconds / 3600 * self.price:.2f}"

    def line(self, text: str) -> None:
        """Print a line that stays; on a terminal it appears above the bars."""
        if self._bars is not None and self._bars.print(text):
            return
        self._stream.write(f"{text}\n")
        self._stream.flush()


class _Bars:
    """A bar for a stage and one for the whole command on a terminal. They vanish when the stage ends."""

    def __init__(self, stream: TextIO, title: str, total: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        texts = (TextColumn("{task.fields[title]}", markup=False), TextColumn("{task.fields[text]}", markup=False))
        self._live = Progress(texts[0], BarColumn(24), texts[1], console=Console(file=stream, highlight=False), transient=True)
        self._stage = self._live.add_task("", total=total, title=title, text="starts …")
        self._whole: rich.progress.TaskID | None = None
        self._running = False

    def start(self) -> None:
        self._live.start()
        self._running = True

    def show(self, done: float, text: str, share: float | None, whole: str) -> None:
        self._live.update(self._stage, completed=done, text=text)
        if share is None:
            return
        if self._whole is None:
            self._whole = self._live.add_task("", total=1.0, title="in all", text="")
        self._live.update(self._whole, completed=share, text=whole)

    def print(self, text: str) -> bool:
        """Print a line above the bars; returns whether they are shown now."""
        if self._running:
            self._live.console.print(text, markup=False, emoji=False, soft_wrap=True)
        return self._running

    def stop(self) -> None:
        self._live.stop()
        self._running = False


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
