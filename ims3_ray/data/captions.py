"""Captions of real images, and the choice of one for each cluster of images (DDVLCP)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from ims3_ray.data.sources.base import Source
from ims3_ray.errors import UserError, first_line
from ims3_ray.io.files import local_copy

TOP_WORDS = 30
"""Number of a cluster's most frequent words that count."""


class Captions:
    """The captions of a data set: a file of JSON lines ``{"file_name": …, "text": …}`` or a Parquet file with these columns,
    or a column of the data set's own Parquet files."""

    def __init__(self, reference: str, source: Source) -> None:
        """Raises :class:`UserError` if ``reference`` is neither a readable file nor a column of ``source``."""
        self.reference, self.source = reference, source
        self._column = source.texts(reference)
        self._by_name = {} if self._column is not None else _read(local_copy(reference))

    def of(self, indices: Sequence[int]) -> list[str]:
        """The captions of the source's images at ``indices``, matched by the names of their files: the whole name below the
        folder of the split, or else its last part, if one caption and one image alone have it.

        Raises :class:`UserError` for an image without a caption, or with an empty one.
        """
        found: list[str] = []
        for index in indices:
            name = self.source.identify(index)
            if self._column is not None:
                text = self._column[index]
            else:
                text = self._by_name.get(name, self._by_last_part.get(last_part(name)))
            if text is None or not text.strip():
                raise UserError(
                    f"data.captions '{self.reference}' has no caption for the image '{name}'; add it, or do without captions "
                    "(words=class)"
                )
            found.append(text)
        return found

    @cached_property
    def _by_last_part(self) -> dict[str, str | None]:
        named = Counter(map(last_part, self._by_name))
        there = Counter(last_part(self.source.identify(index)) for index in range(len(self.source.labels)))
        parts = ((last_part(name), text) for name, text in self._by_name.items())
        return {part: text for part, text in parts if named[part] == there[part] == 1}


def last_part(name: str) -> str:
    """The name of a file without its folders."""
    return PurePosixPath(name).name


def caption_of_clusters(
    captions: Sequence[str], clusters: Sequence[int], k: int, class_words: str, common: float
) -> list[str]:  # fmt: skip
    """For each of ``k`` clusters of a class's images the caption of one of its images, which says most of what the cluster's
    captions say: the sum of the counts of those of the cluster's 30 most frequent words that occur in the caption.

    ``clusters`` holds the cluster of each image, −1 for none. Single letters, words of English that say nothing
    (scikit-learn's list), words that are part of ``class_words``, and words that the share ``common`` of all captions has do
    not count. The prompt of a cluster without words is empty.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    texts = [text.lower() for text in captions]
    words = [re.findall(r"[^\W\d_]{2,}", text) for text in texts]
    having = Counter(word for each in words for word in set(each))
    ignored = {word for word, count in having.items() if count >= common * len(texts) or word in class_words.lower()}
    ignored |= ENGLISH_STOP_WORDS
    chosen = []
    for cluster in range(k):
        mine = [position for position, each in enumerate(clusters) if each == cluster]
        counts = Counter(word for position in mine for word in words[position] if word not in ignored)
        top = counts.most_common(TOP_WORDS)
        scores = {position: sum(count for word, count in top if word in texts[position]) for position in mine}
        best = max(mine, key=lambda position: scores[position], default=None)
        chosen.append(captions[best] if best is not None and scores[best] > 0 else "")
    return chosen


def below_split(name: str) -> str:
    """The name of a file below the folder of the training split."""
    parts = [part for part in PurePosixPath(name).parts if part != "."]
    return "/".join(parts[1:] if parts[:1] == ["train"] and len(parts) > 2 else parts)


def _read(path: Path) -> Mapping[str, str | None]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path, columns=["file_name", "text"]).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        return {below_split(str(row["file_name"])): row["text"] and str(row["text"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.captions '{path}' is neither a column of the data's Parquet files nor JSON lines or Parquet with file_name "
            f"and text ({type(error).__name__}: {first_line(error)})"
        ) from error
