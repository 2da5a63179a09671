"""The toy world's modules, by their plain names, and its detectors as a judge."""

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "toy"))

import world  # noqa: E402
from hosting.errors import HostError  # noqa: E402

from neggen.store import opened  # noqa: E402


def judge(picture: Path, prompt: str, missing: str) -> tuple[float, float, float]:
    """Positive (the object is there), negative (the part is gone), quality (share of plausible pixels), each 0..1.

    picture: 32x32 pixels of the toy world enlarged by a whole factor. Raises HostError for prompts of no toy.
    """
    words = prompt.lower().split()
    things = [thing for thing in world.THINGS if thing.name in words]
    parts = [part for part in things[0].parts if missing in (part.name, part.phrase)] if len(things) == 1 else []
    if not parts:
        known = ", ".join(world.BY_NAME)
        raise HostError(f"the toy judge knows one of {known}, and their parts, not {prompt!r} without {missing!r}")
    image = np.asarray(opened(picture), np.float32) / 255
    factor, rest = divmod(len(image), world.SIZE)
    if rest or image.shape != (len(image), len(image), 3):
        raise HostError(f"the toy judge sees {world.SIZE}x{world.SIZE} pixels, enlarged; {picture} is {image.shape}")
    small = image[factor // 2 :: factor, factor // 2 :: factor].transpose(2, 0, 1)[None]
    style = next((style for style in world.STYLES[1:] if style in prompt), "")
    found = world.detect(small, things[0].name, style)
    return float(found.body[0]), float(not found.parts[parts[0].name][0]), round(float(found.quality[0]), 4)
