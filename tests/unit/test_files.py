"""Files that people run or copy from: configs, the cluster description, what the repository ships."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from ims3_ray.commands.reference import reference
from ims3_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, RunConfig, SweepConfig
from ims3_ray.config.files import config_names
from ims3_ray.config.loading import load_config
from ims3_ray.data.sources import open_source
from ims3_ray.models.checkpoints import check_fit, weights_path
from ims3_ray.models.dit import DiT
from ims3_ray.models.dit_files import open_dit
from ims3_ray.models.encoder import Encoder, encoder_config
from ims3_ray.plan import make_plan

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "configs" / "kuberay" / "rayjob.yaml"
PAPER = {*ROOT.glob("configs/paper/*.yaml")}  # several runs in a file: tests/unit/test_reproduction.py
CONFIGS = sorted({*ROOT.glob("configs/**/*.yaml")} - {KUBERAY} - PAPER)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_loads(file: Path):
    trees = {
        "pretrain": PretrainConfig, "compare": CompareConfig, "parts": CompareConfig, "sweeps": SweepConfig,
        "data": EvaluateConfig,
    }  # fmt: skip
    load_config(trees.get(file.parent.name, RunConfig), file)


def test_a_data_set_and_a_protocol_are_enough_to_score_sets():
    files = [str(ROOT / "configs" / f"{name}.yaml") for name in ("data/imagewoof", "protocols/minimax", "protocols/rded")]
    config = load_config(EvaluateConfig, files, ["sets.mine=distilled"])
    assert (config.data.size, len(config.data.classes or ())) == (256, 10)
    assert list(config.evaluation.rows) == [
        "minimax/convnet-6", "minimax/resnetap-10", "minimax/resnet-18", "rded/resnet-18", "rded/resnet-50", "rded/resnet-101",
    ]  # fmt: skip


def test_the_demonstration_takes_what_is_embedded_and_little_work():
    demo, default = load_config(RunConfig, ROOT / "configs" / "demo.yaml"), RunConfig()
    assert (demo.data, demo.generator, demo.encoder) == (default.data, default.generator, default.encoder)
    plan = make_plan(demo)
    assert sum(stage.flops for stage in plan.stages) < 20e12, "minutes of two cores"
    assert {scored.title for scored in plan.sets.values()} == {"Random real", "IMS3", "IMS3 + DM", "Full"}


def test_the_configuration_page_names_every_key():
    """Written by ``python -m ims3_ray.commands.reference > docs/configuration.md``."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"docs/configuration.md"}))
def test_lines_of_pages_are_no_longer_than_120_characters(page: str):
    """Tables and pictures are one line each, and indented lines are code."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    ", "!["))] == []


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_files_and_links_that_the_pages_name_exist(page: str):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?:configs|jobs|tests|docs|benchmarks|ims3_ray)/[\w./-]+\.(?:ya?ml|py|md|png)", text))
    links = set(re.findall(r"\]\(((?!http)[^)#]+)\)", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    configs = {name for name in re.findall(r"--config ([\w/.-]+)", text) if not name.endswith(".yaml") and name != "FILE"}
    missing += sorted(configs - set(config_names()))
    assert not missing


def test_the_cluster_file_fits_the_schema_of_ray():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))


def node_types() -> dict[str, dict[str, str]]:
    """Type → labels, of ``cluster.yaml`` and of the RayJob, which have the same."""
    aws = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    groups = yaml.safe_load(KUBERAY.read_text())["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    kubernetes = {group["groupName"]: group["labels"] for group in groups}
    for name, labels in kubernetes.items():
        assert labels.items() <= aws[name]["labels"].items()
        assert aws[name].get("min_workers", 0) == 0
    assert set(aws) - set(kubernetes) == {"head"}
    assert aws["head"]["resources"] == {"CPU": 0}
    assert aws["sampler"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in aws["train"]["node_config"]
    return kubernetes


def test_work_is_placed_on_nodes_that_the_cluster_files_have():
    config = load_config(RunConfig, None, [f"{key}={value}" for key, value in cloud_values().items()])
    there = list(node_types().values())
    assert set(config.cluster.place) == {"driver", "finetune", "pool", "evaluate"}
    assert all(labels in there for labels in config.cluster.place.values())


def cloud_values() -> dict[str, object]:
    values = yaml.safe_load((ROOT / "configs" / "cluster" / "cloud.yaml").read_text())["cluster"]
    return {f"cluster.{key}": json.dumps(value) for key, value in values.items()}


KUBERAY_FIELDS = {
    "RayJob": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
        "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds",
        "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
        "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
    },
    "submitterConfig": {"backoffLimit"},
    "rayClusterSpec": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
        "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
    },
    "authOptions": {"enableK8sTokenAuth", "mode", "secretName"},
    "autoscalerOptions": {
        "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext", "upscalingMode",
        "version", "volumeMounts",
    },
    "headGroupSpec": {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"},
    "workerGroupSpecs": {
        "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
        "resources", "scaleStrategy", "suspend", "template",
    },
}  # fmt: skip
"""Of the custom resource RayJob, ray.io/v1, as KubeRay 1.6 documents it (docs/reference/api.md at its tag v1.6.2)."""


def test_the_rayjob_has_fields_that_its_custom_resource_knows():
    job = yaml.safe_load(KUBERAY.read_text())
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    parts = {
        "RayJob": job, "spec": spec, "rayClusterSpec": cluster, "headGroupSpec": cluster["headGroupSpec"],
        **{key: cluster[key] for key in ("authOptions", "autoscalerOptions")}, "submitterConfig": spec["submitterConfig"],
    }  # fmt: skip
    for name, part in [*parts.items(), *(("workerGroupSpecs", group) for group in cluster["workerGroupSpecs"])]:
        assert set(part) <= KUBERAY_FIELDS[name], name
    assert (job["apiVersion"], job["kind"], cluster["authOptions"]) == ("ray.io/v1", "RayJob", {"mode": "token"})
    assert (cluster["autoscalerOptions"]["version"], cluster["enableInTreeAutoscaling"]) == ("v2", True)
    assert spec["shutdownAfterJobFinishes"]  # without which ttlSecondsAfterFinished is refused
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert images == {yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["image"]}
    for pod in pods:
        assert pod["restartPolicy"] == "Never"  # the autoscaler replaces nodes, not Kubernetes
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    gpus = [container["resources"]["limits"].get("nvidia.com/gpu") for pod in pods for container in pod["containers"]]
    assert gpus == [None, None, "1", "1"]


def test_the_image_is_made_of_what_is_there_by_the_pins_of_the_project():
    text = (ROOT / "configs" / "container" / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
    assert not re.search(r"[a-z]==\d", text)
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)", text, re.MULTILINE)
    assert python in ("3.11", "3.12")


def test_the_embedded_data_are_a_thousand_training_images_a_class_and_the_test_split():
    train, test = (open_source("embedded:fashion-mnist", split) for split in ("train", "test"))
    assert train.class_names == test.class_names
    assert len(train.class_names) == 10
    assert [(train.labels == label).sum() for label in range(10)] == [1000] * 10
    assert [(test.labels == label).sum() for label in range(10)] == [1000] * 10
    assert train.image(0).size == (28, 28)


def test_the_embedded_weights_fit_and_are_small_and_have_cards():
    dit, coarse = weights_path("embedded:fashion-mnist-dit"), weights_path("embedded:fashion-mnist-dit-coarse")
    phi = weights_path("embedded:fashion-mnist-phi")
    for generator in (dit, coarse):
        check_fit(DiT, open_dit(generator).config, generator)
        assert generator.stat().st_size <= 10e6
    check_fit(Encoder, encoder_config(phi), phi)
    assert phi.stat().st_size <= 6e6
    for weights in (dit, coarse, phi):
        card = weights.with_suffix(".md").read_text()
        for text in ("- data:", "- steps:", "- seconds:", "- hardware:", "## Quality"):
            assert text in card
