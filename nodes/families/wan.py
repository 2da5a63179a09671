"""Wan 2.1 and 2.2: text is seen in cross-attention alone; its keys are [N, P], CLIP-vision tokens having been split off
by the block. VACE's blocks run outside ComfyUI's block patches and follow the block before them."""

from collections.abc import Mapping
from typing import Any

import torch
from comfy.latent_formats import Wan21
from torch import Tensor

from ..blocks import Block
from ..text_encoder import TextEncoder, Trimmed
from .base import CrossFamily


class Wan(CrossFamily):
    title = "Wan 2.1 and 2.2 (text and image to video, VACE, Fun, 5B and 14B)"
    model_classes = frozenset(f"comfy.model_base.{name}" for name in ("WAN21", "WAN21_Vace", "WAN21_Camera", "WAN22"))
    text_encoders = (
        TextEncoder("wan", "Wan (CLIPLoader of type wan)", "WanT5Model", (Trimmed("umT5", ("umt5xxl",)),)),
    )

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.text_embedding[0].in_features

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.dim // diffusion_model.num_heads

    def text_attentions(self, diffusion_model: Any) -> int:
        """An image to video model to which no CLIP vision is given attends to the text in its place, too."""
        return 2 if hasattr(diffusion_model.blocks[0].cross_attn, "k_img") else 1

    def block_of(self, options: Mapping[str, Any], before: int) -> Block:
        return "double", options["block_index"]  # a block of VACE's: the block before it is its host

    def other_sequence_lengths(self, latent: Tensor, conds: Mapping[str, Any], diffusion_model: Any) -> set[int]:
        vision = {conds["clip_fea"].shape[-2]} if conds.get("clip_fea") is not None else set()
        return vision | super().other_sequence_lengths(latent, conds, diffusion_model)

    def tokens_before(self, count: int, given: int) -> int:
        return count - given  # CLIP vision's

    def other_frames(self, entry: Mapping[str, Any], latent: Tensor) -> tuple[int, int]:
        """VACE's reference images are frames in front of the video: with nothing to change (their mask is 0), and for
        what should change there, zeros as the model sees them."""
        return max(map(_reference_frames, entry.get("vace_frames") or (), entry.get("vace_mask") or ()), default=0), 0

    def reference_tokens(self, conds: Mapping[str, Any], diffusion_model: Any) -> tuple[int, int]:
        first = conds.get("reference_latent") if diffusion_model.ref_conv is not None else None  # Fun control has it
        after = [conds.get("time_dim_concat"), *(conds.get("context_latents") or ())]
        before = 0 if first is None else self.grid(first)
        return before, sum(self.grid(latent) for latent in after if latent is not None)


def _reference_frames(frames: Tensor, mask: Tensor) -> int:
    """How many of the leading latent ``frames`` [B, 32, F, h, w] of a VACE control are reference images."""
    changing = frames[:, 16:32]
    zeros = Wan21().process_out(torch.zeros_like(changing))
    is_reference = torch.isclose(changing, zeros.to(changing), atol=1e-3).flatten(3).all(-1).all(1).all(0)
    is_reference &= (mask == 0).flatten(3).all(-1).all(1).all(0)
    return int(is_reference.int().cumprod(0).sum())
