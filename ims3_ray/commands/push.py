"""The command `ims3 push`: a distilled set, weights or adapters as a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ims3_ray.config import Section
from ims3_ray.errors import UserError
from ims3_ray.io.files import Place, local_copy
from ims3_ray.io.hub import Kind, check_repository, upload
from ims3_ray.models.autoencoder import KIND, OWN_AUTOENCODER
from ims3_ray.models.checkpoints import json_metadata, read_metadata
from ims3_ray.models.encoder import OWN_ENCODER
from ims3_ray.models.generators.dit import OWN_GENERATOR
from ims3_ray.provenance import version
from ims3_ray.report.card import CITATION

WEIGHTS, PARQUET = ".safetensors", ".parquet"
REPOSITORY = "REPOSITORY"
"""Stands in the text of a card for the name of the repository."""
ADAPTER = re.compile(r"adapter-\d+\.safetensors")


class Shared(NamedTuple):
    """How weights of a kind are shared."""

    file: str
    """Name of the file under which a repository of them can be named in a config."""
    key: str
    """The key that names them."""
    title: str
    tags: tuple[str, ...]


KINDS = {
    "dit": Shared(OWN_GENERATOR, "generator", "Generator: a class-conditional diffusion transformer", ("diffusion", "dit")),
    "encoder": Shared(OWN_ENCODER, "encoder", "Feature encoder φ", ("timm", "feature-extraction")),
    "autoencoder": Shared(OWN_AUTOENCODER, "autoencoder", "Autoencoder for generators of latents", ("diffusers", "vae")),
}


class PushConfig(Section):
    """What `ims3 push` uploads, and where."""

    source: str = ""
    """Folder of a distillation (its distilled set), of a distilled set, of a training by `ims3 pretrain` (its weights) or of
    a fine-tuning under `artifacts/` (its adapters), or a weights file."""
    to: str = ""
    """Repository, as in `user/name`. It is created if it does not exist."""
    license: str | None = None
    """The hub's identifier of the licence, as in `cc-by-4.0`. It has to suit that of the source images and of the weights."""
    title: str | None = None
    """Name that the hub shows for a set; by default the data and the number of images per class."""
    private: bool = False
    """Whether a repository that is created is private."""
    message: str = "Upload by ims3-ray"
    """Message of the commit."""


@dataclass(frozen=True)
class Upload:
    """What becomes a repository."""

    kind: Kind
    files: Mapping[str, Path]
    """Name in the repository → file."""
    card: Mapping[str, Any]
    """Metadata of the repository's README.md."""
    text: str
    """Text of README.md below the metadata."""
    replaces: str
    """Pattern of the files of an earlier upload, which are deleted unless this one has them."""

    @property
    def readme(self) -> str:
        return f"---\n{yaml.safe_dump(dict(self.card), sort_keys=False)}---\n\n{self.text.lstrip()}"


def push(config: PushConfig) -> None:
    """Upload in one commit, and print the address. Raises :class:`UserError` if there is nothing to upload, or if the hub does
    not take it."""
    found = upload_of(config)
    address = upload(
        config.to, found.kind, found.files, found.readme, found.replaces, private=config.private, message=config.message
    )
    print(f"{address}: {_described(found)}")
    if "license" not in found.card:
        print("note: the card names no licence; license=… sets it, as in license=cc-by-4.0")


def plan_push(config: PushConfig) -> Iterator[str]:
    """The repository with its files, and its card."""
    found = upload_of(config)
    sizes = [f"  {name}: {file.stat().st_size / 1e6:.1f} MB" for name, file in found.files.items()]
    yield "\n".join([f"{found.kind} repository '{config.to}', {_described(found)}:", *sizes, ""])
    yield found.readme


def _described(found: Upload) -> str:
    size = sum(file.stat().st_size for file in found.files.values())
    return f"{len(found.files)} file{'s' if len(found.files) > 1 else ''} of {size / 1e6:.1f} MB and a card"


def upload_of(config: PushConfig) -> Upload:
    """What the config's ``source`` becomes. Raises :class:`UserError` if it is none of the kinds that can be uploaded."""
    if not config.source or not config.to:
        raise UserError("give what to upload and the repository: ims3 push runs/demo user/name")
    check_repository(config.to)
    source = config.source.rstrip("/")
    place = Place.at(source)
    if not place.exists:
        raise UserError(f"'{source}' does not exist; give the folder of a run or a weights file")
    found = _weights([local_copy(source)], source) if place.is_file else _of_folder(source, place)
    more = {"license": config.license} if config.license else {}
    if config.title:
        if found.kind != "dataset":
            raise UserError("title is the name of a set; the hub shows weights by the name of their repository")
        more["pretty_name"] = config.title
    text = found.text.replace(REPOSITORY, config.to)
    return replace(found, card={**found.card, **more}, text=text)


def _of_folder(source: str, place: Place) -> Upload:
    for folder in (f"{source}/distilled", source):
        if Place.at(f"{folder}/README.md").is_file and Place.at(f"{folder}/data").is_folder:
            return _set(folder)
    trained = f"{source}/{place.name}{WEIGHTS}"
    if Place.at(trained).is_file:
        return _weights([local_copy(trained)], trained)
    for folder in (f"{source}/shards", source):
        if Place.at(folder).is_folder and (names := _adapters(folder)):
            return _weights([local_copy(f"{folder}/{name}") for name in names], folder)
    raise UserError(
        f"'{source}' holds no distilled set, no weights of ims3 pretrain and no adapters; give the folder of a finished run "
        "(with export set), or a file"
    )


def _set(folder: str) -> Upload:
    """The Parquet files of a distilled set with its card. The same images as PNG files are left out."""
    files = {f"data/{child.name}": child for child in Place.at(f"{folder}/data").children(PARQUET) if child.is_file}
    header, text = _card_of(folder)
    if not files or "data_files" not in str(header.get("configs")):
        raise UserError(f"'{folder}' is no distilled set of this project: it needs data/*.parquet and the card of the export")
    copied = {name: local_copy(f"{folder}/{name}") for name in sorted(files)}
    return Upload("dataset", copied, header, text, f"data/*{PARQUET}")


def _card_of(folder: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card, README.md. Raises :class:`UserError` for one that cannot be read."""
    try:
        parts = Place.at(f"{folder}/README.md").read().decode().split("---\n", 2)
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
        if isinstance(header, dict):
            return header, parts[-1]
    except (UnicodeDecodeError, yaml.YAMLError):
        pass
    raise UserError(f"the card '{folder}/README.md' cannot be read; export the set again")


def _adapters(folder: str) -> list[str]:
    """Names of the adapters of a fine-tuning. Raises :class:`UserError` for a fine-tuning that has not ended."""
    names = [child.name for child in Place.at(folder).children(WEIGHTS) if ADAPTER.fullmatch(child.name)]
    if names and folder.endswith("/shards") and not Place.at(f"{folder.removesuffix('/shards')}/manifest.json").is_file:
        raise UserError(f"the fine-tuning in '{folder}' has not ended; the command that began it continues it")
    return sorted(names)


def _weights(paths: list[Path], where: str) -> Upload:
    """Weights of this project, or adapters, with a card."""
    told = [read_metadata(path) if path.suffix == WEIGHTS else {} for path in paths]
    kind = told[0].get("kind", "")
    if "adapter" in told[0]:
        card = {"library_name": "ims3-ray", "tags": ["dataset-distillation", "diffusion", "adapter"]}
        text = _adapter_text(json_metadata(paths[0], "adapter"), paths[0].name)
        return Upload("model", {path.name: path for path in paths}, card, text, "adapter-*")
    if kind not in KINDS:
        raise UserError(
            f"'{where}' is none of this project's weights; convert a generator first (ims3 convert), or upload other files "
            "with huggingface_hub itself"
        )
    beside = Place.at(f"{where.removesuffix(WEIGHTS)}.md")
    text = beside.read().decode() if beside.is_file else _text(paths[0], kind)
    shared = KINDS[kind]
    card = {"library_name": "ims3-ray", "tags": ["dataset-distillation", *shared.tags]}
    more = " autoencoder=ITS-AUTOENCODER sampling.clip=false" if KIND in told[0] else ""
    text = f"{text.rstrip()}\n\n## Use\n\n    ims3 distill {shared.key}={REPOSITORY}{more}\n\n{CITATION}"
    return Upload("model", {shared.file: paths[0]}, card, text, shared.file)


def _text(weights: Path, kind: str) -> str:
    """The text of a card for weights that have none beside them."""
    shown = yaml.safe_dump(json_metadata(weights, "config"), sort_keys=False).strip()
    return f"# {weights.stem}\n\n{KINDS[kind].title}, written by ims3-ray {version()}.\n\n## Config\n\n```yaml\n{shown}\n```\n"


def _adapter_text(about: Mapping[str, Any], first: str) -> str:
    """The text of the card of adapters; ``first`` is the name of the first file."""
    settings = yaml.safe_dump(about["config"], sort_keys=False).strip()
    return (
        f"# Adapter for the generator {about['generator']}\n\nThe parameters that ims3-ray {version()} has fine-tuned; the "
        "generator is named by the start of the SHA-256 of its file, and other weights are refused. To merge them into it:\n\n"
        f"    ims3 convert generator=FILE adapter=hf://{REPOSITORY}/{first} out=generator.safetensors\n\n"
        f"## Fine-tuning\n\n```yaml\n{settings}\n```\n\n{CITATION}"
    )
