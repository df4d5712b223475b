"""The command `ims3 convert`: the weights of a generator in another file format, adapters merged."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from ims3_ray.config import Section
from ims3_ray.data.classes import composed
from ims3_ray.engine.weights import hash_of
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import file_hash
from ims3_ray.io.files import Place, new_file
from ims3_ray.models.autoencoder import KIND, trained_on
from ims3_ray.models.checkpoints import PICKLED, json_metadata, weights_path
from ims3_ray.models.dit_files import open_dit, with_classes, write_dit
from ims3_ray.models.generator import generator_files, generator_path
from ims3_ray.models.generators.dit import DiTGenerator


class ConvertConfig(Section):
    """What `ims3 convert` reads and writes."""

    generator: str = "embedded:fashion-mnist-dit"
    """The generator to convert: a file, a diffusers folder or a hub id."""
    adapter: str | tuple[str, ...] = ()
    """Adapter to merge into the weights: `adapter-0.safetensors` of a fine-tuning. Of several, each is merged over those before
    it; that of adopted classes comes first, and its classes become classes of the generator."""
    classes: str | None = None
    """Text file with one class name per line, in the order of the labels, for weights without class names."""
    out: str = "generator.safetensors"
    """Output: `*.safetensors`, `*.pt`, or a folder that is created in diffusers' layout."""


def _added_by(adapters: list[Path], generator: Path) -> tuple[str, ...]:
    """Names of the classes that the adapters add to the generator. Raises :class:`UserError` for adapters that were trained
    from another generator, or from other adopted classes than those of the adapter before them."""
    if not adapters:
        return ()
    whole = hash_of(generator_files(generator))
    added: tuple[str, ...] = ()
    before: list[str] = []
    for adapter, about in ((adapter, json_metadata(adapter, "adapter")) for adapter in adapters):
        if about.get("generator", whole) != whole:
            raise UserError(
                f"adapter '{adapter}' was trained from other weights than '{generator}'; give the generator of its run (a "
                "converted file has other bytes: merge first, then convert)"
            )
        if "adopted" in about and about["adopted"][:16] not in before:
            raise UserError(
                f"adapter '{adapter}' was trained after an adoption of classes; give the adapter of that adoption before it "
                "(adapter=[adopted.safetensors, fine-tuned.safetensors])"
            )
        mine = tuple(map(composed, about.get("added", ())))
        if added and mine and mine != added:
            raise UserError(f"adapter '{adapter}' adds other classes than the one before it; merge one of them alone")
        added, before = added or mine, [*before, file_hash(adapter)]
    return added


def convert(config: ConvertConfig) -> None:
    """Write the converted weights. Raises :class:`UserError` for weights or adapters that do not fit."""
    path, out = generator_path(config.generator), new_file(config.out)
    if out.suffix not in ("", ".safetensors", *PICKLED):
        raise UserError(f"out='{out}' has an unknown ending; end it in .safetensors or .pt, or give a folder without an ending")
    file = open_dit(path)
    if config.classes is not None:
        if not (listed := Path(config.classes)).is_file():
            raise UserError(f"classes='{listed}' does not exist")
        file = with_classes(file, tuple(Place.at(str(listed)).lines()))
    adapters = [weights_path(each) for each in ((config.adapter,) if isinstance(config.adapter, str) else config.adapter)]
    generator = DiTGenerator(file)
    if added := _added_by(adapters, path):
        generator = generator.adopting(added)
    network = generator.load()
    for adapter in adapters:
        try:
            generator.merge(network, load_file(adapter))
        except (RuntimeError, KeyError) as error:  # tensors that the network lacks, or of other shapes
            raise UserError(
                f"'{adapter}' is no adapter of '{path}'; give the adapter-0.safetensors of a fine-tuning"
            ) from error
    model, classes = generator.with_its_classes(network), (*file.classes, *added)
    trained = trained_on(path)
    write_dit(model, classes, out, **({} if trained is None else {KIND: trained}))
    named = "without class names, which such a file cannot hold" if out.suffix in PICKLED else f"{len(classes)} class names"
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {named}")
