"""What all jobs have in common: the data, the place of the results, the cluster and the part of it that is used."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from ims3_ray.config.base import Section, Text, reserved
from ims3_ray.config.evaluation import EvaluationConfig
from ims3_ray.data.classes import composed

Split = Literal["train", "test"]


class DataConfig(Section):
    path: Text = "embedded:fashion-mnist"
    """The data set: `embedded:NAME`, a folder (IDX files, Parquet files, or `train/` and `test/` with one folder per class), a
    Parquet file or a hub id (`uoft-cs/cifar10`): docs/data.md."""
    train_split: str = "train"
    """Name of the split that is distilled."""
    test_path: Text | None = None
    """Path of the test split, in the same forms as `path`; `path` when unset."""
    test_split: str = "test"
    """Name of the split on which students are tested."""
    test_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of each class's images that is set apart for testing, where the data have no test split; hashes of their names
    choose. When unset, the test split is another one."""
    size: int = Field(default=28, gt=0)
    """Height and width to which images are scaled and cropped, in pixels."""
    channels: Literal[1, 3] = 1
    """Number of channels of the images: 1 for grey, 3 for RGB."""
    background: str = "white"
    """Colour on which transparent images are laid: a name (`white`, `black`, `lightgrey`) or `#rrggbb`."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Names of the classes to distil; all of them when unset."""
    limit: int | None = Field(default=None, ge=1)
    """Number of images per class that are used of each split, the first ones of the data source; all of them when unset. Fewer
    images make a quick try of all stages."""
    test_limit: int | None = Field(default=None, ge=1)
    """Number of images per class that are used of the test split; `limit` when unset."""
    prompts: Text | None = None
    """File with what a generator that is told words is told of each class, as YAML or JSON (`class: text`); when unset,
    ImageNet's words for a class that is named by its wnid, or the name of the class itself."""
    captions: Text | None = None
    """Captions of the training images, for `sampling.prototypes.words: captions`: a file of JSON lines
    (`{"file_name": …, "text": …}`), a Parquet file with these two columns, or the name of a column of the data's own Parquet
    files."""
    unit_size: int = Field(default=500, ge=1)
    """Number of images per shard of the encoded data set."""
    keep: bool | None = None
    """Whether the decoded images are stored, so that later stages read them. Otherwise each stage that needs them decodes the
    files again. When unset, those of a split that takes more than 50 GB are not stored."""

    @field_validator("background")
    @classmethod
    def _known_colour(cls, name: str) -> str:
        ImageColor.getrgb(name)
        return name

    @property
    def colour(self) -> tuple[int, int, int]:
        """The background as red, green and blue."""
        red, green, blue = ImageColor.getrgb(self.background)[:3]
        return red, green, blue

    @property
    def background_params(self) -> dict[str, Any]:
        """What the key of decoded images holds of the background: nothing if it is white."""
        return {} if self.colour == (255, 255, 255) else {"background": list(self.colour)}

    @field_validator("classes")
    @classmethod
    def _composed(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Names in the form in which data sources give them."""
        return names and tuple(map(composed, names))

    @model_validator(mode="after")
    def _one_test_split(self) -> DataConfig:
        if self.test_share is not None and self.test_path is not None:
            raise ValueError("test_share sets images of the training split apart, and test_path names others; leave one out")
        return self

    def place(self, split: Split) -> tuple[str, str, int | None, tuple[float, bool] | None]:
        """Path, name, limit and part of the training or the test split, as :func:`ims3_ray.data.sources.open_source` takes
        them."""
        train = split == "train"
        limit = self.limit if train else self.test_limit or self.limit
        if self.test_share is not None:
            return self.path, self.train_split, limit, (self.test_share, not train)
        path, name = (self.path, self.train_split) if train else (self.test_path or self.path, self.test_split)
        return path, name, limit, None


class ActorsConfig(Section):
    """The Ray Data actor pool that decodes, generates and embeds images."""

    count: int = Field(default=2, ge=1)
    """Number of actors."""
    cpus: float = Field(default=1, gt=0)
    """CPUs reserved for each actor."""
    gpus: float = Field(default=0, ge=0)
    """GPUs reserved for each actor; a fraction lets several share one."""
    threads: int = Field(default=1, ge=1)
    """Number of PyTorch threads of each actor."""
    encoders: int = Field(default=2, ge=1)
    """Number of threads of each actor that encode and write images while its device works on the next unit."""
    max_attempts: int = Field(default=3, ge=1)
    """Number of times that a unit of work is attempted before the stage reports it as failed."""

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each actor."""
        return reserved(self.cpus, self.gpus)


class TrackingConfig(Section):
    uri: str | None = None
    """Tracking URI of MLflow. When unset, that of `MLFLOW_TRACKING_URI`, or else a SQLite file in the run folder."""
    experiment: str = "ims3-ray"
    """Name of the MLflow experiment."""

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
"""The kinds of work that can have nodes of their own: the job itself (``driver``), training with Ray Train (``finetune``),
making and processing images (``pool``), and training students (``evaluate``)."""


class ClusterConfig(Section):
    address: str | None = None
    """Address of the Ray cluster. When unset, the job joins the cluster of `RAY_ADDRESS` or the one to which it was submitted,
    or else starts Ray on this machine."""
    wait_s: float = Field(default=0, ge=0)
    """Seconds that each stage waits for an autoscaling cluster to grow to what it needs; 0 means that the cluster does not
    grow."""
    place: dict[Role, dict[str, str]] = Field(default={})
    """Labels of the nodes on which each kind of work runs, e.g. `{pool: {ray.io/market-type: spot}}`. The kinds are driver,
    finetune, pool and evaluate; a kind without labels runs on any node."""
    driver_cpus: float = Field(default=1, gt=0)
    """CPUs reserved for the task that runs the job, if it was submitted on a node without CPUs (such as a head with
    `CPU: 0`)."""
    gpu_price: Price | dict[Role, Price] | None = None
    """Price of a GPU per hour, in any currency: one number, or one for each kind of work. With it the plan shows the expected
    cost, and the progress shows the cost so far and the cost to come."""
    cpu_price: Price | dict[Role, Price] | None = None
    """Price of a CPU per hour, in the same forms; it is added to the price of the GPUs."""
    gpu_tflops: float = Field(default=60, gt=0)
    """Speed that a GPU sustains, in TFLOP/s; estimates use it."""
    core_gflops: float = Field(default=20, gt=0)
    """Speed that a CPU core sustains, in GFLOP/s; estimates use it for work that reserves no GPU."""

    def hourly(self, role: Role, cpus: float, gpus: float) -> float:
        """The price per hour of a worker with these CPUs and GPUs, for this kind of work; 0 if no price is known."""
        prices = [price.get(role) if isinstance(price, dict) else price for price in (self.cpu_price, self.gpu_price)]
        return cpus * (prices[0] or 0.0) + gpus * (prices[1] or 0.0)


class WorkConfig(Section):
    """The common config of jobs that run in stages and produce a table of accuracies."""

    name: str = Field(default="distill", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`."""
    plugins: tuple[str, ...] = ()
    """Files or modules that add components from outside the package: see docs/extending.md."""
    storage: Text = "runs"
    """Folder or URI (`s3://…`, `gs://…`) that holds results and the artifacts shared by all runs."""
    data: DataConfig = DataConfig()
    actors: ActorsConfig = ActorsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    job: ClassVar[str] = ""
    """Word that the folder's name has, so that another kind of job with the same config has a folder of its own."""
    size_key: ClassVar[str] = "selection.images_per_class"
    """The option that holds the numbers of images per class."""

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name == "artifacts":
            raise ValueError("name 'artifacts' is taken by the shared artifacts; choose another")
        return name if cls.job in name else f"{name}-{cls.job}"


class EvaluateConfig(WorkConfig):
    """Scoring of existing sets of images (`ims3 evaluate`)."""

    job: ClassVar[str] = "evaluate"
    name: str = Field(default="evaluate", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`; `-evaluate` is added to a name without this word."""
    sets: dict[Text, Text] = Field(default={})
    """Sets to score, by title: a folder with one folder of images per class, Parquet files in the Hub's layout, or a hub id.
    Their classes are matched by name with those of `data`."""
