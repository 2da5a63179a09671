"""LTX-Video and LTX-2: text is seen in cross-attention alone; its keys are [N, P], with a mask over the padding of P.
Frames of guides follow those of the video, and are cut off in the end.

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
    has_text_mask = True

    def block_counts(self, diffusion_model: Any) -> Mapping[str, int]:
        return {"double": len(diffusion_model.transformer_blocks)}

    def context_width(self, diffusion_model: Any) -> int:
        return diffusion_model.caption_channels

    def head_dim(self, diffusion_model: Any) -> int:
        return diffusion_model.attention_head_dim

    def other_frames(self, entry: Mapping[str, Any], latent: Tensor) -> tuple[int, int]:
        guides, tokens = entry.get("guide_attention_entries"), entry.get("keyframe_idxs")
        if guides:
            return 0, sum(guide["latent_shape"][0] for guide in guides)
        return 0, 0 if tokens is None else tokens.shape[2] // (latent.shape[-2] * latent.shape[-1])

    def kept_tokens(self, latent: Tensor, conds: Mapping[str, Any]) -> Tensor | None:
        denoise, tokens = conds.get("denoise_mask"), conds.get("keyframe_idxs")
        if denoise is None or tokens is None or tokens.shape[2] == 0:
            return None
        kept = (denoise[0] >= 0).all(dim=0).expand(latent.shape[2:]).flatten()  # guides may leave out some of theirs
        places = kept.nonzero().flatten()
        return None if len(places) == len(kept) else places


class LTXAV(LTXV):
    title = "LTX-2"
    model_classes = frozenset({"comfy.model_base.LTXAV"})
    text_encoders = (
        TextEncoder("ltxav", "LTX-2 (LTXAVTextEncoderLoader)", "LTXAVTEModel", (BosPrefix("Gemma", ("gemma3_12b",)),)),
    )

    def check(self, model: Any) -> None:
        if self.attention_width(model.diffusion_model) == model.diffusion_model.audio_inner_dim:
            raise ValueError("VSF: in this LTX-2, attention of sound and of video are as wide, so it cannot be served.")

    def attention_width(self, diffusion_model: Any) -> int:
        return diffusion_model.inner_dim

    def text_of(self, kind: str, args: Mapping[str, Any]) -> Tensor:
        return args["v_context"]

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

    def other_sequence_lengths(self, latent: Tensor, conds: Mapping[str, Any], diffusion_model: Any) -> set[int]:
        sound = sum(shape[2] for shape in conds.get("latent_shapes", ())[1:])
        voice = conds["ref_audio"]["tokens"].shape[1] if conds.get("ref_audio") else 0
        return super().other_sequence_lengths(latent, conds, diffusion_model) | {sound, voice + sound}
