"""A negative on its way from its node to the model: in a CONDITIONING entry, then in one step's ``model_conds``."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

KEY = "vsf_negatives"
"""Key of our own in a CONDITIONING entry's dict; unpatched models never notice it. During a run of a patched model the
same key in the entry's ``model_conds`` says whose negatives they are: ComfyUI copies a positive entry with an area into
the uncond branch, dict and all, but leaves ``model_conds`` behind."""

PREFIX = "vsf_"
"""Prefix of what a patched model finds in ``model_conds`` while VSF is active."""


@dataclass(frozen=True, eq=False)
class Negative:
    """One negative prompt: what ``VSFNegativeConditioning`` puts into every entry of the positive.

    tokens: [b, n, C] embeddings without padding; strength: multiplies alpha for these tokens; mask: [b, H, W] in 0..1,
    where in the picture it acts, None = everywhere (in a video, b are frames); frames: from and to which part of a
    video (0..1) it acts; encoder: name of the text encoder that made it, None = unknown;
    pooled: [b, C'], the pooled embedding, which only the released pipeline of some families uses; extra: what else the
    encoder said of the text, by ComfyUI's names for it.
    """

    tokens: Tensor
    strength: float = 1.0
    mask: Tensor | None = None
    frames: tuple[float, float] = (0.0, 1.0)
    encoder: str | None = None
    pooled: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def negatives_of(entry: dict) -> tuple[Negative, ...]:
    """The negatives that a CONDITIONING entry's dict carries."""
    return entry.get(KEY, ())


def _spans(negatives: Sequence[Negative]) -> Iterator[tuple[Negative, slice]]:
    """Each negative with the place of its tokens, one after the other."""
    start = 0
    for n in negatives:
        yield n, slice(start, start + n.tokens.shape[1])
        start += n.tokens.shape[1]


def picture_of(latent: Tensor, shapes: Sequence[Sequence[int]] | None) -> Tensor:
    """The picture's own part of a latent that ComfyUI has packed with others, of ``shapes``; LTX-2's has sound."""
    return latent if shapes is None else comfy.utils.unpack_latents(latent, shapes)[0]


def is_video(latent: Tensor, window: object = None) -> bool:
    """Whether frames mean anything in a latent, or in the one whose context ``window`` it is; models of pictures may
    have a frame, too."""
    return latent.ndim == 5 and (latent.shape[2] > 1 or window is not None)


def same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two negatives act in the same places; every node makes a mask of its own out of the one it was given."""
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a)))


def count_tokens(negatives: Sequence[Negative]) -> int:
    return sum(n.tokens.shape[1] for n in negatives)


def step_conds(
    groups: Sequence[Sequence[Negative]],
    scales: Sequence[float],
    offset: float,
    latent: Tensor,
    pooled: bool = False,
    window: tuple[int, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """What each of a step's entries (given by its negatives) adds to its ``model_conds``, so that all share one batch.

    Every entry gets the same keys and shapes: negatives shorter than the longest are padded with tokens of bias +inf,
    and an entry without any is all padding. ``scales``: one, or one for each picture of the batch. ``window``: see
    ``_video_mask``.

    Keys and shapes (b: 1 or more, n: tokens, m: masks, 1 or n):

    - ``vsf_tokens`` [b, n, C]
    - ``vsf_alpha``  [scales, n, 1]: scale times each negative's strength
    - ``vsf_bias``   [1, 1, n or 1]: beta per token; one column where an entry's tokens all share it
    - ``vsf_mask``   [b, m, (frames,) h, w], where a negative has a mask: in latent size, cut by ComfyUI as areas are
    - ``vsf_mixed``  constant: some entry has padding
    - ``vsf_pooled`` [b, 1, C'], with ``pooled``: the negative's pooled embedding, NaN where an entry has none
    """
    length = max(map(count_tokens, groups))
    width = next(n.tokens.shape[-1] for group in groups for n in group)
    mixed = any(count_tokens(group) != length for group in groups)
    shared_bias = all(count_tokens(group) in (0, length) for group in groups)
    in_time = is_video(latent, window)
    masked = any(n.mask is not None or (in_time and n.frames != (0.0, 1.0)) for group in groups for n in group)
    shared_mask = shared_bias and all(
        same_mask(n.mask, group[0].mask) and (n.frames == group[0].frames or not in_time)
        for group in groups
        for n in group[1:]
    )

    out = []
    for group in groups:
        tokens = _padded([n.tokens for n in group], length, width, latent)
        alpha = torch.zeros(len(scales), length, 1)
        bias = torch.full((1, 1, length), torch.inf, device=latent.device)
        for n, span in _spans(group):
            alpha[:, span] = torch.tensor(scales, dtype=torch.float64)[:, None, None] * n.strength
            bias[..., span] = offset
        conds: dict[str, Any] = {
            "tokens": comfy.conds.CONDRegular(tokens),
            "alpha": comfy.conds.CONDRegular(alpha.to(latent.device)),
            "bias": comfy.conds.CONDRegular(bias[..., :1] if shared_bias else bias),
            "mixed": comfy.conds.CONDConstant(mixed),
        }
        if masked:
            mask = (_video_mask if in_time else _latent_mask)(group, length, latent, window)
            mask = mask.unflatten(2, (-1, mask.shape[2])) if mask.ndim < latent.ndim else mask
            conds["mask"] = comfy.conds.CONDNoiseShape(mask[:, :1].clone() if shared_mask else mask)  # no view of all
        if pooled:
            conds["pooled"] = comfy.conds.CONDRegular(_pooled(group, groups).to(latent)[:, None])
        out.append({PREFIX + key: value for key, value in conds.items()})
    return out


def unmistakable(ours: dict, positive: int, taken: set[int], multiple: int) -> dict:
    """``ours`` with N padded until no other attention of the model has as many keys as the text stream.

    Where a call is known by its number of keys alone, the picture's own tokens (self-attention) and CLIP-vision tokens
    must not count the same. ``taken``: how many keys those have; ``multiple``: to what the model fills its text up.
    """
    n = ours["tokens"].shape[1]
    positive += -positive % multiple  # the model goes on filling up P alone if N before it comes out even
    extra = next(e for e in itertools.count(-n % multiple, multiple) if positive + n + e not in taken)
    return lengthened(ours, extra) if extra else ours


def lengthened(ours: dict, extra: int) -> dict:
    """``ours`` with ``extra`` tokens of padding at the end of N, and a bias per token."""
    length = ours["tokens"].shape[1]
    bias = ours["bias"].expand(-1, -1, length)
    ours = {
        **ours,
        "tokens": F.pad(ours["tokens"], (0, 0, 0, extra)),
        "alpha": F.pad(ours["alpha"], (0, 0, 0, extra)),
        "bias": F.pad(bias, (0, extra), value=torch.inf),
        "mixed": True,
    }
    if "mask" in ours:
        mask = ours["mask"].expand(-1, length, *(-1,) * (ours["mask"].ndim - 2))
        ours["mask"] = torch.cat([mask, mask[:, -1:].expand(-1, extra, *(-1,) * (mask.ndim - 2))], dim=1)
    return ours


def _pooled(group: Sequence[Negative], groups: Sequence[Sequence[Negative]]) -> Tensor:
    """The one negative's pooled embedding [b, C'], or NaN in its place."""
    some = next(n.pooled for other in groups for n in other if n.pooled is not None)
    return group[0].pooled if group and group[0].pooled is not None else torch.full_like(some[:1], torch.nan)


def _batch(tensors: Sequence[Tensor], latent: Tensor) -> int:
    """1 where that is all, else the latent's: each tensor is then repeated in turn, as ComfyUI does with prompts."""
    return latent.shape[0] if any(t.shape[0] > 1 for t in tensors) else 1


def _padded(tokens: Sequence[Tensor], length: int, width: int, latent: Tensor) -> Tensor:
    """[b, length, width], where and as precise as the latent: ``tokens`` one after the other, then zeros."""
    batch = _batch(tokens, latent)
    rest = latent.new_zeros(batch, length - sum(t.shape[1] for t in tokens), width)
    return torch.cat([*(comfy.utils.repeat_to_batch_size(t.to(latent), batch) for t in tokens), rest], dim=1)


def in_frames(window: tuple[float, float], frames: int) -> list[bool]:
    """Which latent frames of a video a negative's ``frames`` cover: those whose middle lies inside."""
    return [window[0] <= (frame + 0.5) / frames < window[1] for frame in range(frames)]


def latent_frames_of(frames: int, latent_frames: int) -> Tensor:
    """int [frames]: which latent frame each of a video's frames lies in. Video VAEs are causal: the first latent frame
    is one frame, each further one is as many as the next (4 in Wan and HunyuanVideo, 8 in LTX-Video)."""
    last = max(frames, latent_frames, 2) - 1
    return (torch.arange(frames) * (latent_frames - 1) + last - 1) // last


def _latent_mask(group: Sequence[Negative], length: int, latent: Tensor, _window: object = None) -> Tensor:
    """[b, length, h, w]: each token's mask in the latent's resolution; 1 where there is none."""
    size = latent.shape[-2:]
    batch = _batch([n.mask for n in group if n.mask is not None], latent)
    mask = torch.ones(batch, length, *size)
    for n, span in _spans(group):
        if n.mask is not None:
            small = F.interpolate(n.mask[:, None], size=size, mode="area")
            mask[:, span] = comfy.utils.repeat_to_batch_size(small, batch)
    return mask.to(latent.device)


def _video_mask(
    group: Sequence[Negative], length: int, latent: Tensor, window: tuple[int, Sequence[int]] | None
) -> Tensor:
    """[1, length, frames, h, w]: each token's mask and frame window, over the whole video's latent frames.

    ``window``: how many frames the whole latent has and which of them ``latent`` shows (a context window).
    """
    size = latent.shape[-2:]
    frames, shown = window or (latent.shape[2], range(latent.shape[2]))
    mask = torch.ones(1, length, frames, *size)
    for n, span in _spans(group):
        if n.mask is not None:
            mask[:, span] = _in_latent_frames(n.mask, frames, size)
        for frame, inside in enumerate(in_frames(n.frames, frames)):
            if not inside:
                mask[:, span, frame] = 0.0
    return mask[:, :, list(shown)].to(latent.device)


def _in_latent_frames(mask: Tensor, latent_frames: int, size: torch.Size) -> Tensor:
    """A mask [frames, H, W] as [latent frames, h, w]: each latent frame has the mean over its own frames."""
    frames = mask.shape[0]
    if frames <= latent_frames:
        return F.interpolate(mask[None, None], size=(latent_frames, *size), mode="area")[0, 0]
    small = F.interpolate(mask[:, None], size=size, mode="area")[:, 0].cpu()
    at = latent_frames_of(frames, latent_frames)
    total = torch.zeros(latent_frames, *size).index_add_(0, at, small)
    return total / at.bincount()[:, None, None]
