"""LTX-Video and LTX-2: text is seen in cross-attention alone; its keys are [N, P], with a mask over the padding of P.
Frames of guides are frames of the latent.

LTX-2 makes sound too, from the same text but in attention of its own, narrower and without N. Its text comes raw from
the encoder, led by a start token; connectors of its own let that see 1024 learned tokens, which N does not need."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..negative import Negative
from ..text_encoder import T5, BosPrefix, TextEncoder
from .base import CrossFamily


class LTXV(CrossFamily):
    title = "LTX-Video"
    model_classes = frozenset({"comfy.model_base.LTXV"})
    text_encoders = (TextEncoder("ltxv", "LTX-Video (CLIPLoader of type ltxv)", "MochiT5XXL", (T5,)),)
    patch_size = 1
    masked = True

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.transformer_blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.caption_channels

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.attention_head_dim

    def other_keys(self, latent: Tensor, conds: Mapping[str, Any], diffusion_model: Any) -> set[int]:
        keys, denoise = super().other_keys(latent, conds, diffusion_model), conds.get("denoise_mask")
        if conds.get("keyframe_idxs") is None or denoise is None:
            return keys
        return keys | {int((denoise[0] >= 0).all(dim=0).sum())}  # without what guides leave out


class LTXAV(LTXV):
    title = "LTX-2"
    model_classes = frozenset({"comfy.model_base.LTXAV"})
    text_encoders = (
        TextEncoder("ltxav", "LTX-2 (LTXAVTextEncoderLoader)", "LTXAVTEModel", (BosPrefix("Gemma", ("gemma3_12b",)),)),
    )
    compiles = False

    def check(self, model: Any) -> None:
        if self.attention_width(model.diffusion_model) == model.diffusion_model.audio_inner_dim:
            raise ValueError("VSF: in this LTX-2, attention of sound and of video are as wide, so it cannot be served.")

    def attention_width(self, diffusion_model: Any) -> int:
        return diffusion_model.inner_dim

    def context_width(self, diffusion_model: Any) -> int:
        if diffusion_model.caption_proj_before_connector:
            return diffusion_model.cross_attention_dim + diffusion_model.audio_cross_attention_dim
        return 2 * diffusion_model.caption_channels

    def negative_widths(self, diffusion_model: Any) -> frozenset[int]:
        raw = diffusion_model.cross_attention_dim + diffusion_model.audio_cross_attention_dim
        return frozenset({raw, diffusion_model.caption_channels, self.context_width(diffusion_model)})

    def embedded(self, negative: Negative, model: Any, device: torch.device) -> Negative:
        raw = negative.tokens.to(device, model.get_dtype_inference())
        is_raw = negative.extra.get("unprocessed_ltxav_embeds", False)
        ready = model.diffusion_model.preprocess_text_embeds(raw, unprocessed=is_raw)
        if ready is raw:
            return negative
        if raw.shape[1] == 1:
            raise ValueError("VSF: the negative has no words, only a start token. Give it some, or remove it.")
        return replace(negative, tokens=ready[:, 1 : raw.shape[1]])

    def other_keys(self, latent: Tensor, conds: Mapping[str, Any], diffusion_model: Any) -> set[int]:
        sound = sum(shape[2] for shape in conds.get("latent_shapes", ())[1:])
        voice = conds["ref_audio"]["tokens"].shape[1] if conds.get("ref_audio") else 0
        return super().other_keys(latent, conds, diffusion_model) | {sound, voice + sound}
