"""Dataset distillation with IMS3 (inversion matching, selective subgroup sampling) on Ray.

from ims3_ray import RunConfig, distill
result = distill(RunConfig())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ims3_ray import compat

if TYPE_CHECKING:
    from ims3_ray.commands.distill import compare as compare
    from ims3_ray.commands.distill import distill as distill
    from ims3_ray.commands.distill import evaluate as evaluate
    from ims3_ray.config import CompareConfig as CompareConfig
    from ims3_ray.config import EvaluateConfig as EvaluateConfig
    from ims3_ray.config import RunConfig as RunConfig
    from ims3_ray.config import SweepConfig as SweepConfig
    from ims3_ray.errors import UserError as UserError
    from ims3_ray.report.results import RunResult as RunResult
    from ims3_ray.search.tune import sweep as sweep

compat.install()

_WHERE = {
    "CompareConfig": "ims3_ray.config",
    "EvaluateConfig": "ims3_ray.config",
    "RunConfig": "ims3_ray.config",
    "SweepConfig": "ims3_ray.config",
    "UserError": "ims3_ray.errors",
    "RunResult": "ims3_ray.report.results",
    "compare": "ims3_ray.commands.distill",
    "distill": "ims3_ray.commands.distill",
    "evaluate": "ims3_ray.commands.distill",
    "sweep": "ims3_ray.search.tune",
}
__all__ = [
    "CompareConfig",
    "EvaluateConfig",
    "RunConfig",
    "RunResult",
    "SweepConfig",
    "UserError",
    "compare",
    "distill",
    "evaluate",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that modules that do not need Ray load without it."""
    if name not in _WHERE:
        raise AttributeError(f"module 'ims3_ray' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
