"""The place of a data source: a path, a split, and what lies there."""

from __future__ import annotations

import itertools
import re
from functools import cached_property

from ims3_ray.errors import UserError
from ims3_ray.io.files import Place, check_bucket, concurrently
from ims3_ray.io.hub import fetch, is_hub_id

SPLIT_NAMES = ("train", "test", "val", "valid", "validation")
"""Names of folders that are splits if they hold folders, and classes if they hold images."""
SPLIT_LIKE = re.compile(
    r"(train|training|test|testing|val|valid|validation|eval|evaluation|dev)([-_ ]?(set|split|data|images))?", re.I
)
"""Names that people give to folders of splits. Those beside :data:`SPLIT_NAMES` are splits only if a config names them."""
PARQUET = ".parquet"


def parquet_files(folder: Place) -> list[Place]:
    """Folders and Parquet files in a folder."""
    return folder.children(PARQUET)


class Location:
    """A path, a split, and the files and folders at the path, which are looked up when they are first needed."""

    def __init__(self, path: str, split: str) -> None:
        self.path, self.split = path, split

    @cached_property
    def root(self) -> Place:
        """The file or folder, fetched if the path is a hub id. Raises :class:`UserError` if there is none."""
        check_bucket(self.path)
        root = Place.at(self.path)
        if not root.exists and is_hub_id(self.path):
            names = (f"{self.split}*.parquet", f"{self.split}/*.parquet")
            patterns = [pattern for name in names for pattern in (name, f"*/{name}")]
            root = Place.at(str(fetch(self.path, patterns, "data source", "dataset")))
        if not root.exists:
            raise UserError(
                f"data source '{self.path}' does not exist; give a folder, a Parquet file, embedded:NAME or a hub id"
            )
        return root

    @cached_property
    def children(self) -> list[Place]:
        """Files and folders directly in the folder; none for a file."""
        return [] if self.root.is_file else self.root.children()

    @cached_property
    def nearby(self) -> list[Place]:
        """Folders and Parquet files in the folder and one level below."""
        folders = [child for child in self.children if child.is_folder]
        files = [child for child in self.children if child.is_file and child.name.endswith(PARQUET)]
        return [*folders, *files, *itertools.chain(*concurrently(parquet_files, folders))]

    @property
    def split_folders(self) -> list[str]:
        """Names of the folders directly in the folder that are splits."""
        return [child.name for child in self.children if child.is_folder and child.name in SPLIT_NAMES]

    @property
    def splits(self) -> list[str]:
        """Names of the splits that are folders or Parquet files."""
        files = [re.split(r"\W", place.name)[0] for place in self.nearby if place.is_file]
        return [name for name in SPLIT_NAMES if name in (*self.split_folders, *files)]
