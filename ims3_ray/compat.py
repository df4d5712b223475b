"""Corrections that third-party packages need to work on a machine without CUDA.

PyPI's torchvision is built against CUDA. With a CPU build of PyTorch its operator library does not load, and
``import torchvision`` (hence timm) fails at the missing operator ``torchvision::nms``. Declaring the schemas of the two
operators that torchvision touches while it is imported is enough: nothing in this project calls them. The hook runs
in every process that imports ``ims3_ray`` (Ray workers included), costs nothing until torchvision is imported, and does
nothing where torchvision's own library loads.
"""

from __future__ import annotations

import importlib.machinery
import pickle
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_keep_alive: list[Any] = []  # a torch.library.Library removes its operators when it is garbage-collected


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_torchvision_operators()
        return None


def install() -> None:
    """Arrange for :func:`declare_torchvision_operators` to run just before torchvision is first imported."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def declare_torchvision_operators() -> None:
    """Declare torchvision's import-time operators if (and only if) its compiled library cannot be loaded."""
    import torch

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    for name in ("_C_stable", "_C"):  # torchvision 0.29, and before
        library = importlib.machinery.PathFinder.find_spec(name, list(spec.submodule_search_locations))
        if library is not None and library.origin:
            try:
                torch.ops.load_library(library.origin)
                return
            except OSError:
                break  # a CUDA build beside a CPU PyTorch: declare the schemas instead
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(operators)


def prepare_deepspeed() -> None:
    """Import DeepSpeed without MLflow, and keep it from compiling its shared-memory collective on CPUs (80 s, needs ninja and
    a C++ compiler).

    DeepSpeed imports MLflow where it is installed, which takes every worker a second of a core, and uses it in its autotuner
    alone. gloo stands in for the collective. Call before ``deepspeed.initialize``; on GPUs the op does not exist.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails, as if it were not installed
    try:
        import deepspeed.ops
    finally:
        if hidden:
            del sys.modules["mlflow"]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_deepspeed_file(path: str, map_location: Any = None) -> Any:
    """Load a file of a DeepSpeed checkpoint from a place where others may write. DeepSpeed itself would run code from a forged
    file; this function accepts only tensors, plain values and the three classes that occur in ZeRO's state.

    Python up to 3.11.3 writes a member of an enumeration as a call of ``getattr``, for which a function stands in that knows
    ZeRO's stages alone.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> Any:
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"a checkpoint asks for '{name}' of {kind}, which no checkpoint of DeepSpeed does")
        return ZeroStageEnum[name]

    named = [(member, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address, *named]):
        return torch.load(path, map_location=map_location, weights_only=True)
