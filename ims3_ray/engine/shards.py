"""Units and their shards: how they are named, committed and read."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ims3_ray.errors import Damaged
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import as_json
from ims3_ray.models.checkpoints import first_not_finite

READERS = 16
"""The most shards that a process reads at a time, and that it holds in memory before the caller takes them."""


def commit_units(
    artifact: Artifact, units: Mapping[str, Any], seconds: float, failed: Mapping[str, str] | None = None, **extra: Any
) -> None:
    """Add ``units`` (unit → entry) and the seconds that they took to the artifact's manifest, which may be extended later.
    ``failed`` maps units that could not be made to their errors; an error is removed when its unit is made."""
    artifact.look_again()
    before = artifact.manifest() or {"units": {}, "seconds": 0.0}
    total = float(before["seconds"]) + seconds
    made = {**before["units"], **units}
    errors = {unit: why for unit, why in {**before.get("failed", {}), **(failed or {})}.items() if unit not in made}
    artifact.commit({**before, **extra, "units": made, "failed": errors, "seconds": total, "stage": artifact.stage})


def note(artifact: Artifact, unit: str, entry: Mapping[str, Any]) -> None:
    """Write a unit's entry (its note) beside its shard: the presence of the note shows that the shard is complete."""
    artifact.write(f"{unit}.json", as_json(entry, f"the note of {unit}"))


def read_notes(
    artifact: Artifact, units: Sequence[str], stems: Callable[[str], str] = str, stored: bool = True
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Unit → entry, of those ``units`` whose note and shard are there. ``stems`` maps a unit to the name of its shard without
    ending; units that are not ``stored`` have none. A note that cannot be read, or whose shard is gone, is deleted: its unit
    counts as missing."""
    notes = {name.removesuffix(".json") for name in artifact.shards() if name.endswith(".json")}
    there, present, found = [unit for unit in units if unit in notes], artifact.stems(), {}
    for unit, shard in read_many(artifact, there, "json"):
        try:
            entry = json.loads(shard)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and (not stored or stems(unit) in present):
            found[unit] = entry
        else:
            artifact.forget(f"{unit}.json")
    return found


def made_meanwhile(artifact: Artifact, unit: str) -> dict[str, Any] | None:
    """The entry of a unit that another job has made since this process last looked, if it has: what is made twice may differ in
    its last bits, and others may have used the first already."""
    artifact.look_again()
    return artifact.units.get(unit) or read_notes(artifact, [unit]).get(unit)


def unit_name(label: int, number: int) -> str:
    """Name of unit ``number`` of the class ``label`` (the generator's label for candidates, the source's for real images)."""
    return f"c{label:04d}-u{number:05d}"


def parse_unit(unit: str) -> tuple[int, int]:
    label, number = unit.split("-")
    return int(label[1:]), int(number[1:])


def units_of(label: int, count: int, unit_size: int) -> list[str]:
    """Names of the units that hold images 0 … count−1 of a class."""
    return [unit_name(label, number) for number in range(-(-count // unit_size))]


def by_class(units: Sequence[str]) -> dict[int, list[str]]:
    """Label → its units, in their order."""
    found: dict[int, list[str]] = {}
    for unit in units:
        found.setdefault(parse_unit(unit)[0], []).append(unit)
    return found


def pack_tensors(**tensors: Tensor) -> bytes:
    """Tensors as a shard. Raises ``ValueError`` naming the first one that holds a value which is not finite."""
    if bad := first_not_finite(tensors):
        raise ValueError(f"the {bad.replace('_', ' ')} to be stored have values that are not finite")
    return save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})


def read_many(artifact: Artifact, units: Sequence[str], suffix: str) -> Iterator[tuple[str, bytes]]:
    """(unit, its shard) of many units, read concurrently: object storage answers slowly but serves many requests at a time.

    Raises :class:`Damaged` for a shard that is missing or altered."""
    for unit, shard in read_intact(artifact, units, suffix):
        if isinstance(shard, Damaged):
            raise shard
        yield unit, shard


def read_intact(artifact: Artifact, units: Sequence[str], suffix: str) -> Iterator[tuple[str, bytes | Damaged]]:
    """Like :func:`read_many`, but gives the error in place of a shard that is missing or altered."""

    def shard_of(unit: str) -> bytes | Damaged:
        try:
            return artifact.read(f"{unit}.{suffix}")
        except Damaged as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        left, coming = iter(units), deque[tuple[str, Future[bytes | Damaged]]]()
        while True:
            coming += [(unit, readers.submit(shard_of, unit)) for unit in islice(left, READERS - len(coming))]
            if not coming:
                return
            unit, shard = coming.popleft()
            yield unit, shard.result()


def read_class(artifact: Artifact, units: Sequence[str], name: str) -> Tensor:
    """Tensor ``name`` of a class's units, concatenated in order."""
    return torch.cat([load(shard)[name] for _, shard in read_many(artifact, units, "safetensors")])
