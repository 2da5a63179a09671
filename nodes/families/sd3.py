"""Stable Diffusion 3 and 3.5: joint blocks over [text, image]; Medium's blocks attend to the image a second time."""

from collections.abc import Mapping
from typing import Any

from ..text_encoder import T5, CutAfterEnd, TextEncoder
from .base import Family, Released


class SD3(Family):
    title = "Stable Diffusion 3 and 3.5 (Large, Large Turbo, Medium)"
    model_classes = frozenset({"comfy.model_base.SD3"})
    text_encoders = (
        TextEncoder(
            "sd3",
            "Stable Diffusion 3 (CLIPLoader, DualCLIPLoader or TripleCLIPLoader of type sd3)",
            "SD3ClipModel",
            (CutAfterEnd("CLIP", ("l", "g")), T5),
        ),
    )
    inputs = ("x_embedder", "context_embedder")
    released = Released(copy=True, plain=False, kinds=frozenset({"double"}))

    def check(self, model: Any) -> None:
        mmdit = model.diffusion_model
        if getattr(mmdit, "context_processor", None) is not None or getattr(mmdit, "register_length", 0):
            raise ValueError(
                "VSF: this SD3 variant mixes all text before its blocks (context_processor or registers), so a "
                "negative cannot be kept apart from the positive. Use an SD3 or SD3.5 checkpoint without it."
            )

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.joint_blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.context_embedder.in_features

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.hidden_size // diffusion_model.num_heads
