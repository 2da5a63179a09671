"""Nodes that sample a picture in parts, a run for each (tiled upscalers, detailers): they cut ComfyUI's own masks and
areas to the part, but know nothing of a negative's mask, which would be squeezed into every part.

No convention tells a run which part it is. What can be seen is said: a part that is smaller than the picture for which
the mask was used before is an error; several runs of one size in one node are a warning.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy_execution.utils import ExecutionContext, get_executing_context
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import module_of
from .latent_map import LatentMap
from .negative import negatives_of

log = logging.getLogger(__name__)


@dataclass
class _Use:
    """The first run with a masked negative in a queued prompt, and the latest."""

    prompt: str
    size: tuple[int, ...]
    context: ExecutionContext
    warned: bool = False


_uses = WeakTensorKeyDictionary()
"""By the mask: each node makes one of its own. What is read from a conditioning lives no longer than a run."""


def check_tiles(entries: Sequence[dict], latent_map: LatentMap) -> None:
    """Raises ``ValueError`` for a run that samples a part of the picture that a negative's mask is for."""
    context = get_executing_context()
    if context is None:  # outside ComfyUI's queue
        return
    size = latent_map.shape[-2:]
    for mask in {n: n.mask for entry in entries for n in negatives_of(entry) if n.mask is not None}.values():
        use: _Use | None = _uses.get(mask)
        next_item = use is not None and use.context[:2] == context[:2] and use.context != context  # of a list
        if use is None or use.prompt != context.prompt_id or next_item:
            _uses[mask] = _Use(context.prompt_id, size, context)
            continue
        if any(part < whole for part, whole in zip(size, use.size, strict=True)):
            raise ValueError(
                f"VSF: a negative's mask was used for a picture of {_in_words(use.size)} latent pixels, and this node "
                f"samples one of {_in_words(size)} with it. If that is a part of the picture (a tile, or a detail), "
                "the mask would be squeezed into each part: give this node a negative without a mask. If it is another "
                "picture, give it a VSF Negative Conditioning of its own."
            )
        if context == use.context and not use.warned:
            use.warned = True
            log.warning(
                "VSF: this node samples several times with a negative that has a mask. If each is a part of the "
                "picture (a tile, or a detail), the mask is squeezed into every part: remove the mask there."
            )
        use.context = context


def check_tiler(model_options: Mapping[str, Any], entries: Sequence[dict]) -> None:
    """Raises ``ValueError`` for a negative with a mask where a wrapper around the model cuts each step into tiles, as
    TiledDiffusion's does: it does not say which tile the model gets."""
    wrapper = model_options.get("model_function_wrapper")
    wrapper = getattr(wrapper, "__self__", wrapper)
    if hasattr(wrapper, "tile_width") and any(n.mask is not None for entry in entries for n in negatives_of(entry)):
        raise ValueError(
            f"VSF: {type(wrapper).__qualname__} (of {module_of(type(wrapper))}) samples the picture in tiles without "
            "saying which, so a negative's mask has no place there. Remove the mask, or that node."
        )


def _in_words(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
