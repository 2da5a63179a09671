"""The node "VSF Model Patch"."""

from typing import Any

from comfy_api.latest import io

from .blocks import parse_blocks
from .checks import interval, limited
from .families import family_of
from .methods import METHODS
from .run import Settings
from .watch import watch_prompt
from .wrappers import LAYOUTS, VSFPatch


class VSFModelPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSFModelPatch",
            display_name="VSF Model Patch",
            category="conditioning/VSF",
            description="Makes a few-step model obey the negatives of VSF Negative Conditioning, at cfg 1.",
            search_aliases=["negative prompt", "NAG", "cfg 1", "value sign flip", "VSF"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to patch. LoRA and ModelSampling nodes may come before or after."
                ),
                io.Float.Input(
                    "scale",
                    default=3.3,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="Alpha: how hard the picture is pushed away from the negative. The paper: 3.3 for "
                    "quality, 3.8 for strong, both in layout released; in layout paper they push harder. Lower it "
                    "when the main object suffers. 0 is not off: bypass the node for that.",
                ),
                io.Float.Input(
                    "offset",
                    default=0.2,
                    min=-20.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Beta: lowers how much the picture attends to the negative. Higher is gentler; at 60, in "
                    "layout paper, it has practically no effect. May be negative. The authors' Flux code never uses "
                    "it: for its numbers set 0.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where in the sampling the negative starts to act: 0 is the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where in the sampling the negative stops acting: 1 is after the last step.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    tooltip='Which blocks see the negative, e.g. "double:0-11". Empty: all. In the others the negative '
                    "goes on reading the picture, unseen.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="paper",
                    optional=True,
                    tooltip="paper: Listing 1 of the paper. released: what the picture sees in the authors' published "
                    "code for Stable Diffusion 3 and Flux.1, where the negative stays visible as plain text too. "
                    "Published numbers belong to it; the same number is gentler there.",
                ),
                io.Boolean.Input(
                    "affect_references",
                    default=True,
                    optional=True,
                    tooltip="Models that take reference images (Flux Kontext, Flux.2, Qwen-Image-Edit, HunyuanVideo, "
                    "Wan and its VACE) or guides (LTX-Video, LTX-2): whether the tokens of those see the negative too. "
                    "Masks, from_frame and to_frame of negatives never apply to them.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="vsf",
                    optional=True,
                    advanced=True,
                    tooltip="vsf: value sign flip, with scale, offset and layout. nag: normalized attention guidance. "
                    "nasa: negative-aware attention. ong: orthogonal negative guidance, as this project reads its "
                    "paper's abstract. All in one pass, each with its own inputs below; the others' are not used.",
                ),
                io.Float.Input(
                    "nag_scale",
                    default=5.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Method nag: how far the picture goes past the positive, away from the negative; 1 is not "
                    "at all. By the paper's Eq. 4 it is phi + 1: 5, and 12 for strong. The authors' scripts passed 4 "
                    "and 11 here.",
                ),
                io.Float.Input(
                    "nag_alpha",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    optional=True,
                    advanced=True,
                    tooltip="Method nag: how much of that is blended in. The paper: 0.125, and 0.5 for strong.",
                ),
                io.Float.Input(
                    "nag_tau",
                    default=2.5,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Method nag: the most a token's attention output may grow, relative to its length without "
                    "NAG. The paper: 2.5, and 5 for strong.",
                ),
                io.Float.Input(
                    "nasa_scale",
                    default=0.25,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Method nasa: phi, how much of what the negative would make is taken away. Usually 0.15 to "
                    "0.25; the paper tries up to 0.5.",
                ),
                io.Float.Input(
                    "ong_scale",
                    default=3.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Method ong: how much is taken away of what the negative would make and the positive would "
                    "not; 0 is nothing. Chosen on this project's toys: 3. The paper's own numbers are not known here.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for any sampler or guider.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """The same for ever: ComfyUI asks at the start of each prompt, cached nodes too."""
        watch_prompt()
        return ""

    @classmethod
    @limited
    def execute(
        cls,
        model: io.Model.Type,
        scale: float = 3.3,
        offset: float = 0.2,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        blocks: str = "",
        layout: str = "paper",
        affect_references: bool = True,
        method: str = "vsf",
        nag_scale: float = 5.0,
        nag_alpha: float = 0.25,
        nag_tau: float = 2.5,
        nasa_scale: float = 0.25,
        ong_scale: float = 3.0,
    ) -> io.NodeOutput:
        watch_prompt()
        start, end = interval("start_percent", start_percent, "end_percent", end_percent)
        chosen, scales = METHODS[method], {"nag_scale": nag_scale, "nasa_scale": nasa_scale, "ong_scale": ong_scale}
        scale = {"scale": scale, **scales}[chosen.scale_input]
        offset = offset if chosen.has_offset else 0.0
        arithmetic = chosen.core({"nag_alpha": nag_alpha, "nag_tau": nag_tau})
        family = family_of(model)
        parse_blocks(blocks, family.block_counts(model.model.diffusion_model))
        patched = model.clone()
        settings = Settings(scale, offset, start, end, blocks, layout, affect_references, chosen, arithmetic)
        VSFPatch(settings, family).install(patched)
        return io.NodeOutput(patched)
