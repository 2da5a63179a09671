"""Which models VSF knows. Adding a family: a file beside this one and a line in ``FAMILIES``."""

from typing import Any

from ..compiled import unwrapped
from ..host_check import changed_host
from .base import Family, Released
from .chroma import Chroma, ChromaRadiance
from .cosmos import Anima, Cosmos
from .flux import Flux
from .flux2 import Flux2
from .hunyuan_video import HunyuanVideo, HunyuanVideo15
from .ltx import LTXAV, LTXV
from .qwen_image import QwenImage
from .sd3 import SD3
from .unet import UNet
from .wan import Wan
from .z_image import ZImage

FAMILIES: tuple[Family, ...] = (
    SD3(),
    Flux(),
    Wan(),
    UNet(),
    Cosmos(),
    Anima(),
    LTXV(),
    LTXAV(),
    Chroma(),
    ChromaRadiance(),
    QwenImage(),
    ZImage(),
    Flux2(),
    HunyuanVideo(),
    HunyuanVideo15(),
)

OTHER_LOADERS = {
    "ComfyFlux": "ComfyUI-nunchaku",
    "Nunchaku": "ComfyUI-nunchaku",
    "WanVideoModel": "ComfyUI-WanVideoWrapper",
}
"""How the classes of packs begin that run a model by code of their own, past every hook of ComfyUI's."""


def family_of(model: Any) -> Family:
    """The family of a ComfyUI model (``ModelPatcher.model``), by its exact class: subclasses differ in what matters.

    Raises ``ValueError`` that names the model's class and what is supported.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    family = next((family for family in FAMILIES if kind in family.model_classes), None)
    diffusion_model = unwrapped(getattr(model, "diffusion_model", None))
    if family is None:
        raise _unsupported(model)
    if not type(diffusion_model).__module__.startswith("comfy.ldm."):
        raise _unsupported(diffusion_model)  # ComfyUI's class around another pack's network
    try:
        family.check(model)
        for ask in (family.block_counts, family.context_width, family.head_dim):  # what a run will ask for
            ask(diffusion_model)
        for name in (family.rope_module(diffusion_model), family.token_refiner()):
            getattr(diffusion_model, name or "forward")
    except AttributeError as error:
        raise changed_host(f"this model of {family.title} is built otherwise ({error})") from error
    return family


def _unsupported(model: object) -> ValueError:
    name = type(model).__qualname__
    origin = next((f" of {pack}" for start, pack in OTHER_LOADERS.items() if name.startswith(start)), "")
    supported = "; ".join(family.title for family in FAMILIES)
    return ValueError(
        f"VSF: models of class {name}{origin} are not supported. Supported, with ComfyUI's own loaders: {supported}. "
        "Connect one of these, or remove VSF Model Patch from this workflow."
    )


__all__ = ["FAMILIES", "Family", "Released", "family_of"]
