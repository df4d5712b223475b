"""The steps of ``benchmarks/gpu.py``, each run by it in a process of its own: STEP OUT DATA END, by the monotonic clock.

Rows are written to the standard output as lines of JSON, as soon as they are known; all else goes to the standard error.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float32
"""What large models compute in. CPUs may be hundreds of times slower in bfloat16."""

Emit = Callable[[dict[str, Any]], None]


class Clock:
    """The time that a step has: until ``end`` of the monotonic clock."""

    def __init__(self, end: float) -> None:
        self.end = end

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def while_left(self, names: list[str], needed: float, emit: Emit) -> Iterator[str]:
        """``names`` one after another, as long as ``needed`` seconds are left; those that are left out are named in a row."""
        for position, name in enumerate(names):
            if self.left < needed:
                emit({"left out": names[position:]})
                return
            yield name


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def peak_gb() -> dict[str, float]:
    """Most memory that tensors have taken since the last call, in GB; nothing on a CPU."""
    if not GPU:
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gb": round(peak / 1e9, 2)}


def machine(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Card, driver, and what it reaches on large matrix products and copies."""
    from ims3_ray.hardware import hardware
    from ims3_ray.speed import matmul_rate

    row = {**hardware(DEVICE), "cpus": os.cpu_count()}
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        row |= {"memory_gb": round(properties.total_memory / 1e9, 1), "multiprocessors": properties.multi_processor_count}
        row |= {"cuda": torch.version.cuda}
    emit(row)
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
    """``tests/gpu``, a row each."""
    import pytest

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.failed:
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
    """DiT-XL/2 at 256 pixels, DDPM with guidance; the autoencoder, and PNG beside it."""
    from ims3_ray.config import SamplingConfig
    from ims3_ray.cost import sampling_flops
    from ims3_ray.diffusion.sampling import guided, sample
    from ims3_ray.diffusion.schedule import NoiseSchedule
    from ims3_ray.models.dit import PUBLISHED, DiT
    from ims3_ray.speed import matmul_rate

    shape = PUBLISHED["XL"] if GPU else PUBLISHED["S"].model_copy(update={"patch_size": 8, "depth": 2})
    small, middle, large = (10, 64, 128) if GPU else (1, 2, 4)
    steps, schedule = 50 if GPU else 2, NoiseSchedule()
    flops = sampling_flops(shape, SamplingConfig(sampler="ddpm", steps=50, cfg_scale=4.0))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        full = DiT(shape).eval().requires_grad_(False)
    plain, compiled = full, full
    if GPU:
        plain, compiled = (copy.deepcopy(full).to(HALF) for _ in range(2))
        for block in compiled.blocks:
            block.compile(dynamic=False)

    def draw(model: DiT, batch: int, steps: int) -> None:
        label = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        predict = guided(model, label, shape.null_label, 4.0, 3, variance=True)
        rngs = [torch.Generator().manual_seed(index) for index in range(batch)]
        size = (shape.in_channels, shape.input_size, shape.input_size)
        sample(predict, size, rngs, schedule, steps, sampler="ddpm", device=DEVICE)

    cases: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, model: DiT, batch: int, dtype: torch.dtype, tf32: bool = False) -> None:
        def case() -> dict[str, Any]:
            torch.backends.cuda.matmul.allow_tf32 = False
            possible = matmul_rate(DEVICE, dtype)
            torch.backends.cuda.matmul.allow_tf32 = tf32
            peak_gb()
            cold = timed(lambda: draw(model, batch, 2))  # compiles, where that is asked for
            images_per_s = batch / timed(lambda: draw(model, batch, steps)) * steps / 50
            share = {} if tf32 else {"share": round(images_per_s * flops / possible, 3)}
            return {"cold_s": round(cold, 1), "images_per_s": round(images_per_s, 3), **share, **peak_gb()}

        cases[name] = case

    word = "bf16" if GPU else "fp32"
    add(f"{word}, batch {middle}", plain, middle, HALF)
    if GPU:
        add(f"{word}, batch {middle}, compiled", compiled, middle, HALF)
    add(f"{word}, batch {large}", plain, large, HALF)
    add(f"{word}, batch {small}", plain, small, HALF)
    if GPU:
        add("fp32, batch 1, as the published scripts", full, 1, torch.float32)
        add("fp32, batch 10, as the published scripts", full, 10, torch.float32)
        add("fp32 with TF32, batch 10", full, 10, torch.float32, tf32=True)
        add(f"{word}, batch {large}, compiled", compiled, large, HALF)
        add(f"{word}, batch {small}, compiled", compiled, small, HALF)
    names = list(cases)
    best = 0.0
    for name in clock.while_left(names[:2], 4, emit):
        row = cases[name]()
        best = max(best, row.get("share", 0.0))
        emit({"case": name, "tflop_per_image": round(flops / 1e12, 2), **row})
    if clock.left > 4 and best < 0.6:
        profile(lambda: draw(compiled, middle, 4), emit)
    if clock.left > 8:
        decoding(emit)
    for name in clock.while_left(names[2:], 8 if GPU else 3, emit):
        emit({"case": name, **cases[name]()})


def profile(work: Callable[[], object], emit: Emit) -> None:
    """The ten operations that take the device longest, a row each."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
    work()
    with record(activities=[activity]) as recorded:
        timed(work)
    averages = recorded.key_averages()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if GPU else event.self_cpu_time_total)

    total = sum(map(own, averages)) or 1.0
    for event in sorted(averages, key=own, reverse=True)[:10]:
        share = round(own(event) / total, 3)
        emit({"profile": event.key[:100], "ms": round(own(event) / 1e3, 2), "calls": event.count, "share": share})


def decoding(emit: Emit) -> None:
    """Stable Diffusion's autoencoder (random weights) on 256-pixel latents, and PNG on threads while it works."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        emit({"left out": ["decoding: diffusers is missing"]})
        return
    from ims3_ray.cost import decoding_flops
    from ims3_ray.data.hub import encode_png
    from ims3_ray.data.transforms import to_pil, to_uint8
    from ims3_ray.models.autoencoder import Autoencoder
    from ims3_ray.speed import matmul_rate
    from ims3_ray.stages.images import DECODED_AT_ONCE

    widths, side, count = ((128, 256, 512, 512), 32, 64) if GPU else ((32, 32, 64, 64), 16, 2)
    shape = AutoencoderKL(
        latent_channels=4, block_out_channels=widths, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).config  # fmt: skip
    model = Autoencoder(dict(shape)).eval().requires_grad_(False).to(DEVICE, HALF).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents = torch.randn(count, 4, side, side, device=DEVICE, dtype=HALF).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def parts() -> Iterator[torch.Tensor]:
        for part in latents.split(DECODED_AT_ONCE):
            yield to_uint8(model.decode(part).float())

    next(parts())
    seconds = timed(lambda: list(parts()))
    with torch.device("meta"):
        flops = decoding_flops(Autoencoder(dict(shape)), side)
    rate = matmul_rate(DEVICE, HALF)
    emit({
        "case": "autoencoder alone", "images_per_s": round(count / seconds, 2), "tflop_per_image": round(flops / 1e12, 3),
        "share": round(count / seconds * flops / rate, 3), **peak_gb(),
    })  # fmt: skip
    smooth = torch.nn.functional.interpolate(torch.rand(count, 3, 16, 16), (8 * side, 8 * side), mode="bicubic")
    pictures = [to_pil(image) for image in to_uint8(2 * smooth - 1 + 0.02 * torch.randn_like(smooth))]
    threads = max(1, (os.cpu_count() or 2) - 1)
    with ThreadPoolExecutor(threads) as pool:
        alone = timed(lambda: list(pool.map(encode_png, pictures)))

        def beside() -> None:
            waiting = []
            for position, part in enumerate(parts()):
                part.cpu()
                first = position * DECODED_AT_ONCE
                waiting += [pool.submit(encode_png, picture) for picture in pictures[first : first + len(part)]]
            for job in waiting:
                job.result()

        both = timed(beside)
    emit({"case": f"PNG alone, {threads} threads", "images_per_s": round(count / alone, 1)})
    emit({"case": "autoencoder, PNG beside it", "images_per_s": round(count / both, 2)})


def finetune(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """DiT-XL/2 with DiffFit, batches of 8, by PyTorch alone; with DeepSpeed too where it is installed."""
    import finetune as benchmark

    config = benchmark.BenchmarkConfig(image_size=256 if GPU else 128, steps=20 if GPU else 3, seconds=8 if GPU else 2)
    cases = {"N = 2": benchmark.inversion(2), "L_Diff alone": benchmark.inversion(1, weight=0.0)}
    cases |= {f"N = {steps}": benchmark.inversion(steps) for steps in (1, 5)}
    cases["N = 2, compiled"] = benchmark.Case({"compile": GPU})
    cases["N = 2, batch 32"] = benchmark.Case(batch_size=32 if GPU else 16)
    cases["N = 2, DeepSpeed ZeRO 1"] = benchmark.Case()
    for name in clock.while_left(list(cases), 6, emit):
        engine = benchmark.engine("zero" if "DeepSpeed" in name else "torch")
        if engine is None:
            emit({"left out": [f"{name}: DeepSpeed is missing"]})
            continue
        emit({**benchmark.measure(config, name, cases[name], engine), "case": name})


def students(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Epochs/s on 10 classes of 10 images at 224 pixels, and Eq. 10 for a thousand classes."""
    import evaluation as benchmark

    from ims3_ray.selection import select_subgroups

    seconds = 4.0 if GPU else 0.2
    names = [
        f"{student}, {precision}" for student in ("convnet-6", "resnetap-10", "resnet-18") for precision in ("bf16", "fp32")
    ]
    if not GPU:
        names = [name for name in names if "fp32" in name]
    C, G = (1000, 100) if GPU else (20, 5)
    devices = ["cuda", "cpu"] if GPU else ["cpu"]
    for name in clock.while_left([*names, *(f"Eq. 10 on {device}" for device in devices)], seconds + 1, emit):
        if name.startswith("Eq. 10"):
            device, rng = name.split()[-1], torch.Generator().manual_seed(0)
            candidates = torch.randn(C, G, 512, generator=rng).to(device)
            references = candidates.mean(dim=1)
            select_subgroups(candidates[:3], references[:3], alpha=0.4, beta=0.9)
            taken = timed(lambda c=candidates, r=references: select_subgroups(c, r, alpha=0.4, beta=0.9))  # type: ignore[misc]
            emit({"case": name, "C": C, "G": G, "seconds": round(taken, 2)})
            continue
        student, precision = name.split(", ")
        count = {} if GPU else {"width": 8, "images_per_class": 1}
        size = 224 if GPU else 64 if student == "convnet-6" else 32
        config = benchmark.BenchmarkConfig(student=student, size=size, **count)
        epoch = benchmark.on_the_device(config, precision=precision)
        emit({"case": name, "epochs_per_s": round(1 / benchmark.seconds_per_epoch(epoch, seconds), 3), **peak_gb()})


def training(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """The generators of ``configs/pretrain/*-minutes.yaml``, as long as the time allows."""
    from gpu_training import train_all

    train_all(out, data, clock, emit)


def main() -> None:
    name, out, data, end = sys.argv[1:]
    clock = Clock(float(end))
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints does so into the log
    steps = {step.__name__: step for step in (machine, tests, sampling, finetune, students, training)}
    steps[name](Path(out), Path(data) if data else None, clock, lambda row: print(json.dumps(row), file=rows, flush=True))


if __name__ == "__main__":
    main()
