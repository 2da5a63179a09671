"""N followed through the patches of other nodes that get the model's text in their hands, outside its blocks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .forward_context import FORWARD_KEY, ForwardContext
from .text_stream import lost


def text_followed(options: dict, forward: ForwardContext) -> dict:
    """``transformer_options`` in which a patch of ours runs before and after those of others that may move the text. Of
    those that replace a block, the wrapper around that takes care."""
    family, patches = forward.family, options.get("patches", {})
    replaced = options.get("patches_replace", {}).get("dit", {}).values()
    forward.text.strangers = (*replaced, *patches.get("double_block", ()))
    if family.block_hook == "attn2":
        around = {"attn2_patch": (_unet_text_before, _unet_text_after)}
    elif family.cross_attention:
        around = {"attn2_patch": (_cross_text_before, _cross_text_after)} if family.block_hook is None else {}
    elif family.block_hook is None:
        around = {"double_block": (_sequence_before, _sequence_after)}
    else:
        around = {"post_input": (_input_before, _input_after), "attn1_patch": (_keys_before, _keys_after)}
    bracketed = {
        name: [partial(before, forward), *patches[name], partial(after, forward, patches[name])]
        for name, (before, after) in around.items()
        if patches.get(name)
    }
    return {**options, "patches": {**patches, **bracketed}} if bracketed else options


def _at_work(forward: ForwardContext, options: Mapping[str, Any] | None) -> ForwardContext:
    """The pass at work: in a compiled graph, not the one for which it was made."""
    return (options or {}).get(FORWARD_KEY, forward)


# post_input (Flux, Qwen-Image): the text on its way to the first block


def _input_before(forward: ForwardContext, args: dict) -> dict:
    _at_work(forward, args.get("transformer_options")).text.hold(args["txt"], start=0)
    return args


def _input_after(forward: ForwardContext, patches: list, args: dict) -> dict:
    _at_work(forward, args.get("transformer_options")).text.follow(args["txt"], "post_input", patches)
    return args


# attn2_patch: the text on its way to one cross-attention


def _unet_text_before(
    forward: ForwardContext, n: Tensor, context: Tensor, value: Tensor, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    _at_work(forward, options).text.hold(context, start=0)
    return n, context, value


def _unet_text_after(
    forward: ForwardContext, patches: list, n: Tensor, context: Tensor, value: Tensor, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    _follow_to_attention(_at_work(forward, options), context, options.get("block"), patches)
    return n, context, value


def _cross_text_before(forward: ForwardContext, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> dict:
    _at_work(forward, kwargs.get("extra_options")).text.hold(k, start=0)
    return {}


def _cross_text_after(forward: ForwardContext, patches: list, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> dict:
    _follow_to_attention(_at_work(forward, kwargs.get("extra_options")), k, None, patches)
    return {}


def _follow_to_attention(forward: ForwardContext, text: Tensor, block: object, patches: list) -> None:
    forward.text.follow(text, ("attn2", block), patches)
    if forward.text.count != forward.text.given and forward.text.count in forward.taken:
        raise lost(f"makes the text {forward.text.count} tokens long, as many as another attention here has", patches)


# double_block (Z-Image): the text's part of the sequence, which is written back in place


def _sequence_before(forward: ForwardContext, args: dict) -> dict:
    _at_work(forward, args.get("transformer_options")).text.hold(args["txt"].clone(), start=0)
    return {}


def _sequence_after(forward: ForwardContext, patches: list, args: dict) -> dict:
    text = _at_work(forward, args.get("transformer_options")).text
    if text.follow(args["txt"], ("after", args.get("block_index")), patches) != 0:
        raise lost("moves the tokens of the text", patches)
    return {}


# attn1_patch (Flux, Qwen-Image, HunyuanVideo): queries, keys and values of a joint sequence


def _keys_before(forward: ForwardContext, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> dict:
    _at_work(forward, kwargs.get("extra_options")).keys_before = q, k, v
    return {}


def _keys_after(forward: ForwardContext, patches: list, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> dict:
    forward = _at_work(forward, kwargs.get("extra_options"))
    before, forward.keys_before = forward.keys_before, None
    if before is None or all(new is old for new, old in zip((q, k, v), before, strict=True)):
        return {}
    lengths = tuple(t.shape[2] for t in (*before, q, k, v))
    added = lengths[4] - lengths[1]
    if lengths[0] != lengths[3] or lengths[4] != lengths[5] or added < 0:
        raise lost("changes how many queries or keys the attention has", patches)
    stage = ("keys", lengths)
    if torch.compiler.is_compiling():
        if added:
            raise lost("adds keys to the attention, under torch.compile", patches)
    elif stage not in forward.text.known:
        _check_keys(forward, before, (q, k, v), added, patches)
        forward.text.known[stage] = forward.text.start, True
    forward.cached_keys = added
    return {}


def _check_keys(forward: ForwardContext, before: tuple, after: tuple, added: int, patches: list[Callable]) -> None:
    """Raises where the tokens are not in the order in which they were; what is added must come behind them all."""
    if added:
        for old, new in zip(before, after, strict=True):
            if not torch.equal(old, new[:, :, : old.shape[2]]):
                raise lost("adds keys to the attention elsewhere than behind all others", patches)
        return
    for old, new in zip(before, after, strict=True):
        rows = [t.transpose(1, 2).flatten(2) for t in (old, new)]
        if not torch.equal(*rows) and forward.text.found(rows[0], rows[1], patches)[0] != forward.text.start:
            raise lost("moves the tokens of the attention", patches)
