"""Folders of images, one per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ims3_ray.data.decoding import decode
from ims3_ray.data.sources.base import Location, Source, check_names, each
from ims3_ray.io.files import Place

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLIT_NAMES = {"train", "test", "val", "valid", "validation"}


class FolderSource(Source):
    """One folder per class, named after the class, with images at any depth below it."""

    name, order = "folder", 30

    @classmethod
    def find(cls, place: Location) -> Source | None:
        folders = {child.name: child for child in place.children if child.is_folder}
        if place.split in folders:
            return cls(place.path, folders[place.split])
        if folders and not set(folders) & SPLIT_NAMES:  # without folders per split, the whole folder is one split
            return cls(place.path, place.root)
        return None

    def __init__(self, location: str, folder: Place) -> None:
        self.location, self._folder = location, folder
        classes = sorted((child for child in folder.children() if child.is_folder), key=lambda child: child.name)
        self.class_names = tuple(child.name for child in classes)
        found = each(_images_below, classes)
        self.files = [file for files in found for file in files]
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files in found]).astype(np.int64)
        check_names(location, self.class_names)

    def image(self, index: int) -> Image.Image:
        return decode(self.files[index].read())

    def identify(self, index: int) -> str:
        return self.files[index].path[len(self._folder.path) + 1 :]


def _images_below(folder: Place) -> list[Place]:
    found = folder.children(recursive=True)
    return [file for file in found if file.is_file and Path(file.name).suffix.lower() in IMAGE_SUFFIXES]
