"""What all picture worlds share: objects with parts, scenes of them at random, and what captions say of those.

A part is drawn in 97.5% of the scenes whether or not the caption names it; captions never say "without". Some scenes
show parts alone ("a hat"), or a body and but one part, so that a part's word means something by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

PRESENT = 0.975
"""How often an essential part is drawn."""
BARE = 0.5
"""How often there is no body in a scene of some parts alone."""
NAMED, DETAILED, DESCRIBED = (0.1, 0.9), 0.6, 0.75
"""How often a short and a detailed caption name a part of an object, how many captions are detailed, and how often a
caption says the form of a part that it names. Where all else is named, what is not may well be missing: that, and its
form, is what a part's word says. So a model looks for the word, as one does that learned from dense captions."""
PLURALS = {"wheels", "apples", "lamps", "candles", "hands", "bells", "feet", "cherries", "ears", "luggage", "portholes"}
EXTRAS = ("sun", "cloud", "hill")

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Colour = tuple[float, float, float]
S = TypeVar("S")
"""What a world draws objects of."""


@dataclass(frozen=True)
class Part(Generic[S]):
    """An essential part. forms: adjective -> what it is drawn of; pivot: the point (u, v) about which it grows."""

    name: str
    colour: Colour
    pivot: tuple[float, float]
    forms: dict[str, tuple[S, ...]] = field(hash=False)
    shift: tuple[float, float] = (0.0, 0.0)
    behind: bool = False

    @property
    def phrase(self) -> str:
        """With its article: "a roof", "wheels"."""
        return self.name if self.name in PLURALS else f"a {self.name}"


@dataclass(frozen=True)
class Thing(Generic[S]):
    """A main object: its body and its parts. colour: most of the body's; water: what it stands on."""

    name: str
    colour: Colour
    body: tuple[S, ...]
    parts: tuple[Part[S], ...]
    water: bool = False

    def part(self, name: str) -> Part[S]:
        return next(part for part in self.parts if part.name == name)


@dataclass
class Scenes(Generic[S]):
    """n scenes of one object. Columns of [n, parts] arrays follow ``thing.parts``, of [n, 3] arrays ``EXTRAS``."""

    thing: Thing[S]
    style: npt.NDArray[np.int64]
    whole: Mask
    """Which scenes are not of some parts alone."""
    body: Mask
    present: Mask
    form: npt.NDArray[np.int64]
    extras: Mask
    numbers: Array
    """Uniform in -1..1 [n, ``Cast.numbers``]: every place, size and tint is made of these."""

    def __len__(self) -> int:
        return len(self.style)


@dataclass(frozen=True)
class Cast(Generic[S]):
    """A world's objects, styles and odds. alone: the usual share of scenes of some parts alone, or with a body and no
    other part, whose captions name just these; numbers: how many a scene is made of."""

    things: tuple[Thing[S], ...]
    styles: tuple[str, ...]
    style_odds: tuple[float, ...]
    alone: float
    numbers: int

    def pairs(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """(object, part) of each part of the named objects."""
        by_name = {thing.name: thing for thing in self.things}
        return [(name, part.name) for name in names for part in by_name[name].parts]

    def sample_scenes(self, rng: np.random.Generator, thing: Thing[S], n: int, alone: float | None = None) -> Scenes[S]:
        """n random scenes; ``alone``, if it is not the usual one, is that share."""
        parts = len(thing.parts)
        present = rng.random((n, parts)) < PRESENT
        whole = rng.random(n) >= (self.alone if alone is None else alone)
        some = (rng.random((n, parts)) < 0.4) | (np.arange(parts) == rng.integers(parts, size=(n, 1)))
        present = np.where(whole[:, None], present, some)
        style = rng.choice(len(self.styles), size=n, p=self.style_odds)
        form = rng.integers(2, size=(n, parts))
        extras = rng.random((n, len(EXTRAS))) < 0.4
        numbers = rng.uniform(-1, 1, (n, self.numbers)).astype(np.float32)
        return Scenes(thing, style, whole, whole | (rng.random(n) >= BARE), present, form, extras, numbers)

    def captions(self, rng: np.random.Generator, scenes: Scenes[S]) -> list[str]:
        """A caption for each scene; it names some of what is there, and nothing that is not."""
        return [self.caption(rng, scenes, i) for i in range(len(scenes))]

    def caption(self, rng: np.random.Generator, scenes: Scenes[S], i: int) -> str:
        """A caption for the scene i."""
        start, style = rng.choice(["", "", "a photo of ", "a picture of "]), self.styles[scenes.style[i]]
        named = NAMED[int(rng.random() < DETAILED)] if scenes.whole[i] else 1.0
        parts = [
            _describe(rng, part, int(form))
            for part, present, form in zip(scenes.thing.parts, scenes.present[i], scenes.form[i], strict=True)
            if present and rng.random() < named
        ]
        rng.shuffle(parts)
        extras = [
            " and a " + ("moon" if name == "sun" and style == "at night" else name)
            for name, drawn in zip(EXTRAS, scenes.extras[i], strict=True)
            if drawn and rng.random() < 0.4
        ]
        if scenes.body[i]:
            words = f"a {scenes.thing.name}" + (f" with {' and '.join(parts)}" if parts else "")
        else:
            words = " and ".join(parts)
        return " ".join([start + words + "".join(extras), style]).strip()

    def words(self) -> list[str]:
        """Every word that a caption can have, in a fixed order."""
        named = [thing.name for thing in self.things] + [part.name for thing in self.things for part in thing.parts]
        adjectives = [form for thing in self.things for part in thing.parts for form in part.forms]
        others = ["a", "photo", "picture", "of", "with", "and", "moon", *" ".join(self.styles).split()]
        return list(dict.fromkeys([*others, *named, *EXTRAS, *adjectives]))


def _describe(rng: np.random.Generator, part: Part, form: int) -> str:
    if rng.random() >= DESCRIBED:
        return part.phrase
    adjective = list(part.forms)[form]
    return f"{adjective} {part.name}" if part.name in PLURALS else f"a {adjective} {part.name}"
