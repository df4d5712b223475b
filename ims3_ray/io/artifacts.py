"""Content-addressed stage outputs on one storage URI.

{uri}/artifacts/{stage}/{key}/manifest.json     written last; its presence commits the artifact
{uri}/artifacts/{stage}/{key}/shards/…          a shard appears under its name only when it is complete
{uri}/{run name}/                               output of a run: report, results, distilled data set
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ims3_ray.errors import Damaged
from ims3_ray.io.storage import Storage, as_json

UNCHECKED = (".json", ".state")
"""Endings of shards of which the manifest holds no hash: notes of units, and states of unfinished work."""


def stored_artifacts(storage: Storage) -> list[Artifact]:
    """All artifacts of a storage, finished or not."""
    stages = storage.folders("artifacts")
    return [Artifact(storage, stage, key) for stage in stages for key in storage.folders(f"artifacts/{stage}")]


@dataclass(frozen=True)
class Artifact:
    """The output of one stage: shards, and a manifest that is written after them."""

    storage: Storage
    stage: str
    key: str

    @property
    def folder(self) -> str:
        return f"artifacts/{self.stage}/{self.key}"

    @property
    def address(self) -> str:
        """The artifact's folder as a full path or URI."""
        return self.storage.address(self.folder)

    @property
    def _manifest_path(self) -> str:
        return f"{self.folder}/manifest.json"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the artifact is not committed. It is read once and remembered: see :meth:`look_again`."""
        known, path = self.storage.manifests, self._manifest_path
        if path not in known:
            found = self.storage.read_json(path)
            known[path] = found if found and isinstance(found.get("units"), dict) else None
        return known[path]

    def has_damaged_manifest(self) -> bool:
        """Whether there is a manifest that cannot be read. It is left where it is."""
        try:
            found = json.loads(self.storage.read(self._manifest_path))
        except FileNotFoundError:
            return False
        except ValueError:
            return True
        return not (isinstance(found, dict) and isinstance(found.get("units"), dict))

    @property
    def units(self) -> dict[str, Any]:
        """Committed unit → its entry in the manifest."""
        manifest = self.manifest()
        return manifest["units"] if manifest else {}

    def look_again(self) -> None:
        """Forget the remembered manifest, since another process may have written a new one."""
        self.storage.manifests.pop(self._manifest_path, None)

    def commit(self, manifest: Mapping[str, Any]) -> None:
        data = as_json(manifest, self.storage.address(self._manifest_path), sort_keys=True)
        self.storage.write(self._manifest_path, data)
        self.storage.manifests[self._manifest_path] = json.loads(data)

    def shards(self) -> set[str]:
        return self.storage.names(f"{self.folder}/shards")

    def read(self, shard: str, unit: str | None = None, digest: str | None = None) -> bytes:
        """The content of a shard, which is compared with ``digest``, its SHA-256. By default that is what the manifest holds
        for its ``unit`` (the name of the shard without its ending), if anything.

        Raises :class:`Damaged` for a shard that is missing or is not the one that was committed; the latter is set aside.
        """
        path = f"{self.folder}/shards/{shard}"
        if digest is None and not shard.endswith(UNCHECKED):
            digest = self.digest(unit or shard.rpartition(".")[0])
        for _ in range(2):  # a second time, because the connection and not the file may have been at fault
            try:
                data = self.storage.read(path)
            except FileNotFoundError as error:
                raise Damaged(f"{self.storage.address(path)} is missing; the same command makes it again") from error
            if _matches(data, digest):
                return data
        self.storage.set_aside(path)
        raise Damaged(
            f"{self.storage.address(path)} is damaged: its content is not what was written; it was set aside, and the same "
            "command makes it again"
        )

    def read_json(self, shard: str) -> dict[str, Any]:
        """The JSON object in a shard. Raises :class:`Damaged` if it is missing or holds none; the latter is set aside."""
        path = f"{self.folder}/shards/{shard}"
        found = self.storage.read_json(path)
        if found is None:
            raise Damaged(f"{self.storage.address(path)} is missing or damaged; the same command makes it again")
        return found

    def digest(self, unit: str) -> str | None:
        """SHA-256 of a committed unit's shard; None if it was not recorded."""
        entry = self.units.get(unit)
        return entry.get("sha256") if isinstance(entry, dict) else None

    def intact(self, shard: str, unit: str) -> bool:
        """Whether the shard of a committed unit is there and is the one that was written."""
        try:
            data = self.storage.read(f"{self.folder}/shards/{shard}")
        except FileNotFoundError:
            return False
        return _matches(data, self.digest(unit))

    def stems(self) -> dict[str, str]:
        """Name without its ending → name of each shard; notes of units are not counted."""
        return {name.rpartition(".")[0]: name for name in self.shards() if not name.endswith(UNCHECKED)}

    def users(self) -> set[str]:
        """Names of the runs that have used the artifact."""
        return self.storage.names(f"{self.folder}/users")

    def used_by(self, run: str) -> None:
        """Note that the run ``run`` uses the artifact, so that it is not removed as long as the run's folder exists."""
        known = f"{self.folder}/users/{run}"
        if known not in self.storage.looked_at and run not in self.users():
            self.storage.write(known, b"")
        self.storage.looked_at.add(known)

    def drop(self, units: Collection[str]) -> None:
        """Remove units from the manifest, so that they are made again."""
        if manifest := self.manifest():
            self.commit({**manifest, "units": {unit: entry for unit, entry in manifest["units"].items() if unit not in units}})

    def withdraw(self) -> None:
        """Delete the manifest, so that the whole artifact is made again, from those shards that its notes still name."""
        self.storage.delete_file(self._manifest_path)

    def forget(self, shard: str) -> None:
        """Delete a shard."""
        self.storage.delete_file(f"{self.folder}/shards/{shard}")

    def write(self, shard: str, data: bytes) -> str:
        """Store a shard; returns its SHA-256."""
        self.storage.write(f"{self.folder}/shards/{shard}", data)
        return hashlib.sha256(data).hexdigest()


def _matches(data: bytes, digest: str | None) -> bool:
    """Whether the SHA-256 of ``data`` is ``digest``; true if none is known."""
    return digest is None or hashlib.sha256(data).hexdigest() == digest


def key_of(stage: str, version: int, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """16 hex digits that change with the stage's name and version, the parameters on which it depends, and its inputs."""
    described = json.dumps([stage, version, params, dict(sorted(inputs.items()))], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """16 hex digits of a file's SHA-256. A process reads a file again only if its size or time of modification has changed."""
    state = path.stat()
    return _file_hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(64)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
