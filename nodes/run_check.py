"""What a run was given, checked before its first step."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import module_of, no_effect
from .compiled import unwrapped
from .families import Family
from .latent_map import LatentMap, in_frames
from .negative import Negative

NO_EFFECT = 60
"""From this offset on the negative has practically no effect (layout paper)."""


def check_guider(guider: Any) -> None:
    """Raises ``RuntimeError`` for a guider that runs the model by a forward pass of its own, as ComfyUI-NAG's samplers
    do. They take that off only after a run that ended well: so it is taken off here."""
    network = unwrapped(guider.model_patcher.model.diffusion_model)
    forward = vars(network).get("forward")
    forward = getattr(forward, "__func__", forward)
    forward, kind = getattr(forward, "func", forward), type(guider)
    pack = kind.__module__.partition(".")[0]
    if pack != "comfy" and pack == str(getattr(forward, "__module__", None)).partition(".")[0]:
        del network.forward
        raise RuntimeError(
            f"VSF: {kind.__qualname__} (of {module_of(kind)}) runs the model by a forward pass of its own, in which "
            "the negative would not be. Use another sampler or guider: method nag of VSF Model Patch is the same "
            "guidance, in one pass."
        )


def check_negatives(
    family: Family,
    negatives: Sequence[Negative],
    diffusion_model: Any,
    latent_map: LatentMap,
    dtype: torch.dtype,
) -> None:
    """Raises ``ValueError`` for one of the ``negatives`` that this model cannot take.

    ``latent_map``: what will be sampled; ``dtype``: in which the model computes."""
    widths = family.negative_widths(diffusion_model)
    for negative in negatives:
        _check_embedding(negative, family, widths, dtype)
        if latent_map.is_video and not any(in_frames(negative.frames, latent_map.frames)):
            raise ValueError(
                f"VSF: none of this video's {latent_map.frames} latent frames lies between the negative's from_frame "
                f"({negative.frames[0]:g}) and to_frame ({negative.frames[1]:g}), so it never acts. Widen them."
            )
        _check_batch("embedding", negative.tokens, latent_map.batch)
        if negative.mask is not None and not latent_map.is_video:  # in a video, the mask's pictures are frames
            _check_batch("mask", negative.mask, latent_map.batch)


def warn_of_idle(settings: Any, scales: Sequence[float], negatives: Sequence[Negative], latent_map: LatentMap) -> None:
    """A warning for what makes a negative do nothing in the run to come, though nothing is wrong with it. ``settings``:
    those of VSF Model Patch (``run.Settings``)."""
    negatives = list(dict.fromkeys(negatives))
    if black := sum(map(latent_map.is_nowhere, negatives)):
        no_effect(
            f"VSF: the mask of {black} of {len(negatives)} negatives is black wherever it acts, so it does nothing to "
            "the picture. White is where it acts; LoadImage's mask is black where a picture has no transparency."
        )
    method, numbers = settings.method, vars(settings.arithmetic)
    if method.name in ("nag", "nasa"):
        off = [] if any(map(method.alpha, scales)) else [method.scale_input]
        off += [] if any(n.strength for n in negatives) else ["strength"]
        off += [] if float(numbers.get("alpha", 1)) else ["nag_alpha"]
        if off:
            no_effect(f"VSF: method {method.name} does nothing at this {' and '.join(off)}: raise it.")
    elif settings.layout == "paper" and settings.offset >= NO_EFFECT:
        no_effect(f"VSF: an offset of {settings.offset:g} leaves the negative practically no effect. Try 0 to 2.")


def _check_embedding(negative: Negative, family: Family, widths: Collection[int], dtype: torch.dtype) -> None:
    if negative.encoder is not None and negative.encoder not in family.encoders:
        raise ValueError(
            f'VSF: the negative was made by a text encoder of type "{negative.encoder}", but this model '
            f"({family.title}) takes {' or '.join(sorted(family.encoders))}. Connect the CLIP that encodes this "
            "model's positive prompt to VSF Negative Conditioning."
        )
    width = negative.tokens.shape[-1]
    if width not in widths:
        raise ValueError(
            f"VSF: the negative's embedding is {width} wide, but this model ({family.title}) takes "
            f"{' or '.join(map(str, sorted(widths)))}. Encode it with this model's own text encoder."
        )
    if not torch.isfinite(negative.tokens.to(dtype)).all():
        raise ValueError(
            f"VSF: the negative's embedding has values that {dtype}, in which this model runs, cannot hold. "
            "Lower its weights, like (word:1.3), or its extrapolation."
        )


def check_pooled(groups: Sequence[Sequence[Negative]], positives: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    """Raises ``ValueError`` where the layout cannot mix the pooled embedding of an entry's negatives, one of the
    ``groups``, into that of its positive."""
    mixes = "VSF: layout released mixes the negative's pooled embedding into the positive's here"
    for negatives, pooled in zip(groups, positives, strict=True):
        if not negatives:
            continue
        given = negatives[0].pooled
        if len(negatives) > 1 or given is None:
            raise ValueError(
                "VSF: layout released mixes the pooled embedding of one negative into the positive's here. Use one VSF "
                "Negative Conditioning with text (or a negative that has a pooled output), or layout paper."
            )
        if pooled is None:
            raise ValueError(
                f"{mixes}, but the positive has no pooled output. Encode it with this model's own text encoder, or use "
                "layout paper."
            )
        if given.shape[-1] != pooled.shape[-1]:
            raise ValueError(
                f"{mixes}, but it is {given.shape[-1]} wide and the positive's {pooled.shape[-1]}. Encode both with "
                "this model's own text encoder, or use layout paper."
            )
        if not torch.isfinite(given.to(dtype)).all():
            raise ValueError(
                "VSF: the negative's pooled embedding, which layout released uses here, has values that are NaN "
                "or infinite. Use another text encoder, or layout paper."
            )


def _check_batch(what: str, given: Tensor, batch: int) -> None:
    """Fewer are repeated in turn, as ComfyUI does with prompts; what does not come out even is a mistake."""
    if batch % given.shape[0]:
        raise ValueError(
            f"VSF: the negative's {what} is a batch of {given.shape[0]}, but {batch} pictures are "
            "sampled. Give it one for all, or one for each picture."
        )
