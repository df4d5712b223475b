"""DiT as a generator: its condition is the label of a class, and DiffFit can fine-tune it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.errors import UserError
from ims3_ray.models.difffit import add_difffit, merge_adapter
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.dit_files import DiTFile, find_diffusers, open_dit
from ims3_ray.models.generators.base import Generator, labels_as_conditions

OWN_GENERATOR = "generator.safetensors"
"""Name of the file of this project in a folder or on the hub."""


class DiTGenerator(Generator):
    """A class-conditional DiT in one of the layouts of :mod:`ims3_ray.models.dit_files`."""

    name = "dit"
    hub_files = ("model_index.json", "transformer/*", "scheduler/scheduler_config.json", OWN_GENERATOR)

    def __init__(self, file: DiTFile, added: Mapping[str, int] | None = None) -> None:
        """``added`` are classes beside those of the file, each with the label whose row of the table it starts from."""
        c = file.config
        self.added, self.names = dict(added or {}), file.classes
        self.file, self.path, self.config = file, file.path, c
        self.schedule, self.parametrisation = NoiseSchedule(), c.prediction
        self.latent, self.learns_variance = (c.in_channels, c.input_size, c.input_size), c.learn_sigma
        self.null, self.knows_null = labels_as_conditions(c.null_label), c.null_row

    @classmethod
    def of_shape(cls, config: DiTConfig) -> DiTGenerator:
        """The description of a DiT that has no file yet."""
        return cls(DiTFile(Path("no file"), "ims3", config, ()))

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        own = folder / OWN_GENERATOR
        return own if own.is_file() else find_diffusers(folder)

    @classmethod
    def open(cls, path: Path) -> DiTGenerator:
        return cls(open_dit(path))

    def check(self) -> None:
        self.file.state(meta=True)

    def load(self) -> DiT:
        network = DiT(self.config)
        network.load_state_dict({name: tensor.float() for name, tensor in self.file.state().items()})
        if self.added:
            table = network.y_embedder.embedding_table
            rows = torch.cat([table.weight.data, table.weight.data[list(self.added.values())]])
            network.y_embedder.embedding_table = nn.Embedding.from_pretrained(rows, freeze=False)
        return network.eval()

    def with_its_classes(self, network: nn.Module) -> DiT:
        """A DiT that computes the same as ``network`` and whose own classes are :attr:`names` followed by the added ones: rows
        for no class stay at the end of its table."""
        dit, known, rows = cast(DiT, network), self.config.num_classes, self.config.rows
        own = DiT(self.config.model_copy(update={"num_classes": known + len(self.added)}))
        table = dit.y_embedder.embedding_table.weight.data
        ordered = torch.cat([table[:known], table[rows:], table[known:rows]])
        own.load_state_dict({**dit.state_dict(), self.table: ordered})
        return own.eval()

    def adopting(self, class_names: Sequence[str], like: Mapping[str, str] | None = None) -> DiTGenerator:
        last = self.config.rows - 1  # the row for no class, if the table has one
        starts = {new: self.labels([known])[0] for new, known in (like or {}).items()}
        return DiTGenerator(self.file, {name: starts.get(name, last) for name in class_names})

    def labels(self, class_names: Sequence[str]) -> list[int]:
        """Classes are matched by name, never by position. The error names the most similar known classes. The labels of added
        classes follow those of the table."""
        known = dict(zip(self.names, range(len(self.names)), strict=True))
        known |= {name: self.config.rows + number for number, name in enumerate(self.added)}
        if not known:
            raise UserError(f"generator '{self.title}' does not name its classes; convert it with ims3 convert classes=FILE")
        indices = []
        for name in class_names:
            if self.names.count(name) > 1:
                raise UserError(
                    f"the generator '{self.title}' has two classes called '{name}'; ims3 convert classes=FILE renames them"
                )
            if name not in known:
                near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)
                raise UserError(
                    f"the generator '{self.title}' knows no class '{name}'; nearest: {', '.join(near)}; to teach it the "
                    "classes of the data, set adopt={}"
                )
            indices.append(known[name])
        return indices

    def condition(self, label: int, words: str | None = None) -> Tensor:
        return labels_as_conditions(label)

    @property
    def parts(self) -> Sequence[Path]:
        return (self.path, *self.file.described_by)

    def forward_flops(self) -> float:
        return float(self.config.forward_flops())

    def choose_trained(self, network: nn.Module, parameters: str, scaled_blocks: int, rank: int) -> list[str]:
        if parameters == "difffit":
            return add_difffit(cast(DiT, network), scaled_blocks)
        return [name for name, _ in network.requires_grad_().named_parameters()]

    @property
    def table(self) -> str:
        return "y_embedder.embedding_table.weight"

    def merge(self, network: nn.Module, adapter: Mapping[str, Tensor]) -> None:
        merge_adapter(cast(DiT, network), dict(adapter))

    def repeated(self, network: nn.Module) -> Iterable[nn.Module]:
        return cast(DiT, network).blocks
