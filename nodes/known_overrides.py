"""Overrides of ComfyUI's own nodes, told by where they were made: what they call is found in their closures."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger(__name__)

CHOSEN = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
"""That of the node Model Attention Backend (0.32 on): one function for all calls."""
SPARSE = "make_attention_override.<locals>.override"
SPARSE_MODULE = "comfy_extras.nodes_sparse_attention"
SPARSE_NAME = "Model Sparse Attention"
"""That of the node Model Sparse Attention (0.35 on): calls without a mask leave out keys; others run as before it."""


def dense(previous: Callable | None, func: Callable) -> tuple[Callable | None, Callable]:
    """What attends to all keys for the override ``previous``, in front of the host's ``func``, as far as that is known:
    an override and a function, as they were given."""
    while is_sparse(previous):
        previous = _enclosed(previous).get("previous")
    chosen = chosen_attention(previous)
    return (previous, func) if chosen is None else (None, getattr(chosen, "__wrapped__", chosen))


def chosen_attention(override: Callable | None) -> Callable | None:
    """The attention function that a node has chosen for all calls; None where it is no such override."""
    if getattr(override, "__qualname__", "") != CHOSEN:
        return None
    return _enclosed(override).get("optimized_attention")


def is_sparse(override: Callable | None) -> bool:
    """Whether an override is known to leave out keys, of calls without a mask."""
    made_by = getattr(override, "__module__", None), getattr(override, "__qualname__", None)
    return made_by == (SPARSE_MODULE, SPARSE) and "previous" in _enclosed(override)


def container_function(previous: Callable | None, func: Callable) -> Callable | None:
    """What takes q, k and v in containers, so that memory is free early; None where nothing does."""
    return getattr(func if previous is None else previous, "container_function", None)


def log_preferred(diffusion_model: Any) -> None:
    """Says where a checkpoint asks for an attention of its own in some layers (newer than 0.33). ComfyUI passes over
    that where there is an override, as VSF's is."""
    asked = [
        function.__name__
        for module in diffusion_model.modules()
        if type(module).__name__ == "ComfyAttention" and (function := getattr(module, "function", None)) is not None
    ]
    if asked:
        log.info(
            f"VSF: this checkpoint asks for {', '.join(sorted(set(asked)))} in {len(asked)} layers. ComfyUI passes "
            "over that where another node has a part in the attention, as VSF has: with a negative the usual one runs."
        )


def _enclosed(function: Any) -> Mapping[str, Any]:
    """By name, what a function has from around it."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=False)}
