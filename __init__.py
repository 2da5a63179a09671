"""ComfyUI-VSF: a negative prompt for few-step models by Value Sign Flip."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
