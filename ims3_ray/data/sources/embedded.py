"""Data sets that come with the package: ``embedded:NAME``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ims3_ray.data.sources.base import Source
from ims3_ray.data.sources.location import Location
from ims3_ray.data.sources.parquet import ParquetSource
from ims3_ray.errors import UserError
from ims3_ray.io.files import Place

PREFIX = "embedded:"


class EmbeddedSource(ParquetSource):
    """A Parquet file in the package's folder ``data/embedded/NAME``."""

    name, order, version = "embedded", 0, 1  # its images are the same in every version of the Parquet source

    @classmethod
    def find(cls, place: Location) -> Source | None:
        if not place.path.startswith(PREFIX):
            return None
        name = place.path.removeprefix(PREFIX)
        file = Path(str(resources.files("ims3_ray.data") / "embedded" / name / f"{place.split}.parquet"))
        if not file.is_file():
            there = ", ".join(embedded_names())
            raise UserError(f"no embedded data set '{name}' with split '{place.split}'; there is: {there}")
        return cls(place.path, [Place.at(str(file))])


def embedded_names() -> list[str]:
    """Names that may follow ``embedded:``."""
    folder = resources.files("ims3_ray.data") / "embedded"
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("_"))
