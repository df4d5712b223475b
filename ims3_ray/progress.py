"""One line of progress with rate and time left: rewritten in place on a terminal, printed at intervals in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

LOG_EVERY_S = 15.0
TERMINAL_EVERY_S = 0.2
TIME = "minutes"
"""The unit of work whose length is a time, so that its rate says nothing."""


class Progress:
    """Shows how many of ``total`` things of a stage are done. Use it as a context manager and call :meth:`advance`.

    ``price`` is the cost of an hour of the stage. If it is given, the line also shows the cost so far and the cost to come.
    """

    def __init__(self, title: str, total: float, unit: str, stream: TextIO | None = None, price: float = 0.0) -> None:
        self.title, self.total, self.unit, self.price = title, total, unit, price
        self.done = 0.0
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._began = self._shown = time.monotonic()
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> Progress:
        self._show(f"{self.title} …") if self._terminal else self.line(f"{self.title}: {self.total:g} {self.unit}")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        seconds = self.seconds
        rate = f", {_rate(self.done / seconds)} {self.unit}/s" if self.done and seconds and self.unit != TIME else ""
        verb = "done" if kind is None else "stopped"
        spent = f", {self._cost(seconds)} spent" if self.price else ""
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
        if now - self._shown < (TERMINAL_EVERY_S if self._terminal else LOG_EVERY_S) or done >= self.total:
            return
        self._shown = now
        text = f"{self.title}: {round(done, 2):g}/{self.total:g} {self.unit}"
        if done > self._first[1]:
            rate = (done - self._first[1]) / max(now - self._first[0], 1e-9)
            left = (self.total - done) / rate
            text += f"{'' if self.unit == TIME else f', {_rate(rate)}/s'}, {_clock(left)} left"
            if self.price:
                text += f", {self._cost(now - self._began)} spent, {self._cost(left)} to come"
        text += note and f", {note}"
        self._show(text) if self._terminal else self.line(text)

    def _cost(self, seconds: float) -> str:
        return f"{seconds / 3600 * self.price:.2f}"

    def _show(self, text: str) -> None:
        self._stream.write(f"\r\x1b[2K{text}")
        self._stream.flush()

    def line(self, text: str) -> None:
        """Print a line that is not overwritten."""
        self._stream.write(f"\r\x1b[2K{text}\n" if self._terminal else f"{text}\n")
        self._stream.flush()


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
