"""Real training images that are held out of a set, to choose the best epoch of the students trained on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ims3_ray.engine.planner import Planner, pixel_bytes
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.seeds import generator_for
from ims3_ray.stages.given import pick


@dataclass(eq=False)
class HoldOut(Stage):
    """Holds out some training images of each class. They are the same in every run, so that equal sets get equal scores."""

    name = "held_out"

    @classmethod
    def plan(cls, planner: Planner) -> HoldOut:
        data, per_class = planner.work.data, planner.work.evaluation.held_out(len(planner.classes.names))
        params = {
            **planner.data.params("train"), "split": data.train_split, "size": data.size, "channels": data.channels,
            "classes": list(planner.classes.names), "per_class": per_class, **data.background_params,
        }  # fmt: skip
        images = sum(min(per_class, count) for count in planner.classes.counts)
        return planner.add(
            cls(
                "hold out train images",
                params,
                units=planner.class_units(),
                images=images,
                stored=pixel_bytes(images, planner.work),
                data_source=planner.data.train,
            )
        )

    def run(self, context: Context) -> None:
        """Draw and store the images, without those that cannot be decoded."""
        source, picked = self.opened, []
        for position, label in enumerate(context.classes.source_labels):
            indices = np.flatnonzero(source.labels == label)
            drawn = torch.randperm(len(indices), generator=generator_for(0, "validation", position))
            picked.append(indices[drawn[: self.params["per_class"]].numpy()].tolist())
        pick(context, self, context.config.data, source, picked)
