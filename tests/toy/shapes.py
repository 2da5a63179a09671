"""Smooth pictures of simple shapes, many at a time: signed distances, coverage by distance, and soft light.

Lengths are pixels of a picture of SIZE. A shape lives in axes of its own: u to the right, [n, 1, SIZE] for each of n
pictures, and v upward, [n, SIZE, 1]. All are torch's arrays, on any device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from scenes import Colour
from torch import Tensor

SIZE = 128
BULGE = 12.0
"""How far inside its edge a shape is as light as in its middle, in pixels."""
LIGHT = 0.11
"""How much lighter the upper left of a shape is, and how much darker its lower right."""
RIM = 0.16
"""How much darker a shape is at its edge, as if it were round."""

Shape = tuple[str | float, ...]
"""A kind and its numbers:

box u0 v0 u1 v1 r: corners rounded by r;  disc u v ru rv: an ellipse;  ring u v r w: of radius r, w thick;
path r u v u v ...: a line of half-thickness r through points;  poly r u v u v ...: a polygon, grown and rounded by r.
"""


@dataclass(frozen=True)
class Layer:
    """Shapes of one colour, painted as one. glow: lit by itself, without shade; hint: too small to tell the part by."""

    colour: Colour
    shapes: tuple[Shape, ...]
    glow: bool = False
    hint: bool = False


def grid(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """x to the right of each column's middle, [1, 1, SIZE], and y upward of each row's, [1, SIZE, 1]."""
    at = torch.arange(SIZE, dtype=torch.float32, device=device) + 0.5
    return at.view(1, 1, SIZE), (SIZE - at).view(1, SIZE, 1)


def distance(shapes: Sequence[Shape], u: Tensor, v: Tensor) -> Tensor:
    """Distance of the points (u, v) to the union of the shapes, negative inside."""
    return reduce(torch.minimum, [_distance(shape, u, v) for shape in shapes])


def _distance(shape: Shape, u: Tensor, v: Tensor) -> Tensor:
    kind, *rest = shape
    numbers = [float(number) for number in rest]
    match kind, numbers:
        case "box", [u0, v0, u1, v1, r]:
            a = (u - (u0 + u1) / 2).abs() - ((u1 - u0) / 2 - r)
            b = (v - (v0 + v1) / 2).abs() - ((v1 - v0) / 2 - r)
            outside = (a.clamp(min=0).square() + b.clamp(min=0).square()).sqrt()
            return outside + torch.maximum(a, b).clamp(max=0) - r
        case "disc", [u0, v0, ru, rv]:
            if ru == rv:
                return ((u - u0).square() + (v - v0).square()).sqrt() - ru
            a, b = (u - u0) / ru, (v - v0) / rv  # f / |grad f|: exact at the edge
            length = (a.square() + b.square()).sqrt().clamp(min=1e-3)
            slope = ((a / ru).square() + (b / rv).square()).sqrt().clamp(min=1e-4)
            return (length * (length - 1) / slope).clamp(min=-min(ru, rv))
        case "ring", [u0, v0, r, w]:
            return (((u - u0).square() + (v - v0).square()).sqrt() - r).abs() - w / 2
        case "path", [r, *points]:
            return _segments(points, u, v, closed=False)[0].sqrt() - r
        case "poly", [r, *points]:
            near, inside = _segments(points, u, v, closed=True)
            return torch.where(inside, -near.sqrt(), near.sqrt()) - r
    raise ValueError(shape)


def _segments(points: Sequence[float], u: Tensor, v: Tensor, closed: bool) -> tuple[Tensor, Tensor]:
    """Squared distance to a line through the points, and whether the closed line goes round (even-odd)."""
    corners = list(zip(points[::2], points[1::2], strict=True))
    ends = [*corners[1:], corners[0]] if closed else corners[1:]
    near, inside = torch.full((), 1e9, device=u.device), torch.zeros((), dtype=torch.bool, device=u.device)
    for (u0, v0), (u1, v1) in zip(corners, ends, strict=False):
        a, b, du, dv = u - u0, v - v0, u1 - u0, v1 - v0
        t = ((a * du + b * dv) / (du * du + dv * dv)).clamp(0, 1)
        near = torch.minimum(near, (a - t * du).square() + (b - t * dv).square())
        if closed and dv:
            inside = inside ^ (((v0 > v) != (v1 > v)) & (a < du * b / dv))
    return near, inside


class Canvas:
    """n pictures [n, 3, SIZE, SIZE] in 0..1 that are painted on."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.pixels = torch.zeros(n, 3, SIZE, SIZE, device=device)

    def paint(self, cover: Tensor, colour: Tensor) -> None:
        """Lays a colour [n, 3, 1 or SIZE, 1 or SIZE] over what is there, as far as ``cover`` [n, SIZE, SIZE] says."""
        self.pixels += cover.unsqueeze(1) * (colour - self.pixels)

    def lay(
        self, layer: Layer, u: Tensor, v: Tensor, grow: Tensor, colour: Tensor, rows: Tensor, seen: Tensor, part: bool
    ) -> None:
        """Paints a layer with a colour [rows, 3, 1, 1] in some of the pictures, whose numbers ``rows`` are.

        u, v: the layer's axes in those, whose unit is ``grow`` [rows, 1, 1] pixels. seen [n, SIZE, SIZE]: how much of a
        pixel shows a part; what is laid is one, or hides it.
        """
        if not len(rows):
            return
        across, down = window(layer.shapes, u, v)
        u, v = u[:, :, across], v[:, down]
        d = distance(layer.shapes, u, v) * grow
        cover = (0.5 - d).clamp(0, 1)
        shown = colour if layer.glow else colour * shade(layer, d, u, v).unsqueeze(1)
        here = self.pixels[rows, :, down, across]
        self.pixels[rows, :, down, across] = torch.lerp(here, shown, cover.unsqueeze(1))
        seen[rows, down, across] = torch.lerp(seen[rows, down, across], torch.full_like(cover, part), cover)


def window(shapes: Sequence[Shape], u: Tensor, v: Tensor) -> tuple[slice, slice]:
    """The columns and the rows in which shapes may be, in any of the pictures."""
    (u0, u1), (v0, v1) = extent(shapes)
    slices = []
    for at, low, high in ((u[:, 0], u0, u1), (-v[:, :, 0], -v1, -v0)):
        step = at[:, 1] - at[:, 0]
        first = int(((low - at[:, 0]) / step).min()) - 1
        last = int(((high - at[:, 0]) / step).max()) + 3
        slices.append(slice(max(0, min(first, SIZE - 1)), max(1, min(last, SIZE))))
    return slices[0], slices[1]


def shade(layer: Layer, d: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """What the light makes of a colour, about 1: lighter towards the upper left, darker at the edge."""
    (u0, u1), (v0, v1) = extent(layer.shapes)
    across = ((u - (u0 + u1) / 2) / max(u1 - u0, 1) - (v - (v0 + v1) / 2) / max(v1 - v0, 1)).clamp(-1, 1)
    depth = (-d / min(BULGE, 0.35 * min(u1 - u0, v1 - v0) + 1)).clamp(0, 1)
    return 1 - LIGHT * across - RIM * (1 - depth).square()


def extent(shapes: Sequence[Shape]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The least and the largest u and v of the shapes."""
    us, vs = [], []
    for kind, *rest in shapes:
        numbers = [float(number) for number in rest]
        if kind == "box":
            us, vs = [*us, *numbers[0:3:2]], [*vs, *numbers[1:4:2]]
        elif kind in ("disc", "ring"):
            u, v, ru, rv = numbers
            ru, rv = (ru + rv / 2, ru + rv / 2) if kind == "ring" else (ru, rv)
            us, vs = [*us, u - ru, u + ru], [*vs, v - rv, v + rv]
        else:
            r, points = numbers[0], numbers[1:]
            us, vs = (
                [*us, min(points[::2]) - r, max(points[::2]) + r],
                [*vs, min(points[1::2]) - r, max(points[1::2]) + r],
            )
    return (min(us), max(us)), (min(vs), max(vs))
