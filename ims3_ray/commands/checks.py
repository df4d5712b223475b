"""What would refuse a run, for ``--dry-run``: found without Ray, and without writing anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ims3_ray.cluster.joining import joins, local_cpus, shortage
from ims3_ray.config import PretrainConfig, RunConfig, WorkConfig
from ims3_ray.engine.folder import check_folder
from ims3_ray.io.storage import Storage
from ims3_ray.plan.precision import decided
from ims3_ray.tracking import check_server


def refusals(config: WorkConfig | PretrainConfig, needed: Mapping[str, float]) -> Iterator[str]:
    """Lines about what this machine lacks of the resources ``needed``, if the run starts its own Ray on it; a cluster that is
    joined is asked when the run starts.

    Raises :class:`UserError` for a run folder that holds another config, and for a tracking server that does not answer.
    """
    storage = Storage.at(config.storage)
    if isinstance(config, WorkConfig):
        # A run folder holds the number formats that were decided for it.
        check_folder(decided(config) if isinstance(config, RunConfig) else config, storage)
    check_server(config, storage)
    if joins(config.cluster) is not None or config.cluster.wait_s:
        return
    there = {"CPU": float(local_cpus()), "GPU": float(torch.cuda.device_count())}
    if missing := shortage(needed, there):
        yield f"note: this machine alone is too small for the plan: it needs {missing}; cluster.address names a cluster"
