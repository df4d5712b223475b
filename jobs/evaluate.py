"""Score sets of images, whoever made them: what do classifiers learn from them that is right on the real test split?

    python jobs/evaluate.py sets.mine=runs/demo/distilled sets.theirs=other/images
    python jobs/evaluate.py --config configs/data/imagewoof.yaml --config configs/protocols/minimax.yaml sets.mine=distilled

A set is a folder with one folder of images per class, Parquet in the Hub's layout, or a hub id; the real data are those of
`data`, and classes are matched by name. Protocols and students: docs/evaluation.md. What was trained once is not trained again.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main
from ims3_ray.config import EvaluateConfig
from ims3_ray.estimate import describe
from ims3_ray.pipeline import evaluate
from ims3_ray.plan import make_evaluation
from ims3_ray.report.terminal import print_result


def run(config: EvaluateConfig) -> None:
    print_result(evaluate(config))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", EvaluateConfig, run, lambda config: describe(make_evaluation(config))))
