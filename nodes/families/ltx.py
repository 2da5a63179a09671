"""LTX-Video: text is seen in cross-attention alone; its keys are [N, P], with a mask over the padding of P. Frames of
guides are frames of the latent."""

from collections.abc import Mapping
from typing import Any

from .base import CrossFamily


class LTXV(CrossFamily):
    title = "LTX-Video"
    model_classes = frozenset({"comfy.model_base.LTXV"})
    encoders = frozenset({"ltxv"})
    patch_size = 1
    masked = True

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.transformer_blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.caption_channels

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.attention_head_dim
