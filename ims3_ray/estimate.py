"""What a plan will take, in hours of devices, money and storage; and, once it has run, how far off that was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ims3_ray.artifacts import Storage
from ims3_ray.config import ClusterConfig, Role, WorkConfig
from ims3_ray.plan import Config, Plan
from ims3_ray.stages.base import Stage

DECODE_S_PER_VALUE = 4e-8
"""Seconds in which a core decodes a value (pixel and channel) of a scaled image: some 8 ms for a photograph at 256 pixels."""


@dataclass(frozen=True)
class Worker:
    """What one worker of a stage reserves. It is counted in GPU-hours if it has any, else in core-hours."""

    role: Role
    cpus: float
    gpus: float

    @property
    def unit(self) -> str:
        return "GPU" if self.gpus else "core"

    @property
    def devices(self) -> float:
        return self.gpus or self.cpus

    def flop_rate(self, cluster: ClusterConfig) -> float:
        """FLOP/s that the config assumes."""
        return self.gpus * cluster.gpu_tflops * 1e12 if self.gpus else self.cpus * cluster.core_gflops * 1e9


@dataclass(frozen=True)
class Expected:
    """What is left of a stage, and what it will take."""

    stage: Stage
    missing: int
    """Units."""
    worker: Worker
    seconds: float
    """In which one worker would do it, without start-up."""
    decoding: float = 0.0
    """Of these, what is no floating-point work."""
    whole: bool = True
    """Whether nothing of it was begun before: what was cannot be compared."""

    @property
    def share(self) -> float:
        return self.missing / len(self.stage.units)

    @property
    def flops(self) -> float:
        return self.stage.flops * self.share

    @property
    def stored(self) -> float:
        """Bytes that it will write."""
        return self.stage.stored * self.share

    @property
    def hours(self) -> float:
        """Of its devices."""
        return self.seconds / 3600 * self.worker.devices

    def money(self, cluster: ClusterConfig) -> float:
        return self.seconds / 3600 * cluster.hourly(self.worker.role, self.worker.cpus, self.worker.gpus)


def worker_of(stage: Stage, config: WorkConfig) -> Worker:
    """What of the cluster works on a stage; a core for those that the driver does itself."""
    actors, students = config.actors, config.evaluation
    if stage.kind in ("finetune", "teacher"):
        t = stage.run.finetune.trainer if stage.kind == "finetune" else students.teacher.trainer
        return Worker("finetune", t.cpus_per_worker, t.gpus_per_worker)
    if stage.kind == "evaluate":
        return Worker("evaluate", students.cpus_per_task, students.gpus_per_task)
    if stage.kind == "modes":
        return Worker("pool", actors.cpus, 0.0)
    if stage.kind in ("encode", "embed", "latents", "inverted", "generate", "instability", "refine"):
        return Worker("pool", actors.cpus, actors.gpus)
    return Worker("driver", 1.0, 0.0)


def expect(plan: Plan[Config], storage: Storage) -> list[Expected]:
    """Of every stage, in order."""
    found = []
    for stage in plan.stages:
        worker, missing = worker_of(stage, plan.config), len(stage.missing(storage))
        share, rate = missing / len(stage.units), worker.flop_rate(plan.config.cluster)
        decoding = share * stage.stored * DECODE_S_PER_VALUE if stage.kind == "encode" else 0.0
        seconds = share * stage.flops / rate + decoding
        found.append(Expected(stage, missing, worker, seconds, decoding, not _is_begun(stage, storage)))
    return found


def _is_begun(stage: Stage, storage: Storage) -> bool:
    """Whether a run before, or another, has left something of it."""
    if stage.key(storage) is None:
        return False
    artifact = stage.artifact(storage)
    checkpoints = stage.kind in ("finetune", "teacher") and storage.is_folder(artifact.folder)
    return bool(checkpoints or stage.manifest(storage) or artifact.shards())


def hours_of(expected: Iterable[Expected]) -> dict[str, float]:
    """GPU-hours and core-hours, of those that there are."""
    hours: dict[str, float] = {}
    for each in expected:
        hours[each.worker.unit] = hours.get(each.worker.unit, 0.0) + each.hours
    return {unit: value for unit, value in sorted(hours.items()) if value}


def describe(plan: Plan[Config]) -> str:
    """The plan as text, for ``--dry-run``."""
    storage, cluster = Storage.at(plan.config.storage), plan.config.cluster
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


def account(expected: Iterable[Expected], spent: Mapping[Stage, float], cluster: ClusterConfig) -> dict[str, Any]:
    """What was expected of the stages that a command has run from their beginning, and what they took.

    ``spent`` are seconds of workers, ``error`` the share by which the expectation is off, ``sustained`` the FLOP/s a device
    that would have been right (0 where nothing is known of it), ``lines`` all of it as text.
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
    """The same as lines; none where nothing was run."""
    lines = []
    for unit, each in found["devices"].items():
        key, scale = ("cluster.gpu_tflops", 1e12) if unit == "GPU" else ("cluster.core_gflops", 1e9)
        right = f"; {key}={each['sustained'] / scale:.3g} would have been right" if each["sustained"] else ""
        lines.append(
            f"took {each['hours']:.2g} {unit}-hours, start-up included; the estimate was {each['expected_hours']:.2g} "
            f"({each['error']:+.0%}){right}"
        )
    if found["money"]:
        lines.append(f"cost {found['money']:.2f}; the estimate was {found['expected_money']:.2f}")
    return lines


def hours_text(hours: Mapping[str, float], cluster: ClusterConfig) -> str:
    """Hours with the rates that were assumed."""
    texts = [f"{value:.2g} {unit}-hours at {_rate_text(unit, cluster)}" for unit, value in hours.items()]
    return ", ".join(texts) or "no time"


def hours_between(config: WorkConfig, least: float, most: float) -> str:
    """What so many FLOPs of candidates and students are in hours, by the same rates."""
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
    """With a decimal prefix: ``24.4 E``; empty for nothing."""
    if not value:
        return "0 "
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
