"""What every job has in common: data, where results go, the cluster and what of it is used."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ims3_ray.config.base import Section, reserved
from ims3_ray.config.evaluation import EvaluationConfig


class DataConfig(Section):
    path: str = "embedded:fashion-mnist"
    """`embedded:NAME`, a folder (IDX files, Parquet, or a folder per class), a Parquet file or a hub id (`uoft-cs/cifar10`)."""
    train_split: str = "train"
    test_path: str | None = None
    """Where the test split lies if not under `path`."""
    test_split: str = "test"
    size: int = Field(default=28, gt=0)
    """Height and width to which images are scaled and cropped."""
    channels: Literal[1, 3] = 1
    classes: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Names of the classes to distil; all of them when unset."""
    unit_size: int = Field(default=500, ge=1)
    """Images per shard of the encoded data set."""


class ActorsConfig(Section):
    """The Ray Data actor pool that decodes, generates and embeds images."""

    count: int = Field(default=2, ge=1)
    cpus: float = Field(default=1, gt=0)
    """CPUs reserved for each actor."""
    gpus: float = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)
    """PyTorch threads of each actor."""
    encoders: int = Field(default=2, ge=1)
    """Threads of each actor that encode and write images while its device works on the next unit."""
    max_attempts: int = Field(default=3, ge=1)
    """Passes over units of work that failed before the stage gives up."""

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each actor."""
        return reserved(self.cpus, self.gpus)


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking URI; a sqlite file in the run folder when unset."""
    experiment: str = "ims3-ray"

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlsplit(uri).netloc:
            raise ValueError(
                "a URI with a user or password would be written into the run's files; give it by MLFLOW_TRACKING_URI, or give "
                "the password by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


Price = Annotated[float, Field(ge=0)]
Role = Literal["driver", "finetune", "pool", "evaluate"]
"""Work that may have nodes of its own: the job itself, trainings on Ray Train, all that looks at or makes images, students."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address; unset joins the cluster of `RAY_ADDRESS` or of the job, or starts Ray on this machine."""
    wait_s: float = Field(default=0, ge=0)
    """How long each stage waits for an autoscaling cluster to grow to what it needs; 0: the cluster is as it is."""
    place: dict[Role, dict[str, str]] = Field(default={})
    """Node labels that work of each kind asks for, e.g. `{pool: {ray.io/market-type: spot}}`; unset: any node."""
    driver_cpus: float = Field(default=1, gt=0)
    """CPUs of the task that the job runs in where it was submitted on a node without any (a head with `CPU: 0`)."""
    gpu_price: Price | dict[Role, Price] | None = None
    """What a GPU costs an hour, or one of each kind of work: the plan then says what it costs, progress what was spent and is
    to come. In any currency."""
    cpu_price: Price | dict[Role, Price] | None = None
    """What a CPU costs an hour, beside GPUs."""
    gpu_tflops: float = Field(default=60, gt=0)
    """What a GPU sustains, for estimates."""
    core_gflops: float = Field(default=20, gt=0)
    """What a CPU core sustains, for estimates where no GPU is asked for."""

    def hourly(self, role: Role, cpus: float, gpus: float) -> float:
        """What a worker of that kind costs an hour; 0 where no price is known."""
        prices = [price.get(role) if isinstance(price, dict) else price for price in (self.cpu_price, self.gpu_price)]
        return cpus * (prices[0] or 0.0) + gpus * (prices[1] or 0.0)


class WorkConfig(Section):
    """What is computed in stages and ends in a table of accuracies."""

    name: str = Field(default="demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`."""
    storage: str = "runs"
    """Folder or URI (`s3://…`, `gs://…`) that holds results and the artifacts shared by all runs."""
    data: DataConfig = DataConfig()
    actors: ActorsConfig = ActorsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name == "artifacts":
            raise ValueError("name 'artifacts' is taken by the shared artifacts; choose another")
        return name


class EvaluateConfig(WorkConfig):
    """Scores sets of images that lie somewhere (`jobs/evaluate.py`)."""

    name: str = Field(default="evaluate", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`."""
    sets: dict[str, str] = Field(default={})
    """Title → a folder of images per class, Parquet in the Hub's layout, or a hub id; classes are those of `data`, by name."""
