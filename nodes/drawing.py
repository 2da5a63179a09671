"""Numbers as colours. torch alone."""

import torch
from torch import Tensor

_STOPS = (0x000004, 0x210C4A, 0x57106E, 0x8A226A, 0xBC3754, 0xE45932, 0xF98C0A, 0xF9C932, 0xFCFFA4)
"""The colour map "inferno" at equal distances, as sRGB: lightness rises evenly from black to yellow."""


def heat_colors(values: Tensor) -> Tensor:
    """``values`` [...] in 0..1 (clamped) as colours [..., 3], sRGB in 0..1: black is 0, light yellow is 1."""
    table = torch.tensor([[stop >> shift & 255 for shift in (16, 8, 0)] for stop in _STOPS]) / 255
    at = values.clamp(0, 1) * (len(_STOPS) - 1)
    low = at.long().clamp(max=len(_STOPS) - 2)
    return torch.lerp(table[low], table[low + 1], (at - low)[..., None])


def laid_over(image: Tensor, values: Tensor, opacity: float) -> Tensor:
    """The heat map of ``values`` [n, H, W] in 0..1 over ``image`` [n, H, W, 3], the more opaque the hotter.

    What is at 0 keeps the picture; at 1 the colour's weight is ``opacity``.
    """
    return torch.lerp(image, heat_colors(values), values.clamp(0, 1)[..., None] * opacity)
