"""comfy-kitchen's INT8 attention, as far as its rounding goes: keys and queries in 8 bits by blocks of 64 tokens,
values in 8 bits on one scale a channel over all keys. Probabilities stay as they are."""

import torch
from torch import Tensor

BLOCK = 64


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    scale = scale.clamp_min(1e-12)
    return (x / scale).round().clamp(-127, 127) * scale


def by_blocks(x: Tensor) -> Tensor:
    scales = [part.abs().amax(dim=(2, 3), keepdim=True) / 127 for part in x.split(BLOCK, dim=2)]
    return torch.cat([rounded(part, s) for part, s in zip(x.split(BLOCK, dim=2), scales, strict=True)], dim=2)


def int8_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """[B, H, L, D], with an additive mask or none."""
    logits = by_blocks(q.float()) @ by_blocks(k.float()).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if mask is None else logits + mask.float()
    values = v.float()
    return (logits.softmax(-1) @ rounded(values, values.abs().amax(dim=2, keepdim=True) / 127)).to(q.dtype)
