"""Weights that a pretraining will make: plans are made with files of the same shapes before these weights exist."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml

from ims3_ray.config import DataConfig, PretrainConfig, RunConfig, canonical
from ims3_ray.config.files import CONFIGS
from ims3_ray.config.loading import load_config
from ims3_ray.engine.inputs import Data
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import KIND, autoencoder_path
from ims3_ray.pretraining.targets import TARGETS

Run = TypeVar("Run", bound=RunConfig)
RECIPES = (Path("configs/pretrain"), CONFIGS / "pretrain")
"""Folders with configs of pretraining: one of the working folder, and what comes with the package."""
OF_DATA = ("path", "size", "channels")
"""Keys of `data` that are the same for the weights and for a run that uses them."""

NAMING: tuple[Literal["generator", "encoder", "autoencoder"], ...] = ("autoencoder", "generator", "encoder")
"""Keys of a run that name weights. A generator's shape is known when its autoencoder's is."""


@dataclass(frozen=True)
class Maker:
    """A pretraining, and the command that runs it."""

    config: PretrainConfig
    file: Path | None
    """The config that is given to `ims3 pretrain`; None for a training that has begun in the folder of the weights."""

    @classmethod
    def of(cls, reference: str) -> Maker | None:
        """The pretraining that writes the weights file ``reference``: one that has begun in the file's folder, or one of the
        configs in :data:`RECIPES`; None if there is none."""
        wanted = Path(reference).expanduser().resolve()
        begun = wanted.parent / "config.yaml"
        if begun.is_file() and (found := _stored(begun)) is not None and weights_file(found) == wanted:
            return cls(found, None)
        recipes = dict[Path, Path]()  # in a checkout both folders are the same
        for file in (file for folder in RECIPES for file in sorted(folder.glob("*.yaml"))):
            recipes.setdefault(file.resolve(), file)
        for file in recipes.values():
            with suppress(UserError):  # a config that cannot be read makes nothing
                found = load_config(PretrainConfig, file)
                if weights_file(found) == wanted:
                    return cls(found, file)
        return None

    def command(self, data: DataConfig) -> str:
        """What makes the weights for a run on ``data``."""
        if self.file is None:
            return "repeat the command that began its training"
        changed = {key: getattr(data, key) for key in OF_DATA if getattr(data, key) != getattr(self.config.data, key)}
        ours = self.file.is_relative_to(CONFIGS)
        name = str(self.file.relative_to(CONFIGS).with_suffix("") if ours else self.file)
        return shlex.join(["ims3", "pretrain", "--config", name, *(f"data.{k}={v}" for k, v in changed.items())])

    def write(self, data: DataConfig, names: tuple[str, ...], file: Path, files: Mapping[str, str]) -> None:
        """Write untrained weights of the shapes that the pretraining gives: one that has begun for its own data, another one
        for the ``data`` of the run, which have the classes ``names``. ``files`` are those in place of other weights that do
        not exist yet."""
        names = tuple(self.config.data.classes or names)
        config = self.config
        if self.file is not None:
            config = config.model_copy(update={"data": data})
        reference = config.autoencoder
        given = {} if reference is None else {KIND: Weights.of(autoencoder_path, files.get(reference, reference))}
        file.write_bytes(TARGETS[config.target](config, len(names), 0, given).untrained(names))


def weights_file(config: PretrainConfig) -> Path:
    """The file that a pretraining writes."""
    return Path(config.storage).expanduser().resolve() / config.name / f"{config.name}.safetensors"


def _stored(file: Path) -> PretrainConfig | None:
    """The config in a pretraining's folder; None for that of another job or another version, and for one that is damaged."""
    try:
        plain = yaml.safe_load(file.read_text("utf-8"))
        return PretrainConfig.model_validate({k: v for k, v in plain.items() if k in PretrainConfig.model_fields})
    except (AttributeError, ValueError, OSError, yaml.YAMLError):
        return None


@dataclass(frozen=True)
class Expected(Generic[Run]):
    """A config in which files of untrained weights stand for weights that do not exist yet."""

    config: Run
    makers: Mapping[str, Maker]
    """What the config named → the pretraining that makes it."""
    files: Mapping[str, str]
    """What the config named → the file in its place."""

    def told(self, plan: str) -> str:
        """The text of a ``plan`` made with :attr:`config`, with the names of the weights to be, and with a line about each."""
        for reference, file in self.files.items():
            plan = plan.replace(file, reference)
        notes = [
            f"note: '{reference}' does not exist yet, so this plan is made with untrained weights of its shapes; to make it: "
            f"{maker.command(self.config.data)}"
            for reference, maker in self.makers.items()
        ]
        return "\n".join([plan, *notes])


@contextmanager
def with_expected_weights(config: Run) -> Iterator[Expected[Run]]:
    """``config`` with untrained weights, which last as long as this context, in place of all that do not exist yet and that a
    known pretraining makes."""
    missing = {reference: maker for reference in _references(config) if (maker := _maker_of_missing(reference))}
    if not missing:
        yield Expected(config, {}, {})
        return
    names = Data(config).classes.names
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str] = {}
        for number, (reference, maker) in enumerate(missing.items()):
            file = Path(folder, str(number), Path(reference).name)
            file.parent.mkdir()
            maker.write(config.data, names, file, files)
            files[reference] = str(file)
        yield Expected(_replaced(config, files), missing, files)


def _maker_of_missing(reference: str) -> Maker | None:
    local = "://" not in reference and reference.endswith(".safetensors")
    return Maker.of(reference) if local and not Path(reference).expanduser().exists() else None


def _references(config: RunConfig) -> list[str]:
    """What names weights in a config, each once."""
    found = [*(getattr(config, key) for key in NAMING), config.evaluation.teacher.weights]
    found += [arm.overrides.get(key) for arm in config.arms.values() for key in NAMING]
    return list(dict.fromkeys(each for each in found if isinstance(each, str)))


def _replaced(config: Run, files: dict[str, str]) -> Run:
    """``config`` with other references to weights."""
    plain: dict[str, Any] = canonical(config)
    holders = [plain, *(arm["overrides"] for arm in plain["arms"].values())]
    for holder, key in [(holder, key) for holder in holders for key in NAMING]:
        if holder.get(key) in files:
            holder[key] = files[holder[key]]
    teacher = plain["evaluation"]["teacher"]
    teacher["weights"] = files.get(teacher["weights"], teacher["weights"])
    return type(config).model_validate(plain)
