"""Chroma and Chroma Radiance: Flux's blocks, modulated by a network that knows the step and nothing of text. Newer
Radiance models count their text through, the others give all of it position 0."""

from collections.abc import Mapping
from typing import Any

from ..text_encoder import T5, TextEncoder
from .flux import Flux


class Chroma(Flux):
    title = "Chroma"
    model_classes = frozenset({"comfy.model_base.Chroma"})
    text_encoders = (TextEncoder("chroma", "Chroma (CLIPLoader of type chroma)", "PixArtT5XXL", (T5,)),)
    released = None

    def reference_tokens(self, conds: Mapping[str, Any], diffusion_model: Any) -> tuple[int, int]:
        return 0, 0  # given or not, the model does not look at them


class ChromaRadiance(Chroma):
    title = "Chroma Radiance"
    model_classes = frozenset({"comfy.model_base.ChromaRadiance"})
    patch_size = 16

    def rope_module(self, diffusion_model: Any) -> str:
        return "pe_embedder"
