"""Plans the stages of the four slots of an arm: images, select, synthesise, labels (with weights)."""

from __future__ import annotations

from ims3_ray.config import ArmConfig, RunConfig
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.stage import Stage
from ims3_ray.stages.given import ReadGiven
from ims3_ray.stages.label import Label
from ims3_ray.stages.select import Select
from ims3_ray.stages.synthesise import Synthesise
from ims3_ray.stages.weigh import Weigh


def set_of(planner: Planner, label: str, title: str, arm: ArmConfig, config: RunConfig) -> Stage:
    """Plan the arm's set of K images per class; returns the stage that makes it. ``config`` is the run's config with the arm's
    overrides; ``label`` distinguishes the arm's stages from those of other arms."""
    found: Stage | None = None
    if arm.images == "given":
        k = config.selection.images_per_class
        found = ReadGiven.plan(planner, title, (arm.path or "").replace("{k}", str(k)), config.data, k)
    elif arm.images != "none":
        found = Select.plan(planner, label, title, arm, config)
    if arm.synthesise is not None:
        found = Synthesise.plan(planner, label, title, arm, config, found)
    assert found is not None, "an arm without images has a method that makes some"
    if arm.weights == "clusters":
        found = Weigh.plan(planner, label, title, config, found)
    return Label.plan(planner, label, title, config, found) if arm.labels == "soft" else found


def chosen_of(images: Stage) -> Stage:
    """The first of the stages that make a set, such as its selection: the set before it is synthesised further or labelled."""
    while "set" in images.inputs:
        images = images.inputs["set"]
    return images
