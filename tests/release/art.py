"""Draws the registry's icon and banner from the toy world: ``python tests/release/art.py``, in the host's Python."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "toy"))

from world import BY_NAME, SIZE, Scenes, draw  # noqa: E402

ICON, BANNER = (384, 384), (1344, 576)
HOUSE_PIXEL = 14
INK, PAPER = (34, 34, 46), (246, 243, 236)


def house(*parts: str) -> Image.Image:
    """The toy world's house by day with these parts, 32x32."""
    thing = BY_NAME["house"]
    present = np.array([[part.name in parts for part in thing.parts]])
    one, yes, no = np.zeros(1, np.int64), np.array([True]), np.zeros((1, 3), bool)
    scene = Scenes(thing, one, yes, yes, present, np.zeros_like(present, np.int64), no, np.zeros((1, 64), "f4"))
    return Image.fromarray((draw(scene)[0].transpose(1, 2, 0) * 255).round().astype(np.uint8))


def parts_of_house() -> list[str]:
    """Everything that a house has."""
    return [part.name for part in BY_NAME["house"].parts]


def icon() -> Image.Image:
    """The house: its left half with the roof, its right half without."""
    whole, bare = house(*parts_of_house()), house(*(name for name in parts_of_house() if name != "roof"))
    bare.paste(whole.crop((0, 0, SIZE // 2, SIZE)), (0, 0))
    return bare.resize(ICON, Image.Resampling.NEAREST)


def banner() -> Image.Image:
    """The house with and without its roof, and what took it away."""
    sheet, side = Image.new("RGB", BANNER, PAPER), SIZE * HOUSE_PIXEL
    pen, top = ImageDraw.Draw(sheet), (BANNER[1] - SIZE * HOUSE_PIXEL) // 2
    whole, bare = house(*parts_of_house()), house(*(name for name in parts_of_house() if name != "roof"))
    for left, picture in ((top, whole), (BANNER[0] - side - top, bare)):
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
    middle = BANNER[0] // 2
    for text, y, size in (("VSF", 200, 110), ("a house", 310, 40), ("not: a roof", 365, 40)):
        pen.text((middle, y), text, fill=INK, font=ImageFont.load_default(size), anchor="mm")
    return sheet


if __name__ == "__main__":
    folder = ROOT / "docs" / "images"
    icon().save(folder / "icon.png", optimize=True)
    banner().save(folder / "banner.png", optimize=True)
    print(f"{folder / 'icon.png'}\n{folder / 'banner.png'}")
