"""A picture world with countable truth: 32x32 scenes of eight objects, real captions, and detectors that count pixels.

Every object has a body and two or three essential parts. A part is drawn in 97.5% of the scenes whether or not the
caption names it; captions never say "without". Each part has one hue within its object, so that counting pixels of that
hue says whether it is there. Some scenes show parts alone ("a roof"), so that a part's word means something by itself.

Lengths are pixels. Shapes live in the object's own axes: u to the right from its middle, v upward from the ground.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scenes import Array, Cast, Colour, Mask, Part, Scenes, Thing

SIZE = 32
SPEED = 2.5
"""How far an object in a clip glides at most between two latent frames, in pixels."""
ALONE = 0.25
"""How often a scene shows some parts alone, or with a body and no other part; its caption names just these."""
SPREAD = 0.04
"""Half-width of the uniform variation of a drawn thing's colour, each channel in 0..1."""
TOLERANCE = 0.22
"""Distance in RGB within which a pixel counts as a palette colour."""

Shape = tuple[float | str, ...]


RED, BLACK, BROWN, WHITE = (0.82, 0.08, 0.12), (0.04, 0.04, 0.04), (0.45, 0.25, 0.08), (0.97, 0.97, 0.98)
CYAN, ORANGE, PURPLE, BLUE = (0.08, 0.86, 0.84), (1.00, 0.52, 0.02), (0.52, 0.08, 0.62), (0.10, 0.15, 0.92)

THINGS = (
    Thing(
        "house",
        (0.88, 0.73, 0.48),
        (("box", -7, 0, 7, 9),),
        (
            Part(
                "roof",
                (0.70, 0.10, 0.12),
                (0, 9),
                {"pointed": (("triangle", -9, 9, 9, 9, 0, 17),), "flat": (("box", -9, 9, 9, 12.5),)},
            ),
            Part(
                "door",
                PURPLE,
                (3, 0),
                {"tall": (("box", 1, 0, 5, 7),), "round": (("disc", 3, 2.6, 2.7),)},
                shift=(0.8, 0),
            ),
            Part(
                "window",
                CYAN,
                (-3.5, 5),
                {"square": (("box", -6, 2.4, -0.8, 7.6),), "wide": (("box", -6.4, 3.6, 0.4, 7.6),)},
                shift=(0.3, 0.8),
            ),
        ),
    ),
    Thing(
        "tree",
        (0.02, 0.52, 0.12),
        (("disc", 0, 13, 6.5), ("disc", -4, 11, 4), ("disc", 4, 11, 4)),
        (
            Part(
                "trunk",
                BROWN,
                (0, 0),
                {"thick": (("box", -2.2, 0, 2.2, 9),), "crooked": (("box", -3, 0, 0.5, 4), ("box", -1.2, 3, 2, 9))},
                shift=(1, 0),
                behind=True,
            ),
            Part(
                "apples",
                RED,
                (0, 12),
                {
                    "big": (("disc", -3.5, 12, 1.9), ("disc", 2.5, 15, 1.9), ("disc", 3.5, 10, 1.9)),
                    "small": (("disc", -4, 11, 1.3), ("disc", 0, 13, 1.3), ("disc", 4, 11, 1.3), ("disc", 1, 16, 1.3)),
                },
                shift=(0.7, 0.7),
            ),
        ),
    ),
    Thing(
        "snowman",
        WHITE,
        (("disc", 0, 5, 5.6), ("disc", 0, 13, 4.3)),
        (
            Part(
                "hat",
                PURPLE,
                (0, 16),
                {
                    "tall": (("box", -3.2, 16, 3.2, 22.4), ("box", -5.2, 15.6, 5.2, 17.6)),
                    "pointed": (("triangle", -5.2, 15.6, 5.2, 15.6, 0, 23),),
                },
                shift=(0.6, 0),
            ),
            Part(
                "scarf",
                RED,
                (0, 9.5),
                {
                    "long": (("box", -4.2, 8.4, 4.2, 10.4), ("box", 1.4, 4.4, 3.6, 9)),
                    "thick": (("box", -4.4, 7.6, 4.4, 10.6),),
                },
                shift=(0.3, 0.3),
            ),
            Part(
                "nose",
                ORANGE,
                (0, 13),
                {"long": (("box", -0.8, 11.4, 7.4, 14.6),), "round": (("disc", 0, 13, 2.9),)},
                shift=(0.4, 0.4),
            ),
        ),
    ),
    Thing(
        "car",
        (0.18, 0.30, 0.88),
        (("box", -9, 3, 9, 8.5), ("box", -5.5, 8, 5, 13.5)),
        (
            Part(
                "wheels",
                BLACK,
                (0, 2.5),
                {
                    "big": (("disc", -5, 2.8, 3.1), ("disc", 5, 2.8, 3.1)),
                    "small": (("disc", -5, 2.0, 2.2), ("disc", 5, 2.0, 2.2)),
                },
                shift=(0.6, 0),
            ),
            Part(
                "window",
                CYAN,
                (0, 11),
                {"wide": (("box", -4.2, 9, 3.8, 12.2),), "round": (("disc", 0, 10.6, 2.2),)},
                shift=(0.6, 0.2),
            ),
            Part(
                "lamps",
                ORANGE,
                (0, 6.4),
                {
                    "square": (("box", 6, 5, 9.6, 7.8), ("box", -9.6, 5, -7, 7.8)),
                    "round": (("disc", 8, 6.4, 1.8), ("disc", -8, 6.4, 1.8)),
                },
                shift=(0, 0.4),
            ),
        ),
    ),
    Thing(
        "bicycle",
        (0.93, 0.10, 0.50),
        (
            ("line", -6, 4, -2, 10, 1.1),
            ("line", -2, 10, 5, 10, 1.1),
            ("line", 5, 10, -1, 4, 1.1),
            ("line", -6, 4, -1, 4, 1.1),
            ("line", 4, 13, 7, 4, 1.1),
        ),
        (
            Part(
                "wheels",
                BLACK,
                (0, 4),
                {
                    "thin": (("ring", -6.2, 4, 2.6, 4.2), ("ring", 6.6, 4, 2.6, 4.2)),
                    "thick": (("ring", -6.2, 4, 1.6, 4.2), ("ring", 6.6, 4, 1.6, 4.2)),
                },
                shift=(0.4, 0),
                behind=True,
            ),
            Part(
                "saddle",
                BROWN,
                (-2.6, 11.5),
                {"flat": (("box", -6.4, 10.6, 1.2, 14),), "round": (("disc", -2.6, 12.6, 3.1),)},
                shift=(0.4, 0.3),
            ),
            Part(
                "basket",
                CYAN,
                (7.5, 11),
                {"square": (("box", 5.6, 9.4, 10, 13.4),), "deep": (("box", 5.6, 7.4, 9.2, 13.4),)},
                shift=(0.3, 0.4),
            ),
        ),
    ),
    Thing(
        "cake",
        (1.00, 0.62, 0.74),
        (("box", -8.5, 0, 8.5, 9),),
        (
            Part(
                "icing",
                (0.38, 0.18, 0.06),
                (0, 9),
                {
                    "thick": (("box", -8.6, 6, 8.6, 10),),
                    "dripping": (
                        ("box", -8.6, 7.6, 8.6, 10),
                        ("box", -7, 4.6, -4.6, 8),
                        ("box", -1.6, 5.4, 0.8, 8),
                        ("box", 4, 4.2, 6.6, 8),
                    ),
                },
            ),
            Part(
                "candles",
                BLUE,
                (0, 9.5),
                {
                    "tall": (("box", -6.4, 9.4, -4.4, 16.4), ("box", 4.4, 9.4, 6.4, 16.4)),
                    "thick": (("box", -7.2, 9.4, -3.8, 13.6), ("box", 3.8, 9.4, 7.2, 13.6)),
                },
                shift=(0.4, 0),
            ),
            Part(
                "cherry",
                RED,
                (0, 11),
                {"big": (("disc", 0, 12, 2.5),), "small": (("disc", 0, 11.2, 1.8),)},
                shift=(0.8, 0),
            ),
        ),
    ),
    Thing(
        "clock",
        (0.96, 0.90, 0.58),
        (("disc", 0, 9.5, 7.6),),
        (
            Part(
                "hands",
                BLACK,
                (0, 9.5),
                {
                    "long": (("line", 0, 9.5, 0, 15, 1.1), ("line", 0, 9.5, 4.4, 9.5, 1.1)),
                    "crooked": (("line", 0, 9.5, -3, 13.4, 1.1), ("line", 0, 9.5, 3, 6.6, 1.1)),
                },
            ),
            Part(
                "feet",
                PURPLE,
                (0, 2.5),
                {
                    "straight": (("box", -5.6, 0, -3, 3.6), ("box", 3, 0, 5.6, 3.6)),
                    "round": (("disc", -5, 2, 2.1), ("disc", 5, 2, 2.1)),
                },
                shift=(0.3, 0),
            ),
            Part(
                "bells",
                RED,
                (0, 16.5),
                {
                    "round": (("disc", -4.8, 17, 3), ("disc", 4.8, 17, 3)),
                    "pointed": (
                        ("triangle", -8.4, 14.6, -1.4, 16.4, -5.8, 21.6),
                        ("triangle", 8.4, 14.6, 1.4, 16.4, 5.8, 21.6),
                    ),
                },
                shift=(0.3, 0.2),
            ),
        ),
    ),
    Thing(
        "boat",
        (0.62, 0.34, 0.10),
        (("triangle", -10, 6, 10, 6, 0, -3), ("box", -6, 1, 6, 6), ("box", -0.9, 5, 0.9, 17)),
        (
            Part(
                "sail",
                WHITE,
                (1, 8),
                {"pointed": (("triangle", 1, 7.4, 9, 7.4, 1, 17),), "square": (("box", 1, 8, 7.4, 14.6),)},
                shift=(0, 0.5),
            ),
            Part(
                "flag",
                RED,
                (-0.9, 16),
                {"long": (("box", -6.4, 15, -0.9, 18),), "pointed": (("triangle", -0.9, 13.4, -0.9, 18.4, -6.4, 16),)},
                shift=(0, 0.4),
            ),
        ),
        water=True,
    ),
)
BY_NAME = {thing.name: thing for thing in THINGS}

STYLES = ("", "at night", "in pastel colours")
STYLE_ODDS = (0.7, 0.17, 0.13)
SKY = {"day": (0.52, 0.77, 0.98), "night": (0.12, 0.10, 0.45)}
GRASS = {"day": (0.60, 0.86, 0.40), "night": (0.12, 0.36, 0.33)}
WATER = {"day": (0.20, 0.46, 0.80), "night": (0.05, 0.28, 0.62)}
HILL = {"day": (0.38, 0.66, 0.28), "night": (0.34, 0.30, 0.62)}
SUN, CLOUD = (1.00, 0.87, 0.08), (0.72, 0.74, 0.78)

VALIDATION = ("tree", "car", "cake", "boat")
TEST = ("house", "snowman", "bicycle", "clock")

CAST = Cast(THINGS, STYLES, STYLE_ODDS, ALONE, 64)
pairs, sample_scenes, words = CAST.pairs, CAST.sample_scenes, CAST.words
captions = CAST.captions


def draw_clips(scenes: Scenes, frames: int) -> Array:
    """Clips [n, 3, frames, 32, 32] in 0..1: the object glides sideways, at most SPEED pixels a frame."""
    pace = SPEED * scenes.numbers[:, -1]
    return np.stack([draw(scenes, pace * (k - (frames - 1) / 2)) for k in range(frames)], 2)


def draw(scenes: Scenes, aside: Array | float = 0.0) -> Array:
    """Pictures [n, 3, 32, 32] in 0..1, without anti-aliasing; the object stands ``aside`` [n] pixels to the right."""
    n, numbers = len(scenes), iter(scenes.numbers.T[:, :, None, None])
    night = (scenes.style == STYLES.index("at night"))[:, None, None]
    canvas = np.empty((n, SIZE, SIZE, 3), np.float32)
    x, y = np.meshgrid(np.arange(SIZE, dtype=np.float32) + 0.5, SIZE - np.arange(SIZE, dtype=np.float32) - 0.5)

    def paint(mask: Mask, colour: Colour | dict[str, Colour]) -> None:
        tint = np.stack([next(numbers) for _ in range(3)], -1) * SPREAD
        if isinstance(colour, dict):
            shade = np.where(night[..., None], np.float32(colour["night"]), np.float32(colour["day"])) + tint
        else:
            shade = np.float32(colour) + tint
        np.copyto(canvas, shade, where=mask[..., None])

    ground = 6.5 + 1.5 * next(numbers)
    paint(np.ones_like(night), SKY)
    sun, cloud, hill = (scenes.extras[:, k, None, None] for k in range(3))
    side = np.where(next(numbers) > 0, 1, -1)
    sun_x = 16 + side * (10.5 + 2 * next(numbers))
    paint(sun & _inside(("disc", 0, 0, 3), x - sun_x, y - 27 + 1.5 * next(numbers)), SUN)
    paint(hill & _inside(("disc", 0, -6, 13), x - 16 - 12 * next(numbers), y - ground), HILL)
    u, v = x - 16 + side * (8 + 2 * next(numbers)), y - 26.5 - 1.5 * next(numbers)
    paint(cloud & (_inside(("disc", -2, 0, 2.4), u, v) | _inside(("disc", 2, 0.3, 2.8), u, v)), CLOUD)
    paint(y < ground, WATER if scenes.thing.water else GRASS)

    grow = 1.05 + 0.13 * next(numbers)
    u = (x - 16 - 3 * next(numbers) - np.reshape(aside, (-1, 1, 1))) / grow
    v = (y - ground + 2 + 0.8 * next(numbers)) / grow

    def paint_parts(behind: bool) -> None:
        for k, part in enumerate(scenes.thing.parts):
            if part.behind != behind:
                continue
            scale = 1 + 0.14 * next(numbers)
            pu = (u - part.pivot[0] - part.shift[0] * next(numbers)) / scale + part.pivot[0]
            pv = (v - part.pivot[1] - part.shift[1] * next(numbers)) / scale + part.pivot[1]
            one, two = (_union(shapes, pu, pv) for shapes in part.forms.values())
            shape = np.where(scenes.form[:, k, None, None] == 0, one, two)
            paint(shape & scenes.present[:, k, None, None], part.colour)

    paint_parts(behind=True)
    paint(_union(scenes.thing.body, u, v) & scenes.body[:, None, None], scenes.thing.colour)
    paint_parts(behind=False)
    pastel = (scenes.style == STYLES.index("in pastel colours"))[:, None, None, None]
    return np.where(pastel, _pastel(canvas), canvas).clip(0, 1).transpose(0, 3, 1, 2)


def _pastel(colour: Array) -> Array:
    return 0.65 * colour + 0.35


def _union(shapes: Sequence[Shape], u: Array, v: Array) -> Mask:
    return np.logical_or.reduce([_inside(shape, u, v) for shape in shapes])


def _inside(shape: Shape, u: Array, v: Array) -> Mask:
    """Whether the points (u, v), each [n, 32, 32], lie in the shape."""
    kind, *numbers = shape
    match kind, [float(number) for number in numbers]:
        case "box", [u0, v0, u1, v1]:
            return (u >= u0) & (u <= u1) & (v >= v0) & (v <= v1)
        case "disc", [u0, v0, r]:
            return (u - u0) ** 2 + (v - v0) ** 2 <= r * r
        case "ring", [u0, v0, r0, r1]:
            d = (u - u0) ** 2 + (v - v0) ** 2
            return (d >= r0 * r0) & (d <= r1 * r1)
        case "line", [u0, v0, u1, v1, r]:
            length = (u1 - u0) ** 2 + (v1 - v0) ** 2
            t = (((u - u0) * (u1 - u0) + (v - v0) * (v1 - v0)) / length).clip(0, 1)
            return (u - u0 - t * (u1 - u0)) ** 2 + (v - v0 - t * (v1 - v0)) ** 2 <= r * r
        case "triangle", [u0, v0, u1, v1, u2, v2]:
            a = (u1 - u0) * (v - v0) - (v1 - v0) * (u - u0)
            b = (u2 - u1) * (v - v1) - (v2 - v1) * (u - u1)
            c = (u0 - u2) * (v - v2) - (v0 - v2) * (u - u2)
            return ((a >= 0) & (b >= 0) & (c >= 0)) | ((a <= 0) & (b <= 0) & (c <= 0))
    raise ValueError(shape)


def batches(
    seed: int, size: int, chunk: int = 32, frames: int = 0, alone: float = ALONE
) -> Iterator[tuple[Array, list[str], Mask]]:
    """Endless training batches: pictures [size, 3, 32, 32], captions, and where parts show [size, 1, 32, 32].

    With ``frames``, clips [size, 3, frames, 32, 32]. ``chunk`` batches are drawn at a time. alone: as in
    ``sample_scenes``.
    """
    rng = np.random.default_rng(seed)
    while True:
        share = rng.multinomial(size * chunk, [1 / len(THINGS)] * len(THINGS))
        groups = [sample_scenes(rng, thing, n, alone) for thing, n in zip(THINGS, share, strict=True)]
        bare = [replace(scenes, present=np.zeros_like(scenes.present)) for scenes in groups]
        pictures, without = (
            np.concatenate([draw_clips(scenes, frames) if frames else draw(scenes) for scenes in some])
            for some in (groups, bare)
        )
        parts = (pictures != without).any(axis=1, keepdims=True)
        texts = [text for scenes in groups for text in captions(rng, scenes)]
        for rows in rng.permutation(size * chunk).reshape(chunk, size):
            yield pictures[rows], [texts[row] for row in rows], parts[rows]


# -- what is in a picture ---------------------------------------------------------------------------------------------


def palette(thing: Thing, style: str) -> tuple[list[str], Array]:
    """Names and colours [k, 3] of all that the renderer could draw in such a scene."""
    time = "night" if style == "at night" else "day"
    colours = {
        "body": thing.colour,
        **{part.name: part.colour for part in thing.parts},
        "sky": SKY[time],
        "ground": (WATER if thing.water else GRASS)[time],
        "hill": HILL[time],
        "sun": SUN,
        "cloud": CLOUD,
    }
    table = np.array(list(colours.values()), np.float32)
    return list(colours), _pastel(table) if style == "in pastel colours" else table


def classify(pictures: Array, thing: Thing, style: str = "") -> tuple[dict[str, Mask], Mask]:
    """Which pixels [n, 32, 32] are of each palette colour, and which are of any."""
    names, table = palette(thing, style)
    distance = np.linalg.norm(pictures.transpose(0, 2, 3, 1)[..., None, :] - table, axis=-1)
    nearest, known = distance.argmin(-1), distance.min(-1) <= TOLERANCE
    return {name: (nearest == k) & known for k, name in enumerate(names)}, known


def flat(clips: Array) -> Array:
    """Clips [n, 3, frames, 32, 32] as pictures [n * frames, 3, 32, 32]."""
    return clips.swapaxes(1, 2).reshape(-1, 3, SIZE, SIZE)


@lru_cache
def drawn(thing_name: str, frames: int = 0) -> dict[str, tuple[int, Mask]]:
    """For the body and each part: the fewest pixels that the renderer gives it, and where it may be (of 600 scenes).

    With ``frames``, in any frame of clips of that length.
    """
    thing = BY_NAME[thing_name]
    scenes = sample_scenes(np.random.default_rng(0), thing, 600, alone=0.0)
    scenes.style[:], scenes.present[:] = 0, True
    pictures = flat(draw_clips(scenes, frames)) if frames else draw(scenes)
    pixels, _ = classify(pictures, thing)
    names = ("body", *(part.name for part in thing.parts))
    return {name: (int(pixels[name].sum((1, 2)).min()), pixels[name].any(0)) for name in names}


@dataclass(frozen=True)
class Found:
    """What the detectors see, one entry a picture. parts: whether each part is there; quality: share of pixels whose
    colour the renderer could have drawn."""

    body: Mask
    parts: dict[str, Mask]
    quality: Array


def detect(pictures: Array, thing_name: str, style: str = "") -> Found:
    """Looks at pictures [n, 3, 32, 32], or clips [n, 3, frames, 32, 32], made for captions of that object and style.

    A thing is there if, where it may be, it has at least half the fewest pixels that the renderer gives it. In a clip
    the body is there if it is in every frame, a part if it is in any.
    """
    if pictures.ndim == 5:
        n, _, frames = pictures.shape[:3]
        found = _look(flat(pictures), thing_name, style, frames)
        parts = {name: there.reshape(n, frames).any(1) for name, there in found.parts.items()}
        return Found(found.body.reshape(n, frames).all(1), parts, found.quality.reshape(n, frames).mean(1))
    return _look(pictures, thing_name, style, 0)


def _look(pictures: Array, thing_name: str, style: str, frames: int) -> Found:
    pixels, known = classify(pictures, BY_NAME[thing_name], style)
    limits = drawn(thing_name, frames).items()
    there = {name: (pixels[name] & where).sum((1, 2)) >= fewest / 2 for name, (fewest, where) in limits}
    return Found(there.pop("body"), there, known.mean((1, 2), dtype=np.float32))
