"""Files that people run or copy from: configs, the cluster description, what the repository ships."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ims3_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, RunConfig, SweepConfig
from ims3_ray.data.sources import open_source
from ims3_ray.loading import load_config, reference
from ims3_ray.models.checkpoints import check_fit, weights_path
from ims3_ray.models.dit import DiT
from ims3_ray.models.encoder import Encoder, encoder_config
from ims3_ray.models.generator import generator_config

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "configs" / "kuberay" / "rayjob.yaml"
CONFIGS = sorted({*ROOT.glob("configs/**/*.yaml")} - {KUBERAY})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_loads(file: Path):
    trees = {"pretrain": PretrainConfig, "compare": CompareConfig, "sweeps": SweepConfig, "data": EvaluateConfig}
    load_config(trees.get(file.parent.name, RunConfig), file)


def test_a_data_set_and_a_protocol_are_enough_to_score_sets():
    files = [str(ROOT / "configs" / f"{name}.yaml") for name in ("data/imagewoof", "protocols/minimax", "protocols/rded")]
    config = load_config(EvaluateConfig, files, ["sets.mine=distilled"])
    assert (config.data.size, len(config.data.classes or ())) == (256, 10)
    assert list(config.evaluation.rows) == [
        "minimax/convnet-6", "minimax/resnetap-10", "minimax/resnet-18", "rded/resnet-18", "rded/resnet-50", "rded/resnet-101",
    ]  # fmt: skip


def test_the_demo_config_is_the_default():
    assert load_config(RunConfig, ROOT / "configs" / "demo.yaml") == RunConfig()


def test_the_configuration_page_names_every_key():
    """Written by ``python -m ims3_ray.loading > docs/configuration.md``."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_files_and_links_that_the_pages_name_exist(page: str):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?:configs|jobs|tests|docs|benchmarks|ims3_ray)/[\w./-]+\.(?:ya?ml|py|md|png)", text))
    links = set(re.findall(r"\]\(((?!http)[^)#]+)\)", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_the_cluster_file_fits_the_schema_of_ray():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))


def test_the_embedded_data_are_a_thousand_training_images_a_class_and_the_test_split():
    train, test = (open_source("embedded:fashion-mnist", split) for split in ("train", "test"))
    assert train.class_names == test.class_names
    assert len(train.class_names) == 10
    assert [(train.labels == label).sum() for label in range(10)] == [1000] * 10
    assert [(test.labels == label).sum() for label in range(10)] == [1000] * 10
    assert train.image(0).size == (28, 28)


def test_the_embedded_weights_fit_and_are_small_and_have_cards():
    dit, phi = weights_path("embedded:fashion-mnist-dit"), weights_path("embedded:fashion-mnist-phi")
    check_fit(DiT, generator_config(dit), dit)
    check_fit(Encoder, encoder_config(phi), phi)
    assert dit.stat().st_size <= 10e6
    assert phi.stat().st_size <= 6e6
    for weights in (dit, phi):
        card = weights.with_suffix(".md").read_text()
        for text in ("- data:", "- steps:", "- seconds:", "- hardware:", "## Quality"):
            assert text in card
