"""The pack's nodes, as ComfyUI asks for them."""

from comfy_api.latest import ComfyExtension, io

from .graph_check import watch_prompts
from .model_patch import VSFModelPatch
from .negative_conditioning import VSFNegativeConditioning


class VSFExtension(ComfyExtension):
    async def on_load(self) -> None:
        watch_prompts()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [VSFNegativeConditioning, VSFModelPatch]


async def comfy_entrypoint() -> VSFExtension:
    return VSFExtension()
