"""The whole run as one typed tree. Read from YAML and the command line by :mod:`ims3_ray.loading`."""

from ims3_ray.config.base import Section, canonical, differing, merge, reserved
from ims3_ray.config.candidates import PoolConfig, RefineConfig, SamplingConfig, SelectionConfig
from ims3_ray.config.evaluation import AugmentConfig, EncoderTraining, EvaluationConfig, ProtocolConfig, TeacherConfig
from ims3_ray.config.finetune import (
    DiffusionObjective,
    FinetuneConfig,
    InversionMatchingObjective,
    MinimaxObjective,
    ObjectivesConfig,
    ReleasedObjective,
    TrainerConfig,
)
from ims3_ray.config.pretrain import GeneratorTraining, PretrainConfig, QualityConfig
from ims3_ray.config.run import ArmConfig, CompareConfig, InstabilityConfig, RunConfig
from ims3_ray.config.sweep import Range, SearchConfig, SweepConfig
from ims3_ray.config.work import ActorsConfig, ClusterConfig, DataConfig, EvaluateConfig, Role, TrackingConfig, WorkConfig

__all__ = [
    "ActorsConfig",
    "ArmConfig",
    "AugmentConfig",
    "ClusterConfig",
    "CompareConfig",
    "DataConfig",
    "DiffusionObjective",
    "EncoderTraining",
    "EvaluateConfig",
    "EvaluationConfig",
    "FinetuneConfig",
    "GeneratorTraining",
    "InstabilityConfig",
    "InversionMatchingObjective",
    "MinimaxObjective",
    "ObjectivesConfig",
    "PoolConfig",
    "PretrainConfig",
    "ProtocolConfig",
    "QualityConfig",
    "Range",
    "RefineConfig",
    "ReleasedObjective",
    "Role",
    "RunConfig",
    "SamplingConfig",
    "SearchConfig",
    "Section",
    "SelectionConfig",
    "SweepConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainerConfig",
    "WorkConfig",
    "canonical",
    "differing",
    "merge",
    "reserved",
]
