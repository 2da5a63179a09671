"""Flux.1: double blocks over [text, image], then single blocks over one joined sequence; reference images follow the
image (Kontext). All text has rotary position 0, so N0's place in the stream shifts nothing."""

from collections.abc import Mapping
from typing import Any

from ...vsf_core import TokenLayout
from ..text_encoder import T5, InTemplate, TextEncoder
from .base import Family, Released


class Flux(Family):
    title = "Flux.1 (Schnell, Dev, Krea, Kontext, Fill)"
    model_classes = frozenset({"comfy.model_base.Flux"})
    text_encoders = (
        TextEncoder("flux", "Flux.1 (DualCLIPLoader of type flux)", "FluxClipModel", (T5,)),
        TextEncoder(
            "ovis", "Ovis-Image (CLIPLoader of type ovis)", "OvisTEModel", (InTemplate("Qwen3", ("qwen3_2b",)),)
        ),
    )
    released = Released(copy=False, kinds=frozenset({"double"}), pooled=1.1)

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.double_blocks), "single": len(diffusion_model.single_blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.params.context_in_dim

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.hidden_size // diffusion_model.num_heads

    def layout(self, kind: str, args: Mapping[str, Any], negative: int) -> TokenLayout:
        if kind == "double":
            text, image = args["txt"].shape[1], args["img"].shape[1]
        else:  # one stream, text first
            text = args["transformer_options"]["img_slice"][0]
            image = args["img"].shape[1] - text
        return TokenLayout(image, positive=text - negative, negative=negative)
