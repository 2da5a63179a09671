"""The node "VSF Attention Map": which parts of the picture attended to the negative, as colours."""

import json

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..vsf_core import LAYERS, AttentionRecord
from .checks import limited
from .drawing import heat_colors, laid_over
from .graph_check import ancestors
from .latent_map import latent_frames_of
from .record import Holder, MapType

STEPS = ("mean", "each")
SCALES = ("shared", "each", "0 to 1")


class VSFAttentionMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSFAttentionMap",
            display_name="VSF Attention Map",
            category="conditioning/VSF",
            description="Shows which parts of the picture attended to the negative: 1 - W, the part of an image "
            "token's attention that fell on it.",
            search_aliases=["attention map", "heat map", "what did it do", "debug", "VSF"],
            inputs=[
                MapType.Input("map", tooltip="From the VSF Record before the sampler that made this picture."),
                io.Image.Input("image", tooltip="The sampled picture or the video's frames, decoded; of any size."),
                io.Combo.Input(
                    "steps",
                    options=list(STEPS),
                    default="mean",
                    tooltip="mean: one map, over the steps in which the negative acted. each: one for every step, in "
                    "order.",
                ),
                io.Combo.Input(
                    "layers",
                    options=["all", *LAYERS],
                    default="all",
                    tooltip="Which third of the model's blocks is shown; on Flux.1, early is the double blocks. Blocks "
                    "that do not see the negative do not count.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the picture the hottest colour hides in the overlay.",
                ),
                io.Combo.Input(
                    "normalize",
                    options=list(SCALES),
                    default="shared",
                    tooltip="Where the brightest colour is. shared: at the highest value of all maps shown, so that "
                    "they compare. each: at each map's own. 0 to 1: at 1, so that runs compare.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="heat map", tooltip="The colours alone: black is 0, yellow the most."),
                io.Image.Output(display_name="overlay", tooltip="The heat map laid over the picture."),
                io.String.Output(
                    display_name="summary", tooltip="The peak, the mean, and the steps in which the negative acted."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    @limited
    def execute(
        cls,
        map: Holder,
        image: Tensor,
        steps: str = "mean",
        layers: str = "all",
        opacity: float = 0.8,
        normalize: str = "shared",
    ) -> io.NodeOutput:
        record = cls._record(map)
        shown = list(range(record.steps)) if steps == "each" else [None]
        maps = torch.cat([_per_picture(record.mean(layers, step), image) for step in shown])
        values = record.fitted(maps, image.shape[1], image.shape[2])
        peaks = values.amax(dim=(1, 2), keepdim=True)
        top = {"shared": peaks.amax(), "each": peaks, "0 to 1": torch.ones(())}[normalize]
        values = values / torch.where(top > 0, top, 1.0)
        picture = image[..., :3].float().cpu().repeat(len(shown), 1, 1, 1)
        summary, overlay = _summary(record, layers, maps), laid_over(picture, values, opacity)
        return io.NodeOutput(heat_colors(values), overlay, summary, ui=ui.PreviewText(summary))

    @classmethod
    def _record(cls, map: Holder) -> AttentionRecord:
        """That of the picture's run."""
        record = map.record_here()
        if record is None:
            raise ValueError(
                "VSF: nothing was sampled with this VSF Record. Connect its model output to the sampler that makes "
                "this picture."
            )
        if not map.belongs_to(cls._picture()):
            raise ValueError(
                "VSF: the map of this picture is gone: a later run was recorded over it, and ComfyUI took the picture "
                "from its cache. Change the seed, or anything else before the sampler, to sample again."
            )
        if map.is_mixed:
            raise ValueError(
                "VSF: several runs of this queue were recorded by one VSF Record, and nothing tells which of them made "
                "this picture. Use one VSF Record for each sampler, and none before a node that samples several times "
                "(a tiled upscaler)."
            )
        return record

    @classmethod
    def _picture(cls) -> str | None:
        """All nodes that lead to the picture, as text; the same text means the same picture. None if unknown."""
        prompt, node = (cls.hidden.prompt, cls.hidden.unique_id) if cls.hidden else (None, None)
        if not prompt or node not in prompt:
            return None
        source = prompt[node]["inputs"]["image"][0]
        return json.dumps({n: prompt[n] for n in sorted(ancestors(prompt, source))}, sort_keys=True)


def _per_picture(maps: Tensor, image: Tensor) -> Tensor:
    """``maps`` [B, latent frames, h, w] as [pictures, h, w]: a map for each of ``image``'s pictures or video frames."""
    batch, latent_frames, count = *maps.shape[:2], image.shape[0]
    frames, rest = divmod(count, batch)
    if rest or not frames or (latent_frames == 1 and frames > 1):
        raise ValueError(
            f"VSF: there are {count} pictures, but the recorded run made {batch} of {latent_frames} latent frames "
            "each. Connect the pictures of that very run, all of them."
        )
    return maps[:, latent_frames_of(frames, latent_frames)].flatten(0, 1)


def _summary(record: AttentionRecord, layers: str, maps: Tensor) -> str:
    """What the colours cannot say; ``maps``: 1 - W as shown, before it is scaled."""
    acted = record.acted
    if not acted:
        return "The negative acted in no step of this run: nothing attended to it."
    strongest = max(acted, key=lambda step: float(record.mean(layers, step).mean()))
    return (
        f"share of attention on the negative (1 - W): peak {float(maps.max()):.3g}, mean {float(maps.mean()):.3g}\n"
        f"layers: {layers}; acted in {len(acted)} of {record.steps} steps, most in step {strongest + 1}"
    )
