"""Z-Image and Z-Image Turbo: blocks over one sequence [text, image], without block patches. Before them the text
refines itself. Both are filled up to a multiple of tokens, and text positions are counted through to the image's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks import Block
from ..text_encoder import InTemplate, TextEncoder
from .base import Family


class ZImage(Family):
    title = "Z-Image (and Turbo)"
    model_classes = frozenset({"comfy.model_base.Lumina2"})
    text_encoders = (
        TextEncoder(
            "z_image", "Z-Image (CLIPLoader of type lumina2)", "ZImageTEModel", (InTemplate("Qwen3", ("qwen3_4b",)),)
        ),
    )
    block_hook = None

    def check(self, model: Any) -> None:
        if model.diffusion_model.pad_tokens_multiple is None:
            raise ValueError(
                "VSF: this model of the class Lumina2 is not Z-Image, and others (Lumina Image 2.0, NewBie) are not "
                "supported. Connect a Z-Image model, or remove VSF Model Patch from this workflow."
            )

    def rope_module(self, diffusion_model: Any) -> str:
        return "rope_embedder"

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.layers)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.cap_embedder[1].in_features

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.dim // diffusion_model.n_heads

    def unmarked_blocks(self, diffusion_model: Any) -> Any:
        return diffusion_model.layers

    def block_of(self, options: Mapping[str, Any], before: int) -> Block:
        return "double", options["block_index"]

    def reference_tokens(self, conds: Mapping[str, Any], diffusion_model: Any) -> tuple[int, int]:
        if conds.get("ref_latents"):
            raise ValueError(
                "VSF: Z-Image with reference latents (Omni) is not supported: each reference has a text of its own "
                "there. Remove the reference latents, or VSF Model Patch."
            )
        return 0, 0

    def text_multiple(self, diffusion_model: Any) -> int:
        return diffusion_model.pad_tokens_multiple

    def image_padding(self, latent: Tensor, diffusion_model: Any) -> int:
        return -self.grid(latent) % diffusion_model.pad_tokens_multiple

    def positions(self, ids: Tensor, negative: int, real: Tensor, text: int, diffusion_model: Any) -> Tensor:
        """Asked once for the text and once for the image, whose first axis goes on where the text ended."""
        first = ids[..., :1]
        return torch.cat([torch.where(first > negative, first - negative, first), ids[..., 1:]], dim=-1)
