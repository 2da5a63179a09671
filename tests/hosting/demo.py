"""The demo, inside the host's Python: one workflow with and without VSF on a running server, three pictures or clips.

Usage: python -m hosting.demo ADDRESS WORKFLOW.json OUT_DIR
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageSequence

from hosting.client import ComfyClient
from hosting.errors import HostError, PromptFailed
from hosting.graph import Prompt, only_node, to_prompt, upstream_text, without_nodes

# Each VSF node, with the input that takes its place when it is taken out.
VSF_NODES = {"VSFModelPatch": "model", "VSFNegativeConditioning": "positive"}
SMALLEST_WIDTH = 384
MARGIN, FONT_SIZE = 12, 16
FRAME_MS = 150


def main(arguments: list[str]) -> int:
    """Runs the demo and prints the paths of its pictures."""
    address, workflow, out = arguments
    client, folder = ComfyClient(address), Path(out)
    try:
        graph = json.loads(Path(workflow).read_text(encoding="utf-8"))
        after_graph = to_prompt(graph, client.object_info()) if "nodes" in graph else graph
        before_graph = without_nodes(after_graph, VSF_NODES)
        after = frames(client, after_graph, "with VSF")
        before = frames(client, before_graph, "without VSF")
        texts = captions(after_graph)
        both = [side_by_side(a, b, texts) for a, b in zip(before, after, strict=True)]
    except HostError as error:
        print(f"dev.py: the demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in (("before", before), ("after", after), ("side-by-side", both)):
        print(save(images, folder / name))
    return 0


def save(images: list[Image.Image], path: Path) -> Path:
    """Writes a picture as PNG, several as an animated WebP; gives the file's path."""
    if len(images) == 1:
        images[0].save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    rest = {"save_all": True, "append_images": images[1:], "duration": FRAME_MS, "loop": 0, "quality": 90}
    images[0].save(path.with_suffix(".webp"), **rest)
    return path.with_suffix(".webp")


def frames(client: ComfyClient, prompt: Prompt, label: str) -> list[Image.Image]:
    """Runs a graph and fetches the first picture that it saves: one frame, or those of an animated one."""
    outputs = client.run(prompt, progress_line(prompt, label))
    refs = [ref for output in outputs.values() for ref in output.get("images", [])]
    if not refs:
        raise PromptFailed(f"the graph {label} saved no picture")
    return unrolled(Image.open(BytesIO(client.image(refs[0]))))


def unrolled(image: Image.Image) -> list[Image.Image]:
    """A picture, or the frames of an animated one at equal pace: equal frames in a row are stored as one that lasts."""
    shown = []
    for frame in ImageSequence.Iterator(image):
        picture = frame.convert("RGB")  # loads the frame, and with it how long it lasts
        shown.append((picture, frame.info.get("duration", 0)))
    shortest = min(duration for _, duration in shown) or 1
    return [picture for picture, duration in shown for _ in range(max(1, round(duration / shortest)))]


def progress_line(prompt: Prompt, label: str) -> Callable[[str, int, int], None]:
    """A callback that prints the node at work and its step, a line each."""
    start = time.monotonic()

    def show(node_id: str, step: int, steps: int) -> None:
        name = prompt.get(node_id, {}).get("class_type", node_id)
        position = f" step {step}/{steps}" if steps else ""
        print(f"[{time.monotonic() - start:6.1f} s] {label}: {name}{position}", flush=True)

    return show


def captions(prompt: Prompt) -> tuple[str, str]:
    """What stands under the two pictures, read from the graph itself."""
    negative = prompt[only_node(prompt, "VSFNegativeConditioning")]["inputs"]
    patch = prompt[only_node(prompt, "VSFModelPatch")]["inputs"]
    text = f"prompt: {upstream_text(prompt, negative.get('positive'))}"
    pushed = negative.get("text") or upstream_text(prompt, negative.get("negative"))
    settings = f"scale {number(patch.get('scale'))}, offset {number(patch.get('offset'))}"
    return f"before\n{text}\nno negative prompt", f"after\n{text}\nnegative: {pushed}\n{settings}"


def number(value: Any) -> str:
    """A setting as people write it: 3.3, not 3.3000000000000003."""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def side_by_side(before: Image.Image, after: Image.Image, texts: tuple[str, str]) -> Image.Image:
    """Both pictures in one, each over its caption; tiny pictures are enlarged pixel by pixel."""
    panels = [with_caption(enlarged(image), text) for image, text in zip((before, after), texts, strict=True)]
    width = sum(panel.width for panel in panels) + MARGIN * 3
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels) + MARGIN * 2), "white")
    left = MARGIN
    for panel in panels:
        sheet.paste(panel, (left, MARGIN))
        left += panel.width + MARGIN
    return sheet


def enlarged(image: Image.Image) -> Image.Image:
    """The picture at least SMALLEST_WIDTH wide, by a whole factor."""
    factor = max(1, -(-SMALLEST_WIDTH // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def with_caption(image: Image.Image, text: str) -> Image.Image:
    """The picture with its caption below, wrapped to its width."""
    font = ImageFont.load_default(FONT_SIZE)
    letters = max(20, int(image.width / font.getlength("n")))
    wrapped = "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, letters) or [""])
    box = ImageDraw.Draw(image).multiline_textbbox((0, 0), wrapped, font=font)
    panel = Image.new("RGB", (image.width, image.height + int(box[3]) + MARGIN), "white")
    panel.paste(image, (0, 0))
    ImageDraw.Draw(panel).multiline_text((0, image.height + MARGIN // 2), wrapped, fill="black", font=font)
    return panel


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
