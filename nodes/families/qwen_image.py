"""Qwen-Image and Qwen-Image-Edit: double blocks over [text, image]; reference images follow the image. Text tokens are
counted through, from half the picture's side on; a text with padding comes with a mask over it."""

from collections.abc import Mapping
from typing import Any

from ..text_encoder import QWEN25_VL, TextEncoder
from .base import Family


class QwenImage(Family):
    title = "Qwen-Image (and Edit, 2509, 2511, Layered)"
    model_classes = frozenset({"comfy.model_base.QwenImage"})
    text_encoders = (
        TextEncoder("qwen_image", "Qwen-Image (CLIPLoader of type qwen_image)", "QwenImageTEModel", (QWEN25_VL,)),
    )

    def rope_module(self, diffusion_model: Any) -> str:
        return "pe_embedder"

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.transformer_blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.txt_in.in_features

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.transformer_blocks[0].attention_head_dim
