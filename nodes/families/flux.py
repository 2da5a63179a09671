"""Flux.1: double blocks over [text, image], then single blocks over one joined sequence; reference images follow the
image (Kontext). All text has rotary position 0, so N0's place in the stream shifts nothing; Ovis-Image, which loads as
the same class, counts its text through.

The authors' pipeline: in double blocks the image sees N0 beside N1, in single ones N is text like P. The offset that it
takes is in none of its masks. Besides, these show N1 to P and N0 and hide some image tokens, which are slips of index:
they are not imitated."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...vsf_core import TokenLayout
from ..text_encoder import T5, InTemplate, TextEncoder
from .base import Family, Released


class Flux(Family):
    title = "Flux.1 (Schnell, Dev, Krea, Kontext, Fill, Ovis-Image)"
    model_classes = frozenset({"comfy.model_base.Flux"})
    text_encoders = (
        TextEncoder("flux", "Flux.1 (DualCLIPLoader of type flux)", "FluxClipModel", (T5,)),
        TextEncoder(
            "ovis", "Ovis-Image (CLIPLoader of type ovis)", "OvisTEModel", (InTemplate("Qwen3", ("qwen3_2b",)),)
        ),
    )
    released = Released(copy=False, plain=True, kinds=frozenset({"double"}), pooled=1.1)

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.double_blocks), "single": len(diffusion_model.single_blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.params.context_in_dim

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.hidden_size // diffusion_model.num_heads

    def rope_module(self, diffusion_model: Any) -> str | None:
        return "pe_embedder" if getattr(diffusion_model.params, "txt_ids_dims", None) else None

    def text_of(self, kind: str, args: Mapping[str, Any]) -> Tensor:
        return args["txt" if kind == "double" else "img"]

    def layout(self, kind: str, args: Mapping[str, Any], negative: int, start: int, added: int) -> TokenLayout:
        if kind == "double":
            return super().layout(kind, args, negative, start, added)
        text = args["transformer_options"]["img_slice"][0] + added  # one stream, text first
        return TokenLayout(args["img"].shape[1] - text, positive=text - negative, negative=negative, before=start)
