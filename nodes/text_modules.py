"""Modules of a model before its blocks that would take N and P for one text: for the length of one call, torch's own
hooks are on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..vsf_core import padding_mask, unless_all
from .compiled import thread
from .families import Family
from .forward_context import ForwardContext, forward_of
from .host_check import changed_host


@contextmanager
def text_kept_apart(forward: ForwardContext, diffusion_model: Any, compiled: bool) -> Iterator[None]:
    """While open, N is a text of its own to the modules before the blocks."""
    with _positions(forward, diffusion_model, compiled), _refined(forward.family, diffusion_model):
        yield


@contextmanager
def _positions(forward: ForwardContext, diffusion_model: Any, compiled: bool) -> Iterator[None]:
    """While open, N shifts no rotary position. ComfyUI has no hook for those: torch's own is on the module that
    makes them, for the length of one call."""
    family = forward.family
    name = family.rope_module(diffusion_model)
    if name is None:
        yield
        return
    seen, real = [], forward.real_tokens()

    def place(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(True)
        here = forward.here()
        text, counts = here.text, (here.tokens, real if here is forward else here.real_tokens(), here.text.given)
        if not text.in_one_piece:
            raise RuntimeError(
                "VSF: a patch of another node has put tokens between the negative and the prompt, and this model "
                "counts its text through: their positions cannot be told. Remove that node, or VSF Model Patch."
            )
        front, ids = given[0][:, : text.start], given[0][:, text.start :]
        return torch.cat([front, family.positions(ids, *counts, diffusion_model)], dim=1), *given[1:]

    handle = getattr(diffusion_model, name).register_forward_pre_hook(place)
    try:
        yield
    finally:
        handle.remove()
    if not seen and not compiled and forward.reached.any():
        raise changed_host(f"this model made its rotary positions without {name}")


@contextmanager
def _refined(family: Family, diffusion_model: Any) -> Iterator[None]:
    """While open, N and P go through the family's ``token_refiner`` one by one, by torch's own hooks."""
    name = family.token_refiner()
    if name is None:
        yield
        return
    refined: dict[int, Tensor] = {}

    def without_n(module: Any, given: tuple, options: dict) -> tuple[tuple, dict]:
        forward = forward_of(options["transformer_options"])
        text, timesteps, mask = given
        n, text = text[:, : forward.tokens], text[:, forward.tokens :]
        n, hidden = _without_padding(n, forward.padding)
        refined[thread()] = module.forward(n, timesteps, hidden, **options)
        return (text, timesteps, None if mask is None else mask[:, forward.tokens :]), options

    def with_n(_module: Any, _given: tuple, _options: dict, text: Tensor) -> Tensor:
        return torch.cat([refined.pop(thread()), text], dim=1)

    module = getattr(diffusion_model, name)
    handles = [
        module.register_forward_pre_hook(without_n, with_kwargs=True),
        module.register_forward_hook(with_n, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_padding(n: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """N [B, n, C] with its padding [B or 1, n] filled by the mean of the rest, so that the mean of all is that too; and
    the additive mask [B, n] over the padding, if there is any."""
    if padding is None:
        return n, None
    padding = unless_all(padding)
    real = ~padding[..., None]
    mean = (n.float() * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
    hidden = padding_mask(padding, n.dtype).clamp(min=torch.finfo(n.dtype).min)
    return torch.where(real, n, mean.to(n)), hidden.expand(n.shape[0], -1)
