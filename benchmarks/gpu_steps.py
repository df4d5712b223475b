"""The steps of ``benchmarks/gpu.py``, which runs each in a process of its own with the arguments STEP OUT DATA END.

END is a time of the monotonic clock. Rows are written to the standard output as lines of JSON, as soon as they are known;
all other output goes to the standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float32
"""Data type in which large models compute: CPUs may be hundreds of times slower in bfloat16 than in float32."""
COMPILING_S = 45.0
"""Seconds that must be left to start a case that uses torch.compile."""

Emit = Callable[[dict[str, Any]], None]


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:300]


class Clock:
    """The time limit of a step: the time ``end`` of the monotonic clock."""

    def __init__(self, end: float) -> None:
        self.end = end

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Cases:
    """Measurements of a step; the failure of one does not stop the others."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.waiting, self.failed = emit, list[tuple[str, Callable[[], dict[str, Any] | None], float]](), list[str]()

    def add(self, name: str, case: Callable[[], dict[str, Any] | None], needed: float) -> None:
        """``case`` returns the figures of its row, or None if it emits rows itself; it should take ``needed`` seconds."""
        self.waiting.append((name, case, needed))

    def run(self, clock: Clock) -> None:
        """Run the added cases in order. A case for which too little time is left is not run but named in a row."""
        waiting, self.waiting = self.waiting, []
        for name, case, needed in waiting:
            if clock.left < needed:
                self.emit({"left out": f"{name}: no time was left"})
                continue
            try:
                figures = case()
            except ImportError as error:
                self.emit({"left out": f"{name}: {error.name or error} is missing"})
            except Exception as error:  # whatever the error is, the other cases can still be measured
                traceback.print_exc()
                self.failed.append(name)
                self.emit({"case": name, "error": one_line(error)})
            else:
                if figures is not None:
                    self.emit({"case": name, **figures})
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()

    def finish(self) -> None:
        """End the process with an error if a case failed."""
        if self.failed:
            raise SystemExit(f"these cases failed: {', '.join(self.failed)}")


class Memory:
    """Peak GPU memory of tensors since this object was created, beyond what was allocated at that time."""

    def __init__(self) -> None:
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if GPU else 0

    def beside_weights(self) -> dict[str, float]:
        """The peak in GB; empty on a CPU, where it is not measured."""
        return {"beside_gb": round((torch.cuda.max_memory_allocated() - self.before) / 1e9, 2)} if GPU else {}


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def exact_float32() -> None:
    """Switch TF32 off for float32 matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def machine(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Name of the device and its driver, and its rates for large matrix products and copies."""
    from ims3_ray.cluster.hardware import hardware
    from ims3_ray.cluster.speed import matmul_rate

    row = {**hardware(DEVICE), "cpus": os.cpu_count()}
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        row |= {"memory_gb": round(properties.total_memory / 1e9, 1), "multiprocessors": properties.multi_processor_count}
        row |= {"cuda": torch.version.cuda}
    emit(row)
    exact_float32()
    types = {"bf16": torch.bfloat16, "fp32": torch.float32} if GPU else {"fp32": torch.float32}
    for name, dtype in types.items():
        emit({"matmul": name, "tflop_per_s": round(matmul_rate(DEVICE, dtype) / 1e12, 3)})
    if GPU:
        torch.backends.cuda.matmul.allow_tf32 = True
        emit({"matmul": "tf32", "tflop_per_s": round(matmul_rate.__wrapped__(DEVICE, torch.float32) / 1e12, 3)})
    source = torch.empty(2**30 if GPU else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(timed(lambda: target.copy_(source)) for _ in range(5))
    emit({"copy": "device to device, read and written", "gb_per_s": round(2 * source.numel() / seconds / 1e9, 1)})


def tests(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Run ``tests/gpu``: a row with the number of tests, then a row for each."""
    import pytest

    class Recorder:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            emit({"collected": len(session.items)})

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                name = report.nodeid.split("::", 1)[-1]
                row: dict[str, Any] = {"test": name, "outcome": report.outcome, "seconds": round(report.duration, 2)}
                if report.failed:
                    row["error"] = str(getattr(report.longrepr, "reprcrash", report.longrepr))[:600]
                emit(row)

    folder = Path(__file__).resolve().parents[1] / "tests" / "gpu"
    code = pytest.main([str(folder), "-p", "no:cacheprovider", "--device", DEVICE], plugins=[Recorder()])
    if code:
        raise SystemExit(f"pytest ended with {code!r}")


def sampling(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Speed of DiT-XL/2 at 256 pixels with guided DDPM sampling, and of the autoencoder, alone and with PNG encoding."""
    from gpu_sampling import run

    run(clock, emit)


def finetune(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Speed of fine-tuning DiT-XL/2 with DiffFit, mostly in batches of 8: by PyTorch alone, and by DeepSpeed if installed."""
    import finetune as benchmark

    config = benchmark.BenchmarkConfig(image_size=256 if GPU else 128, steps=20 if GPU else 3, seconds=8 if GPU else 2)
    inversion = benchmark.inversion
    settings = {
        "N = 2": inversion(2), "L_Diff alone": inversion(1, weight=0.0), "N = 1": inversion(1), "N = 5": inversion(5),
        "N = 2, batch 32": benchmark.Case(batch_size=32 if GPU else 16), "N = 2, DeepSpeed ZeRO 1": benchmark.Case(),
        "N = 2, compiled": benchmark.Case({"compile": GPU}),
    }  # fmt: skip
    cases = Cases(emit)
    for name, case in settings.items():

        def measured(name: str = name, case: Any = case) -> dict[str, Any]:
            engine = benchmark.engine("zero" if "DeepSpeed" in name else "torch")
            row: dict[str, Any] = benchmark.measure(config, name, case, engine)
            return row if GPU else {key: value for key, value in row.items() if key != "peak_gb"}

        cases.add(name, measured, (COMPILING_S if "compiled" in name else 8.0) if GPU else 2.0)
    cases.run(clock)
    cases.finish()


def students(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Epochs/s on 10 classes of 10 images at 224 pixels, and Eq. 10 for a thousand classes."""
    import evaluation as benchmark

    from ims3_ray.selection import select_subgroups

    exact_float32()
    cases, seconds = Cases(emit), 3.0 if GPU else 0.2

    def epochs(student: str, precision: str) -> dict[str, Any]:
        fewer = {} if GPU else {"width": 8, "images_per_class": 1}
        size, memory = 224 if GPU else 64 if student == "convnet-6" else 32, Memory()
        config = benchmark.BenchmarkConfig(student=student, size=size, **fewer)
        epoch = benchmark.on_the_device(config, precision=precision)
        return {"epochs_per_s": round(1 / benchmark.seconds_per_epoch(epoch, seconds), 3), **memory.beside_weights()}

    def selection() -> dict[str, Any]:
        C, G = (1000, 100) if GPU else (20, 5)
        candidates = torch.randn(C, G, 512, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        references = candidates.mean(dim=1)
        select_subgroups(candidates[:3], references[:3], alpha=0.4, beta=0.9)
        taken = timed(lambda: select_subgroups(candidates, references, alpha=0.4, beta=0.9))
        return {"C": C, "G": G, "seconds": round(taken, 2)}

    for student in ("convnet-6", "resnetap-10", "resnet-18"):
        for precision in ("bf16", "fp32") if GPU else ("fp32",):
            cases.add(f"{student}, {precision}", lambda s=student, p=precision: epochs(s, p), seconds + 1)  # type: ignore[misc]
    cases.add("Eq. 10", selection, 5.0 if GPU else 1.0)
    cases.run(clock)
    cases.finish()


def training(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Train the generators of ``configs/pretrain/*-minutes.yaml`` for as long as the time allows."""
    from gpu_training import train_all

    train_all(out, data, clock, emit)


def main() -> None:
    name, out, data, end = sys.argv[1:]
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # everything else that is printed goes into the log

    def emit(row: dict[str, Any]) -> None:
        print(json.dumps(row), file=rows, flush=True)

    device = torch.cuda.get_device_name() if GPU else "CPU"
    emit({"on": f"{device}, torch {torch.__version__}", "gpu": GPU})
    steps = {step.__name__: step for step in (machine, tests, sampling, finetune, students, training)}
    steps[name](Path(out), Path(data) if data else None, Clock(float(end)), emit)


if __name__ == "__main__":
    sys.modules["gpu_steps"] = sys.modules["__main__"]  # files that import gpu_steps get this module, not a copy
    main()
