"""The pack's nodes, as ComfyUI asks for them."""

import logging

from comfy_api.latest import ComfyExtension, io

from .attention_map import VSFAttentionMap
from .contact_sheet import VSFContactSheet
from .graph_check import watch_prompts
from .model_patch import VSFModelPatch
from .negative_conditioning import VSFNegativeConditioning
from .record import VSFRecord
from .scale_sweep import VSFScaleSweep


class VSFExtension(ComfyExtension):
    async def on_load(self) -> None:
        # a level of its own: some nodes turn ComfyUI's log off while they sample (UltimateSDUpscale)
        logging.getLogger(__package__).setLevel(logging.getLogger().level)
        watch_prompts()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            VSFNegativeConditioning,
            VSFModelPatch,
            VSFRecord,
            VSFAttentionMap,
            VSFScaleSweep,
            VSFContactSheet,
        ]


async def comfy_entrypoint() -> VSFExtension:
    return VSFExtension()
