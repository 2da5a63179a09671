"""What is in a picture of the vector world: whether the object, which parts, and how much of it is in its colours.

Pictures [n, 3, SIZE, SIZE] in 0..1 are looked at in half their size. A pixel is of the nearest colour that the renderer
may use there, in any of its shades.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import vector_world as world
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

SHADES = (0.74, 0.86, 1.0, 1.1)
"""What the light makes of a colour, about: ``shapes.shade``."""
MIXES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Places between the horizon and the sky above."""
TOLERANCE = 0.12
"""Distance in RGB within which a pixel is of a colour."""
NEAR = 2
"""How far beyond where the renderer drew it a thing may be, in pixels of half size."""
LEAST = 0.4
"""The share of the fewest pixels that the renderer gives a thing, from which on it is there."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """What the detectors see, one entry a picture. parts: whether each part is there; quality: share of pixels of a
    colour that the renderer could have drawn."""

    body: Mask
    parts: dict[str, Mask]
    quality: npt.NDArray[np.float32]


@lru_cache
def palette(thing_name: str, style: str) -> tuple[list[str], Tensor]:
    """Names and colours [k, 3] of all that the renderer could draw in such a scene; a name has several."""
    thing, k = world.BY_NAME[thing_name], world.STYLES.index(style)
    light = torch.tensor(world.LIGHTS[k])
    own = {thing.colour: "body", **{part.colour: part.name for part in thing.parts}}
    layers = [*thing.body, *(layer for part in thing.parts for form in part.forms.values() for layer in form)]
    colours: list[tuple[str, Tensor]] = []
    for layer in dict.fromkeys(layers):
        name = own[layer.colour] if layer.colour in own and not layer.hint else "detail"
        base = torch.tensor(layer.colour)
        colours += [(name, base)] if layer.glow else [(name, base * light * shade) for shade in SHADES]
    low, high = torch.tensor(world.HORIZON[k]), torch.tensor(world.SKY[k])
    colours += [("sky", low + mix * (high - low)) for mix in MIXES]
    ground = torch.tensor((world.WATER if thing.water else world.GRASS)[k])
    colours += [("ground", ground * shade) for shade in (0.6, 0.72, 0.84, 0.94, 1.06)]
    if thing.water:
        colours.append(("ground", ground + 0.3 * (1 - ground)))
    colours += [
        (name, torch.tensor(of[k])) for name, of in (("hill", world.HILL), ("sun", world.SUN), ("cloud", world.CLOUD))
    ]
    return [name for name, _ in colours], torch.stack([colour for _, colour in colours]).clamp(0, 1)


def classify(pictures: Tensor, thing_name: str, style: str = "") -> tuple[dict[str, Tensor], Tensor]:
    """Which pixels of half size [n, h, w] are of each name's colours, and which are of any."""
    names, table = palette(thing_name, style)
    small = avg_pool2d(pictures.float(), 2).movedim(1, -1)
    distance = torch.cdist(small.reshape(len(small), -1, 3), table).reshape(*small.shape[:-1], -1)
    least, nearest = distance.min(-1)
    known = least <= TOLERANCE
    ids = {name: torch.tensor([k for k, other in enumerate(names) if other == name]) for name in dict.fromkeys(names)}
    return {name: torch.isin(nearest, own) & known for name, own in ids.items()}, known


@lru_cache
def drawn(thing_name: str, glides: bool = False) -> dict[str, tuple[int, Tensor]]:
    """For the body and each part: the fewest pixels that the renderer gives it, and where it may be (of 150 scenes);
    where it may be in a clip, when it ``glides``."""
    thing = world.BY_NAME[thing_name]
    scenes = world.sample_scenes(np.random.default_rng(0), thing, 150, alone=0.0)
    scenes.style[:], scenes.present[:], scenes.extras[:] = 0, True, False
    limits = {}
    asides = (0.0, -1.5 * world.SPEED, 1.5 * world.SPEED) if glides else (0.0,)
    looks = [classify(world.draw(scenes, aside).pictures, thing_name)[0] for aside in asides]
    for name in ("body", *(part.name for part in thing.parts)):
        where = torch.stack([look[name].any(0) for look in looks]).any(0)
        wider = max_pool2d(where[None].float(), 2 * NEAR + 1, stride=1, padding=NEAR)[0].bool()
        limits[name] = int(looks[0][name].sum((1, 2)).min()), wider
    return limits


def detect(pictures: npt.NDArray[np.float32] | Tensor, thing_name: str, style: str = "") -> Found:
    """Looks at pictures, or at clips [n, 3, frames, SIZE, SIZE], made for captions of that object and style.

    In a clip the body is there if it is in every frame, a part if it is in any.
    """
    seen = torch.as_tensor(pictures)
    if seen.ndim == 4:
        return _look(seen, thing_name, style, glides=False)
    n, frames = seen.shape[0], seen.shape[2]
    found = _look(seen.transpose(1, 2).flatten(0, 1), thing_name, style, glides=True)
    parts = {name: there.reshape(n, frames).any(1) for name, there in found.parts.items()}
    return Found(found.body.reshape(n, frames).all(1), parts, found.quality.reshape(n, frames).mean(1))


def _look(pictures: Tensor, thing_name: str, style: str, glides: bool) -> Found:
    pixels, known = classify(pictures, thing_name, style)
    there = {
        name: ((pixels[name] & where).sum((1, 2)) >= fewest * LEAST).numpy()
        for name, (fewest, where) in drawn(thing_name, glides).items()
    }
    return Found(there.pop("body"), there, known.float().mean((1, 2)).numpy())
