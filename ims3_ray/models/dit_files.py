"""The files that DiT weights come in: this project's safetensors, the DiT release's ``.pt``, a diffusers pipeline.

No file is opened by unpickling arbitrary objects, and the shape of a model is known before its weights are read.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from ims3_ray.data.classes import composed, imagenet_wnids, repeated
from ims3_ray.errors import UserError
from ims3_ray.io.files import drafted
from ims3_ray.models.checkpoints import PICKLED, compare_shapes, pack, read_json, read_metadata, read_tensors
from ims3_ray.models.dit import PUBLISHED, DiT, DiTConfig

DIFFUSERS_CLASS = "DiTTransformer2DModel"
DIFFUSERS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True)
class DiTFile:
    """A weights file of a DiT whose shape is known; ``layout`` is ``ims3``, ``diffusers`` or ``release``."""

    path: Path
    layout: str
    config: DiTConfig
    classes: tuple[str, ...]
    """Class names by label; empty if the file does not name its classes. Classes of ImageNet-1K are named by their wnids."""

    @property
    def described_by(self) -> list[Path]:
        """The files beside the weights that say what they compute: those of a diffusers pipeline."""
        if self.layout != "diffusers":
            return []
        pipeline = self.path.parent.parent
        files = (
            self.path.with_name("config.json"), pipeline / "scheduler" / "scheduler_config.json", pipeline / "model_index.json"
        )  # fmt: skip
        return [file for file in files if file.is_file()]

    def state(self, meta: bool = False) -> dict[str, Tensor]:
        """The tensors under the names of the DiT release. With ``meta`` they are on the meta device and no weights are read.

        Raises :class:`UserError` naming the first tensor that does not fit the shape.
        """
        found = read_tensors(self.path, meta)
        state = _from_diffusers(found, self.config.depth) if self.layout == "diffusers" else found
        state = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
        with torch.device("meta"):
            wanted = DiT(self.config).state_dict()
        shapes = [{k: tuple(v.shape) for k, v in tensors.items()} for tensors in (wanted, state)]
        compare_shapes(shapes[0], shapes[1], self.path)
        return state


def open_dit(path: Path) -> DiTFile:
    """Detect the format of a weights file, and the shape of the model, from the content of the file.

    * safetensors whose metadata carry the shape (this project's);
    * a diffusers transformer: ``config.json`` beside it says so;
    * a state dict with the DiT release's names, plain or under ``ema`` or ``model`` (``ema`` is preferred), in a ``.pt``
      or a bare safetensors file: the shape is read off its tensors.

    Raises :class:`UserError` for anything else.
    """
    try:
        file = _open(path)
        return replace(file, classes=tuple(map(composed, file.classes)))
    except (ValueError, KeyError, TypeError) as error:  # a ValidationError is a ValueError
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"generator '{path}' has a description that cannot be used ({reason}); fetch or convert it again"
        ) from error


def _open(path: Path) -> DiTFile:
    beside = _json(path.with_name("config.json"))
    if _is_diffusers_dit(beside):
        config = _diffusers_config(beside)
        scheduler = _json(path.parent.with_name("scheduler") / "scheduler_config.json")
        if scheduler.get("prediction_type", "epsilon") == "v_prediction":
            config = config.model_copy(update={"prediction": "v"})
        table = read_tensors(path, meta=True).get(f"transformer_blocks.0.{TABLE[1]}")
        if table is not None and len(table) == config.num_classes:  # trained without label dropout
            config = config.model_copy(update={"null_row": False})
        named = _json(path.parent.with_name("model_index.json")).get("id2label") or {}
        return DiTFile(path, "diffusers", config, _foreign_classes(config, [named[key] for key in sorted(named, key=int)]))
    if path.suffix not in PICKLED:
        metadata = read_metadata(path)
        if "kind" in metadata:
            metadata = read_metadata(path, "dit")
            config = DiTConfig.model_validate(json.loads(metadata["config"]))
            return DiTFile(path, "ims3", config, tuple(filter(None, metadata.get("classes", "").split("\n"))))
    config = _release_config(path, {name: tuple(tensor.shape) for name, tensor in read_tensors(path, meta=True).items()})
    return DiTFile(path, "release", config, _foreign_classes(config, []))


def with_classes(file: DiTFile, classes: tuple[str, ...]) -> DiTFile:
    """``file`` with class names, one per label. They also say whether a table of labels without a description holds a row for
    no class. Raises :class:`UserError` for a name that stands twice, and for a number of names that does not fit the table."""
    config, classes = file.config, tuple(map(composed, classes))
    if file.layout == "release" and len(classes) == config.rows:
        config = config.model_copy(update={"num_classes": config.rows, "null_row": False})
    if (twice := repeated(classes)) is not None:
        raise UserError(f"two classes are called '{twice}' in the list of class names; give each a name of its own")
    if len(classes) != config.num_classes:
        rows = f"; its table of labels has {config.rows} rows, of which the last may be that for images without a class"
        table = rows if file.layout == "release" else ""
        raise UserError(f"{len(classes)} class names for a generator of {config.num_classes} classes{table}")
    return replace(file, config=config, classes=classes)


def find_diffusers(folder: Path) -> Path | None:
    """The transformer's weights in a diffusers pipeline folder (or in a ``transformer`` folder alone)."""
    for inner in (folder / "transformer", folder):
        if _is_diffusers_dit(_json(inner / "config.json")):
            for name in DIFFUSERS_NAMES:
                if (inner / name).is_file():
                    return inner / name
    return None


def write_dit(model: DiT, classes: tuple[str, ...], out: Path, **about: str) -> None:
    """Write ``model`` in the format that the name of ``out`` implies. ``out`` appears only when it is complete. ``about`` is
    added to the metadata of this project's format, the only one that has any.

    ``*.safetensors``: this project's format; ``*.pt``: a plain state dict of the DiT release; anything else: a folder with a
    diffusers transformer (``transformer/`` and ``model_index.json``; for a pipeline, the autoencoder and the scheduler must be
    added).
    """
    if model.config.prediction != "epsilon" and out.suffix != ".safetensors":
        raise UserError(f"a DiT that predicts v has no form in which '{out}' could say so; write a .safetensors file")
    with drafted(out) as draft:
        if out.suffix == ".safetensors":
            draft.write_bytes(pack(model, model.config.model_dump(), "dit", None, classes="\n".join(classes), **about))
        elif out.suffix in PICKLED:
            state = {**model.state_dict(), "pos_embed": model.get_buffer("pos_embed")}
            _check_release(model.config, {name: tuple(tensor.shape) for name, tensor in state.items()}, out)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            draft.write_bytes(buffer.getbuffer())
        else:
            (draft / "transformer").mkdir(parents=True)
            # Bytes, since the libraries report a full disk by errors of their own.
            tensors = save(_to_diffusers(model.state_dict(), model.config.depth))
            (draft / "transformer" / DIFFUSERS_NAMES[0]).write_bytes(tensors)
            (draft / "transformer" / "config.json").write_text(json.dumps(_diffusers_json(model.config), indent=2))
            index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", DIFFUSERS_CLASS]}
            labels = {str(label): name for label, name in enumerate(classes)}
            (draft / "model_index.json").write_text(json.dumps({**index, "id2label": labels}, indent=2))


def _check_release(config: DiTConfig, shapes: Mapping[str, tuple[int, ...]], out: Path) -> None:
    """Raises :class:`UserError` for a network of another shape than would be derived from its tensors."""
    try:
        found = _release_config(out, shapes)
    except UserError:
        found = None
    # A list of class names says later whether the last row of the table stands for no class.
    named = {"num_classes": config.num_classes, "null_row": config.null_row}
    if found is None or found.model_copy(update=named) != config:
        raise UserError(
            f"'{out}' could not say that this DiT of width {config.hidden_size} and depth {config.depth} has "
            f"{config.num_heads} heads, since a {out.suffix} file holds tensors alone; write a .safetensors file or a folder"
        )


def _is_diffusers_dit(config: Mapping[str, Any]) -> bool:
    """Whether the config is that of a diffusers DiT. The pipelines on the hub are older than diffusers' DiT class: they use the
    general transformer with adaLN-Zero."""
    older = config.get("_class_name") == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    return older or config.get("_class_name") == DIFFUSERS_CLASS


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _foreign_classes(config: DiTConfig, names: list[str]) -> tuple[str, ...]:
    """The class names of a generator from another project. With 1,000 classes it is assumed to be one of ImageNet-1K, whose
    labels follow the sorted wnids, unless it names other classes. (The pipelines on the hub name ImageNet's classes in
    English.)"""
    imagenet = not names or names[0] == imagenet_wnids()[0] or names[0].startswith("tench")
    return imagenet_wnids() if config.num_classes == 1000 and imagenet else tuple(names)


def _release_config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    """The shape of a DiT, derived from its tensors. They do not determine the number of heads, which is that of the published
    family, or else one per 64 channels; nor whether the last row of the table of labels stands for no class, which is assumed
    here and corrected by :func:`with_classes`."""
    if path.name.lower().startswith("sit-"):  # the tensors of SiT have the names and shapes of DiT's
        raise UserError(
            f"weights '{path}' are named like those of SiT, which predicts a velocity that is not DiT's and would "
            "give noise; use a DiT (docs/weights.md)"
        )
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        tokens = shapes["pos_embed"][1]
        outputs = shapes["final_layer.linear.weight"][0] // patch**2
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        classes = shapes["y_embedder.embedding_table.weight"][0] - 1
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"weights '{path}' are no DiT's: {error} is not among the tensors; see docs/weights.md") from error
    family = {(shape.depth, shape.hidden_size): shape.num_heads for shape in PUBLISHED.values()}
    heads = family.get((depth, width), width // 64)
    try:
        return DiTConfig(
            input_size=math.isqrt(tokens) * patch, in_channels=channels, patch_size=patch, hidden_size=width, depth=depth,
            num_heads=heads, num_classes=classes, learn_sigma=outputs == 2 * channels,
        )  # fmt: skip
    except (ValidationError, ZeroDivisionError) as error:
        raise UserError(
            f"weights '{path}' do not say how many heads a DiT of width {width} and depth {depth} has; "
            "convert them to safetensors with metadata, see docs/weights.md"
        ) from error


def _diffusers_config(plain: Mapping[str, Any]) -> DiTConfig:
    channels = plain["in_channels"]
    return DiTConfig(
        input_size=plain["sample_size"], in_channels=channels, patch_size=plain["patch_size"],
        hidden_size=plain["num_attention_heads"] * plain["attention_head_dim"], depth=plain["num_layers"],
        num_heads=plain["num_attention_heads"], num_classes=plain["num_embeds_ada_norm"],
        learn_sigma=(plain.get("out_channels") or channels) == 2 * channels,
    )  # fmt: skip


def _diffusers_json(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": DIFFUSERS_CLASS, "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads, "in_channels": config.in_channels,
        "out_channels": config.out_channels, "num_layers": config.depth, "sample_size": config.input_size,
        "patch_size": config.patch_size, "num_embeds_ada_norm": config.num_classes, "attention_bias": True,
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
    }  # fmt: skip


OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
"""Linear layers outside the blocks: DiT's name → diffusers' name."""
INSIDE = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
CONDITION = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
"""Layers of the time embedding: DiT's name → diffusers' name. Diffusers keeps a copy of the time and label embedding in every
block; DiT has one."""
TABLE = ("y_embedder.embedding_table.weight", "norm1.emb.class_embedder.embedding_table.weight")


def _from_diffusers(theirs: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Convert diffusers' names and separate q, k, v to those of DiT. Tensors that are missing stay missing; the check of shapes
    reports them."""
    pairs = {**OUTSIDE, **{ours: f"transformer_blocks.0.{name}" for ours, name in CONDITION.items()}}
    for i in range(depth):
        pairs |= {f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{name}" for ours, name in INSIDE.items()}
    state: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        state |= {f"{a}.{kind}": theirs[f"{b}.{kind}"] for a, b in pairs.items() if f"{b}.{kind}" in theirs}
        for i in range(depth):
            qkv = [theirs.get(f"transformer_blocks.{i}.attn1.to_{x}.{kind}") for x in "qkv"]
            if all(part is not None for part in qkv):
                state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([part for part in qkv if part is not None])
    if (table := theirs.get(f"transformer_blocks.0.{TABLE[1]}")) is not None:
        state[TABLE[0]] = table
    return state


def _to_diffusers(ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        state |= {f"{b}.{kind}": ours[f"{a}.{kind}"] for a, b in OUTSIDE.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}."
            state |= {f"{block}{b}.{kind}": ours[f"blocks.{i}.{a}.{kind}"] for a, b in INSIDE.items()}
            state |= {f"{block}{b}.{kind}": ours[f"{a}.{kind}"].clone() for a, b in CONDITION.items()}
            parts = ours[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            state |= {f"{block}attn1.to_{x}.{kind}": part.clone() for x, part in zip("qkv", parts, strict=True)}
    for i in range(depth):
        state[f"transformer_blocks.{i}.{TABLE[1]}"] = ours[TABLE[0]].clone()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
