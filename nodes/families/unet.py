"""The UNets, Stable Diffusion 1.5, 2.1 and SDXL: text is seen in cross-attention alone (attn2); its keys are [N, P].

Transformer layers sit in some of the input, middle and output blocks, at up to four sizes of the picture's grid."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..blocks import Block, Counts
from ..text_encoder import TextEncoder, WordsOnly
from .base import CrossFamily


class UNet(CrossFamily):
    title = "Stable Diffusion 1.5, 2.1 and SDXL (with Lightning, DMD2, LCM and other LoRAs)"
    model_classes = frozenset({"comfy.model_base.BaseModel", "comfy.model_base.SDXL"})
    text_encoders = (
        TextEncoder(
            "sd1", "Stable Diffusion 1.5 (its checkpoint's CLIP)", "SD1ClipModel", (WordsOnly("CLIP", ("l",)),)
        ),
        TextEncoder(
            "sd2", "Stable Diffusion 2.1 (its checkpoint's CLIP)", "SD2ClipModel", (WordsOnly("CLIP", ("h",)),)
        ),
        TextEncoder(
            "sdxl",
            "SDXL (its checkpoint's CLIP, or DualCLIPLoader of type sdxl)",
            "SDXLClipModel",
            (WordsOnly("CLIP", ("l", "g")),),
        ),
    )
    patch_size = 1
    grid_factors = (1, 2, 4, 8)
    block_hook = "attn2"

    def check(self, model: Any) -> None:
        if not any(self.block_counts(model.diffusion_model).values()):
            raise ValueError("VSF: this UNet has no cross-attention, so it takes no text. Use one that does.")

    def block_counts(self, diffusion_model: Any) -> Counts:
        parts = {
            "input": diffusion_model.input_blocks,
            "middle": [diffusion_model.middle_block or nn.Identity()],
            "output": diffusion_model.output_blocks,
        }
        with_text = {kind: [i for i, block in enumerate(part) if any(_text(block))] for kind, part in parts.items()}
        return {kind: numbers for kind, numbers in with_text.items() if numbers}

    def context_width(self, diffusion_model: Any) -> int:
        return next(_text(diffusion_model)).to_k.in_features

    def head_dim(self, diffusion_model: Any) -> int:
        return max(attention.dim_head for attention in _text(diffusion_model))

    def block_of(self, options: Mapping[str, Any], before: int) -> Block:
        return options["block"]


def _text(part: nn.Module) -> Iterator[Any]:
    """The attentions over text of a part of the model."""
    return (layer.attn2 for layer in part.modules() if getattr(layer, "attn2", None) is not None)
