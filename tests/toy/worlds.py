"""The worlds that toys were trained on: 32x32 squares (``world``), and smooth 128x128 scenes (``vector_world``)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import codec
import detectors
import numpy as np
import vector_codec
import vector_world
import world
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class World:
    """What a toy draws. module: its objects; side: of its latents; folder: where its codec is, if that is a file."""

    module: ModuleType
    side: int
    folder: Path

    @property
    def pairs(self) -> dict[str, list[tuple[str, str]]]:
        """(object, part) by split."""
        names: dict[str, Sequence[str]] = {"validation": self.module.VALIDATION, "test": self.module.TEST}
        return {split: self.module.pairs(things) for split, things in names.items()}

    def decode(self, family: str, latents: Tensor) -> np.ndarray:
        """The sampler's latents -> pictures [n, 3, h, w] in 0..1, or clips [n, 3, frames, h, w]."""
        if self.module is world:
            return (codec.decode_wan if family == "wan" else codec.decode)(latents).numpy()
        if family != "wan":
            return self._decoder(latents).clamp(0, 1).numpy()
        frames = vector_codec.from_wan(latents).transpose(1, 2)
        pictures = self._decoder(frames.flatten(0, 1)).clamp(0, 1)
        return pictures.unflatten(0, frames.shape[:2]).transpose(1, 2).numpy()

    @cached_property
    def _decoder(self) -> vector_codec.Decoder:
        return vector_codec.load(self.folder / "codec.safetensors")[1].requires_grad_(False)


def of(weights: Path) -> World:
    """The world of a file of trained weights, which says so."""
    with safe_open(weights, "pt") as file:
        vector = (file.metadata() or {}).get("world") == "vector"
    side = vector_world.SIZE // vector_codec.PATCH if vector else world.SIZE
    return World(vector_world if vector else world, side, weights.parent)


def phrase(thing: str, part: str) -> str:
    """A part as a prompt names it, in whichever world its object has it."""
    things = [one for module in (world, vector_world) for one in module.THINGS if one.name == thing]
    return next(own.phrase for one in things for own in one.parts if own.name == part)


def detect(pictures: np.ndarray, thing: str, style: str) -> Any:
    """What the detectors of the pictures' world see."""
    if pictures.shape[-1] == world.SIZE:
        return world.detect(pictures, thing, style)
    return detectors.detect(pictures, thing, style)
