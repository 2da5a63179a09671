"""A picture world with countable truth: scenes of eight objects, 128x128 and smooth, and what may be said of them.

Every object has a body and two or three essential parts. A part is drawn in 97.5% of the scenes whether or not the
caption names it; captions never say "without". Each part has a colour that nothing else in its object has, so that
pixels of that colour say whether it is there: the first layer of a form that is no hint has it. Some scenes show parts
alone ("a hat"), or a body and but one part, so that a part's word means something by itself.

Lengths are pixels. Shapes live in the object's own axes: u to the right from its middle, v upward from the ground.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scenes import Array, Cast, Colour, Mask, Part, Scenes, Thing
from shapes import SIZE, Canvas, Layer, Shape, distance, grid
from torch import Tensor

SPEED = 7.0
"""How far an object in a clip glides at most between two latent frames, in pixels."""
ALONE = 0.3
"""How often a scene shows some parts alone, or with a body and no other part; its caption names just these."""
SPREAD = 0.03
"""Half-width of the uniform variation of a drawn thing's colour, each channel in 0..1."""

RED, BLACK, BROWN, WHITE = (0.86, 0.12, 0.14), (0.10, 0.10, 0.12), (0.50, 0.30, 0.14), (0.97, 0.97, 0.99)
GLASS, ORANGE, PURPLE, BLUE = (0.16, 0.44, 0.90), (1.00, 0.55, 0.10), (0.47, 0.22, 0.68), (0.16, 0.36, 0.90)
YELLOW, GREY, DARK = (1.00, 0.84, 0.20), (0.62, 0.64, 0.70), (0.20, 0.16, 0.20)


def mirrored(*shapes: Shape) -> tuple[Shape, ...]:
    """Discs and boxes, and the same on the left."""
    out = list(shapes)
    for kind, *numbers in shapes:
        u0, *rest = (float(number) for number in numbers)
        out.append((kind, -rest[1], rest[0], -u0, *rest[2:]) if kind == "box" else (kind, -u0, *rest))
    return tuple(out)


def one(colour: Colour, *shapes: Shape) -> Layer:
    return Layer(colour, shapes)


def hint(colour: Colour, *shapes: Shape) -> Layer:
    return Layer(colour, shapes, hint=True)


def window(u0: float, v0: float, u1: float, v1: float, r: float, colour: Colour) -> tuple[Layer, ...]:
    """A pane in a white frame, with bars."""
    u, v = (u0 + u1) / 2, (v0 + v1) / 2
    return (
        hint(WHITE, ("box", u0 - 2, v0 - 2, u1 + 2, v1 + 2, r + 1)),
        one(colour, ("box", u0, v0, u1, v1, r)),
        hint(WHITE, ("path", 0.7, u, v0, u, v1), ("path", 0.7, u0, v, u1, v)),
    )


def _house() -> Thing:
    brick, frame = (0.78, 0.26, 0.22), (0.30, 0.14, 0.42)
    chimney = {
        "tall": (one(brick, ("box", 11, 44, 23, 80, 1)), hint((0.55, 0.18, 0.17), ("box", 9, 77, 25, 82, 1))),
        "wide": (one(brick, ("box", 8, 44, 25, 74, 1)), hint((0.55, 0.18, 0.17), ("box", 6, 71, 27, 76, 1))),
    }
    knob = hint(WHITE, ("disc", 15, 11, 1.7, 1.7))
    door = {
        "tall": (hint(frame, ("box", 0, -1, 20, 29, 2)), one(PURPLE, ("box", 2, 0, 18, 27, 1)), knob),
        "round": (hint(frame, ("disc", 10, 12, 11.5, 14.5)), one(PURPLE, ("disc", 10, 12, 9.5, 12.5)), knob),
    }
    panes = {"square": window(-24, 10, -6, 28, 0.5, GLASS), "round": window(-25, 9, -5, 29, 9.9, GLASS)}
    return Thing(
        "house",
        (0.96, 0.86, 0.66),
        (
            one((0.96, 0.86, 0.66), ("box", -30, 0, 30, 42, 1)),
            one((0.30, 0.46, 0.56), ("poly", 2, -37, 38, 37, 38, 0, 68)),
        ),
        (
            Part("chimney", brick, (16, 44), chimney, shift=(1.5, 0), behind=True),
            Part("door", PURPLE, (10, 0), door, shift=(2, 0)),
            Part("window", GLASS, (-15, 18), panes, shift=(1, 2)),
        ),
    )


def _tree() -> Thing:
    leaf = (0.20, 0.62, 0.24)
    crown = (("disc", 0, 68, 26, 24), ("disc", -22, 56, 18, 17), ("disc", 22, 56, 18, 17), ("disc", 0, 54, 24, 17))

    def apples(r: float, *places: tuple[float, float]) -> tuple[Layer, ...]:
        return (
            one(RED, *(("disc", u, v, r, r) for u, v in places)),
            hint((1.0, 0.62, 0.60), *(("disc", u - r * 0.35, v + r * 0.35, r * 0.22, r * 0.22) for u, v in places)),
        )

    rope = hint((0.86, 0.76, 0.56), ("path", 0.9, 20, 12, 20, 48), ("path", 0.9, 36, 12, 36, 48))
    swing = {
        "low": (rope, one(ORANGE, ("box", 15, 4, 41, 13, 2.5))),
        "high": (rope, one(ORANGE, ("box", 14, 17, 42, 26, 3))),
    }
    return Thing(
        "tree",
        leaf,
        (one((0.47, 0.30, 0.16), ("poly", 1, -8, 0, 8, 0, 5, 46, -5, 46)), one(leaf, *crown)),
        (
            Part("swing", ORANGE, (28, 46), swing, shift=(2, 0), behind=True),
            Part(
                "apples",
                RED,
                (0, 60),
                {
                    "big": apples(6.5, (-20, 56), (-4, 74), (4, 52), (20, 64)),
                    "small": apples(4.5, (-24, 60), (-9, 50), (-10, 78), (5, 64), (16, 76), (24, 55)),
                },
                shift=(2, 2),
            ),
        ),
    )


def _snowman() -> Thing:
    silk = (0.50, 0.16, 0.62)
    eyes = ("disc", -6, 62, 2.2, 2.6), ("disc", 6, 62, 2.2, 2.6)
    buttons = ("disc", 0, 28, 2.2, 2.2), ("disc", 0, 18, 2.2, 2.2)
    return Thing(
        "snowman",
        (0.93, 0.95, 0.99),
        (
            one((0.93, 0.95, 0.99), ("disc", 0, 22, 27, 25)),
            one((0.93, 0.95, 0.99), ("disc", 0, 58, 19, 18)),
            hint(BLACK, *eyes, *buttons),
        ),
        (
            Part(
                "hat",
                silk,
                (0, 71),
                {
                    "tall": (one(silk, ("box", -13, 70, 13, 96, 2), ("box", -22, 69, 22, 75, 2.5)),),
                    "pointed": (one(silk, ("poly", 2, -17, 70, 17, 70, 3, 97)), hint(WHITE, ("disc", 3, 99, 4, 4))),
                },
                shift=(2, 0),
            ),
            Part(
                "scarf",
                RED,
                (0, 43),
                {
                    "long": (one(RED, ("path", 4.5, -15, 45, -6, 41, 6, 41, 15, 45), ("path", 4.2, 10, 42, 13, 20)),),
                    "thick": (one(RED, ("path", 7.5, -13, 46, -5, 42, 5, 42, 13, 46)),),
                },
                shift=(0.5, 1),
            ),
            Part(
                "nose",
                ORANGE,
                (0, 56),
                {
                    "long": (one(ORANGE, ("poly", 1.5, -3, 60, -3, 52, 26, 53)),),
                    "round": (one(ORANGE, ("disc", 0, 54, 7, 6.5)),),
                },
                shift=(1, 1),
            ),
        ),
    )


def _car() -> Thing:
    def wheels(r: float) -> tuple[Layer, ...]:
        return (
            one(BLACK, *mirrored(("disc", 23, r, r, r))),
            hint(GREY, *mirrored(("disc", 23, r, r * 0.45, r * 0.45))),
        )

    body = (0.16, 0.42, 0.90)
    luggage = (0.60, 0.36, 0.16)
    strap, glass = (0.84, 0.26, 0.22), (1.00, 0.93, 0.52)
    return Thing(
        "car",
        body,
        (
            one(body, ("poly", 3, -18, 28, -12, 46, 12, 46, 24, 28)),
            one(body, ("box", -43, 10, 43, 33, 8)),
            hint(YELLOW, ("disc", 39, 24, 3, 3.6)),
        ),
        (
            Part("wheels", BLACK, (0, 0), {"big": wheels(13), "small": wheels(9.5)}, shift=(2, 0)),
            Part(
                "window",
                glass,
                (3, 38),
                {
                    "wide": (one(glass, ("poly", 1, -16, 31, -11, 43, 11, 43, 20, 31)),),
                    "round": (one(glass, ("disc", 2, 37, 9, 7.5)),),
                },
                shift=(1, 0),
            ),
            Part(
                "luggage",
                luggage,
                (0, 49),
                {
                    "square": (
                        one(luggage, ("box", -14, 48, 13, 66, 2)),
                        hint(strap, ("path", 1.2, -7, 48.5, -7, 65.5), ("path", 1.2, 6, 48.5, 6, 65.5)),
                    ),
                    "flat": (
                        one(luggage, ("box", -19, 48, 18, 58, 2)),
                        hint(strap, ("path", 1.2, -9, 48.5, -9, 57.5), ("path", 1.2, 8, 48.5, 8, 57.5)),
                    ),
                },
                shift=(1.5, 0),
            ),
        ),
    )


def _bicycle() -> Thing:
    frame = (0.92, 0.16, 0.50)
    leather, wicker = (0.46, 0.26, 0.12), (0.96, 0.74, 0.22)

    def wheels(w: float) -> tuple[Layer, ...]:
        spokes = []
        for u in (-25.0, 27.0):
            spokes += [("path", 0.5, u - 17, 20, u + 17, 20), ("path", 0.5, u, 3, u, 37)]
        return (hint(GREY, *spokes), one(BLACK, ("ring", -25, 20, 18, w), ("ring", 27, 20, 18, w)))

    bars = (
        *(("path", 2.7, -25, 20, -9, 44), ("path", 2.7, -9, 44, 17, 46), ("path", 2.7, 17, 46, -2, 19)),
        *(("path", 2.7, -25, 20, -2, 19), ("path", 2.7, -2, 19, -11, 50), ("path", 2.7, 27, 20, 16, 58)),
    )
    return Thing(
        "bicycle",
        frame,
        (one(frame, *bars), hint((0.34, 0.34, 0.40), ("path", 2.7, 16, 58, 8, 60), ("disc", -2, 19, 4, 4))),
        (
            Part("wheels", BLACK, (0, 20), {"thin": wheels(4.6), "thick": wheels(7.5)}, shift=(1, 0), behind=True),
            Part(
                "saddle",
                leather,
                (-11, 51),
                {
                    "flat": (one(leather, ("path", 3.4, -22, 53, -1, 52)),),
                    "round": (one(leather, ("disc", -12, 54, 9.5, 6.5)),),
                },
                shift=(1, 1),
            ),
            Part(
                "basket",
                wicker,
                (30, 50),
                {
                    "square": (
                        one(wicker, ("box", 21, 42, 42, 59, 2)),
                        hint((0.78, 0.54, 0.12), ("path", 0.7, 22, 53, 41, 53)),
                    ),
                    "deep": (one(wicker, ("poly", 1.5, 24, 37, 37, 37, 42, 59, 20, 59)),),
                },
                shift=(1, 1),
            ),
        ),
    )


def _cake() -> Thing:
    dough, chocolate = (0.98, 0.66, 0.74), (0.36, 0.19, 0.10)
    drips = (("path", 4.2, -22, 30, -22, 20), ("path", 4.2, -4, 30, -4, 16), ("path", 4.2, 15, 30, 15, 21))

    def candles(*at: float, w: float, top: float) -> tuple[Layer, ...]:
        return (
            one(BLUE, *(("box", u - w, 33, u + w, top, 1) for u in at)),
            Layer(YELLOW, tuple(("disc", u, top + 4.5, 2.8, 4.2) for u in at), glow=True, hint=True),
        )

    return Thing(
        "cake",
        dough,
        (one((0.80, 0.84, 0.90), ("box", -44, -2, 44, 3, 2.5)), one(dough, ("box", -34, 2, 34, 36, 4))),
        (
            Part(
                "candles",
                BLUE,
                (0, 35),
                {"tall": candles(-22, 0, 22, w=3.5, top=58), "thick": candles(-18, 18, w=5.5, top=51)},
                shift=(2, 0),
                behind=True,
            ),
            Part(
                "icing",
                chocolate,
                (0, 36),
                {
                    "thick": (one(chocolate, ("box", -35, 25, 35, 37.5, 4)),),
                    "dripping": (one(chocolate, ("box", -35, 29, 35, 37.5, 4), *drips),),
                },
            ),
            Part(
                "cherries",
                RED,
                (0, 12),
                {
                    "big": (one(RED, *(("disc", u, 10, 6, 6) for u in (-22, 0, 22))),),
                    "small": (one(RED, *(("disc", u, 9, 4.2, 4.2) for u in (-26, -13, 0, 13, 26))),),
                },
                shift=(1.5, 0.5),
            ),
        ),
    )


def _cat() -> Thing:
    fur, ear, tail, silk = (0.97, 0.88, 0.74), (0.40, 0.22, 0.16), (0.93, 0.56, 0.20), (0.16, 0.58, 0.80)
    pink = (0.95, 0.60, 0.62)
    curls = {
        "long": (one(tail, ("path", 5.2, 16, 8, 30, 8, 38, 15, 40, 27, 37, 40, 40, 50)),),
        "curly": (one(tail, ("path", 5.2, 16, 8, 30, 7, 39, 13, 40, 24, 33, 30, 27, 25)),),
    }
    ears = {
        "pointed": (
            one(ear, ("poly", 2, -21, 62, -4, 76, -20, 90), ("poly", 2, 21, 62, 4, 76, 20, 90)),
            hint(pink, ("poly", 0.5, -16, 72, -11, 75, -16, 80), ("poly", 0.5, 16, 72, 11, 75, 16, 80)),
        ),
        "round": (one(ear, *mirrored(("disc", 18, 77, 10.5, 10.5))), hint(pink, *mirrored(("disc", 18, 78, 4.5, 4.5)))),
    }
    bow = {
        "big": (one(silk, ("poly", 2, 0, 39, -15, 47, -15, 31), ("poly", 2, 0, 39, 15, 47, 15, 31)),),
        "round": (one(silk, ("disc", -8, 39, 7.5, 6.5), ("disc", 8, 39, 7.5, 6.5)),),
    }
    face = (
        hint((0.24, 0.42, 0.22), *mirrored(("disc", 8.5, 60, 3, 3.8))),
        hint(pink, ("poly", 1, -2.2, 54, 2.2, 54, 0, 51.5)),
        hint((0.55, 0.42, 0.36), ("path", 0.6, 0, 51, -5, 47.5), ("path", 0.6, 0, 51, 5, 47.5)),
    )
    paws = hint((1.0, 0.97, 0.92), *mirrored(("disc", 9, 3, 7.5, 5)))
    return Thing(
        "cat",
        fur,
        (one(fur, ("disc", 0, 20, 22, 22)), one(fur, ("disc", 0, 57, 23, 20)), paws, *face),
        (
            Part("tail", tail, (16, 8), curls, shift=(1, 1), behind=True),
            Part("ears", ear, (0, 66), ears, shift=(0.5, 1), behind=True),
            Part("bow", silk, (0, 39), bow, shift=(1, 1)),
        ),
    )


def _boat() -> Thing:
    hull, cloth = (0.60, 0.30, 0.14), (0.97, 0.42, 0.30)
    stripe, silk = (0.98, 0.93, 0.82), (0.08, 0.58, 0.32)
    return Thing(
        "boat",
        hull,
        (
            one((0.47, 0.30, 0.16), ("box", -2, 16, 2, 84, 1)),
            one(hull, ("poly", 2, -41, 20, 41, 20, 27, -4, -29, -4)),
            hint((0.95, 0.90, 0.80), ("box", -42, 17, 42, 21, 1.5)),
        ),
        (
            Part(
                "sail",
                cloth,
                (4, 26),
                {
                    "pointed": (
                        one(cloth, ("poly", 1, 5, 26, 38, 26, 5, 76)),
                        hint(stripe, ("poly", 0, 4, 38, 30.6, 38, 26.5, 44, 4, 44)),
                    ),
                    "square": (
                        one(cloth, ("poly", 1, 5, 28, 35, 31, 31, 66, 5, 70)),
                        hint(stripe, ("poly", 0, 4, 45, 34, 45, 33, 52, 4, 52)),
                    ),
                },
                shift=(0.5, 1),
            ),
            Part(
                "flag",
                silk,
                (-2, 78),
                {
                    "long": (one(silk, ("poly", 0.5, -2, 73, -2, 84, -14, 82, -27, 85, -27, 75, -14, 71)),),
                    "pointed": (one(silk, ("poly", 0.5, -2, 69, -2, 85, -22, 77)),),
                },
                shift=(0, 1),
            ),
            Part(
                "portholes",
                YELLOW,
                (0, 8),
                {
                    "big": (one(YELLOW, *(("disc", u, 8, 6, 6) for u in (-20, 0, 20))),),
                    "small": (one(YELLOW, *(("disc", u, 8, 4.2, 4.2) for u in (-24, -8, 8, 24))),),
                },
                shift=(1.5, 0.5),
            ),
        ),
        water=True,
    )


THINGS = (_house(), _tree(), _snowman(), _car(), _bicycle(), _cake(), _cat(), _boat())
BY_NAME = {thing.name: thing for thing in THINGS}

STYLES = ("", "at night", "at sunset")
STYLE_ODDS = (0.66, 0.17, 0.17)
SKY = ((0.36, 0.66, 0.96), (0.16, 0.18, 0.46), (0.45, 0.36, 0.68))
HORIZON = ((0.68, 0.87, 1.00), (0.38, 0.40, 0.72), (1.00, 0.70, 0.45))
GRASS = ((0.56, 0.80, 0.36), (0.28, 0.48, 0.42), (0.60, 0.64, 0.32))
WATER = ((0.22, 0.55, 0.82), (0.16, 0.32, 0.62), (0.46, 0.40, 0.66))
HILL = ((0.44, 0.70, 0.46), (0.26, 0.32, 0.54), (0.56, 0.44, 0.54))
SUN = ((1.00, 0.88, 0.30), (0.96, 0.95, 0.84), (1.00, 0.82, 0.44))
CLOUD = ((1.00, 1.00, 1.00), (0.50, 0.52, 0.76), (1.00, 0.84, 0.78))
LIGHTS = ((1.0, 1.0, 1.0), (0.84, 0.86, 0.98), (1.0, 0.92, 0.84))
"""What the light of each style makes of an object's colours."""

VALIDATION = ("tree", "car", "cake", "boat")
TEST = ("house", "snowman", "bicycle", "cat")
NUMBERS = 96

CAST = Cast(THINGS, STYLES, STYLE_ODDS, ALONE, NUMBERS)
pairs, sample_scenes, words = CAST.pairs, CAST.sample_scenes, CAST.words
caption, captions = CAST.caption, CAST.captions


@dataclass(frozen=True)
class Drawn:
    """Pictures [n, 3, SIZE, SIZE] in 0..1, and how much of each pixel shows a part, [n, 1, SIZE, SIZE]."""

    pictures: Tensor
    parts: Tensor


class _Pen:
    """Draws scenes; hands out their numbers in a fixed order."""

    def __init__(self, scenes: Scenes, device: torch.device | str) -> None:
        self.scenes, self.device, self.n = scenes, device, len(scenes)
        self.canvas, (self.x, self.y) = Canvas(self.n, device), grid(device)
        self.numbers = iter(torch.from_numpy(scenes.numbers).to(device).T[:, :, None, None])
        self.light = self.by_style(LIGHTS)

    def by_style(self, colours: tuple[Colour, ...]) -> Tensor:
        """[n, 3, 1, 1]"""
        return torch.tensor(colours, device=self.device)[torch.from_numpy(self.scenes.style)][:, :, None, None]

    def there(self, present: Mask) -> Tensor:
        """A column of the scenes as [n, 1, 1]."""
        return torch.from_numpy(present.astype(np.float32)).to(self.device)[:, None, None]

    def tint(self) -> Tensor:
        """[n, 3, 1, 1]"""
        return torch.stack([next(self.numbers) for _ in range(3)], 1) * SPREAD

    def soft(self, shapes: Sequence[Shape], u: Tensor, v: Tensor, width: float = 1.0) -> Tensor:
        """What shapes with an edge of this width cover."""
        return (0.5 - distance(shapes, u, v) / width).clamp(0, 1)

    def background(self) -> Tensor:
        """Sky, sun, clouds, hill and ground; gives the ground's height."""
        paint, numbers = self.canvas.paint, self.numbers
        sun, cloud, hill = (self.there(self.scenes.extras[:, k]) for k in range(3))
        ground = 27 + 5 * next(numbers)
        rise = ((self.y - ground) / (SIZE - ground)).clamp(0, 1).unsqueeze(1)
        low, high = self.by_style(HORIZON), self.by_style(SKY)
        self.canvas.pixels += low + rise.sqrt() * (high - low) + self.tint()
        stars = [("disc", u, v, 0.9, 0.9) for u, v in STARS]
        night = self.there(self.scenes.style == STYLES.index("at night"))
        paint(self.soft(stars, self.x, self.y) * night * 0.8, self.by_style((WHITE,) * 3))
        side = torch.where(next(numbers) > 0, 1.0, -1.0)
        u, v = self.x - 64 - side * (44 + 6 * next(numbers)), self.y - 107 - 6 * next(numbers)
        glow = self.soft((("disc", 0, 0, 15, 15),), u, v, 14) * 0.35
        paint(sun * glow, self.by_style(SUN))
        paint(sun * self.soft((("disc", 0, 0, 11, 11),), u, v), self.by_style(SUN) + self.tint())
        u, v = self.x - 64 + side * (36 + 10 * next(numbers)), self.y - 112 - 4 * next(numbers)
        puffs = (("disc", -12, 0, 9, 7), ("disc", 0, 4, 12, 10), ("disc", 13, 0, 9, 7), ("box", -18, -7, 19, 2, 4))
        paint(cloud * self.soft(puffs, u, v, 2.5), self.by_style(CLOUD) + self.tint())
        u = self.x - 64 - 44 * next(numbers)
        paint(
            hill * self.soft((("disc", 0, 0, 50, 20),), u, self.y - ground + 1, 1.5), self.by_style(HILL) + self.tint()
        )
        self._ground(ground)
        return ground

    def _ground(self, ground: Tensor) -> None:
        colour = self.by_style(WATER if self.scenes.thing.water else GRASS) + self.tint()
        near = ((ground - self.y) / 40).clamp(0, 1).unsqueeze(1)
        self.canvas.paint((ground - self.y + 0.5).clamp(0, 1), colour * (1.06 - 0.24 * near))
        if self.scenes.thing.water:
            depth = ground - self.y
            crest = torch.sin(self.x * 0.2 + depth * 0.5) * torch.sin(depth * 0.4)
            self.canvas.paint((crest - 0.4).clamp(0, 0.3) * (depth > 0), self.by_style((WHITE,) * 3))

    def thing(self, ground: Tensor, aside: Tensor) -> Tensor:
        """The object and its parts; gives what the parts cover."""
        scenes, numbers = self.scenes, self.numbers
        grow = 0.98 + 0.10 * next(numbers)
        self.u = (self.x - 62 - 9 * next(numbers) - aside) / grow
        self.v = (self.y - ground + (4 if scenes.thing.water else 10) + 3 * next(numbers)) / grow
        self.grow, body = grow, self.there(scenes.body)
        if not scenes.thing.water:
            shadow = self.soft((("disc", 0, 0, 40, 5),), self.u, self.v, 5)
            self.canvas.paint(0.28 * shadow * body, self.by_style((DARK,) * 3))
        seen = torch.zeros(self.n, SIZE, SIZE, device=self.device)
        self.parts(seen, behind=True)
        tint, rows = self.tint(), np.flatnonzero(scenes.body)
        for layer in scenes.thing.body:
            self.lay(layer, self.u, self.v, tint, rows, seen, part=False)
        self.parts(seen, behind=False)
        return seen

    def parts(self, seen: Tensor, behind: bool) -> None:
        for k, part in enumerate(self.scenes.thing.parts):
            if part.behind != behind:
                continue
            scale = 1 + 0.12 * next(self.numbers)
            u = (self.u - part.pivot[0] - part.shift[0] * next(self.numbers)) / scale + part.pivot[0]
            v = (self.v - part.pivot[1] - part.shift[1] * next(self.numbers)) / scale + part.pivot[1]
            tint = self.tint()
            for form, layers in enumerate(part.forms.values()):
                rows = np.flatnonzero(self.scenes.present[:, k] & (self.scenes.form[:, k] == form))
                for layer in layers:
                    self.lay(layer, u, v, tint, rows, seen, part=True)

    def lay(
        self, layer: Layer, u: Tensor, v: Tensor, tint: Tensor, rows: npt.NDArray[np.int64], seen: Tensor, part: bool
    ) -> None:
        at = torch.from_numpy(rows).to(self.device)
        colour = torch.tensor(layer.colour, device=self.device).view(1, 3, 1, 1).expand(len(rows), 3, 1, 1)
        colour = (colour if layer.glow else colour * self.light[at]) + tint[at]
        self.canvas.lay(layer, u[at], v[at], self.grow[at], colour, at, seen, part)


STARS = ((10, 118), (27, 98), (44, 121), (58, 106), (75, 116), (92, 100), (108, 121), (119, 104), (16, 78), (112, 82))


def draw(scenes: Scenes, aside: Array | float = 0.0, device: torch.device | str = "cpu") -> Drawn:
    """The scenes; the object stands ``aside`` [n] pixels to the right."""
    pen = _Pen(scenes, device)
    ground = pen.background()
    far = torch.as_tensor(aside, dtype=torch.float32, device=device).reshape(-1, 1, 1)
    seen = pen.thing(ground, far)
    return Drawn(pen.canvas.pixels.clamp(0, 1), seen.unsqueeze(1))


def draw_clips(scenes: Scenes, frames: int, device: torch.device | str = "cpu") -> Drawn:
    """Clips [n, 3, frames, SIZE, SIZE]: the object glides sideways, at most SPEED pixels a frame."""
    pace = SPEED * scenes.numbers[:, -1]
    drawn = [draw(scenes, pace * (k - (frames - 1) / 2), device) for k in range(frames)]
    return Drawn(torch.stack([d.pictures for d in drawn], 2), torch.stack([d.parts for d in drawn], 2))
