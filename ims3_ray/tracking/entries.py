"""What MLflow is told, as the values and entities that it takes, and what its errors mean."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ims3_ray.errors import masked
from ims3_ray.provenance import PRIVATE, command, commit, version


def slug(title: str) -> str:
    """``title`` with only characters that MLflow accepts in names."""
    return re.sub(r"\W+", "_", title.replace("+", "and")).strip("_")


def source_tags() -> dict[str, str]:
    """MLflow's own tags that say which program, at which commit, made a run."""
    tags = {
        "mlflow.source.name": command(PRIVATE) or "ims3_ray",
        "mlflow.source.type": "JOB" if os.environ.get("RAY_JOB_ID") else "LOCAL",
        "ims3.version": version(),
    }  # fmt: skip
    if found := commit():
        tags["mlflow.source.git.commit"] = found.removesuffix("+")
    return tags


def datasets_of(fingerprints: Mapping[str, str], path: str) -> list[Any]:
    """MLflow's inputs of the splits of the data at ``path``, each with its fingerprint."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    path = path.rstrip("/")
    contexts = {"train": "training", "test": "evaluation"}
    return [
        DatasetInput(
            Dataset(f"{path.rpartition('/')[2]} {split}", digest, "local", json.dumps({"path": path})),
            [InputTag("mlflow.data.context", contexts.get(split, split))],
        )
        for split, digest in fingerprints.items()
    ]


def digest_of(params: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """A hash by which a child run that was logged before is known to have the same values."""
    told = repr((sorted((key, str(value)) for key, value in params.items()), sorted(metrics.items())))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def refused(error: Exception) -> bool:
    """Whether another attempt is useless, because the server answered and refused the call."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return isinstance(error, TypeError | ValueError | PermissionError) or (400 <= status < 500 and status not in (408, 429))


def reason(error: Exception) -> str:
    """The first line of an error, without passwords."""
    return masked((str(error) or type(error).__name__).splitlines()[0])[:200]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of each value of a tree."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
