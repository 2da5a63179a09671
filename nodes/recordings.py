"""What newer ComfyUIs record of a model's blocks and replay: docs/ARCHITECTURE.md says what is known of it.

The allocator (the "comfy compiler", 0.34 on) records where each block allocates: what is allocated in a block must be
free when it ends. CUDA graphs (0.33 on) record what a block launches: no Python runs again, so that nothing that VSF
does there would change with the step."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

PREFETCH = "prefetch_dynamic_vbars"
"""In ``transformer_options``: whether blocks' weights are fetched ahead, without which no graph is made."""


def _host() -> Any:
    """ComfyUI's module of both; None where it has none."""
    try:
        return import_module("comfy.model_prefetch")
    except ImportError:
        return None


def is_recording(device: torch.device) -> bool:
    """Whether the allocator records this thread now. True, too, where it may and nothing tells."""
    enabled = getattr(_host(), "malloc_graph_enabled", None)
    if enabled is None or not enabled(device):
        return False
    graphs = getattr(_host(), "MALLOC_GRAPHS", None)
    if not isinstance(graphs, Mapping):
        return True
    graph = graphs.get(threading.get_ident())
    return graph is not None and getattr(graph, "_comfy_active", True)


def lasting_copy(t: Tensor) -> Tensor:
    """A copy that may outlive the block in which it is made."""
    if torch.compiler.is_compiling():
        return t.clone()
    with getattr(_host(), "pause_malloc_graph", nullcontext)():
        return t.clone()


def has_graphs(diffusion_model: Any) -> bool:
    """Whether ComfyUI has made CUDA graphs of the model's blocks, or is about to."""
    warm = getattr(_host(), "GRAPH_WARMED_MODULES", None)
    return bool(warm) and any(module in warm or hasattr(module, "_comfy_graph") for module in diffusion_model.modules())


@contextmanager
def without_graphs(diffusion_model: Any) -> Iterator[None]:
    """While open, ComfyUI makes and replays no graphs of the model's blocks. It sets that option behind our wrappers:
    torch's own hook is on the model, for the length of one call."""

    def decline(_model: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
        return given, {**named, "transformer_options": {**named.get("transformer_options", {}), PREFETCH: False}}

    handle = diffusion_model.register_forward_pre_hook(decline, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_not_captured() -> None:
    """Raises ``RuntimeError`` where a CUDA graph is being made of what runs."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "VSF: a CUDA graph is being made of this model, and when it is replayed, the negative would be that of "
            "this step. Remove the node that makes it, or start ComfyUI with --disable-cuda-graphs."
        )
