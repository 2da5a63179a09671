"""Which models VSF knows. Adding a family: a file beside this one and a line in ``FAMILIES``."""

from typing import Any

from ..checks import module_of
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


def family_of(patcher: Any) -> Family:
    """The family of a ``ModelPatcher``'s model, by its exact class: subclasses differ in what matters.

    Raises ``ValueError`` that names the model's class and what is supported.
    """
    model, own = patcher.model, own_class(type(patcher.model))
    kind = f"{own.__module__}.{own.__qualname__}"
    family = next((family for family in FAMILIES if kind in family.model_classes), None)
    if family is None:
        raise _unsupported(own)
    check_network(patcher)
    diffusion_model = unwrapped(model.diffusion_model)
    try:
        family.check(model)
        for ask in (family.block_counts, family.context_width, family.head_dim):  # what a run will ask for
            ask(diffusion_model)
        for name in (family.rope_module(diffusion_model), family.token_refiner()):
            getattr(diffusion_model, name or "forward")
    except AttributeError as error:
        raise changed_host(f"this model of {family.title} is built otherwise ({error})") from error
    return family


def check_network(patcher: Any) -> None:
    """Raises ``ValueError`` where a run of this ``ModelPatcher`` would run another pack's network in ComfyUI's model.

    Other patchers of the same model may have left a class of theirs on it: a run takes that off, and puts this one's
    on."""
    own = patcher.model.diffusion_model
    network = patcher.get_model_object("diffusion_model")
    plain = network is own and unwrapped(own) is own
    kind = own_class(patcher.get_model_object("diffusion_model.__class__") if plain else type(unwrapped(network)))
    if not kind.__module__.startswith("comfy.ldm."):
        raise _unsupported(kind)


def own_class(kind: type) -> type:
    """A model's class, where FSDP (``fully_shard``) has put one of its own in its place: that has the same code, and is
    called for instance FSDPFlux. Shards are whole while the model runs."""
    return next(base for base in kind.__mro__ if not _is_of_fsdp(base))


def _is_of_fsdp(kind: type) -> bool:
    return any(
        base.__name__ == "FSDPModule" and base.__module__.startswith("torch.distributed") for base in kind.__mro__
    )


def _unsupported(kind: type) -> ValueError:
    name, module = kind.__qualname__, module_of(kind)
    other = "" if module.startswith("comfy.") else f" (of {module})"
    origin = next((f" of {pack}" for start, pack in OTHER_LOADERS.items() if name.startswith(start)), other)
    supported = "; ".join(family.title for family in FAMILIES)
    return ValueError(
        f"VSF: models of class {name}{origin} are not supported. Supported, with ComfyUI's own loaders: {supported}. "
        "Connect one of these, or remove VSF Model Patch from this workflow."
    )


__all__ = ["FAMILIES", "Family", "Released", "check_network", "family_of", "own_class"]
