"""Estimates what a plan will take in device hours, money and storage, and the error of that estimate once it has run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ims3_ray.config import ClusterConfig, WorkConfig
from ims3_ray.engine.stage import Stage, Worker
from ims3_ray.io.storage import Storage
from ims3_ray.plan.layout import Config, Plan


@dataclass(frozen=True)
class Expected:
    """The units of a stage that are left to make, and what they will take."""

    stage: Stage
    missing: int
    """Number of units that are not committed yet."""
    worker: Worker
    seconds: float
    """Seconds that one worker would take for them, without start-up."""
    decoding: float = 0.0
    """The part of ``seconds`` that is not spent on floating-point operations."""
    whole: bool = True
    """False for an unfinished stage that was begun before: its estimate cannot be compared with the time that it takes."""

    @property
    def share(self) -> float:
        return self.missing / len(self.stage.units)

    @property
    def flops(self) -> float:
        return self.stage.flops * self.share

    @property
    def stored(self) -> float:
        """Bytes that the stage will write."""
        return self.stage.stored * self.share

    @property
    def hours(self) -> float:
        """Device hours that the stage will take."""
        return self.seconds / 3600 * self.worker.devices

    def wall_seconds(self, config: WorkConfig) -> float:
        """Seconds that the stage will take if the workers that it needs, or the actors of the pool, work side by side."""
        return self.seconds / max(self.worker.at_once, config.actors.count if self.worker.role == "pool" else 1)

    def money(self, cluster: ClusterConfig) -> float:
        return self.seconds / 3600 * cluster.hourly(self.worker.role, self.worker.cpus, self.worker.gpus)


def expect(plan: Plan[Config], storage: Storage) -> list[Expected]:
    """The estimate of every stage of a plan, in the order of the plan."""
    found = []
    for stage in plan.stages:
        worker, missing = stage.worker(plan.config), len(stage.missing(storage))
        share, rate = missing / len(stage.units), worker.flop_rate(plan.config.cluster)
        decoding = share * stage.seconds_beside_flops()
        seconds = share * stage.flops / rate + decoding
        found.append(Expected(stage, missing, worker, seconds, decoding, not (missing and _is_begun(stage, storage))))
    return found


def _is_begun(stage: Stage, storage: Storage) -> bool:
    """Whether an earlier or another run has stored a part of the stage already."""
    return stage.key(storage) is not None and storage.is_folder(stage.artifact(storage).folder)


def hours_of(expected: Iterable[Expected]) -> dict[str, float]:
    """GPU-hours and core-hours of some stages; zeros are left out."""
    hours: dict[str, float] = {}
    for each in expected:
        hours[each.worker.unit] = hours.get(each.worker.unit, 0.0) + each.hours
    return {unit: value for unit, value in sorted(hours.items()) if value}


def describe(plan: Plan[Config], storage: Storage | None = None) -> str:
    """The plan as text, for ``--dry-run``."""
    storage, cluster = storage or Storage.at(plan.config.storage), plan.config.cluster
    expected = expect(plan, storage)
    width = max(34, *(len(stage.title) + 2 for stage in plan.stages))
    lines = [f"{'stage':{width}}{'there':>14}{'images':>11}{'FLOP':>9}{'hours':>14}{'storage':>10}"]
    for each in expected:
        stage, whole = each.stage, len(each.stage.units)
        there = f"{whole - each.missing}/{whole} units" if each.missing else "done"
        hours = f"{each.hours:.2g} {each.worker.unit}" if each.hours else ""
        lines.append(
            f"{stage.title:{width}}{there:>14}{stage.images:>11}{scaled(stage.flops):>9}{hours:>14}{scaled(stage.stored):>9}B"
        )
    needed = ", ".join(f"{v:g} {k}" for k, v in plan.needed().items())
    lines += [
        f"left to compute: {scaled(sum(e.flops for e in expected))}FLOP, {hours_text(hours_of(expected), cluster)}, without "
        "start-up and idle time",
        money_text(sum(e.money(cluster) for e in expected), cluster),
        f"left to write: {scaled(sum(e.stored for e in expected))}B of "
        f"{scaled(sum(e.stage.stored for e in expected))}B; needs at a time: {needed}",
        f"results: {storage.address(plan.config.name)}",
    ]
    return "\n".join(lines)


LONG_ENOUGH_HOURS = 0.25
"""Device-hours of a command from which its speed is printed as advice for later estimates, and the error of the estimate:
shorter commands mostly start up."""


def account(expected: Iterable[Expected], spent: Mapping[Stage, float], cluster: ClusterConfig) -> dict[str, Any]:
    """Compare the estimate of the stages that a command has run from their beginning with what they took.

    ``spent`` holds the worker seconds of each stage. In the result, ``error`` is the relative error of the estimate,
    ``sustained`` the FLOP/s per device that would have been right (0 for stages without floating-point operations), and
    ``lines`` all of it as text.
    """
    done = [each for each in expected if each.stage in spent and each.whole]
    took = [Expected(e.stage, e.missing, e.worker, spent[e.stage]) for e in done]
    flops, decoding = dict[str, float](), dict[str, float]()
    for each in done:
        unit = each.worker.unit
        flops[unit] = flops.get(unit, 0.0) + each.flops
        decoding[unit] = decoding.get(unit, 0.0) + each.decoding * each.worker.devices
    before, after = hours_of(done), hours_of(took)
    found: dict[str, Any] = {
        "devices": {
            unit: {
                "expected_hours": before.get(unit, 0.0), "hours": hours,
                "error": before.get(unit, 0.0) / hours - 1, "sustained": flops[unit] / max(3600 * hours - decoding[unit], 1.0),
            }
            for unit, hours in after.items()
        },
        "expected_money": sum(e.money(cluster) for e in done), "money": sum(e.money(cluster) for e in took),
        "stages": [
            {"title": e.stage.title, "unit": e.worker.unit, "expected_hours": e.hours, "hours": t.hours}
            for e, t in zip(done, took, strict=True)
        ],
    }  # fmt: skip
    return {**found, "lines": _account_text(found)}


def _account_text(found: Mapping[str, Any]) -> list[str]:
    """The comparison as lines of text; no lines if no stage was run."""
    lines = []
    for unit, each in found["devices"].items():
        key, scale = ("cluster.gpu_tflops", 1e12) if unit == "GPU" else ("cluster.core_gflops", 1e9)
        tells = each["hours"] >= LONG_ENOUGH_HOURS
        error = f" ({each['error']:+.0%})" if tells else ""
        right = f"; {key}={each['sustained'] / scale:.3g} would have been right" if tells and each["sustained"] else ""
        lines.append(
            f"took {each['hours']:.2g} {unit}-hours, start-up included; the estimate was "
            f"{each['expected_hours']:.2g}{error}{right}"
        )
    if found["money"]:
        lines.append(f"cost {found['money']:.2f}; the estimate was {found['expected_money']:.2f}")
    return lines


def hours_text(hours: Mapping[str, float], cluster: ClusterConfig) -> str:
    """Hours as text, with the rates that were assumed."""
    texts = [f"{value:.2g} {unit}-hours at {_rate_text(unit, cluster)}" for unit, value in hours.items()]
    return ", ".join(texts) or "no time"


def hours_between(config: WorkConfig, least: float, most: float) -> str:
    """The hours of ``least`` to ``most`` FLOPs of candidates and students as text, by the rates that the config assumes."""
    unit = "GPU" if config.actors.gpus or config.evaluation.gpus_per_task else "core"
    rate = config.cluster.gpu_tflops * 1e12 if unit == "GPU" else config.cluster.core_gflops * 1e9
    hours = dict.fromkeys(f"{flops / rate / 3600:.2g}" for flops in (least, most))
    return f"{' to '.join(hours)} {unit}-hours at {_rate_text(unit, config.cluster)}"


def _rate_text(unit: str, cluster: ClusterConfig) -> str:
    if unit == "GPU":
        return f"cluster.gpu_tflops={cluster.gpu_tflops:g}"
    return f"cluster.core_gflops={cluster.core_gflops:g}"


def money_text(money: float, cluster: ClusterConfig) -> str:
    prices = {"gpu_price": cluster.gpu_price, "cpu_price": cluster.cpu_price}
    known = ", ".join(f"cluster.{key}={_price_text(price)}" for key, price in prices.items() if price is not None)
    return f"costs {money:.2f} at {known}" if known else "cost: not known; set cluster.gpu_price and cluster.cpu_price"


def _price_text(price: float | Mapping[Any, float]) -> str:
    return ", ".join(f"{role} {value:g}" for role, value in price.items()) if isinstance(price, Mapping) else f"{price:g}"


def scaled(value: float) -> str:
    """A value with a decimal prefix, such as ``24.4 E``; ``0`` for zero."""
    if not value:
        return "0 "
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
