"""Flux.2: Flux's blocks, a modulation that they share, and text tokens that are counted through on an axis of their
own. ComfyUI fills texts up to 512 tokens: Dev's in front, so that its words come last; Klein's behind."""

from typing import Any

import torch
from torch import Tensor

from ..text_encoder import InTemplate, TextEncoder
from .flux import Flux


class Flux2(Flux):
    title = "Flux.2 (Dev, Klein)"
    model_classes = frozenset({"comfy.model_base.Flux2"})
    text_encoders = (
        TextEncoder(
            "flux2",
            "Flux.2 (CLIPLoader of type flux2)",
            "Flux2TEModel",
            (InTemplate("Mistral or Qwen3", ("mistral3_24b", "qwen3_4b", "qwen3_8b")),),
        ),
    )
    patch_size = 1
    released = None

    def positions(self, ids: Tensor, negative: int, real: Tensor, text: int, diffusion_model: Any) -> Tensor:
        positive = text - negative
        is_dev = diffusion_model.params.guidance_embed  # Klein takes no guidance; Dev's prompts are filled in front
        start = (positive - real).clamp(min=0) if is_dev else torch.zeros_like(real)
        own = (start[:, None] + torch.arange(negative, device=ids.device)).expand(ids.shape[0], -1)
        own = ids.gather(1, own[..., None].expand(-1, -1, ids.shape[2]))
        return torch.cat([own, ids[:, :positive], ids[:, text:]], dim=1)
