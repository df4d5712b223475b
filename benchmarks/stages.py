"""Seconds and images/s of every stage of a run, as JSON.

    python benchmarks/stages.py                         the default run on the embedded data, in a temporary folder
    python benchmarks/stages.py sampling.steps=50       with overrides, as in ims3 distill
    python benchmarks/stages.py --config FILE

`share` is the floating-point rate of a stage, start-up included, divided by the rate at which this machine multiplies two large
float32 matrices with all its cores; the rest is lost to start-up, memory traffic and small layers. The seconds of evaluation
are the sum over its students, which run in parallel.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from contextlib import redirect_stdout

import torch

from ims3_ray.cli import main
from ims3_ray.cluster.speed import matmul_rate
from ims3_ray.commands.distill import distill
from ims3_ray.config import RunConfig
from ims3_ray.plan import make_plan


def benchmark(config: RunConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.model_validate({**config.model_dump(), "storage": folder})
        plan, rate = make_plan(config), matmul_rate("cuda" if torch.cuda.is_available() else "cpu") / 1e9
        began = time.perf_counter()
        with redirect_stdout(sys.stderr):
            results = distill(config).results
        total = time.perf_counter() - began
    rows = []
    for stage, row in zip(plan.stages, results["stages"], strict=True):
        rows.append({"stage": row["title"], "seconds": round(row["seconds"], 2), "images": row["images"]})
        if row["seconds"] > 0.1:
            rows[-1]["images_per_s"] = round(row["images"] / row["seconds"], 1)
            if stage.flops:
                rows[-1]["gflop_per_s"] = round(stage.flops / row["seconds"] / 1e9, 1)
                rows[-1]["share"] = round(stage.flops / row["seconds"] / 1e9 / rate, 3)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    report = {"machine": machine, "matmul_gflop_per_s": round(rate, 1), "wall_seconds": round(total, 1), "stages": rows}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", RunConfig, benchmark))
