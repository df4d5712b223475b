"""The base class of a plan's stages and the context in which they run. Each kind of stage is a file of ``ims3_ray/stages/``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from ims3_ray import plugins
from ims3_ray.component import Component, Registry
from ims3_ray.config import ClusterConfig, Role, RunConfig, WorkConfig, reserved
from ims3_ray.data.classes import ClassTable
from ims3_ray.data.sources import Source
from ims3_ray.engine.weights import Weights
from ims3_ray.engine.worker import ShardReceiver
from ims3_ray.io.artifacts import Artifact, key_of
from ims3_ray.io.files import natural
from ims3_ray.io.storage import Storage
from ims3_ray.progress import Course
from ims3_ray.tracking import Untracked


@dataclass(frozen=True)
class Worker:
    """Resources that one worker of a stage reserves. Its time is counted in GPU-hours if it has GPUs, else in core-hours."""

    role: Role = "driver"
    cpus: float = 1.0
    gpus: float = 0.0
    at_once: int = 1
    """Number of workers that the stage needs at the same time."""

    @property
    def unit(self) -> str:
        return "GPU" if self.gpus else "core"

    @property
    def devices(self) -> float:
        return self.gpus or self.cpus

    @property
    def reserved(self) -> dict[str, float]:
        """What Ray reserves for all workers that are needed at the same time."""
        return {kind: self.at_once * amount for kind, amount in reserved(self.cpus, self.gpus).items()}

    def flop_rate(self, cluster: ClusterConfig) -> float:
        """FLOP/s of one worker that the config assumes."""
        return self.gpus * cluster.gpu_tflops * 1e12 if self.gpus else self.cpus * cluster.core_gflops * 1e9


@dataclass(eq=False)
class Stage(Component, ABC):
    """A node of the plan. A subclass is a kind of stage; its ``name`` is also the name of its artifacts' folder.

    A kind defines everything that the rest of the program needs to know about it: what its key depends on, its inputs and
    units, its cost and where it runs. No code outside its file depends on the kind of a stage.
    """

    registry = Registry["type[Stage]"]("kind of stage", "ims3_ray.stages")
    version: ClassVar[int] = 1
    """Version of the output. It is raised when the output changes for the same input, so that old artifacts are not reused.

    A changed default of :attr:`settings` is such a change, since keys hold only the values that differ from the defaults.
    """
    settings: ClassVar[type[BaseModel] | None] = None
    """Class of the settings of which the key holds only the values that differ from the defaults.
    ``tests/unit/defaults.json`` records the defaults of each version."""
    makes_set: ClassVar[bool] = False
    """Whether the output is a set of images to train on, which later stages identify by its content."""
    of_arm: ClassVar[bool] = False
    """Whether stages of this kind belong to one arm. A stage that depends on none of these needs only real images and serves
    all arms."""
    runs_last: ClassVar[bool] = False
    """Whether the stage waits until no other stage is left to run, so that all stages of its batch run at once."""
    exclusive: ClassVar[bool] = False
    """Whether two processes must not run the same stage at once, since they would share its checkpoints."""
    counted: ClassVar[str] = ""
    """Name under which a search counts stages of this kind; empty if it does not count them."""

    title: str
    params: Mapping[str, Any]
    """The values, mostly of the config, on which the output depends; part of the key."""
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    units: tuple[str, ...] = ("result",)
    """Names of the pieces that the manifest must list for the stage to be complete."""
    images: int = 0
    flops: float = 0.0
    stored: float = 0.0
    """Approximate number of bytes that the stage writes; files that are small compared with images are not counted."""
    label: str = ""
    """The arm or split that the stage belongs to, where a kind occurs more than once."""
    weights: Mapping[str, Weights] = field(default_factory=dict)
    """Those of ``generator``, ``encoder``, ``autoencoder`` and ``teacher`` that the stage needs; ``params`` holds their
    hashes."""
    config: RunConfig | None = None
    """The run's config as it applies to the arm that the stage was planned for; None if nothing is distilled."""
    after: tuple[Stage, ...] = ()
    """Stages that have to be complete before this one runs although it does not read what they make."""
    data_source: Source | None = None
    """The image set whose files the stage reads; None for stages that read none."""
    has_logits: bool | None = False
    """For a set: whether it has soft labels; None where that is known only once it is made."""
    _keys: dict[str, str] = field(default_factory=dict, repr=False)

    # Description

    @property
    def run_config(self) -> RunConfig:
        """The config of a stage that is part of a distillation."""
        assert self.config is not None
        return self.config

    @property
    def opened(self) -> Source:
        """The image set whose files the stage reads."""
        assert self.data_source is not None
        return self.data_source

    @property
    def batch(self) -> Hashable:
        """Stages with the same value run together, by one call of :meth:`run_all`. By default each stage runs alone."""
        return self

    def worker(self, config: WorkConfig) -> Worker:
        """The workers that run the stage; by default one core beside the driver."""
        return Worker()

    def seconds_beside_flops(self) -> float:
        """Seconds that one core needs for work that :attr:`flops` does not count, such as decoding files."""
        return 0.0

    def widen(self, units: Sequence[str]) -> None:
        """Add ``units`` to the units of the stage, and scale its numbers of images, operations and bytes accordingly."""
        if more := set(units) - set(self.units):
            scale = (len(self.units) + len(more)) / len(self.units)
            self.units = tuple(sorted({*self.units, *more}, key=natural))
            self.images, self.flops, self.stored = round(self.images * scale), self.flops * scale, self.stored * scale

    def settle(self) -> None:
        """Called when the plan is complete: adapts the stage to inputs that other stages have widened."""

    def units_of_class(self, position: int) -> list[str]:
        """The units that hold the output for the class at ``position``."""
        return [self.units[position]]

    @property
    def belongs_to_arm(self) -> bool:
        """Whether :attr:`of_arm` holds for the stage or for one that it depends on."""
        return self.of_arm or any(stage.belongs_to_arm for stage in self.inputs.values())

    # Output

    @classmethod
    def stem(cls, unit: str) -> str:
        """Name, without its ending, of the shard that holds a unit."""
        return unit

    def forget_lost(self, storage: Storage) -> list[str]:
        """Remove from the manifest the units whose shards are no longer there, so that they are made again; returns them.

        Of a set the whole manifest is removed, since it holds the set's content hash. A process looks once at each artifact.
        """
        if not self.manifest(storage) or self.artifact(storage).folder in storage.looked_at:
            return []
        artifact = self.artifact(storage)
        storage.looked_at.add(artifact.folder)
        lost = self.lost(artifact)
        if lost and self.makes_set:
            artifact.withdraw()
        elif lost:
            artifact.drop(lost)
        return lost

    @classmethod
    def lost(cls, artifact: Artifact) -> list[str]:
        """The units of a committed ``artifact`` whose shards are gone. Units without a recorded hash are not looked for."""
        units = [unit for unit in artifact.units if artifact.digest(unit)]
        present = artifact.stems() if units else {}
        return [unit for unit in units if cls.stem(unit) not in present]

    def forget_key(self) -> None:
        """Compute the key anew when it is needed: the content of a set on which it depends may be another by then."""
        self._keys.clear()

    def key(self, storage: Storage) -> str | None:
        """Hash of version, params and inputs; None while an input that is identified by its content is not made yet."""
        if storage.uri not in self._keys:
            inputs = {name: stage.identity(storage) for name, stage in self.inputs.items()}
            known = {name: key for name, key in inputs.items() if key is not None}
            if len(known) < len(inputs):
                return None
            own = plugins.hashes(type(self))
            params = {**self.params, "kind": own} if own else self.params
            self._keys[storage.uri] = key_of(self.name, self.version, params, known)
        return self._keys[storage.uri]

    def identity(self, storage: Storage) -> str | None:
        """What the key of a later stage holds for this one: the content hash of a set of images, otherwise the key."""
        if not self.makes_set:
            return self.key(storage)
        manifest = self.manifest(storage)
        return manifest["content"] if manifest else None

    def artifact(self, storage: Storage) -> Artifact:
        """Where the output is stored. Inputs that are identified by their content must be made before."""
        key = self.key(storage)
        assert key is not None, f"{self.title} was asked for before its inputs were made"
        return Artifact(storage, self.name, key)

    def manifest(self, storage: Storage) -> dict[str, Any] | None:
        """The committed manifest, or None. It is read once and remembered: see :meth:`look_again`."""
        return self.artifact(storage).manifest() if self.key(storage) else None

    def look_again(self, storage: Storage) -> None:
        """Forget the remembered manifest, since another process may have written a new one."""
        if self.key(storage):
            self.artifact(storage).look_again()

    def missing(self, storage: Storage) -> list[str]:
        """Units that are not committed yet."""
        have = (self.manifest(storage) or {}).get("units", {})
        return [unit for unit in self.units if unit not in have]

    # Execution

    @abstractmethod
    def run(self, context: Context) -> None:
        """Make the missing units and commit them. The inputs are complete."""

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[Any]) -> None:
        """Make the missing units of all stages of a batch."""
        for stage in stages:
            stage.run(context)

    @classmethod
    def listen(cls, context: Context, waiting: Sequence[Any], running: Sequence[Stage]) -> dict[Stage, list[ShardReceiver]]:
        """Stage of ``running``, the stages that are about to run → receivers of its shards, for the ``waiting`` stages of this
        kind."""
        return {}

    def check(self, context: Context) -> None:
        """Called whenever the stage is complete. Raises :class:`UserError` if the output does not hold what the plan needs."""

    def results(self, storage: Storage) -> dict[str, Any]:
        """Further entries of ``results.json``, beside the stage's row under ``stages``."""
        return {}

    def curves(self, storage: Storage) -> dict[str, list[dict[str, float]]]:
        """Prefix of metric names in MLflow → rows of a training's steps; empty for a stage that trains nothing."""
        return {}


@dataclass
class Context:
    """The context in which every stage runs."""

    config: WorkConfig
    storage: Storage
    classes: ClassTable
    tracker: Untracked
    spent: dict[Stage, float] = field(default_factory=dict)
    """Stage → worker-seconds that it has taken."""
    listeners: dict[Stage, list[ShardReceiver]] = field(default_factory=dict)
    """Stage → receivers of the shard of each of its units, once it is made."""
    most_tasks: int | None = None
    """Maximum number of tasks of a stage at a time; None for as many as the cluster has room for."""
    course: Course = field(default_factory=lambda: Course({}))
    """How far the command is, by what its stages are expected to take."""

    def spend(self, stage: Stage, seconds: float, workers: float = 1) -> None:
        self.spent[stage] = self.spent.get(stage, 0.0) + seconds * workers
