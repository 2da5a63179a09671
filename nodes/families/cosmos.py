"""Cosmos Predict2 and Anima: text is seen in cross-attention alone; its keys are [N, P]. Their blocks are outside
ComfyUI's block patches, and before 0.30 nothing says which is at work: they run one after the other, each once.

Anima's own adapter turns the encoder's output into one embedding a T5 token, and fills up with zeros to 512, which N
does not need."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..blocks import Block
from ..negative import Negative
from ..text_encoder import T5, Asked, CutAfterEnd, TextEncoder
from .base import CrossFamily


class Cosmos(CrossFamily):
    title = "Cosmos Predict2 (text and image to video)"
    model_classes = frozenset({"comfy.model_base.CosmosPredict2"})
    text_encoders = (TextEncoder("cosmos", "Cosmos Predict2 (CLIPLoader of type cosmos)", "CosmosT5XXL", (T5,)),)
    block_hook = None

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.blocks[0].cross_attn.context_dim

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.blocks[0].cross_attn.head_dim

    def unmarked_blocks(self, diffusion_model: Any) -> Any:
        return diffusion_model.blocks

    def block_of(self, options: Mapping[str, Any], before: int) -> Block:
        return "double", options.get("block_index", before)


class Anima(Cosmos):
    title = "Anima"
    model_classes = frozenset({"comfy.model_base.Anima"})
    text_encoders = (
        TextEncoder(
            "anima",
            "Anima (CLIPLoader with its Qwen3 0.6B)",
            "AnimaTEModel",
            (CutAfterEnd("Qwen3", ("qwen3_06b",)),),
            asked=Asked("T5", ("t5xxl",)),
        ),
    )

    def embedded(self, negative: Negative, model: Any, device: torch.device) -> Negative:
        ids, weights = (negative.extra.get(key) for key in ("t5xxl_ids", "t5xxl_weights"))
        if ids is None:
            return negative
        source = negative.tokens.to(device, model.get_dtype_inference())
        weights = None if weights is None else weights[None, :, None].to(source)
        tokens = model.diffusion_model.preprocess_text_embeds(source, ids[None].to(device), t5xxl_weights=weights)
        return replace(negative, tokens=tokens[:, : ids.shape[0]])
