"""The node "VSF Contact Sheet": pictures side by side, each over its label."""

import numpy as np
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .checks import limited

COLUMNS = 5
"""With ``columns`` 0, at most this many."""
MOST_COLUMNS = 64
LONGEST_LABEL = 200
"""Letters of a label; longer ones are cut."""
GAP = 8
SMALLEST_FONT = 8


class VSFContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSFContactSheet",
            display_name="VSF Contact Sheet",
            category="conditioning/VSF",
            description="Puts pictures side by side, each over its label. Videos stay videos.",
            search_aliases=["grid", "compare images", "side by side", "XY plot", "VSF"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures in order; or videos, as many as there are labels."),
                io.String.Input(
                    "labels",
                    force_input=True,
                    optional=True,
                    tooltip="A line for each picture, as VSF Scale Sweep gives them. Without it: numbers.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=MOST_COLUMNS,
                    optional=True,
                    tooltip="Pictures in a row. 0: all in one row, up to five.",
                ),
                io.Boolean.Input(
                    "videos",
                    default=False,
                    optional=True,
                    tooltip="Several pictures for each label: the frames of one video after the other. Labels of VSF "
                    "Scale Sweep say so themselves.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The sheet; for videos, its frames.")],
        )

    @classmethod
    @limited
    def execute(cls, images: Tensor, labels: str = "", columns: int = 0, videos: bool = False) -> io.NodeOutput:
        lines = [_cut(line.strip()) for line in labels.splitlines() if line.strip()]
        lines = lines or [str(i + 1) for i in range(images.shape[0])]
        several, rest = divmod(images.shape[0], len(lines))
        if rest or not several or (several > getattr(labels, "most", 1) and not videos):
            raise ValueError(
                f"VSF: there are {images.shape[0]} pictures, but {len(lines)} labels. Connect all pictures of the run "
                "whose labels these are, and no other's: batches of several machines, joined, need a sheet each. If "
                "they are the frames of one video after the other, set videos to on."
            )
        pictures = images[..., :3].float().cpu().unflatten(0, (len(lines), -1))  # [labels, frames, H, W, 3]
        cells = [
            torch.cat([p, _label(line, p.shape[2]).expand(p.shape[0], -1, -1, -1)], dim=1)
            for p, line in zip(pictures, lines, strict=True)
        ]
        return io.NodeOutput(_tiled(cells, columns or min(len(cells), COLUMNS)))


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST_LABEL else f"{line[:LONGEST_LABEL]}..."


def _tiled(cells: list[Tensor], columns: int) -> Tensor:
    """[frames, height, width, 3]: ``cells`` [frames, h, w, 3] row by row on white, ``GAP`` pixels apart."""
    cells = cells + [torch.ones_like(cells[0])] * (-len(cells) % columns)
    cells = [F.pad(cell, (0, 0, 0, GAP, 0, GAP), value=1.0) for cell in cells]
    rows = [torch.cat(cells[i : i + columns], dim=2) for i in range(0, len(cells), columns)]
    return F.pad(torch.cat(rows, dim=1), (0, 0, GAP, 0, GAP, 0), value=1.0)


def _label(text: str, width: int) -> Tensor:
    """A strip [1, height, width, 3] with ``text`` in black on white, smaller where it would not fit."""
    largest = size = max(12, width // 16)
    while size > SMALLEST_FONT and ImageFont.load_default(size).getlength(text) > width:
        size -= 1
    strip = Image.new("RGB", (width, largest * 3 // 2), "white")
    middle, font = (width // 2, strip.height // 2), ImageFont.load_default(size)
    ImageDraw.Draw(strip).text(middle, text, "black", font, anchor="mm")
    return torch.from_numpy(np.array(strip))[None].float() / 255
