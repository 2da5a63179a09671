"""A custom node for the demo and the tests: the toy world's text encoders, which no stock loader takes.

ComfyUI's CLIPLoader knows T5 and umt5 by their full depth alone; these are tiny.
"""

import sys
from pathlib import Path

TOY = str(Path(__file__).resolve().parents[1])


class VSFToyTextEncoder:
    """CLIP of a family, with prompts padded to few tokens, as the toy was trained."""

    CATEGORY = "VSF/toy"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    DESCRIPTION = "The text encoder of the toy models. Not for real ones."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (["sd3", "flux", "wan"],)}}

    def load(self, family):
        if TOY not in sys.path:
            sys.path.append(TOY)
        import captions

        return (captions.load_clip(family),)


NODE_CLASS_MAPPINGS = {"VSFToyTextEncoder": VSFToyTextEncoder}
