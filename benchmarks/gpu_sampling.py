"""The step ``sampling`` of ``benchmarks/gpu.py``: DiT-XL/2, the autoencoder, and PNG encoding in parallel with it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from gpu_steps import COMPILING_S, DEVICE, GPU, HALF, Cases, Clock, Emit, Memory, exact_float32, timed

from ims3_ray.cluster.speed import matmul_rate
from ims3_ray.config import SamplingConfig
from ims3_ray.data.transforms import to_pil, to_uint8
from ims3_ray.diffusion.prediction import guided
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.engine.images import DECODED_AT_ONCE
from ims3_ray.io.parquet import encode_png
from ims3_ray.models.autoencoder import decoding_flops
from ims3_ray.models.dit import PUBLISHED, DiT
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.stages.candidates import sampling_flops

STEPS = 50
"""Number of DDPM steps per image, as in the published baselines."""
AIM = 0.6
"""The slowest operations are listed if the share of the device's matmul rate is below this."""


def run(clock: Clock, emit: Emit) -> None:
    """Run the cases in order of importance. Cases that need compilation come last, except the one that should reach the aim."""
    shape = PUBLISHED["XL"] if GPU else PUBLISHED["S"].model_copy(update={"patch_size": 8, "depth": 2})
    small, middle, large = (10, 64, 128) if GPU else (1, 2, 4)
    flops = sampling_flops(DiTGenerator.of_shape(shape), SamplingConfig(sampler="ddpm", steps=STEPS, cfg_scale=4.0))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        full = DiT(shape).eval().requires_grad_(False)
    half = copy.deepcopy(full).to(HALF)
    word, cases, shares = "bf16" if GPU else "fp32", Cases(emit), [0.0]

    def add(name: str, model: DiT, batch: int, dtype: torch.dtype, tf32: bool = False, needed: float = 6.0) -> None:
        def case() -> dict[str, Any]:
            exact_float32()
            possible = matmul_rate(DEVICE, dtype)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            memory, steps = Memory(), STEPS if GPU else 2
            cold = timed(lambda: draw(model, batch, 2))  # includes compilation, where the case has it
            images_per_s = batch / timed(lambda: draw(model, batch, steps)) * steps / STEPS
            share = images_per_s * flops / possible
            shares.append(share)
            row = {"images_per_s": round(images_per_s, 3), "tflop_per_image": round(flops / 1e12, 2), "cold_s": round(cold, 1)}
            return {**row, **({} if tf32 else {"share": round(share, 3)}), **memory.beside_weights()}

        cases.add(name, case, needed if GPU else 1.0)

    add(f"{word}, batch {middle}", half, middle, HALF)
    if GPU:
        compiled = copy.deepcopy(half)
        for block in compiled.blocks:
            block.compile(dynamic=False)
        add(f"{word}, batch {middle}, compiled", compiled, middle, HALF, needed=COMPILING_S)
    cases.run(clock)
    if max(shares) < AIM:
        cases.add("profile", lambda: profile(lambda: draw(half, middle, 4), f"{word}, batch {middle}", emit), 4.0)
    cases.add("autoencoder", lambda: decoding(emit), 10.0 if GPU else 3.0)
    if GPU:
        for batch in (1, 10):
            add(f"fp32 with TF32, batch {batch}, as the published scripts", full, batch, torch.float32, tf32=True)
    add(f"{word}, batch {small}", half, small, HALF)
    add(f"{word}, batch {large}", half, large, HALF, needed=10.0)
    if GPU:
        add("fp32 without TF32, batch 10", full, 10, torch.float32, needed=10.0)
        for batch in (large, small):
            add(f"{word}, batch {batch}, compiled", compiled, batch, HALF, needed=COMPILING_S)
    cases.run(clock)
    cases.finish()


def draw(model: DiT, batch: int, steps: int) -> None:
    """Sample a batch of one class, guided on 3 of 4 channels."""
    shape = model.config
    label = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    predict = guided(model, label, shape.null_label, 4.0, 3, variance=True)
    rngs = [torch.Generator().manual_seed(index) for index in range(batch)]
    size = (shape.in_channels, shape.input_size, shape.input_size)
    sample(predict, size, rngs, NoiseSchedule(), steps, sampler="ddpm", device=DEVICE)


def profile(work: Callable[[], object], of: str, emit: Emit) -> None:
    """Emit a row for each of the ten operations that take most time on the device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    work()
    with record(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as recorded:
        timed(work)
    averages = recorded.key_averages()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if GPU else event.self_cpu_time_total)

    total = sum(map(own, averages)) or 1.0
    for event in sorted(averages, key=own, reverse=True)[:10]:
        figures = {"ms": round(own(event) / 1e3, 2), "calls": event.count, "share": round(own(event) / total, 3)}
        emit({"profile": event.key[:100], "of": of, **figures})


def decoding(emit: Emit) -> None:
    """Measure Stable Diffusion's autoencoder (random weights) on latents of 256-pixel images, alone and with PNG encoding."""
    from diffusers import AutoencoderKL

    from ims3_ray.models.autoencoder import Autoencoder

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

    memory = Memory()
    next(parts())
    seconds = timed(lambda: list(parts()))
    with torch.device("meta"):
        flops = decoding_flops(Autoencoder(dict(shape)), side)
    share = count / seconds * flops / matmul_rate(DEVICE, HALF)
    row = {"images_per_s": round(count / seconds, 2), "tflop_per_image": round(flops / 1e12, 3), "share": round(share, 3)}
    emit({"case": "autoencoder alone", **row, **memory.beside_weights()})
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
