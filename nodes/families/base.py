"""What the seams need to know of a model family."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...vsf_core import TokenLayout


@dataclass(frozen=True)
class Released:
    """How the authors' released pipeline differs from the paper's layout."""

    copy: bool
    """A plain copy of N stays in the text stream, as ordinary text: [P, N, N0]."""
    kinds: frozenset[str]
    """Types of the blocks that run VSF; in others N0 is an ordinary text token."""
    pooled: float | None = None
    """Weight w of the pooled embedding's mix: neg + w (pos - neg); None where it stays the positive's."""


class Family(ABC):
    """Where a family's text sits, and which of its attention calls are joint."""

    title: str
    """For people: what to load."""
    model_classes: frozenset[str]
    """Exact classes of ``comfy.model_base``."""
    encoders: frozenset[str]
    """Names of the text encoders whose negatives fit (``encode.ENCODERS``)."""
    patch_size: int = 2
    """Latent pixels per image token, along each side."""
    released: Released | None = None
    """None where the authors released no pipeline for the family."""
    rotary: str | None = None
    """The diffusion model's module that turns token positions into rotations, where text tokens are counted through."""
    cross: bool = False
    """Text is seen in cross-attention alone (Eq. 9): no duplication and no isolation are needed."""
    marker: str | None = "dit"
    """How a block tells that it runs: "dit", through its entry in ``patches_replace``; None where ComfyUI asks for
    none: then each block must show its attention over text, known by ``block_index``."""

    def check(self, model: Any) -> None:  # noqa: B027 (most families have nothing to refuse)
        """Raise ``ValueError`` for a variant of the family that VSF cannot serve."""

    @abstractmethod
    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        """How many blocks of each type ("double" is ComfyUI's "double_block") the model has."""

    @abstractmethod
    def context_width(self, diffusion_model: Any) -> int:
        """Channels of the text embedding that the model takes."""

    @abstractmethod
    def head_dim(self, diffusion_model: Any) -> int:
        """Channels of one attention head."""

    def layout(self, kind: str, args: Mapping[str, Any], negative: int) -> TokenLayout:
        """The joint sequence inside a block of type ``kind``, from the arguments ComfyUI hands to a block patch."""
        raise NotImplementedError(f"{self.title} has no block patches with a joint sequence")

    def reference_tokens(self, conds: Mapping[str, Any], diffusion_model: Any) -> tuple[int, int]:
        """How many tokens of reference images the model puts before and after the image's, from its conds."""
        return 0, 0

    def text_multiple(self, diffusion_model: Any) -> int:
        """The model fills its text up, at the end, to a multiple of so many tokens."""
        return 1

    def image_padding(self, latent: Tensor, diffusion_model: Any) -> int:
        """How many tokens the model puts behind all others to fill the image up: no part of the picture, they never
        see N."""
        return 0

    def positions(self, ids: Tensor, negative: int, text: int, diffusion_model: Any) -> Tensor:
        """The positions [B, L, axes] of a sequence that begins with a text of ``text`` tokens [N, P], as the model
        counts them: those of P and all else as they were without N, N's those of a prompt of its own."""
        return torch.cat([ids[:, :negative], ids[:, : text - negative], ids[:, text:]], dim=1)

    def grid(self, latent: Tensor) -> int:
        """Image tokens of a latent [B, C, (frames,) h, w]."""
        frames = latent.shape[2] if latent.ndim == 5 else 1
        return frames * math.prod(-(-size // self.patch_size) for size in latent.shape[-2:])

    def image_tokens(self, mask: Tensor) -> Tensor:
        """A latent-sized mask [B, m, (frames,) h, w] as [B, I, m], a row an image token: the share of it inside."""
        p, flat = self.patch_size, mask.flatten(0, -3)[:, None]
        pad = (0, -mask.shape[-1] % p, 0, -mask.shape[-2] % p)
        pooled = F.avg_pool2d(F.pad(flat, pad, mode="replicate"), p)
        return pooled.reshape(*mask.shape[:2], -1).transpose(1, 2)
