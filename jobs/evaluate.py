"""Score sets of images, made by any method: train classifiers on them and measure their accuracy on the real test split.

    python jobs/evaluate.py sets.mine=runs/demo/distilled sets.theirs=other/images
    python jobs/evaluate.py --config configs/data/imagewoof.yaml --config configs/protocols/minimax.yaml sets.mine=distilled

A set is a folder with one folder of images per class, Parquet in the Hub's layout, or a hub id. `data` names the real data;
classes are matched by name. Protocols and students: docs/evaluation.md. Trainings that are already done are not repeated.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main

JOBS = "ims3_ray.commands.jobs"

if __name__ == "__main__":
    sys.exit(
        main(
            __doc__ or "",
            "ims3_ray.config:EvaluateConfig",
            f"{JOBS}:run_evaluate",
            f"{JOBS}:plan_evaluate",
        )
    )
