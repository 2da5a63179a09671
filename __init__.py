"""ComfyUI-VSF: a negative prompt for few-step models by Value Sign Flip."""

from .nodes.host_check import is_supported

if is_supported():
    from .nodes.extension import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./js"
else:
    NODE_CLASS_MAPPINGS = {}  # so that ComfyUI takes it for a pack without nodes, not for a broken one
