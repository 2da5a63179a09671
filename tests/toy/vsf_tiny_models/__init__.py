"""A custom node for the tests: tiny random models of families that have no trained toy, with text encoder and VAE.

No stock loader takes such encoders, and some sizes of these models are set past the loader (``helpers.load_sized``).
"""

import sys
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
FAMILIES = ["anima", "chroma", "flux2", "hunyuan_video", "ltxv", "qwen_image", "sdxl", "z_image"]


@cache
def loaded(family):
    """MODEL, CLIP and VAE of a family."""
    sys.path += [str(TESTS / folder) for folder in ("toy", "host") if str(TESTS / folder) not in sys.path]
    import comfy.sd
    import comfy.taesd.taehv
    import comfy.taesd.taesd
    import encoders
    import helpers
    import tiny

    make_model, make_clip = {
        "anima": (lambda: helpers.load_cosmos("anima"), lambda: encoders.make_cosmos_clip("anima")),
        "chroma": (helpers.load_chroma, encoders.make_chroma_clip),
        "flux2": (lambda: helpers.load_flux2(guidance=False, context=192), encoders.make_klein_clip),
        "hunyuan_video": (helpers.load_hunyuan_video, lambda: encoders.make_hunyuan_video_clip(pooled=768)),
        "ltxv": (helpers.load_ltxv, encoders.make_ltxv_clip),
        "qwen_image": (helpers.load_qwen_image, encoders.make_qwen_image_clip),
        "sdxl": (helpers.load_unet, lambda: encoders.make_unet_clip("sdxl")),
        "z_image": (helpers.load_z_image, encoders.make_z_image_clip),
    }[family]
    model = make_model()
    channels = model.get_model_object("latent_format").latent_channels
    of_clips = family in ("hunyuan_video", "ltxv")
    decoder = comfy.taesd.taehv.TAEHV if of_clips else comfy.taesd.taesd.TAESD
    state = tiny.randomize(decoder(latent_channels=channels).state_dict(), 0)
    return model, make_clip(), comfy.sd.VAE(sd=state, metadata={"tae_latent_channels": channels})


class VSFTinyModel:
    """A family's tiny random model, its text encoder and a tiny VAE for its latents."""

    CATEGORY = "VSF/toy"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    DESCRIPTION = "A tiny random model. Not for pictures."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (FAMILIES,)}}

    def load(self, family):
        return loaded(family)


NODE_CLASS_MAPPINGS = {"VSFTinyModel": VSFTinyModel}
