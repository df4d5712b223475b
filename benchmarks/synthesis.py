"""Steps/s of DM and IDC-1, as JSON, and what a second worker adds.

    python benchmarks/synthesis.py                         ConvNet-3 of width 32 on CPUs, of width 128 on a GPU
    python benchmarks/synthesis.py k=50 width=64           other sets and networks
    python benchmarks/synthesis.py 'cases=[dm, idc]'       some of the cases

The images are random, since speed does not depend on them. `dm, preparation` computes the mean features of real images, which
sets of all sizes share; `dm` optimises the images of one class; `idc` matches every class once and trains the network. `share`
is the rate of the method's own operations (those of the plan) divided by the matmul rate of the device. `two workers` makes two
classes by DM in one process with one thread and then in two, and gives the ratio of the times.

Needs torch, numpy, pydantic, pyyaml and pillow, and no Ray.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ims3_ray.cli import main
from ims3_ray.cluster.speed import matmul_rate
from ims3_ray.config import Section
from ims3_ray.errors import UserError
from ims3_ray.synthesis.base import Costs, Given, Inputs, Piece
from ims3_ray.synthesis.dm import DM
from ims3_ray.synthesis.idc import IDC

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CLASSES = 10


class BenchmarkConfig(Section):
    width: int = Field(default=128 if GPU else 32, ge=1)
    """Channels of every layer of the ConvNet-3."""
    size: int = Field(default=32, ge=8)
    k: int = Field(default=10, ge=1)
    """Images per class."""
    real: int = Field(default=500, ge=1)
    """Real images per class."""
    steps: int = Field(default=500 if GPU else 40, ge=1)
    """Steps of DM that are timed."""
    inner: int = Field(default=20 if GPU else 4, ge=1)
    """Inner steps of IDC-1 that are timed."""
    cases: tuple[str, ...] = ()
    """Names of the cases to run; all cases when empty."""


def images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def inputs_of(config: BenchmarkConfig) -> dict[str, Any]:
    real = images(config.real, config.size)
    statistics = torch.full((3, 1, 1), 0.5, device=DEVICE), torch.full((3, 1, 1), 0.3, device=DEVICE)
    return {
        "num_classes": CLASSES, "seed": 0, "device": DEVICE, "size": config.size, "channels": 3,
        "counts": (config.real,) * CLASSES, "real": lambda position: real, "statistics": statistics,
    }  # fmt: skip


def given_of(config: BenchmarkConfig, classes: range, prepared: Mapping[Piece, Mapping[str, Tensor]]) -> Given:
    return Given(
        pixels=images(config.k * len(classes), config.size), classes=torch.tensor(list(classes)).repeat_interleave(config.k),
        indices=torch.arange(config.k).repeat(len(classes)), prepared=prepared.__getitem__, **inputs_of(config),
    )  # fmt: skip


def nothing(state: bytes, done: float = 0.0) -> None:
    return None


def dm_of(config: BenchmarkConfig, steps: int) -> DM:
    return DM(DM.Config(steps=steps, width=config.width))


def means_of(method: DM, config: BenchmarkConfig, position: int = 0) -> dict[Piece, Mapping[str, Tensor]]:
    pieces = method.pieces(method.config, (0,) * position + (config.real,))
    return {piece: method.prepare(piece, Inputs(**inputs_of(config))) for piece in pieces if piece[0] == position}


def seconds(work: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def costs(config: BenchmarkConfig, classes: int) -> Costs:
    return Costs({}, (config.real,) * classes, config.k, config.size, 3)


def rate_of(steps: int, taken: float, flops: float) -> dict[str, float]:
    share = flops / taken / matmul_rate(DEVICE, torch.float32)
    return {"steps_per_s": round(steps / taken, 3), "share": round(share, 3)}


def dm_preparation(config: BenchmarkConfig) -> dict[str, float]:
    method = dm_of(config, config.steps)
    means_of(dm_of(config, 2), config)
    taken = seconds(lambda: means_of(method, config))
    return rate_of(config.steps, taken, method.preparation_flops(method.config, costs(config, 1)))


def dm(config: BenchmarkConfig) -> dict[str, float]:
    method = dm_of(config, config.steps)
    given = given_of(config, range(1), means_of(method, config))
    dm_of(config, 2).make(given, None, nothing)
    taken = seconds(lambda: method.make(given, None, nothing))
    return rate_of(config.steps, taken, method.flops(method.config, costs(config, 1)))


def idc(config: BenchmarkConfig) -> dict[str, float]:
    def of(inner: int) -> IDC:
        return IDC(IDC.Config(outer=1, inner=inner, width=config.width))

    method, given = of(config.inner), given_of(config, range(CLASSES), {})
    of(1).make(given, None, nothing)
    taken = seconds(lambda: method.make(given, None, nothing))
    return rate_of(config.inner, taken, method.flops(method.config, costs(config, CLASSES)))


def make_one(config: BenchmarkConfig) -> None:
    """A class by DM, with its preparation, on one thread."""
    torch.set_num_threads(1)
    method = dm_of(config, config.steps)
    method.make(given_of(config, range(1), means_of(method, config)), None, nothing)


def two_workers(config: BenchmarkConfig) -> dict[str, float]:
    took = {}
    short = config.model_copy(update={"steps": 2})
    for count in (1, 2):
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            list(pool.map(make_one, [short] * count))  # starts the processes
            began = time.perf_counter()
            list(pool.map(make_one, [config] * 2))
            took[count] = time.perf_counter() - began
    return {"speedup": round(took[1] / took[2], 2)}


CASES: dict[str, Callable[[BenchmarkConfig], Mapping[str, float]]] = {
    "dm, preparation": dm_preparation, "dm": dm, "idc": idc, "two workers": two_workers,
}  # fmt: skip


def benchmark(config: BenchmarkConfig) -> None:
    if unknown := set(config.cases) - set(CASES):
        raise UserError(f"there is no case '{min(unknown)}'; choose from: {'; '.join(CASES)}")
    rows = [{"case": name, **case(config)} for name, case in CASES.items() if not config.cases or name in config.cases]
    machine = {
        "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if GPU:
        machine["gpu"] = torch.cuda.get_device_name()
    print(json.dumps({"machine": machine, **config.model_dump(exclude={"cases"}), "cases": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
