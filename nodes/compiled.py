"""torch.compile as ComfyUI and other packs use it, on whole models or on blocks one by one: guards that name
``transformer_options``, in which VSF travels to the attention, are dropped. So a graph must be told from others by what
no such filter drops, and no argument of a block need change for it.

Before it takes a graph, torch compares what was read from modules while that was made, such as ``_kind`` here; and its
ambient state, to which the cache of autocast's casts belongs. That cache is off while a pass with VSF runs (it serves
no one there: ComfyUI does not use autocast), so that no graph of stock's fits."""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .recordings import check_not_captured

WRAPPER_KEY = "torch.compile"
"""Under which ComfyUI, and other packs, add their wrappers."""

_kind = ""
"""What the compiled pass, or the block of it, at work takes for granted; empty elsewhere."""
_one_pass = RLock()
"""Devices that share the work have a thread each, and torch reads no variable of a thread's own."""


def unwrapped(module: Any) -> Any:
    """The module itself where torch.compile has wrapped it."""
    return getattr(module, "_orig_mod", module)


def thread() -> int:
    """Which thread this is; a graph cannot know."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def will_compile(transformer_options: Mapping) -> bool:
    """Whether a wrapper compiles the model, or parts of it: it may come after ours."""
    return bool(transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(WRAPPER_KEY))


def is_compiled(diffusion_model: Any) -> bool:
    """Whether torch.compile has wrapped the model or a part of it, in whichever way. Takes a millisecond or more."""
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in diffusion_model.modules())


@contextmanager
def compiled_pass(kind: str) -> Iterator[None]:
    """While open, torch takes no graph of stock, nor of another ``kind`` of pass or block."""
    global _kind
    with _one_pass:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        _kind = kind
        try:
            yield
        finally:
            _kind = ""
            torch.set_autocast_cache_enabled(cached)


def run_block(stock: Callable[[dict], dict], args: dict, *facts: Any) -> dict:
    """``stock(args)``, a block; where it is compiled by itself, torch takes no graph that was made with other ``facts``
    of the block."""
    global _kind
    if torch.compiler.is_compiling() or _kind == "":
        return stock(args)
    before, _kind = _kind, _kind + described(facts)
    try:
        return stock(args)
    finally:
        _kind = before


def bind_graph() -> None:
    """To be called by what may run inside a graph and takes something for granted: the graph then fits no other
    ``_kind``. Raises ``RuntimeError`` in a graph of a model that did not look compiled."""
    if not torch.compiler.is_compiling():
        check_not_captured()
    elif _kind == "":
        raise RuntimeError(
            "VSF: torch.compile is at work on this model in a way that this version of ComfyUI-VSF does not know. "
            "Remove the node that compiles the model, or use ComfyUI's TorchCompileModel."
        )


def described(value: Any) -> str:
    """What a graph takes for granted of ``value``: all but the numbers in tensors."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}{value.stride()}{value.dtype}{value.device}"
    if isinstance(value, partial):
        return described((value.func, value.args, value.keywords))
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__ + described({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{key}:{described(item)}' for key, item in value.items()))}}}"
    if isinstance(value, Set):
        return f"{{{','.join(sorted(map(described, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(described, value))}]"
    if value is None or isinstance(value, (str, bool, int, float, slice)):
        return repr(value)
    return getattr(value, "__name__", type(value).__name__)
