"""The fourth seam: which attention call is over text, and VSF in its place. Its door is ``patched_options``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..vsf_core import (
    VSF,
    AttentionBackend,
    NegativeTerms,
    TokenLayout,
    attend_cross,
    attend_joint,
    padding_mask,
    unless_all,
    way_of,
)
from .blocks import Block
from .forward import FORWARD_KEY, PLACE_KEY, Forward, Place
from .host_attention import OVERRIDE, HostAttention
from .host_check import changed_host


def patched_options(options: dict, forward: Forward) -> dict:
    """A copy of ``transformer_options`` in which each block's patch is wrapped, so that we know where we are."""
    options = {**options, FORWARD_KEY: forward}
    if forward.family.cross:  # for the whole forward: VACE's blocks run outside the block patches
        options[OVERRIDE] = partial(_cross_override, options.get(OVERRIDE))
    elif forward.family.marker is None:
        options.pop("block_index", None)
        options[OVERRIDE] = partial(_unmarked_override, options.get(OVERRIDE))
    if forward.family.marker == "attn2":  # the last one, next to the attention itself
        patches = options.get("patches", {})
        options["patches"] = {**patches, "attn2_patch": [*patches.get("attn2_patch", ()), _mark_block]}
    if forward.family.marker != "dit":
        return options
    replace = options.get("patches_replace", {})
    dit, result = dict(replace.get("dit", {})), {}
    for position, block in enumerate(forward.run.blocks):
        key = (f"{block[0]}_block", block[1])
        dit[key] = partial(_run_block, block, position, dit.get(key), result)
    return {**options, "patches_replace": {**replace, "dit": dit}}


def _run_block(
    block: Block, position: int, previous: Callable | None, result: dict, args: dict, extra: Mapping
) -> dict:
    """An entry of ``patches_replace["dit"]``: the block with VSF's attention, inside whatever was there before.

    ``result`` is returned from every block of a pass: ComfyUI's loop holds what a block returned while the next one
    runs, which in Flux's first single block would be an image more than without patches.
    """

    def original(inner: dict) -> dict:
        try:
            options, stock = inner["transformer_options"], extra["original_block"]
            forward: Forward = options[FORWARD_KEY]
            # where there is no joint sequence, the override is in force already
            inner = forward.family.arguments(block, inner, forward.tokens, forward.text)
            layout = None if forward.family.cross else forward.family.layout(block[0], inner, forward.tokens)
        except KeyError as missing:
            raise changed_host(f"{block[0]} blocks hand their patches no {missing}") from missing
        here: dict[str, Any] = {PLACE_KEY: forward.place(block, forward.reached[1, position], forward.note(position))}
        if layout is not None:
            here[OVERRIDE] = partial(_joint_override, layout, options.get(OVERRIDE))
        forward.reached[0, position].add_(1)
        return stock({**inner, "transformer_options": {**options, **here}})

    result.clear()
    made = original(args) if previous is None else previous(args, {**extra, "original_block": original})
    if torch.compiler.is_compiling():
        return made
    result.update(made)
    return result


def _mark_block(n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An ``attn2_patch`` that changes nothing: it tells that a block's attention over text is about to run."""
    forward: Forward = options[FORWARD_KEY]
    block = forward.family.block_of(options, forward.calls)
    if block in forward.run.blocks:
        forward.reached[0, forward.run.blocks.index(block)].add_(1)
    return n, context, value


def _cross_override(previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's attention call in a cross-attention model: VSF where its keys are the text stream [N, P]."""
    host = HostAttention(previous, func, *args, **kwargs)
    forward: Forward = host.options[FORWARD_KEY]
    if host.keys != forward.text:
        return host.unchanged()
    if host.queries == host.keys or (host.mask is not None and not forward.family.masked):
        raise RuntimeError(
            f"VSF: cannot tell which attention this is ({host.queries} queries, {host.keys} keys, "
            f"{'a' if host.mask is not None else 'no'} mask). Change the negative by a word, and please report which "
            "model this was."
        )
    q, k, v = host.split()
    n = forward.tokens
    positive, negative = (k[:, :, n:], v[:, :, n:]), (k[:, :, :n], v[:, :, :n])
    mask = None if host.mask is None else host.mask[..., n:]
    if forward.width not in (None, host.heads * q.shape[-1]):  # that of sound
        return host.join(host.black_box(q, *positive, mask))
    place: Place | None = host.options.get(PLACE_KEY)
    if place is None:
        place = forward.place_outside(host.options)
    method, backend = forward.guide or VSF(), _backend(forward, host)
    terms = NegativeTerms(forward.alpha, forward.bias_for(place, host.queries), forward.padding)
    if not place.enter(forward.run, way_of(method, backend, mask, cross=True)):
        return host.join(host.black_box(q, *positive, mask))
    mass = place.share(host.queries)
    return host.join(attend_cross(method, backend, q, *positive, *negative, terms, mask, mass))


def _unmarked_override(previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's attention call in a joint model without block patches: inside its blocks the sequence is [N, P, I];
    before them, where text attends to text, N and P are kept apart."""
    host = HostAttention(previous, func, *args, **kwargs)
    forward: Forward = host.options[FORWARD_KEY]
    if "block_index" not in host.options:
        return _kept_apart(host, forward) if host.keys == forward.text else host.unchanged()
    place = forward.place_outside(host.options)
    layout = TokenLayout(host.keys - forward.text, forward.text - forward.tokens, forward.tokens)
    return _joint(host, layout, place)


def _kept_apart(host: HostAttention, forward: Forward) -> Tensor:
    """Attention of the text [N, P] to itself, as of two texts."""
    (q, k, v), n, padding = host.split(), forward.tokens, forward.padding
    hidden = None
    if padding is not None:  # where all of N is padding it sees itself: nothing sees it
        hidden = padding_mask(unless_all(padding), q.dtype)[:, None, None]
    own = forward.backend.masked(host)(q[:, :, :n], k[:, :, :n], v[:, :, :n], hidden)
    rest = host.black_box(q[:, :, n:], k[:, :, n:], v[:, :, n:], host.mask)
    return host.join(torch.cat([own, rest], dim=2))


def _joint_override(
    layout: TokenLayout, previous: Callable | None, func: Callable, *args: Any, **kwargs: Any
) -> Tensor:
    """ComfyUI's attention call inside a joint block: VSF where its keys are the joint sequence."""
    host = HostAttention(previous, func, *args, **kwargs)
    if host.keys != layout.length:
        return host.unchanged()
    return _joint(host, layout, host.options[PLACE_KEY])


def _joint(host: HostAttention, layout: TokenLayout, place: Place) -> Tensor:
    """VSF's attention over a joint sequence."""
    forward: Forward = host.options[FORWARD_KEY]
    q, k, v = host.split()
    mask = _total_mask(host.mask, layout, place.kind, forward, q.dtype)
    method, backend = forward.guide or VSF(), _backend(forward, host)
    ordinary = forward.released is not None and place.kind not in forward.released.kinds
    entered = place.enter(forward.run, "ordinary text" if ordinary else way_of(method, backend, mask))
    mass = place.share(layout.image)
    if ordinary:
        return host.join(backend.black_box(q, k, v, mask))
    terms = NegativeTerms(forward.alpha, place.bias if entered else None, forward.padding)
    return host.join(attend_joint(method, backend, q, k, v, layout, terms, mask, mass))


def _backend(forward: Forward, host: HostAttention) -> AttentionBackend:
    """What this call may be made of."""
    chosen = forward.backend
    name = host.name if chosen.deaf is None else "PyTorch"
    return AttentionBackend(chosen.masked(host), chosen.attention(host), host.scale, name)


def _total_mask(
    mask: Tensor | None, layout: TokenLayout, kind: str, forward: Forward, dtype: torch.dtype
) -> Tensor | None:
    """What besides VSF's own rules keeps queries from keys: additive [B or 1, 1, 1 or L, L] or None.

    That is the caller's mask, and the padding of N where the released layout shows it as ordinary text.
    """
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(dtype)
    if forward.hidden is None or forward.released is None:
        return mask
    end = layout.span("N").stop if kind not in forward.released.kinds else layout.span("P").stop
    if end == layout.span("P").stop and not forward.released.copy:
        return mask
    hidden = torch.zeros(forward.hidden.shape[0], 1, 1, layout.length, device=forward.bias.device, dtype=dtype)
    hidden[:, 0, 0, end - forward.tokens : end] = padding_mask(forward.hidden, dtype)
    return hidden if mask is None else mask + hidden
