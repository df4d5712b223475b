"""configs/imagewoof.yaml from its images to its distilled set, with stand-in weights in the formats it names."""

from __future__ import annotations

import json
from pathlib import Path

from ims3_ray import RunConfig, distill
from ims3_ray.artifacts import Storage
from ims3_ray.loading import load_config
from ims3_ray.plan import make_plan
from ims3_ray.stages.adapters import Adapters
from tests.imagenet import write_images, write_weights

ROOT = Path(__file__).parents[2]


def test_imagewoof_runs(tmp_path: Path, cluster: None):
    file = ROOT / "configs" / "imagewoof.yaml"
    wnids = load_config(RunConfig, file).data.classes or ()
    write_images(tmp_path / "imagewoof", wnids, 2)
    small = [
        f"data.path={tmp_path}/imagewoof", *write_weights(tmp_path), f"storage={tmp_path}/runs", "name=woof",
        "finetune.trainer.gpus_per_worker=0", "actors.gpus=0", "evaluation.gpus_per_task=0", "selection.images_per_class=1",
        "selection.groups=2", "sampling.unit_size=2", "sampling.steps=2", "instability={images: 1, steps: 1, lanczos_steps: 1}",
        "evaluation={width: 2, epochs: 1, seeds: [0], validations: 1}", "arms={random_real: null, dit: null, dit_s3: null}",
    ]  # fmt: skip
    config = load_config(RunConfig, file, small)
    result = distill(config)
    storage, plan = Storage.at(config.storage), make_plan(config)
    stages = {stage.kind: stage for stage in plan.stages}
    rows = Adapters.of(stages["finetune"], storage).losses(0)
    assert len(rows) == 20  # 8 epochs of 20 images in batches of 8
    assert sorted(path.name for path in Path(result.folder, "distilled", "images").iterdir()) == sorted(wnids)
    assert json.loads(Path(result.folder, "results.json").read_text())["arms"]["ims3"]["seeds"]
