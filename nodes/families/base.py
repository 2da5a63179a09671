"""What the rest of the pack asks of a model family."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...vsf_core import TokenLayout
from ..blocks import Block, Counts
from ..negative import Negative
from ..text_encoder import TextEncoder


@dataclass(frozen=True)
class Released:
    """How the authors' released pipeline differs from the paper's layout."""

    copy: bool
    """A plain copy of N stays in the text stream, as ordinary text: [P, N, N0]."""
    plain: bool
    """The image sees N0 as it is, too, beside N1, wherever it sees that."""
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
    text_encoders: tuple[TextEncoder, ...]
    """Those whose negatives fit."""
    patch_size: int = 2
    """Latent pixels per image token, along each side."""
    grid_factors: tuple[int, ...] = (1,)
    """By how much the image's grid is coarser than that, for each grid that blocks attend from: a UNet has several."""
    released: Released | None = None
    """None where the authors released no pipeline for the family."""
    cross_attention: bool = False
    """Text is seen in cross-attention alone (Eq. 9): no duplication and no isolation are needed."""
    has_text_mask: bool = False
    """That attention may come with a mask, which hides the padding of P."""
    inputs: tuple[str, ...] = ()
    """The modules that the latent and the text go into first, where ComfyUI has no wrapper around the network."""
    block_hook: str | None = "dit"
    """How a block tells that it runs: "dit", through its entry in ``patches_replace``; "attn2", through an
    ``attn2_patch``; None where ComfyUI offers neither: then each block must show its attention over text."""

    @property
    def encoders(self) -> frozenset[str]:
        """Names of its text encoders."""
        return frozenset(encoder.name for encoder in self.text_encoders)

    def check(self, model: Any) -> None:  # noqa: B027 (most families have nothing to refuse)
        """Raise ``ValueError`` for a variant of the family that VSF cannot serve."""

    @abstractmethod
    def block_counts(self, diffusion_model: Any) -> Counts:
        """How many blocks of each type ("double" is ComfyUI's "double_block") the model has, or which."""

    @abstractmethod
    def context_width(self, diffusion_model: Any) -> int:
        """Channels of the text embedding that the model takes."""

    def negative_widths(self, diffusion_model: Any) -> frozenset[int]:
        """Channels that a negative's embedding may have: others where ``embedded`` changes them."""
        return frozenset({self.context_width(diffusion_model)})

    def attention_width(self, diffusion_model: Any) -> int | None:
        """Channels of all heads of the picture's attention over text, where something else attends to it, too; by these
        it is told apart."""
        return None

    @abstractmethod
    def head_dim(self, diffusion_model: Any) -> int:
        """Channels of one attention head, the widest."""

    def text_attentions(self, diffusion_model: Any) -> int:
        """How many attentions over text a block has at most."""
        return 1

    def token_refiner(self) -> str | None:
        """The diffusion model's module in which text tokens see one another before the blocks, called with (text,
        timesteps, mask): N goes through it by itself."""
        return None

    def rope_module(self, diffusion_model: Any) -> str | None:
        """The diffusion model's module that turns token positions into rotations, where text tokens are counted
        through, so that N would shift them."""
        return None

    def tokens_before(self, count: int, given: int) -> int:
        """How many tokens of its own the model has put in front of the ``given`` tokens of text, where the first block
        gets ``count``."""
        return 0

    def text_of(self, kind: str, args: Mapping[str, Any]) -> Tensor:
        """The stream [B, tokens, C] in which N is, from what goes into a block of type ``kind``, or comes out."""
        return args["txt"]

    def layout(self, kind: str, args: Mapping[str, Any], negative: int, start: int, added: int) -> TokenLayout:
        """The joint sequence inside a block of type ``kind``, from the arguments ComfyUI hands to a block patch. Asked
        of joint families alone; in most blocks text and image are two streams.

        start: N's first token in the text; added: how many tokens a patch around this block has put in front of it."""
        text = args["txt"].shape[1]
        return TokenLayout(image=args["img"].shape[1], positive=text - negative, negative=negative, before=start)

    def unmarked_blocks(self, diffusion_model: Any) -> Iterable[Any]:
        """The blocks themselves, in the order of their numbers, where ``block_hook`` is None."""
        return ()

    def block_of(self, options: Mapping[str, Any], before: int) -> Block:
        """The block of an attention over text that no block patch encloses, from its ``transformer_options`` and the
        number of such calls ``before`` it in this forward pass."""
        raise NotImplementedError(f"{self.title} has its text attention inside block patches")

    def embedded(self, negative: Negative, model: Any, device: torch.device) -> Negative:
        """``negative`` with its tokens as the model's own text: what ``model`` does to that before its blocks."""
        return negative

    def reference_tokens(self, conds: Mapping[str, Any], diffusion_model: Any) -> tuple[int, int]:
        """How many tokens of reference images the model puts before and after the image's, from its conds. Those that
        ComfyUI calls ``ref_latents`` come after."""
        return 0, sum(self.grid(latent) for latent in conds.get("ref_latents") or ())

    def other_frames(self, entry: Mapping[str, Any], latent: Tensor) -> tuple[int, int]:
        """How many frames of the ``latent`` of a run are references' or guides' and not the picture's: in front of its
        own and behind them. ``entry``: what the CONDITIONING says."""
        return 0, 0

    def kept_tokens(self, latent: Tensor, conds: Mapping[str, Any]) -> Tensor | None:
        """int: which of a latent's tokens the model keeps, where it leaves some out. Asked once a run for each view of
        its latent: this may wait for the device."""
        return None

    def other_sequence_lengths(self, latent: Tensor, conds: Mapping[str, Any], diffusion_model: Any) -> set[int]:
        """Where calls are told apart by it: how many keys the attentions over anything but text have."""
        before, after = self.reference_tokens(conds, diffusion_model)
        padding = self.image_padding(latent, diffusion_model)
        others = (0, before, after, before + after, padding)
        return {count + more for count in self.grids(latent) for more in others}

    def lengths_to_avoid(
        self, latent: Tensor, conds: Mapping[str, Any], diffusion_model: Any, kept: Tensor | None
    ) -> set[int]:
        """How many tokens a text must not have, so that each call can be told: none where blocks tell. ``kept``: those
        of ``kept_tokens``."""
        if not self.cross_attention and self.block_hook is not None:
            return set()
        return self.other_sequence_lengths(latent, conds, diffusion_model) | (set() if kept is None else {len(kept)})

    def text_multiple(self, diffusion_model: Any) -> int:
        """The model fills its text up, at the end, to a multiple of so many tokens."""
        return 1

    def image_padding(self, latent: Tensor, diffusion_model: Any) -> int:
        """How many tokens the model puts behind all others to fill the image up: no part of the picture, they never
        see N."""
        return 0

    def positions(self, ids: Tensor, negative: int, real: Tensor, text: int, diffusion_model: Any) -> Tensor:
        """The positions [B, L, axes] of a sequence that begins with a text of ``text`` tokens [N, P], as the model
        counts them: those of P and all else as they were without N, N's those of a prompt of its own. real: [B or 1],
        how many of the ``negative`` tokens of N are no padding."""
        return torch.cat([ids[:, :negative], ids[:, : text - negative], ids[:, text:]], dim=1)

    def grid(self, latent: Tensor) -> int:
        """Image tokens of a latent [B, C, (frames,) h, w], on the finest grid."""
        return self.grids(latent)[0]

    def grids(self, latent: Tensor) -> list[int]:
        """Image tokens at each of ``grid_factors``."""
        frames = latent.shape[2] if latent.ndim == 5 else 1
        patches = (self.patch_size * factor for factor in self.grid_factors)
        return [frames * math.prod(-(-size // p) for size in latent.shape[-2:]) for p in patches]

    def image_tokens(self, mask: Tensor) -> Tensor:
        """A latent-sized mask [B, m, (frames,) h, w] as [B, I, m], a row an image token: the share of it inside.

        The rows of one of ``grid_factors`` follow those of the one before.
        """
        return torch.cat([_cells(mask, self.patch_size * factor) for factor in self.grid_factors], dim=1)


class CrossFamily(Family):
    """A family whose text is seen in cross-attention alone; the authors' released layout is the paper's Eq. 9 there."""

    cross_attention = True
    released = Released(copy=False, plain=False, kinds=frozenset({"double", "input", "middle", "output"}))


def _cells(mask: Tensor, p: int) -> Tensor:
    """The means of a mask [B, m, (frames,) h, w] over squares of ``p`` pixels: [B, squares, m]."""
    pad = (0, -mask.shape[-1] % p, 0, -mask.shape[-2] % p)
    pooled = F.avg_pool2d(F.pad(mask.flatten(0, -3)[:, None], pad, mode="replicate"), p)
    return pooled.reshape(*mask.shape[:2], -1).transpose(1, 2)
