"""Weights files: safetensors with the shape of the model in the metadata, which is read without building the model first."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ims3_ray.errors import Diverged, UserError, first_line, not_there
from ims3_ray.io.files import local_copy

EMBEDDED_PREFIX = "embedded:"
PICKLED = (".pt", ".pth", ".bin")
"""Endings of weights files in PyTorch's own format."""


def weights_path(reference: str) -> Path:
    """The file that ``embedded:NAME`` or a path refers to. Raises :class:`UserError` if it does not exist."""
    if reference.startswith(EMBEDDED_PREFIX):
        name = reference.removeprefix(EMBEDDED_PREFIX)
        folder = Path(str(resources.files("ims3_ray.models") / "embedded"))
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            shipped = sorted(file.stem for file in folder.glob("*.safetensors"))
            raise UserError(not_there("weights file of the package", name, shipped))
    else:
        path = local_copy(reference)
    if not path.is_file():
        raise UserError(
            f"weights '{reference}' do not exist; give a weights file or embedded:NAME, or make them with ims3 pretrain "
            "(docs/own-images.md)"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file beside weights. Raises :class:`UserError` if there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' must hold a JSON object; fetch it again")
    return found


def pack(model: nn.Module, config: dict[str, Any], kind: str, dtype: torch.dtype | None = None, **extra: str) -> bytes:
    """The parameters and buffers of ``model`` as a safetensors file that also records the ``kind`` and the shape of the
    model. Raises :class:`Diverged` naming the first tensor whose values, in this ``dtype``, are not all finite."""
    state = {
        name: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    if bad := first_not_finite(state):
        raise Diverged(f"the trained {kind} has values that are not finite ('{bad}'); lower the learning rate")
    return _in_order(save(state, metadata={"kind": kind, "config": json.dumps(config), **extra}))


def _in_order(file: bytes) -> bytes:
    """A safetensors file whose metadata are in alphabetical order, since the library writes them in any order: the same weights
    are then the same bytes."""
    length = int.from_bytes(file[:8], "little")
    header: dict[str, Any] = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a value which is not finite; None if all values are."""
    floating = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, tensor in floating if not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    # PyTorch does not look for infinities in numbers of 8 bits.
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def check_finite(path: Path) -> None:
    """Raises :class:`UserError` naming the first tensor of a weights file that holds a value which is not finite. A process
    reads a file again only if it has changed."""
    state = path.stat()
    if bad := _first_not_finite_in(path, state.st_size, state.st_mtime_ns):
        raise UserError(f"weights '{path}' hold values that are not finite ('{bad}'); fetch or train them again")


@lru_cache(64)
def _first_not_finite_in(path: Path, size: int, changed: int) -> str | None:
    if path.suffix in PICKLED:
        return first_not_finite(read_tensors(path))
    read_tensors(path, meta=True)  # an unreadable file is an error of one line
    with safe_open(path, framework="pt") as file:  # one tensor in memory at a time
        return next((name for name in file.keys() if first_not_finite({name: file.get_tensor(name)})), None)  # noqa: SIM118


def read_tensors(path: Path, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickled state dict; with ``meta`` their shapes alone."""
    if path.suffix in PICKLED:
        return _unpickled(path, meta)
    try:
        if not meta:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"weights '{path}' are not a readable safetensors file ({error}); fetch them again") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _unpickled(path: Path, meta: bool) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file, read with torch's restricted unpickler. It also accepts the settings
    (``argparse.Namespace``) that DiT's training script stores in the same file."""
    lazily = not meta and zipfile.is_zipfile(path)  # files from before PyTorch 1.6 cannot be memory-mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="meta" if meta else "cpu", weights_only=True, mmap=lazily)
    except pickle.UnpicklingError as error:
        reason = first_line(error)
        raise UserError(f"weights '{path}' hold more than tensors, and foreign objects are not unpickled ({reason})") from error
    except (RuntimeError, EOFError, ValueError, IndexError, OSError) as error:
        raise UserError(
            f"weights '{path}' are not a readable PyTorch file ({type(error).__name__}); fetch them again"
        ) from error
    for key in ("ema", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"weights '{path}' hold no state dict, neither plain nor under 'ema' or 'model'")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


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


def json_metadata(path: Path, entry: str, kind: str | None = None) -> dict[str, Any]:
    """The JSON object in an entry of the metadata of a weights file, checked for the given kind (if any); empty if the file has
    no such entry. Raises :class:`UserError` for an entry that is no JSON object."""
    text = read_metadata(path, kind).get(entry, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the entry '{entry}' in the metadata of '{path}' is not readable JSON; fetch the file again"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"the entry '{entry}' in the metadata of '{path}' must be a JSON object; fetch the file again")
    return found


def check_fit(build: Callable[[Any], nn.Module], config: Any, path: Path) -> None:
    """Raise :class:`UserError` naming the first tensor of ``path`` that does not fit ``build(config)``; reads no weights."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    compare_shapes(wanted, {name: tuple(tensor.shape) for name, tensor in read_tensors(path, meta=True).items()}, path)


def load_into(model: nn.Module, path: Path) -> None:
    """Copy the tensors of ``path`` into ``model``. Raises :class:`UserError` naming the first tensor that does not fit."""
    wanted = model.state_dict()
    state = read_tensors(path)
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
