"""torch.compile as ComfyUI uses it: TorchCompileModel drops every guard that names ``transformer_options``, in which
VSF travels to the attention. What a graph takes for granted must therefore show in the model's other arguments."""

from collections.abc import Mapping
from typing import Any

from comfy.patcher_extension import WrappersMP

WRAPPER_KEY = "torch.compile"
"""Under which ComfyUI adds its own wrapper."""

_numbers: dict[str, int] = {}


def unwrapped(diffusion_model: Any) -> Any:
    """The model itself where torch.compile has wrapped it."""
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


def is_compiled(diffusion_model: Any, transformer_options: Mapping) -> bool:
    """Whether torch.compile has wrapped the model, or will deeper down: ComfyUI's own wrapper may come after ours."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return unwrapped(diffusion_model) is not diffusion_model or bool(wrappers.get(WRAPPER_KEY))


def distinguish_graphs(mark: str, blocks: int, control: dict | None, kwargs: dict) -> tuple[dict, dict]:
    """``control`` and ``kwargs`` such that no graph of stock, or of another ``mark``, fits this pass.

    Guards are kept on the names of arguments (Flux and Wan pass them on) and on the length of a list that is read (SD3
    reads control's): the mark is a name, and a number of residuals, beyond those of the blocks, that are None.
    """
    control = {"input": [], **(control or {})}
    residuals = list(control.get("output") or ())
    residuals += [None] * (max(0, blocks - len(residuals)) + _numbers.setdefault(mark, len(_numbers) + 1))
    return {**control, "output": residuals}, {**kwargs, mark: None}
