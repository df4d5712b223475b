"""The dataset card of the distilled set (README.md beside its Parquet)."""

from __future__ import annotations

import yaml

from ims3_ray.config import RunConfig, canonical
from ims3_ray.data.classes import ClassTable
from ims3_ray.provenance import PRIVATE, described, last_part, without_places
from ims3_ray.report.markdown import plain, table
from ims3_ray.report.results import KINDS, Results, summary_text

CITATION = """\
## Citation

```bibtex
@article{wang2026ims3,
  title = {IMS3: Breaking Distributional Aggregation in Diffusion-Based Dataset Distillation},
  author = {Wang, Chenru and Chen, Yunyi and Yang, Zijun and Zhou, Joey Tianyi and Zhang, Chi},
  journal = {arXiv preprint arXiv:2603.13960},
  year = {2026}
}
```
"""
"""Section of a card that says what to cite."""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's categories of the number of rows, each with the number below which it applies."""


def accuracy_rows(results: Results) -> list[str]:
    """Markdown rows: arm and protocol with accuracies as mean ± std."""
    return table(
        ["images", "protocol", *KINDS],
        (
            [plain(found["title"]), plain(row), *(summary_text(values.get(kind)) for kind in KINDS)]
            for found in results["sets"].values()
            for row, values in found["rows"].items()
        ),
    )


def chosen_text(results: Results) -> str:
    """How the exported arm was chosen, as ``, chosen by …``; empty if the config names it."""
    held_out = results["exported"]["held_out"]
    if not held_out:
        return ""
    ranked = sorted(held_out, key=lambda name: -held_out[name])
    shares = ", ".join(f"{results['sets'][name]['title']} {held_out[name]:.1f} %" for name in ranked)
    return f", chosen by the accuracy of its students on held-out training images: {shares}"


def dataset_card(config: RunConfig, classes: ClassTable, results: Results) -> str:
    """The dataset card as Markdown, with the metadata that the Hub's viewer reads."""
    arm, k = results["sets"][results["exported"]["arm"]], config.selection.images_per_class
    names = ", ".join(map(plain, classes.names))
    shown = without_places({key: value for key, value in canonical(config).items() if key not in PRIVATE})
    name = last_part(config.data.path)
    count = int(arm["images"])
    most = -(-count // len(classes.names))
    title = f"{name}, distilled: {k} images a class" if most == k else f"{name}: {count} images"
    header = {
        "pretty_name": title,
        # The datasets library caches by folder and config name, and every set lies in a folder called "distilled".
        "configs": [
            {
                "config_name": f"{config.name}-{arm['content']}",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
        "task_categories": ["image-classification"],
        "size_categories": [next((category for limit, category in SIZES if count < limit), "1M<n<10M")],
        "tags": ["dataset-distillation", "synthetic"],
    }
    return "\n".join(
        [
            "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "",
            f"# {plain(title)}", "",
            f"{count} images in {len(classes.names)} classes ({names}), made by ims3-ray "
            f"(arm {plain(arm['title'])}{plain(chosen_text(results))}), content hash `{arm['content']}`. The images "
            "are in Parquet files in `data/`; `images/`, where it is, holds the same as PNG files.",
            "",
            f"{results['metric'].capitalize()}; students are trained from scratch on each set. *last*: final epoch; *best*: "
            "best epoch on the test split itself; *val*: best epoch on held-out training images. The config has the protocols.",
            "",
            *accuracy_rows(results), "",
            "## Provenance", "", *(f"- {name}: {plain(value)}" for name, value in described(results["provenance"])), "",
            "The licence of the source images and of the generator's weights applies.", "",
            "## Config", "", "```yaml", yaml.safe_dump(shown, sort_keys=False).strip(), "```", "", CITATION,
        ]
    )  # fmt: skip
