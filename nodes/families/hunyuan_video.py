"""HunyuanVideo: Flux's blocks over [text, video], all text at position 0. Before them, text tokens see one another and
their mean, so N goes there by itself; in 1.5, text of other encoders then stands in front."""

from collections.abc import Mapping
from typing import Any

from ..text_encoder import QWEN25_VL, InTemplate, TextEncoder
from .flux import Flux


class HunyuanVideo(Flux):
    title = "HunyuanVideo (text and image to video)"
    model_classes = frozenset(f"comfy.model_base.HunyuanVideo{kind}" for kind in ("", "I2V", "SkyreelsI2V"))
    text_encoders = (
        TextEncoder(
            "hunyuan_video",
            "HunyuanVideo (DualCLIPLoader of type hunyuan_video)",
            "HunyuanVideoClipModel",
            (InTemplate("LLaMA", ("llama",)),),
        ),
    )
    released = None

    def token_refiner(self) -> str:
        return "txt_in"

    def reference_tokens(self, conds: Mapping[str, Any], diffusion_model: Any) -> tuple[int, int]:
        if conds.get("guiding_frame_index") is not None:
            raise ValueError(
                "VSF: HunyuanVideo with a guiding frame (guidance type v2 of its image to video) is not supported: "
                "ComfyUI counts that frame's tokens from the text's first one. Choose guidance type v1, or remove VSF "
                "Model Patch."
            )
        return 0 if conds.get("ref_latent") is None else self.grid(conds["ref_latent"]), 0


class HunyuanVideo15(HunyuanVideo):
    title = "HunyuanVideo 1.5"
    model_classes = frozenset(f"comfy.model_base.HunyuanVideo15{kind}" for kind in ("", "_SR_Distilled"))
    text_encoders = (
        TextEncoder(
            "hunyuan_video_15",
            "HunyuanVideo 1.5 (DualCLIPLoader of type hunyuan_video_15)",
            "HunyuanImageTEModel",
            (QWEN25_VL,),
            tokenizer_class="HunyuanVideo15Tokenizer",
        ),
    )
    patch_size = 1

    def tokens_before(self, count: int, given: int) -> int:
        return count - given
