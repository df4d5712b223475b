"""The command of `ims3 pretrain`: trains a generator, an encoder φ or an autoencoder, evaluates it, and writes a weights file
with its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml

from ims3_ray.cluster.capacity import wait_for_capacity
from ims3_ray.cluster.hardware import hardware
from ims3_ray.cluster.joining import connected, own_device, placed
from ims3_ray.config import PretrainConfig, canonical, reserved
from ims3_ray.data.contact_sheet import contact_sheet
from ims3_ray.engine.board import RESUMED
from ims3_ray.engine.folder import check_same, completed, stored_config
from ims3_ray.engine.inputs import Data
from ims3_ray.engine.lease import check_free, working_on
from ims3_ray.engine.tasks import awaited
from ims3_ray.errors import UserError
from ims3_ray.io.files import is_remote
from ims3_ray.io.storage import Storage
from ims3_ray.pretraining.base import Target
from ims3_ray.pretraining.quality import Quality, splits_of
from ims3_ray.pretraining.targets import TARGETS, target_of
from ims3_ray.progress import Progress
from ims3_ray.provenance import without_places
from ims3_ray.tracking import Tracker
from ims3_ray.training.finetuning import Row


def pretrain(config: PretrainConfig) -> Path:
    """Train ``config.target`` and write the weights and their card to ``{storage}/{name}/``. Returns the safetensors file.

    An interrupted training goes on from its last checkpoint, and a finished one writes the same bytes again. Raises
    :class:`UserError` for bad input and for a folder that holds another training.
    """
    target, fingerprints, place = open_pretraining(config)
    place.make_folder(config.name)
    check_free(place, config.name)
    with connected(config.cluster, needed(config)), working_on(place, config.name):
        described = check_pretraining(config, fingerprints, place)  # another process may have begun another one meanwhile
        place.write(f"{config.name}/config.yaml", yaml.safe_dump(described, sort_keys=False).encode())
        tracker = Tracker(config, place)
        try:
            path = _train_and_judge(target, place, tracker)
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        tracker.finish("FINISHED")
    return path


def needed(config: PretrainConfig) -> dict[str, float]:
    """The resources that a training takes at a time."""
    trainer = config.trainer
    return reserved(trainer.num_workers * trainer.cpus_per_worker, trainer.num_workers * trainer.gpus_per_worker)


def open_pretraining(config: PretrainConfig) -> tuple[Target, dict[str, str], Storage]:
    """What is trained, the hashes of all that it is trained with, and the storage. Raises :class:`UserError` for everything
    that would refuse the training, and writes nothing."""
    if is_remote(config.storage):
        raise UserError(f"storage '{config.storage}' is remote; weights are trained to a folder, so give storage=/a/folder")
    data = Data(config)
    target = target_of(config, data)
    fingerprints = {**data.fingerprints, **{name: weights.digest for name, weights in target.weights.items()}}
    place = Storage.at(str(Path(config.storage).expanduser().resolve()))
    check_pretraining(config, fingerprints, place)
    return target, fingerprints, place


def _train_and_judge(target: Target, place: Storage, tracker: Tracker) -> Path:
    """Train, write the weights, judge them, and write their card and a sheet of samples."""
    config = target.config
    folder, shown = Path(place.address(config.name)), Shown(config, place, tracker)
    outcome = _trained(target, shown)
    path = folder / f"{config.name}.safetensors"
    place.write(f"{config.name}/{path.name}", outcome["weights"])
    print(f"judge: {target.judging}", flush=True)
    cpus, gpus = min(config.quality.threads, config.trainer.cpus_per_worker), config.trainer.gpus_per_worker
    task = ray.remote(_judge).options(num_cpus=cpus, num_gpus=gpus, **placed(config.cluster, "finetune"))
    watch = wait_for_capacity(config.cluster, "finetune", "judge", [reserved(cpus, gpus)])
    quality: Quality
    (quality,) = awaited([task.remote(replace(target, config=_from_anywhere(config)), path)], "judge", watch)
    if quality.samples is not None:
        shown.samples(contact_sheet(quality.samples, 10))
    card = weights_card(target, outcome, path, quality)
    place.write(f"{config.name}/{config.name}.md", card.encode())
    tracker.metrics(quality.figures)
    tracker.file(f"{config.name}.md", card.encode())
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB after {outcome['seconds']:.0f} s")
    print("\n".join(quality.lines))
    if quality.broken:
        more = f" and {len(quality.broken) - 5} more" if len(quality.broken) > 5 else ""
        print(f"note: {len(quality.broken)} images cannot be decoded and were left out: {', '.join(quality.broken[:5])}{more}")
    return path


def _trained(target: Target, shown: Shown) -> dict[str, Any]:
    """Run the training on Ray Train while its progress is shown and its losses are logged; returns what rank 0 returns."""
    from ims3_ray.engine.train import watched_fit

    config, trainer = target.config, target.config.trainer
    workers = [trainer.worker_resources] * trainer.num_workers
    watch = wait_for_capacity(config.cluster, "finetune", config.name, workers, trainer.num_workers)
    loop, arguments = target.loop(_from_anywhere(config))
    folder = shown.place.address(config.name)
    total, unit = target.total
    with Progress(f"train the {config.target}", total, unit) as progress:
        outcome = watched_fit(loop, arguments, trainer, "train", folder, watch, partial(shown.tell, progress))
        progress.done = total
    return outcome


class Shown:
    """What a training tells: progress on the terminal, losses and samples in MLflow, and the last samples in the folder."""

    def __init__(self, config: PretrainConfig, place: Storage, tracker: Tracker) -> None:
        self.config, self.place, self.tracker = config, place, tracker

    def tell(self, progress: Progress, rows: list[Row], sheet: bytes | None) -> None:
        """Show new rows of losses, and a new sheet of samples if there is one."""
        if sheet is not None:
            self.samples(sheet)
        if not rows:
            return
        last = rows[-1]
        for row in rows:
            if row.pop(RESUMED, None):
                progress.line(f"the training goes on after {row['step']:.0f} steps")
        self.tracker.losses(rows)
        if "seconds" in last:
            done = last["seconds"] / 60 if progress.unit == "minutes" else last["step"]
            progress.at(min(done, progress.total), f"loss {last['loss']:.4f}, {last['images_per_s']:.0f} images/s")

    def samples(self, sheet: bytes) -> None:
        """Write a sheet of samples to the folder and to MLflow, in place of an earlier one."""
        self.place.write(f"{self.config.name}/{self.config.name}.png", sheet)
        self.tracker.file(f"{self.config.name}.png", sheet)


def _from_anywhere(config: PretrainConfig) -> PretrainConfig:
    """The config for other processes, whose working folders differ: local places of the data are absolute."""
    places = {key: getattr(config.data, key) for key in ("path", "test_path")}
    local = {key: str(Path(place).expanduser().resolve()) for key, place in places.items() if place and _is_local(place)}
    changed: dict[str, Any] = {"data": config.data.model_copy(update=local)}
    if config.autoencoder and _is_local(config.autoencoder):
        changed["autoencoder"] = str(Path(config.autoencoder).expanduser().resolve())
    return config.model_copy(update=changed)


def _is_local(place: str) -> bool:
    return "://" not in place and Path(place).expanduser().exists()


def _judge(target: Target, path: Path) -> Quality:
    splits = splits_of(target.config.data)
    device = own_device()
    return replace(target.judge(path, splits, device), broken=splits.broken, device=hardware(device)["device"])


FINGERPRINTS = "data_fingerprints"
"""Key of the stored config that holds the hashes of both splits and of the weights that the training uses."""


def check_pretraining(config: PretrainConfig, fingerprints: Mapping[str, str], storage: Storage) -> dict[str, Any]:
    """The config with the ``fingerprints`` of data and weights, as the run folder stores it. Raises :class:`UserError` if the
    folder holds a training with another config, other data or other weights. What only says where and how fast it trains may
    differ, and so may the number of steps or epochs."""
    name, mine = config.name, {**canonical(config), FINGERPRINTS: dict(fingerprints)}
    stored = stored_config(storage, name, "or choose another name, if the training in it is still wanted")
    if stored is not None:
        data = stored.pop(FINGERPRINTS, None)
        check_same(storage, name, *map(_what_matters, ({**completed(config, stored), FINGERPRINTS: data}, mine)))
    elif storage.is_folder(f"{name}/train"):
        raise UserError(
            f"run folder '{storage.address(name)}' holds a training whose config is not known (config.yaml is missing); choose "
            f"another name (name={name}-2) or delete the folder"
        )
    return mine


def _what_matters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the options that may change between two commands that continue the same training. Data and weights
    are compared by their fingerprints, so that they may move."""
    places = ("storage", "trainer", "cluster", "quality", "plugins", "tracking", "autoencoder")
    kept = {key: value for key, value in plain.items() if key not in places}
    left_out: dict[str, tuple[str, ...]] = {"data": ("path", "test_path", "unit_size")}
    left_out |= {each.section: (*each.lengths, "checkpoint_every") for each in TARGETS.values()}
    for section, details in left_out.items():
        kept[section] = {key: value for key, value in plain.get(section, {}).items() if key not in details}
    return kept


def weights_card(target: Target, outcome: dict[str, Any], path: Path, quality: Quality) -> str:
    """The Markdown card of the weights: data, steps, seconds, hardware, quality, and the config that reproduces them."""
    config, trainer = target.config, target.config.trainer
    each = f"{trainer.gpus_per_worker:g} GPU" if trainer.gpus_per_worker else f"{trainer.threads_per_worker} CPU threads"
    workers = f"{trainer.num_workers} worker(s), each with {each} ({quality.device})"
    recent = outcome["losses"][-250:]
    kept = {"name", "seed", "target", "data", target.section, "trainer", *target.weights}
    kept |= {"quality"} if quality.judged else set()
    plain = without_places({key: value for key, value in canonical(config).items() if key in kept})
    return "\n".join(
        [
            f"# {config.name}", "",
            f"The {config.target} trained by `ims3 pretrain` on the training split alone.", "",
            f"- data: {Path(config.data.path).name}, split {config.data.train_split}, {outcome['images']} images"
            + (f"; {len(quality.broken)} images of both splits cannot be decoded and were left out" if quality.broken else ""),
            *(f"- {name}: SHA-256 begins with {weights.digest}" for name, weights in target.weights.items()),
            f"- steps: {outcome['steps']} of {target.batch_size} images, mean loss at the end {sum(recent) / len(recent):.4f}",
            f"- seconds: {outcome['seconds']:.0f}", f"- hardware: {workers}",
            f"- file: {path.stat().st_size / 1e6:.1f} MB, safetensors, half precision", "",
            "## Quality", "", *(f"- {line}" for line in quality.lines), "",
            "The test split was used for these figures alone, after training.", "",
            "## Config", "", "```yaml", yaml.safe_dump(plain, sort_keys=False).strip(), "```", "",
        ]
    )  # fmt: skip
