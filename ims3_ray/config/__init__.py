"""The config of a job as a tree of typed sections. :mod:`ims3_ray.config.loading` builds it from YAML files and the command
line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ims3_ray.config.base import Section as Section
    from ims3_ray.config.base import canonical as canonical
    from ims3_ray.config.base import differing as differing
    from ims3_ray.config.base import merge as merge
    from ims3_ray.config.base import reserved as reserved
    from ims3_ray.config.candidates import PoolConfig as PoolConfig
    from ims3_ray.config.candidates import SamplingConfig as SamplingConfig
    from ims3_ray.config.candidates import SelectionConfig as SelectionConfig
    from ims3_ray.config.candidates import SynthesisConfig as SynthesisConfig
    from ims3_ray.config.evaluation import AugmentConfig as AugmentConfig
    from ims3_ray.config.evaluation import EncoderTraining as EncoderTraining
    from ims3_ray.config.evaluation import EvaluationConfig as EvaluationConfig
    from ims3_ray.config.evaluation import ProtocolConfig as ProtocolConfig
    from ims3_ray.config.evaluation import TeacherConfig as TeacherConfig
    from ims3_ray.config.finetune import AdoptConfig as AdoptConfig
    from ims3_ray.config.finetune import FinetuneConfig as FinetuneConfig
    from ims3_ray.config.finetune import ObjectivesConfig as ObjectivesConfig
    from ims3_ray.config.finetune import TrainerConfig as TrainerConfig
    from ims3_ray.config.pretrain import GeneratorTraining as GeneratorTraining
    from ims3_ray.config.pretrain import PretrainConfig as PretrainConfig
    from ims3_ray.config.pretrain import QualityConfig as QualityConfig
    from ims3_ray.config.run import ArmConfig as ArmConfig
    from ims3_ray.config.run import CompareConfig as CompareConfig
    from ims3_ray.config.run import InstabilityConfig as InstabilityConfig
    from ims3_ray.config.run import RecognitionConfig as RecognitionConfig
    from ims3_ray.config.run import RunConfig as RunConfig
    from ims3_ray.config.sweep import Range as Range
    from ims3_ray.config.sweep import SearchConfig as SearchConfig
    from ims3_ray.config.sweep import SweepConfig as SweepConfig
    from ims3_ray.config.work import ActorsConfig as ActorsConfig
    from ims3_ray.config.work import ClusterConfig as ClusterConfig
    from ims3_ray.config.work import DataConfig as DataConfig
    from ims3_ray.config.work import EvaluateConfig as EvaluateConfig
    from ims3_ray.config.work import Role as Role
    from ims3_ray.config.work import TrackingConfig as TrackingConfig
    from ims3_ray.config.work import WorkConfig as WorkConfig

_WHERE = {
    "ActorsConfig": "ims3_ray.config.work",
    "AdoptConfig": "ims3_ray.config.finetune",
    "ArmConfig": "ims3_ray.config.run",
    "AugmentConfig": "ims3_ray.config.evaluation",
    "ClusterConfig": "ims3_ray.config.work",
    "CompareConfig": "ims3_ray.config.run",
    "DataConfig": "ims3_ray.config.work",
    "EncoderTraining": "ims3_ray.config.evaluation",
    "EvaluateConfig": "ims3_ray.config.work",
    "EvaluationConfig": "ims3_ray.config.evaluation",
    "FinetuneConfig": "ims3_ray.config.finetune",
    "GeneratorTraining": "ims3_ray.config.pretrain",
    "InstabilityConfig": "ims3_ray.config.run",
    "ObjectivesConfig": "ims3_ray.config.finetune",
    "PoolConfig": "ims3_ray.config.candidates",
    "PretrainConfig": "ims3_ray.config.pretrain",
    "ProtocolConfig": "ims3_ray.config.evaluation",
    "QualityConfig": "ims3_ray.config.pretrain",
    "Range": "ims3_ray.config.sweep",
    "Role": "ims3_ray.config.work",
    "RecognitionConfig": "ims3_ray.config.run",
    "RunConfig": "ims3_ray.config.run",
    "SamplingConfig": "ims3_ray.config.candidates",
    "SearchConfig": "ims3_ray.config.sweep",
    "Section": "ims3_ray.config.base",
    "SelectionConfig": "ims3_ray.config.candidates",
    "SweepConfig": "ims3_ray.config.sweep",
    "SynthesisConfig": "ims3_ray.config.candidates",
    "TeacherConfig": "ims3_ray.config.evaluation",
    "TrackingConfig": "ims3_ray.config.work",
    "TrainerConfig": "ims3_ray.config.finetune",
    "WorkConfig": "ims3_ray.config.work",
    "canonical": "ims3_ray.config.base",
    "differing": "ims3_ray.config.base",
    "merge": "ims3_ray.config.base",
    "reserved": "ims3_ray.config.base",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that code that only reads config files does not load PyTorch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'ims3_ray.config' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)
