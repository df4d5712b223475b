"""Samples/s and peak memory of fine-tuning, as JSON: ZeRO stages, inversion steps, cached latents, precision.

    python benchmarks/finetune.py                                 DiT-S/8 on CPUs; DiT-XL/2 on a GPU if there is one
    python benchmarks/finetune.py model=B patch=4 batch_size=16   another size
    python benchmarks/finetune.py workers=2                       several workers, with a GPU or a part of the CPU cores each
    python benchmarks/finetune.py 'cases=[ZeRO 1, compiled]'      some of the cases

Weights and images are random: speed does not depend on them. `share` is the rate of the DiT's operations that the config
requires (recomputed activations and the autoencoder do not count), divided by the rate at which the same device multiplies
large matrices of the same type. `launches alone` trains on one image with a DiT that has the same depth but width 64: it shows
the time for launching the kernels, which no step can go below. On the command line each case runs in processes of its own. The
peak memory is that of the first process, on the GPU if there is one.

Needs torch, deepspeed, pydantic, pyyaml, pillow and safetensors (diffusers for `latents encoded each step`), and no Ray.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from ims3_ray.cli import main
from ims3_ray.cluster.speed import matmul_rate
from ims3_ray.config import FinetuneConfig, Section
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.errors import UserError
from ims3_ray.models.dit import PUBLISHED, DiT
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.seeds import generator_for
from ims3_ray.stages.zero import ZeroEngine
from ims3_ray.training.finetuning import BuildEngine, Finetuner, TorchEngine, finetune_flops

GPU = torch.cuda.is_available()
WARM_UP = 2
IMAGES = 64


class BenchmarkConfig(Section):
    model: Literal["S", "B", "L", "XL"] = "XL" if GPU else "S"
    patch: Literal[2, 4, 8] = 2 if GPU else 8
    image_size: int = Field(default=256, multiple_of=64)
    batch_size: int = Field(default=8, ge=1)
    """Images per step and worker."""
    workers: int = Field(default=1, ge=1)
    steps: int = Field(default=50 if GPU else 20, ge=1)
    """Timed steps of a case, after two steps that are not timed; fewer if `seconds` have passed."""
    seconds: float = Field(default=30, gt=0)
    """Time after which no further step of a case is started, in seconds; ignored with several workers."""
    cases: tuple[str, ...] = ()
    """Names of the cases to run; all cases when empty."""


@dataclass(frozen=True)
class Case:
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from ZeRO 1, N = 2 and bf16 on a GPU or fp32 on CPUs."""
    cached: bool = True
    """Whether latents are drawn from moments in memory; otherwise each step encodes its images."""
    thin: bool = False
    """Whether the case uses one image and a DiT of width 64."""
    batch_size: int | None = None
    """Images per step and worker, if they differ from the config's."""


def inversion(steps: int, weight: float = 0.002) -> Case:
    """Inversion matching with N = ``steps``."""
    return Case({"objectives": {"inversion_matching": {"weight": weight, "n_steps": steps}}})


def cases() -> dict[str, Case]:
    found = {f"ZeRO {stage}": Case({"zero_stage": stage}) for stage in range(4)}
    found["latents encoded each step"] = Case(cached=False)
    found["L_Diff alone"] = inversion(1, weight=0.0)
    found |= {f"N = {steps}": inversion(steps) for steps in (1, 5, 10)}
    found["the other precision"] = Case({"precision": "fp32" if GPU else "bf16"})
    found["compiled"] = Case({"compile": True})
    found["activations recomputed"] = Case({"activation_checkpointing": True})
    found["everything trained"] = Case({"parameters": "all"})
    found["launches alone"] = Case(thin=True)
    found["launches alone, compiled"] = Case({"compile": True}, thin=True)
    return found


def measure(config: BenchmarkConfig, name: str, case: Case, build_engine: BuildEngine, rank: int = 0) -> dict[str, Any]:
    world = config.workers
    device = torch.device("cuda", rank) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
        gc.collect()  # frees the memory of the previous case, if one process measures several
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    shape = PUBLISHED[config.model].model_copy(update={"patch_size": config.patch, "input_size": config.image_size // 8})
    if case.thin:
        shape = shape.model_copy(update={"hidden_size": 64, "num_heads": 4})
    each = 1 if case.thin else case.batch_size or config.batch_size
    settings = {"precision": "bf16" if GPU else "fp32", "batch_size": each * world, **case.settings}
    tuning = FinetuneConfig.model_validate({"trainer": {"num_workers": world}, **settings})
    with device:
        tuner = Finetuner(DiT(shape), DiTGenerator.of_shape(shape), tuning, device, rank, world, build_engine)
    labels = torch.arange(IMAGES) % 10
    latents = (IMAGES, 1, shape.in_channels, shape.input_size, shape.input_size)
    moments = {key: torch.randn(latents, dtype=torch.float16) for key in ("mean", "log_variance")}
    encode = None if case.cached else encoder(config, device)

    def one_step(number: int) -> None:
        if encode is not None:
            for key, values in encode().items():
                moments[key][:each] = values
        index = (torch.arange(tuning.batch_size) + number) % IMAGES
        images = CleanImages(moments, labels, flip=False)
        tuner.step(tuner.draw(images, index, generator_for(0, "benchmark", number)))  # waits until the device has finished

    for number in range(WARM_UP):
        one_step(number)
    began, taken = time.perf_counter(), 0
    while taken < config.steps and (
        world > 1 or time.perf_counter() - began < config.seconds
    ):  # workers take equally many steps
        one_step(WARM_UP + taken)
        taken += 1
    seconds = (time.perf_counter() - began) / taken
    peak = torch.cuda.max_memory_allocated() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    dtype = torch.bfloat16 if tuning.precision == "bf16" else torch.float32
    flop_rate = tuning.batch_size / seconds * finetune_flops(DiTGenerator.of_shape(shape), tuning)
    possible = matmul_rate(device, dtype) * world
    return {
        "case": name, "ms_per_step": round(seconds * 1e3, 1), "samples_per_s": digits(tuning.batch_size / seconds),
        "peak_gb": round(peak / 1e9, 2), "precision": tuning.precision, "tflop_per_s": digits(flop_rate / 1e12),
        "matmul_tflop_per_s": digits(possible / 1e12), "share": round(flop_rate / possible, 3),
    }  # fmt: skip


def digits(value: float) -> float:
    """``value`` with four significant digits, however small it is."""
    return float(f"{value:.4g}")


def encoder(config: BenchmarkConfig, device: torch.device) -> Callable[[], dict[str, torch.Tensor]]:
    """Encode images with Stable Diffusion's autoencoder (random weights), as each step of a run without cached latents does."""
    from diffusers import AutoencoderKL

    from ims3_ray.models.autoencoder import Autoencoder

    with device:
        vae = AutoencoderKL(
            latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=config.image_size,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        autoencoder = Autoencoder(dict(vae.config)).requires_grad_(False).eval()
        pixels = torch.rand(config.batch_size, 3, config.image_size, config.image_size) * 2 - 1

    @torch.inference_mode()
    def encode() -> dict[str, torch.Tensor]:
        mean, log_variance = autoencoder.moments(pixels)
        return {"mean": mean[:, None].cpu(), "log_variance": log_variance[:, None].cpu()}

    return encode


def engine(name: Literal["torch", "zero"]) -> BuildEngine:
    """The engine of that name, for one worker. Raises ``ImportError`` if DeepSpeed is needed and cannot be imported."""
    if name == "torch":
        return TorchEngine
    join(0, 1, free_port())
    import deepspeed  # noqa: F401

    return ZeroEngine


def join(rank: int, workers: int, port: int) -> None:
    """Set the environment variables from which DeepSpeed learns the process group and this process's rank in it."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({"DS_BUILD_OPS": "0", **{key: str(value) for key, value in group.items()}})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def worker(config: BenchmarkConfig, name: str, rank: int, port: int, results: Any) -> None:
    sys.stdout = sys.stderr  # keeps DeepSpeed's log lines out of the JSON
    join(rank, config.workers, port)
    try:
        row = measure(config, name, cases()[name], ZeroEngine, rank)
    except torch.OutOfMemoryError:
        row = {"case": name, "error": "out of memory"}
    if rank == 0:
        results.put(row)


def run_case(config: BenchmarkConfig, name: str) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    port = free_port()
    processes = [
        spawn.Process(target=worker, args=(config, name, rank, port, results), daemon=True) for rank in range(config.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return {"case": name, "error": f"exit code {processes[0].exitcode}"} if results.empty() else results.get()


def benchmark(config: BenchmarkConfig) -> None:
    known = cases()
    if unknown := set(config.cases) - known.keys():
        raise UserError(f"there is no case '{min(unknown)}'; choose from: {'; '.join(known)}")
    if GPU and config.workers > torch.cuda.device_count():
        raise UserError(f"workers={config.workers} need a GPU each, and there are {torch.cuda.device_count()}")
    rows = []
    for name in config.cases or known:
        rows.append(run_case(config, name))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
    machine = {"device": device, "workers": config.workers, "torch": torch.__version__}
    machine |= {} if GPU else {"threads": torch.get_num_threads()}
    print(json.dumps({"machine": machine, "model": f"DiT-{config.model}/{config.patch}", "cases": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
