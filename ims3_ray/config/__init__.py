"""The whole run as one typed tree. Read from YAML and the command line by :mod:`ims3_ray.loading`."""

from ims3_ray.config.base import Section, canonical
from ims3_ray.config.finetune import (
    DiffusionObjective,
    FinetuneConfig,
    InversionMatchingObjective,
    MinimaxObjective,
    ObjectivesConfig,
    ReleasedObjective,
    TrainerConfig,
)
from ims3_ray.config.pretrain import EncoderTraining, GeneratorTraining, PretrainConfig, QualityConfig
from ims3_ray.config.run import (
    ActorsConfig,
    ArmConfig,
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    InstabilityConfig,
    PoolConfig,
    RunConfig,
    SamplingConfig,
    SelectionConfig,
    TrackingConfig,
)

__all__ = [
    "ActorsConfig",
    "ArmConfig",
    "ClusterConfig",
    "DataConfig",
    "DiffusionObjective",
    "EncoderTraining",
    "EvaluationConfig",
    "FinetuneConfig",
    "GeneratorTraining",
    "InstabilityConfig",
    "InversionMatchingObjective",
    "MinimaxObjective",
    "ObjectivesConfig",
    "PoolConfig",
    "PretrainConfig",
    "QualityConfig",
    "ReleasedObjective",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "SelectionConfig",
    "TrackingConfig",
    "TrainerConfig",
    "canonical",
]
