"""CLIP's text encoder with its tokenizer, which tells Stable Diffusion what a prompt says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ims3_ray.errors import UserError, first_line


class TextEncoder:
    """Turns prompts into what the cross-attention of a network reads."""

    def __init__(self, folder: Path) -> None:
        """``folder`` holds ``tokenizer/`` and ``text_encoder/``, as a diffusers pipeline does.

        Raises :class:`UserError` for files that do not load, and where transformers is not installed.
        """
        transformers = needs_transformers(folder)
        for part in ("tokenizer", "text_encoder"):
            if not (folder / part).is_dir():
                raise UserError(f"'{folder}' has no folder {part}, which a generator that is told words needs; fetch it again")
        try:
            self.tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            self.model, found = transformers.CLIPTextModel.from_pretrained(
                folder / "text_encoder", local_files_only=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"the text encoder in '{folder}' does not load ({first_line(error)}); fetch it again") from error
        if wrong := sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]):
            raise UserError(f"the text encoder in '{folder}' has no fitting tensor '{wrong[0]}'; fetch it again")
        self.model = self.model.float().eval().requires_grad_(False)
        self.length = int(self.model.config.max_position_embeddings)
        """Number of tokens that the encoder reads at once: 77 for CLIP."""

    def tokens(self, prompt: str, pieces: int = 1, *, cut: bool = False) -> Tensor:
        """Token ids [P, length] of a prompt that is cut into as many pieces as it needs, at least ``pieces``. The last one is
        padded; only the first begins with the token that begins a text. With ``cut`` a long prompt ends where the first piece
        does."""
        settings = {"truncation": cut, **({"max_length": self.length} if cut else {})}
        ids = self.tokenizer(prompt, verbose=False, **settings).input_ids
        count = max(pieces, -(-len(ids) // self.length))
        ids = ids + [self.tokenizer.pad_token_id] * (count * self.length - len(ids))
        return torch.tensor(ids).reshape(count, self.length)

    def pieces(self, prompt: str) -> int:
        """Number of pieces that a prompt is cut into."""
        return len(self.tokens(prompt))

    @torch.no_grad()
    def __call__(self, prompt: str, pieces: int = 1, *, cut: bool = False) -> Tensor:
        """The prompt's embeddings, float32 [1, P · length, D]; the pieces of a long one are encoded apart and joined, or with
        ``cut`` only the first is."""
        encoded: Tensor = self.model(self.tokens(prompt, pieces, cut=cut))[0]
        return encoded.reshape(1, -1, encoded.shape[-1])


def needs_transformers(folder: Path) -> ModuleType:
    """The package transformers. Raises :class:`UserError` if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"generator '{folder.name}' is told words, which takes the package transformers: pip install 'ims3-ray[text]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # one for each file of a few tensors
    return transformers
