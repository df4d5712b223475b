"""The dataset card of the distilled set (README.md beside its Parquet)."""

from __future__ import annotations

from typing import Any

import yaml

from ims3_ray.config import RunConfig, canonical
from ims3_ray.data.classes import ClassTable


def accuracy_rows(results: dict[str, Any]) -> list[str]:
    """Markdown rows: arm, last and best accuracy as mean ± std."""
    rows = ["| images | last epoch | best epoch |", "|---|---|---|"]
    for arm in results["arms"].values():
        best = arm["best"]
        rows.append(f"| {arm['title']} | {arm['mean']:.1f} ± {arm['std']:.1f} | {best['mean']:.1f} ± {best['std']:.1f} |")
    return rows


def dataset_card(config: RunConfig, classes: ClassTable, results: dict[str, Any]) -> str:
    """Markdown with the metadata that the Hub's viewer reads."""
    arm, k = results["arms"][config.export], config.selection.images_per_class
    header = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "synthetic"],
    }
    e = config.evaluation
    return "\n".join(
        [
            "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "",
            f"# {config.data.path}, distilled: {k} images a class", "",
            f"{k * len(classes.names)} images in {len(classes.names)} classes ({', '.join(classes.names)}), made by ims3-ray "
            f"(arm {arm['title']}), content hash `{arm['content']}`. `data/` holds Parquet, `images/` the same as PNG files.",
            "",
            f"Top-1 test accuracy in % of a ConvNet-{e.depth} of width {e.width} with instance norm, trained from scratch "
            f"for {e.epochs} epochs on each set (hard labels, SGD, {len(e.seeds)} seeds, mean ± standard deviation):", "",
            *accuracy_rows(results), "",
            "The licence of the source images and of the generator's weights applies.", "",
            "## Config", "", "```yaml", yaml.safe_dump(canonical(config), sort_keys=False).strip(), "```", "",
        ]
    )  # fmt: skip
