"""What MLflow is told, as the values and entities that it takes, and what its errors mean."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ims3_ray.errors import first_line, masked
from ims3_ray.provenance import PRIVATE, command, commit, version


def slug(title: str) -> str:
    """``title`` with only characters that MLflow accepts in names."""
    return re.sub(r"\W+", "_", title.replace("+", "and")).strip("_")


def slugs(titles: Sequence[str]) -> list[str]:
    """A slug of each title. Of equal ones the later have their position appended."""
    found: list[str] = []
    for position, title in enumerate(titles):
        name = slug(title)
        found.append(f"{name}-{position}" if name in found else name)
    return found


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


KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment for which MLflow's pages show runs and charts first, instead of traces of language models."""
SCHEMA = {
    "mlflow_colspec": [
        {"type": "binary", "name": "image", "required": True}, {"type": "long", "name": "label", "required": True},
    ]
}  # fmt: skip
"""MLflow's signature of a labelled image set."""


@dataclass(frozen=True)
class DistilledSet:
    """The set that a run has exported."""

    content: str
    """Hash of its images."""
    folder: str
    """Its folder or URI."""
    images: int
    classes: int

    def entity(self, name: str) -> Any:
        """MLflow's input of the set, with its hash, size and signature; ``name`` is that of the run."""
        profile = {"num_rows": self.images, "num_classes": self.classes}
        return _dataset(f"{name} distilled", self.content, self.folder, "distilled", profile)


def _dataset(name: str, digest: str, uri: str, context: str, profile: Mapping[str, int] | None = None) -> Any:
    """MLflow's input of a labelled image set, with its signature."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    described = json.dumps(profile) if profile else None
    dataset = Dataset(name, digest, "local", json.dumps({"uri": uri}), schema=json.dumps(SCHEMA), profile=described)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def table_of(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """A table as MLflow's pages show it, from its columns."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return json.dumps({"columns": list(columns), "data": rows}, ensure_ascii=False).encode()


def datasets_of(fingerprints: Mapping[str, str], path: str) -> list[Any]:
    """MLflow's inputs of the splits of the data at ``path``, each with its fingerprint and its signature."""
    path, contexts = path.rstrip("/"), {"train": "training", "test": "evaluation"}
    name = path.rpartition("/")[2]
    return [_dataset(f"{name} {split}", digest, path, contexts.get(split, split)) for split, digest in fingerprints.items()]


def digest_of(params: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """A hash by which a child run that was logged before is known to have the same values."""
    return hash_of((sorted((key, str(value)) for key, value in params.items()), sorted(metrics.items())))


def hash_of(values: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of how Python writes ``values``."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def refused(error: Exception) -> bool:
    """Whether another attempt is useless, because the server answered and refused the call."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return isinstance(error, TypeError | ValueError | PermissionError) or (400 <= status < 500 and status not in (408, 429))


def reason(error: Exception) -> str:
    """The first line of an error, without passwords."""
    return masked(first_line(error))[:200]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of each value of a tree."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
