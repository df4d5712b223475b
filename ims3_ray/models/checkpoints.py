"""Weights files: safetensors with the shape of the model in the metadata, which is read without building the model first."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ims3_ray.errors import UserError
from ims3_ray.io.files import local_copy

EMBEDDED_PREFIX = "embedded:"


def weights_path(reference: str) -> Path:
    """The file that ``embedded:NAME`` or a path refers to. Raises :class:`UserError` if it does not exist."""
    if reference.startswith(EMBEDDED_PREFIX):
        name = reference.removeprefix(EMBEDDED_PREFIX)
        path = Path(str(resources.files("ims3_ray.models") / "embedded" / f"{name}.safetensors"))
    else:
        path = local_copy(reference)
    if not path.is_file():
        raise UserError(f"weights '{reference}' do not exist; give a weights file or embedded:NAME")
    return path


def pack(model: nn.Module, config: dict[str, Any], kind: str, dtype: torch.dtype | None = None, **extra: str) -> bytes:
    """The parameters and buffers of ``model`` as a safetensors file that also records the ``kind`` and the shape of the
    model."""
    state = {
        name: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    return save(state, metadata={"kind": kind, "config": json.dumps(config), **extra})


def read_metadata(path: Path, kind: str | None = None) -> dict[str, str]:
    """The metadata of a weights file, checked for the given kind (if any); ``metadata["config"]`` is JSON."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"weights '{path}' are not a readable safetensors file ({error}); fetch them again") from error
    if kind is None:
        return metadata
    if metadata.get("kind") != kind or "config" not in metadata:
        found = f"hold a '{metadata['kind']}'" if "kind" in metadata else "carry no model shape"
        raise UserError(f"weights '{path}' {found} where a '{kind}' is needed; see docs/weights.md")
    return metadata


def check_fit(build: Callable[[Any], nn.Module], config: Any, path: Path) -> None:
    """Raise :class:`UserError` naming the first tensor of ``path`` that does not fit ``build(config)``; reads no weights."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    compare_shapes(wanted, found, path)


def load_into(model: nn.Module, path: Path) -> None:
    """Copy the tensors of ``path`` into ``model``. Raises :class:`UserError` naming the first tensor that does not fit."""
    wanted = model.state_dict()
    state = load_file(path)
    compare_shapes({k: tuple(v.shape) for k, v in wanted.items()}, {k: tuple(v.shape) for k, v in state.items()}, path)
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in state.items()})


def compare_shapes(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise :class:`UserError` naming the first tensor that is missing, has another shape, or is not part of the model."""
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"weights '{path}' do not fit the model: '{name}' is missing")
        if found[name] != shape:
            raise UserError(f"weights '{path}' do not fit the model: '{name}' is {found[name]}, needed {shape}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise UserError(f"weights '{path}' do not fit the model: '{extra[0]}' is not part of it")
