"""Which attention call of a model is over text, and VSF in its place. The door is ``patched_options``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..vsf_core import (
    AttentionBackend,
    TokenLayout,
    aligned,
    attend_cross,
    attend_joint,
    padding_mask,
    unless_all,
    way_of,
)
from .blocks import Block
from .compiled import run_block, unwrapped
from .forward_context import BLOCK_KEY, FORWARD_KEY, BlockContext, ForwardContext, forward_of, spread
from .host_attention import FORCE, OVERRIDE, HostAttention
from .host_check import changed_host
from .known_overrides import container_function
from .sealed import Sealed, opened
from .text_patches import text_followed


def patched_options(options: dict, forward: ForwardContext) -> dict:
    """A copy of ``transformer_options`` in which each block's patch is wrapped, so that we know where we are, and N is
    followed through the patches of others."""
    family = forward.family
    options = text_followed({**options, FORWARD_KEY: Sealed(forward)}, forward)
    if family.cross_attention:  # for the whole forward: VACE's blocks run outside the block patches
        options[OVERRIDE] = _in_slot(options, _cross_override)
    elif family.block_hook is None:
        options.pop("block_index", None)
        options[OVERRIDE] = _in_slot(options, _unmarked_override)
    if family.block_hook == "attn2":  # the last one, next to the attention itself
        patches = options.get("patches", {})
        options["patches"] = {**patches, "attn2_patch": [*patches.get("attn2_patch", ()), _mark_block]}
    if family.block_hook != "dit":
        return options
    replace = options.get("patches_replace", {})
    dit = dict(replace.get("dit", {}))
    for position, block in enumerate(forward.run.blocks):
        key = (f"{block[0]}_block", block[1])
        is_last = position == len(forward.run.blocks) - 1
        dit[key] = partial(_run_block, block, position, is_last, dit.get(key))
    return {**options, "patches_replace": {**replace, "dit": dit}}


def _in_slot(options: Mapping[str, Any], override: Callable, *facts: Any) -> Callable:
    """``override`` for the slot, before what these ``transformer_options`` have there. Where that, or ComfyUI's own
    attention, takes containers (0.33), ours hands them on: their memory is free as early as without VSF."""
    ours = partial(override, *facts, options.get(OVERRIDE))
    usual = comfy_attention.optimized_attention
    if container_function(options.get(OVERRIDE), usual) is not None:
        ours.container_function = partial(ours, usual)  # pyright: ignore[reportAttributeAccessIssue]
    return ours


def blocks_told(options: dict, forward: ForwardContext) -> dict:
    """``transformer_options`` under which blocks that no block patch encloses are told which they are, where
    torch.compile has each by itself: all share a graph, which can read no number of a block's."""
    if forward.family.block_hook is not None:
        return options
    wrappers = options.get("wrappers", {})
    ours = {"vsf_blocks": [partial(_tell_blocks, forward)]}
    return {
        **options,
        "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), **ours}},
    }


def _tell_blocks(forward: ForwardContext, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper around the whole model, in which all others that compile it have done so."""
    if torch.compiler.is_compiling():
        return executor(*args, **kwargs)

    def told(position: int, _block: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
        block = forward.run.blocks[position]
        here = {BLOCK_KEY: Sealed(forward.block(block, forward.reached[1, position], forward.note(position)))}
        return given, {**named, "transformer_options": {**named["transformer_options"], **here}}

    handles = [
        module.register_forward_pre_hook(partial(told, position), with_kwargs=True)
        for position, module in enumerate(forward.family.unmarked_blocks(executor.class_obj))
        if unwrapped(module) is not module
    ]
    try:
        return executor(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _run_block(
    block: Block, position: int, is_last: bool, previous: Callable | None, args: dict, extra: Mapping
) -> dict:
    """An entry of ``patches_replace["dit"]``: the block with VSF's attention, inside whatever was there before.

    One dict is returned from every block of a pass but the last: ComfyUI's loop holds what a block returned while the
    next one runs, which in Flux's first single block would be an image more than without patches. Nothing that the
    model made is kept when it ends: ComfyUI may record where it allocates (``recordings.py``).
    """
    pass_here, given, start = _enter_block(block, previous, args)

    def original(inner: dict) -> dict:
        try:
            options, stock = inner["transformer_options"], extra["original_block"]
            forward = forward_of(options)
            if previous is not None:
                text = forward.family.text_of(block[0], inner)
                forward.text.enter_again(text, given, start)
                forward.text.follow(text, ("inside", block), [previous])
            here = _inside(block, position, forward, inner, forward.text.start - start)
        except KeyError as missing:
            raise changed_host(f"{block[0]} blocks hand their patches no {missing}") from missing
        forward.reached[0, position].add_(1)
        inner = {**inner, "transformer_options": {**options, **here}}
        made = run_block(stock, inner, block[0], here.get(OVERRIDE))
        if not is_last:
            forward.text.leave_block(None if forward.family.cross_attention else forward.family.text_of(block[0], made))
        return made

    result = pass_here.made
    result.clear()
    made = original(args) if previous is None else previous(args, {**extra, "original_block": original})
    if not pass_here.family.cross_attention:
        pass_here.text.leave_patches(block, given, pass_here.family.text_of(block[0], made))
    if torch.compiler.is_compiling() or is_last:
        return made
    result.update(made)
    return result


def _enter_block(block: Block, previous: Callable | None, args: dict) -> tuple[ForwardContext, Tensor, int]:
    """The pass at work; the text that goes into a block, and then through the patch ``previous``; N's first token."""
    try:
        forward = forward_of(args["transformer_options"])
        given = forward.family.text_of(block[0], args)
    except KeyError as missing:
        raise changed_host(f"{block[0]} blocks hand their patches no {missing}") from missing
    start = forward.text.enter_block(block, given, forward.family.tokens_before)
    if forward.text.leading < 0:
        raise spread(f"a {block[0]} block of this model gets {given.shape[1]} of {forward.text.given} tokens of text")
    if previous is not None:
        forward.text.hold(given)
    return forward, given, start


def _inside(block: Block, position: int, forward: ForwardContext, args: dict, added: int) -> dict[str, Any]:
    """What a block's ``transformer_options`` gain: where the attention is and, of a joint one, which call it is."""
    own = forward.block(block, forward.reached[1, position], forward.note(position))
    here: dict[str, Any] = {BLOCK_KEY: Sealed(own)}
    if not forward.family.cross_attention:  # else the override is in force already
        forward.cached_keys = 0
        try:
            layout = forward.family.layout(block[0], args, forward.tokens, forward.text.start, added)
        except ValueError as error:  # less text than N has tokens, or no picture
            raise spread(f"a {block[0]} block of this model gets {error}") from error
        here[OVERRIDE] = _in_slot(args["transformer_options"], _joint_override, layout)
    return here


def _mark_block(n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An ``attn2_patch`` that changes nothing: it tells that a block's attention over text is about to run."""
    forward = forward_of(options)
    block = forward.family.block_of(options, forward.calls)
    if block in forward.run.blocks:
        forward.reached[0, forward.run.blocks.index(block)].add_(1)
    return n, context, value


def _cross_override(previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's attention call in a cross-attention model: VSF where its keys are the text stream, with N in it."""
    host = HostAttention(previous, func, *args, **kwargs)
    forward = forward_of(host.options)
    text = forward.text
    is_other = forward.width is not None and host.keys == text.given and forward.width != host.width
    if host.keys != text.count - text.leading and not is_other:
        return host.unchanged()
    if host.queries == host.keys or (host.mask is not None and not forward.family.has_text_mask):
        raise RuntimeError(
            f"VSF: cannot tell which attention this is ({host.queries} queries, {host.keys} keys, "
            f"{'a' if host.mask is not None else 'no'} mask). Change the negative by a word, and please report which "
            "model this was."
        )
    q, k, v = host.split()
    start = 0 if is_other else text.start - text.leading
    n = slice(start, start + forward.tokens)
    positive, negative = (_without(n, k), _without(n, v)), (k[:, :, n], v[:, :, n])
    mask = None if host.mask is None else aligned(_without(n, host.mask, dim=-1))
    if is_other:  # that of sound
        return host.join(host.black_box(q, *positive, mask))
    block: BlockContext | None = opened(host.options, BLOCK_KEY)
    if block is None:
        block = forward.block_outside(host.options)
    forward.check_rows(q.shape[0])
    backend = forward.attention_on(q.device).of(host)
    if not block.enter(forward.run.paths, _way(forward, backend, mask, cross=True)):
        return host.join(host.black_box(q, *positive, mask))
    terms, method = forward.terms(block, host.queries, q.device), forward.method_on(q.device)
    with _noted(block.attention_mass(host.queries, forward.rows), q.device) as mass:
        out = attend_cross(method, backend, q, *positive, *negative, terms, mask, mass)
    return host.join(forward.checked(out))


@contextmanager
def _noted(mass: Tensor | None, device: torch.device) -> Iterator[Tensor | None]:
    """Where an attention on ``device`` adds its mass: ``mass`` itself, or something that is added to it afterwards."""
    if mass is None or mass.device == device:
        yield mass
        return
    there = torch.zeros_like(mass, device=device)
    yield there
    mass += there.to(mass.device)


def _without(span: slice, x: Tensor, dim: int = 2) -> Tensor:
    """``x`` without a ``span`` along ``dim``: a view where that is at its beginning."""
    rest = x.narrow(dim, span.stop, x.shape[dim] - span.stop)
    return rest if span.start == 0 else torch.cat([x.narrow(dim, 0, span.start), rest], dim)


def _unmarked_override(previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's attention call in a joint model without block patches: inside its blocks the sequence is [N, P, I];
    before them, where text attends to text, N and P are kept apart."""
    host = HostAttention(previous, func, *args, **kwargs)
    forward = forward_of(host.options)
    text = forward.text.given
    if "block_index" not in host.options:
        return _kept_apart(host, forward) if host.keys == text else host.unchanged()
    if host.keys <= text:
        raise spread(f"an attention has {host.keys} keys, where the text alone has {text}")
    layout = TokenLayout(host.keys - text, text - forward.tokens, forward.tokens)
    return _joint(host, layout, opened(host.options, BLOCK_KEY) or forward.block_outside(host.options))


def _kept_apart(host: HostAttention, forward: ForwardContext) -> Tensor:
    """Attention of the text [N, P] to itself, as of two texts."""
    (q, k, v), n, padding = host.split(), forward.tokens, forward.padding
    # where all of N is padding it sees itself: nothing sees it
    padding = None if padding is None else unless_all(forward.at(padding, q.device))
    hidden = None if padding is None else padding_mask(padding[:, None, None], q.dtype)
    own = forward.attention_on(q.device).masked(host)(q[:, :, :n], k[:, :, :n], v[:, :, :n], hidden)
    rest = host.black_box(q[:, :, n:], k[:, :, n:], v[:, :, n:], host.mask)
    return host.join(torch.cat([own, rest], dim=2))


def _joint_override(
    layout: TokenLayout, previous: Callable | None, func: Callable, *args: Any, **kwargs: Any
) -> Tensor:
    """ComfyUI's attention call inside a joint block: VSF where its sequence is the joint one."""
    host = HostAttention(previous, func, *args, **kwargs)
    forward = forward_of(host.options)
    layout = replace(layout, cached=forward.cached_keys)
    if host.queries != layout.length or host.keys != layout.keys:
        return host.unchanged()
    return _joint(host, layout, opened(host.options, BLOCK_KEY))


def _joint(host: HostAttention, layout: TokenLayout, block: BlockContext) -> Tensor:
    """VSF's attention over a joint sequence."""
    forward = forward_of(host.options)
    q, k, v = host.split()
    forward.check_rows(q.shape[0])
    forward.check_tokens(layout, block.kind)
    mask = _total_mask(host.mask, layout, block.kind, forward, q)
    backend = forward.attention_on(q.device).of(host)
    ordinary = forward.released is not None and block.kind not in forward.released.kinds
    entered = block.enter(forward.run.paths, "ordinary text" if ordinary else _way(forward, backend, mask))
    noted = block.attention_mass(layout.image, forward.rows)
    if ordinary:
        return host.join(backend.black_box(q, k, v, None if mask is None else aligned(mask)))
    terms, method = forward.terms(block, layout.image, q.device, seen=entered), forward.method_on(q.device)
    with _noted(noted, q.device) as mass:
        out = attend_joint(method, backend, q, k, v, layout, terms, mask, mass)
    return host.join(forward.checked(out))


def _way(forward: ForwardContext, backend: AttentionBackend, mask: Tensor | None, cross: bool = False) -> str:
    """In words, how a call is computed. Raises ``RuntimeError`` where it cannot be in the way that is forced."""
    try:
        return way_of(forward.method, backend, mask, cross)
    except ValueError as error:
        raise RuntimeError(f"VSF: {FORCE}={backend.forced} does not work with this model: {error}.") from error


def _total_mask(
    mask: Tensor | None, layout: TokenLayout, kind: str, forward: ForwardContext, q: Tensor
) -> Tensor | None:
    """What besides VSF's own rules keeps queries from keys: additive [B or 1, 1, 1 or L, L] or None.

    That is the caller's mask, and the padding of N where the released layout shows it as ordinary text: N itself, or
    the copy of it at the end of the text that was given.
    """
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(q.dtype)
    padding, released = forward.padding_as_text, forward.released
    if padding is None or released is None or (kind in released.kinds and not released.copy):
        return mask
    ordinary = kind not in released.kinds
    if not ordinary and not forward.text.in_one_piece:
        raise RuntimeError(
            "VSF: a patch of another node has put tokens inside the text, of which layout released shows a part twice. "
            "Set layout to paper on VSF Model Patch, or remove that node."
        )
    start = layout.before if ordinary else layout.before + forward.text.given - forward.tokens
    hidden = torch.zeros(padding.shape[0], 1, 1, layout.keys, device=q.device, dtype=q.dtype)
    hidden[:, 0, 0, start : start + forward.tokens] = padding_mask(forward.at(padding, q.device), q.dtype)
    return hidden if mask is None else mask + hidden
