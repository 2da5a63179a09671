"""The node "VSF Scale Sweep": one picture at several scales, as one batch."""

import comfy.patcher_extension
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io

from .checks import finite_number, limited
from .run import SCALES_KEY
from .wrappers import WRAPPER_KEY

MOST = 256
"""Scales in one run."""


LONGEST_FRAME = 8
"""Frames of a video in one latent frame, of LTX-Video's VAE; all others have fewer."""


class Labels(str):
    """A line for each scale. ``most``: how many decoded pictures each can have; more of them are several runs'."""

    most: int

    @classmethod
    def of(cls, values: tuple[float, ...], latent_frames: int) -> "Labels":
        made = cls("\n".join(f"scale {value:g}" for value in values))
        made.most = 1 + LONGEST_FRAME * (latent_frames - 1)
        return made


class VSFScaleSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSFScaleSweep",
            display_name="VSF Scale Sweep",
            category="conditioning/VSF",
            description="Samples the same picture at several scales in one run, to find the right one. Takes the "
            "place of VSF Model Patch's scale. Put it between that node and the sampler.",
            search_aliases=["alpha sweep", "compare scales", "XY plot", "grid", "VSF"],
            inputs=[
                io.Model.Input("model", tooltip="From VSF Model Patch, whose other settings stay in use."),
                io.Latent.Input("latent", tooltip="The latent of one picture or video: each scale gets a copy of it."),
                io.String.Input(
                    "scales",
                    default="0, 1, 2, 3, 4",
                    tooltip="The scales, separated by commas. All get the same noise, so they differ in nothing else "
                    "(with samplers that add noise on the way, as the ancestral ones do, in that noise too). Memory "
                    "grows with their number as with any batch.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for the sampler."),
                io.Latent.Output(tooltip="The latent, once for each scale, for the same sampler."),
                io.String.Output(display_name="labels", tooltip="A line for each scale, for VSF Contact Sheet."),
            ],
        )

    @classmethod
    @limited
    def execute(cls, model: io.Model.Type, latent: dict, scales: str = "0, 1, 2, 3, 4") -> io.NodeOutput:
        if not model.get_wrappers(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, WRAPPER_KEY):
            raise ValueError(
                "VSF: VSF Scale Sweep needs a model that VSF Model Patch has patched. Put that node before it."
            )
        values, samples = _parsed(scales), latent["samples"]
        packed = samples.is_nested  # LTX-2's latent: of video and of sound
        if samples.shape[0] != 1:
            raise ValueError(
                f"VSF: VSF Scale Sweep takes the latent of one picture, got a batch of {samples.shape[0]}. Set the "
                "batch size to 1, or pick one with LatentFromBatch."
            )
        swept = model.clone()
        swept.model_options["transformer_options"][SCALES_KEY] = values
        # ComfyUI draws a picture's noise by its place in the batch, unless this says which place
        place = (latent.get("batch_index") or [0])[0]
        parts = [s.repeat(len(values), *(1,) * (s.ndim - 1)) for s in (samples.unbind() if packed else [samples])]
        repeated = NestedTensor(parts) if packed else parts[0]
        copies = {**latent, "samples": repeated, "batch_index": [place] * len(values)}
        frames = parts[0].shape[2] if parts[0].ndim == 5 else 1
        return io.NodeOutput(swept, copies, Labels.of(values, frames))


def _parsed(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated text. Raises ``ValueError`` that names what is none."""
    items = [part.strip() for part in text.split(",")]
    if len(items) > MOST:
        raise ValueError(f"VSF: scales has {len(items)} numbers, but one run takes {MOST} at most. Give it fewer.")
    values = tuple(finite_number("each of scales, between commas,", item) for item in items if item)
    if not values:
        raise ValueError('VSF: scales is empty. Write for example "0, 1, 2, 3.3".')
    return values
