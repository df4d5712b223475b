"""The command of `ims3 artifacts`: lists, verifies, repairs and prunes the artifacts of a storage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ims3_ray import plugins
from ims3_ray.config import Section
from ims3_ray.engine.stage import Stage
from ims3_ray.errors import IncompletePool, UserError
from ims3_ray.io.artifacts import Artifact, stored_artifacts
from ims3_ray.io.files import concurrently
from ims3_ray.io.storage import Storage

DAY_S = 86_400.0


class ArtifactsConfig(Section):
    """What `ims3 artifacts` does with a storage."""

    action: Literal["list", "verify", "repair", "prune"] = "list"
    """`list` shows every artifact with its size, its age and the runs that use it. `verify` compares every shard with its
    SHA-256. `repair` does the same and lets damaged and lost units count as missing, so that the command that made them makes
    them again. `prune` deletes artifacts that no run uses."""
    storage: str = "runs"
    """Folder or URI that holds the artifacts."""
    plugins: tuple[str, ...] = ()
    """Files or modules with kinds of stage from outside the package."""
    older_than_days: float = Field(default=7, ge=0)
    """Number of days without a change after which `prune` deletes an artifact that no run uses."""
    dry_run: bool = False
    """Whether `prune` only shows what it would delete. `verify` shows what `repair` would let count as missing."""


@dataclass(frozen=True)
class Stored:
    """An artifact as it lies on the storage."""

    artifact: Artifact
    size: int
    """Bytes of all its files."""
    changed: float
    """Time of the last change, in seconds since 1970."""
    damaged: bool
    """Whether its manifest cannot be read."""
    users: tuple[str, ...]
    """Names of the runs that use it and whose folders still exist."""

    @property
    def name(self) -> str:
        return f"{self.artifact.stage}/{self.artifact.key}"


def run(config: ArtifactsConfig) -> None:
    """Do what ``config.action`` says. Raises :class:`IncompletePool` if `verify` finds damaged shards."""
    if config.dry_run and config.action != "prune":
        raise UserError("dry_run=true is for ims3 artifacts prune; what repair would do, ims3 artifacts verify shows")
    plugins.load(config.plugins)
    storage = Storage.at(config.storage)
    if not storage.is_folder("artifacts"):
        raise UserError(
            f"storage '{storage.uri}' holds no artifacts; name the folder or URI that the runs were given as storage="
        )
    {"list": show, "verify": verify, "repair": repair, "prune": prune}[config.action](config, storage)


def found_in(storage: Storage) -> list[Stored]:
    records = _records(storage)
    return concurrently(lambda artifact: _stored(artifact, records), stored_artifacts(storage))


def _records(storage: Storage) -> dict[str, str]:
    """Run → the text of its results and of the records of its trials, which name the keys of all artifacts that it used."""
    found = {}
    for run in set(storage.folders("")) - {"artifacts"}:
        paths = [f"{run}/results.json", *(f"{run}/trials/{name}" for name in storage.names(f"{run}/trials"))]
        found[run] = "".join(storage.read(path).decode(errors="replace") for path in paths if storage.exists(path))
    return found


def _stored(artifact: Artifact, records: Mapping[str, str]) -> Stored:
    """An artifact is used by the runs that have noted it, by the run that is making it, and by those whose results name it."""
    storage = artifact.storage
    files = storage.files(artifact.folder, recursive=True).values()
    maker = (storage.read_json(f"{artifact.folder}/maker.json") or {}).get("run")
    noted = {str(run) for run in (*artifact.users(), maker) if run in records}
    users = noted | {run for run, text in records.items() if artifact.key in text}
    changed = max((file.mtime_ns or 0 for file in files), default=0) / 1e9
    size = sum(file.size or 0 for file in files)
    return Stored(artifact, size, changed, artifact.has_damaged_manifest(), tuple(sorted(users)))


def show(config: ArtifactsConfig, storage: Storage) -> None:
    rows = [("artifact", "units", "MB", "days old", "used by")]
    found = found_in(storage)
    for stored in found:
        manifest = None if stored.damaged else stored.artifact.manifest()
        units = f"{len(manifest['units'])}" if manifest else "damaged" if stored.damaged else "unfinished"
        age = f"{(time.time() - stored.changed) / DAY_S:.1f}" if stored.changed else "?"
        rows.append((stored.name, units, f"{stored.size / 1e6:.1f}", age, ", ".join(stored.users) or "no run"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    print(f"{len(found)} artifacts, {sum(stored.size for stored in found) / 1e6:.1f} MB in {storage.uri}")


def _kind(artifact: Artifact) -> type[Stage]:
    """The kind of stage that made an artifact; :class:`Stage` for a kind of a plugin that is not loaded."""
    return Stage.registry[artifact.stage] if artifact.stage in Stage.registry else Stage  # noqa: SIM401


def damaged_units(artifact: Artifact) -> list[tuple[str, str | None]]:
    """(unit, its shard) of an artifact's committed units that are damaged; no shard for a unit whose shard is gone."""
    kind = _kind(artifact)
    lost = [(unit, None) for unit in kind.lost(artifact)] if kind is not Stage else []
    names = artifact.stems()
    shards = [(unit, names[kind.stem(unit)]) for unit in artifact.units if kind.stem(unit) in names]
    intact = concurrently(lambda pair: artifact.intact(pair[1], pair[0]), shards)
    return [*lost, *((unit, shard) for (unit, shard), whole in zip(shards, intact, strict=True) if not whole)]


def _damaged(storage: Storage) -> Iterator[tuple[Artifact, list[tuple[str, str | None]]]]:
    """Artifacts with damaged units; each is printed. Of an artifact whose manifest is damaged, no unit is known."""
    whole = 0
    artifacts = stored_artifacts(storage)
    damaged = concurrently(Artifact.has_damaged_manifest, artifacts)
    for artifact, is_damaged in zip(artifacts, damaged, strict=True):
        if is_damaged:
            print(f"{artifact.address}: manifest.json is damaged; units without an intact note are made again", flush=True)
            yield artifact, [("manifest.json", None)]
        elif found := damaged_units(artifact):
            for unit, shard in found:
                print(f"{artifact.address}: {unit} is {'lost' if shard is None else f'damaged (shards/{shard})'}", flush=True)
            yield artifact, found
        else:
            whole += 1
    print(f"{whole} artifacts are intact", flush=True)


def verify(config: ArtifactsConfig, storage: Storage) -> None:
    found = [unit for _, units in _damaged(storage) for unit in units]
    if found:
        raise IncompletePool(
            f"{len(found)} units or manifests are damaged or lost; ims3 artifacts repair storage={config.storage} lets them "
            "count as missing, and the command that made them makes them again"
        )


def repair(config: ArtifactsConfig, storage: Storage) -> None:
    for artifact, units in list(_damaged(storage)):
        if artifact.manifest() is None:  # it was damaged, and is set aside now
            continue
        for _, shard in units:
            if shard is not None:
                storage.set_aside(f"{artifact.folder}/shards/{shard}")
        if _kind(artifact).makes_set:
            artifact.withdraw()
        else:
            artifact.drop([unit for unit, _ in units])
        print(f"{artifact.address}: {len(units)} units count as missing; the command that made them makes them again")


def prune(config: ArtifactsConfig, storage: Storage) -> None:
    before = time.time() - config.older_than_days * DAY_S
    unused = [stored for stored in found_in(storage) if not stored.users and stored.changed <= before]
    for stored in unused:
        print(f"{'would delete' if config.dry_run else 'deletes'} {stored.name}, {stored.size / 1e6:.1f} MB", flush=True)
        if not config.dry_run:
            storage.delete(stored.artifact.folder)
    total = sum(stored.size for stored in unused) / 1e6
    print(f"{len(unused)} artifacts that no run uses, {total:.1f} MB, older than {config.older_than_days:g} days")
