"""Line charts and contact sheets with Pillow alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
Point = tuple[float, float, str]
"""x and y in data units, and what to write beside it."""


def chart(
    path: Path, title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]], top_y: float = 1.0
) -> None:
    """Draws each series as points joined in their order; y goes from 0 to ``top_y``, x over what is there."""
    width, height, left, top, right, bottom = 1440, 960, 120, 80, 380, 100
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(26), ImageFont.load_default(19)
    xs = [x for points in series.values() for x, _, _ in points] or [0.0]
    low, high = min(0.0, *xs), max(1.0, *xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low) / (high - low)
        return left + across * (width - left - right), height - bottom - y / top_y * (height - top - bottom)

    for k in range(6):
        y, x = top_y * k / 5, low + (high - low) * k / 5
        canvas.line([place(low, y), place(high, y)], "#dddddd")
        canvas.line([place(x, 0), place(x, top_y)], "#dddddd")
        canvas.text((left - 14, place(low, y)[1]), f"{y:.1f}", "black", small, anchor="rm")
        canvas.text((place(x, 0)[0], height - bottom + 12), f"{x:.1f}", "black", small, anchor="ma")
    canvas.text((left, 24), title, "black", font)
    canvas.text((place((low + high) / 2, 0)[0], height - 40), x_label, "black", font, anchor="mm")
    canvas.text((14, top - 34), y_label, "black", small)
    for k, (name, points) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        places = [place(x, y) for x, y, _ in points]
        if len(places) > 1:
            canvas.line(places, colour, 4)
        for (px, py), (_, _, note) in zip(places, points, strict=True):
            canvas.ellipse([px - 7, py - 7, px + 7, py + 7], colour)
            canvas.text((px + 10, py + 6), note, colour, small)
        x, y = width - right + 40, top + 34 * k
        canvas.ellipse([x, y + 5, x + 14, y + 19], colour)
        canvas.text((x + 24, y), name, colour, small)
    image.resize((width // 2, height // 2), Image.Resampling.LANCZOS).save(path)


def bars(path: Path, title: str, groups: Mapping[str, Mapping[str, float]], mark: float = 1.0) -> None:
    """A group of horizontal bars a name, each with its value; a line at ``mark``."""
    left, top, line, gap, across = 320, 70, 30, 44, 760
    height = top + sum(gap + line * len(group) for group in groups.values()) + 20
    image = Image.new("RGB", (left + across + 120, height), "white")
    canvas, font, small = ImageDraw.Draw(image), ImageFont.load_default(24), ImageFont.load_default(17)
    canvas.text((20, 16), title, "black", font)
    unit = across / max(value for group in groups.values() for value in group.values())
    y = top
    for name, group in groups.items():
        canvas.text((20, y + 6), name, "black", small)
        y += gap - 10
        for k, (label, value) in enumerate(group.items()):
            canvas.text((left - 12, y + line / 2), label, "black", small, anchor="rm")
            canvas.rectangle([left, y + 3, left + value * unit, y + line - 3], COLOURS[k % len(COLOURS)])
            canvas.text((left + value * unit + 8, y + line / 2), f"{value:.3f}", "black", small, anchor="lm")
            y += line
        y += 10
    canvas.line([left + mark * unit, top, left + mark * unit, y], "black", 2)
    image.save(path)


def contact_sheet(path: Path, columns: Sequence[str], rows: Mapping[str, Sequence[np.ndarray]], zoom: int = 3) -> None:
    """One line a row name; each cell is pictures [n, 3, 32, 32] in 0..1, side by side."""
    label, head, gap = 230, 40, 6
    cells = [cell for line in rows.values() for cell in line]
    cell_width = max(cell.shape[0] * cell.shape[3] for cell in cells) * zoom + gap
    cell_height = cells[0].shape[2] * zoom + gap
    image = Image.new("RGB", (label + cell_width * len(columns), head + cell_height * len(rows)), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for k, name in enumerate(columns):
        canvas.text((label + k * cell_width, 10), name, "black", font)
    for j, (name, line) in enumerate(rows.items()):
        y = head + j * cell_height
        canvas.text((8, y + cell_height / 2), name, "black", font, anchor="lm")
        for k, cell in enumerate(line):
            strip = np.concatenate(list(cell.transpose(0, 2, 3, 1)), axis=1)
            picture = Image.fromarray((strip * 255).round().clip(0, 255).astype(np.uint8))
            size = (picture.width * zoom, picture.height * zoom)
            image.paste(picture.resize(size, Image.Resampling.NEAREST), (label + k * cell_width, y))
    image.save(path)
