"""N followed through the patches of other nodes that get the model's text in their hands, outside its blocks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .compiled import thread
from .families import Family
from .forward_context import FORWARD_KEY, ForwardContext
from .parts import begin_part
from .text_stream import lost

MODEL = WrappersMP.DIFFUSION_MODEL


def text_followed(options: dict, forward: ForwardContext) -> dict:
    """``transformer_options`` in which a patch of ours runs before and after those of others that may move the text. Of
    those that replace a block, the wrapper around that takes care."""
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {}).get("dit", {})
    forward.text.strangers = (*replaced.values(), *patches.get("double_block", ()))
    bracketed = {
        name: [partial(_here, before, forward), *patches[name], partial(_here, after, forward, patches[name])]
        for name, (before, after) in _brackets(forward.family).items()
        if patches.get(name)
    }
    wrappers = options.get("wrappers", {})
    around = wrappers.get(MODEL, {})
    forward.text.copies = not forward.run.reported and bool(forward.text.strangers or bracketed)
    options = {**options, "patches": {**patches, **bracketed}} if bracketed else options
    ours = _model_begins(forward, [wrapper for some in around.values() for wrapper in some])
    return {**options, "wrappers": {**wrappers, MODEL: {"vsf_before": ours[:1], **around, "vsf_after": ours[1:]}}}


def _model_begins(forward: ForwardContext, wrappers: list[Callable]) -> list[Callable]:
    """Wrappers around the ``wrappers`` of others around the whole model, which get its text, and may run it twice."""
    given: dict[int, Tensor] = {}

    def before(executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given[thread()] = context
        return executor(x, timestep, context, *args, **kwargs)

    def after(executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if forward.network is not None:  # models write into their options, which threads would share
            args, kwargs = tuple(map(_own, args)), {key: _own(value) for key, value in kwargs.items()}
        kwargs.get("transformer_options", {}).pop("block_index", None)  # as ``patched_options``
        if forward.network is None:
            text, forward.calls = forward.text, 0
            text.begin()
        else:
            text = begin_part(forward, executor.class_obj, x, context).text
        if wrappers:
            held = given[thread()]
            if held.shape[0] != context.shape[0]:  # they cut the batch
                held = context
            text.hold(held)
            if text.follow(context, "model", wrappers) or context.shape[1] != held.shape[1]:
                raise lost("puts tokens into the text of the whole model", wrappers)
        return executor(x, timestep, context, *args, **kwargs)

    return [before, after]


def _own(given: Any) -> Any:
    """``transformer_options`` of one's own."""
    return {**given} if isinstance(given, dict) and FORWARD_KEY in given else given


def _here(patch: Callable, forward: ForwardContext, *args: Any, **kwargs: Any) -> Any:
    """A ``patch`` of ours, for the part of the pass that is at work."""
    return patch(forward.here(), *args, **kwargs)


def _brackets(family: Family) -> dict[str, tuple[Callable, Callable]]:
    """By the name that ComfyUI has for such patches: ours before them, and ours behind."""
    if family.block_hook == "attn2":
        return {"attn2_patch": _text(lambda n, context, value, options: (context, options["block"]), _as_given)}
    if family.cross_attention and family.block_hook is None:
        return {"attn2_patch": _text(lambda q, k, v, extra_options, **_: (k, extra_options.get("block_index")))}
    if family.cross_attention:
        return {}
    if family.block_hook is None:  # Z-Image's is written back in place
        return {"double_block": _text(lambda args: (args["txt"].clone(), args["block_index"]))}
    return {
        "post_input": _text(lambda args: (args["txt"], None), _as_given),
        "attn1_patch": (_keys_before, _keys_after),
    }


def _as_given(*args: Any) -> Any:
    """What a patch gives back that changes nothing: its one dict, or its first three tensors."""
    return args[0] if len(args) == 1 else args[:3]


def _text(text_of: Callable, unchanged: Callable = lambda *args: {}) -> tuple[Callable, Callable]:
    """Patches around others, for a hook of which ``text_of`` finds the text and its block among the arguments, and for
    which ``unchanged`` makes an answer that changes nothing."""

    def before(forward: ForwardContext, *args: Any, **kwargs: Any) -> Any:
        forward.text.hold(text_of(*args, **kwargs)[0], start=0)
        return unchanged(*args)

    def after(forward: ForwardContext, patches: Sequence[Callable], *args: Any, **kwargs: Any) -> Any:
        text, block = text_of(*args, **kwargs)
        forward.text.follow(text, ("patched", block), patches)
        if forward.text.count != forward.text.given and forward.text.count in forward.taken:
            raise lost(f"makes the text {forward.text.count} tokens long, as another attention here is", patches)
        if forward.family.block_hook is None and not forward.family.cross_attention and forward.text.start:
            raise lost("moves the tokens of the text", patches)
        return unchanged(*args)

    return before, after


def _keys_before(forward: ForwardContext, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> dict:
    """Queries, keys and values of a joint sequence, as they go into the patches of others."""
    forward.keys_before = q, k, v
    return {}


def _keys_after(forward: ForwardContext, patches: list, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> dict:
    """The same as they come out: with more keys behind all others, perhaps, but none moved."""
    before, forward.keys_before = forward.keys_before, None
    if before is None or all(new is old for new, old in zip((q, k, v), before, strict=True)):
        return {}
    lengths = tuple(t.shape[2] for t in (*before, q, k, v))
    added = lengths[4] - lengths[1]
    if lengths[0] != lengths[3] or lengths[4] != lengths[5] or added < 0:
        raise lost("changes how many queries or keys the attention has", patches)
    at = kwargs.get("extra_options", {})
    stage = ("keys", at.get("block_type"), at.get("block_index"), lengths)
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
        old, new, n = before[1], after[1], forward.text.negative
        if not all(torch.equal(o, a[:, :, : o.shape[2]]) for o, a in zip(before, after, strict=True)):
            raise lost("adds keys to the attention elsewhere than behind all others", patches)
        n = old[:, :, forward.text.start : forward.text.start + n, :1]  # a channel of each head tells keys apart
        if (new[:, :, old.shape[2] :, :1] == n.mT).all(dim=1).any():
            raise lost("adds keys of the negative to the attention once more", patches)
        return
    for old, new in zip(before, after, strict=True):
        rows = [t.transpose(1, 2).flatten(2) for t in (old, new)]
        if not torch.equal(*rows) and forward.text.found(rows[0], rows[1], patches)[0] != forward.text.start:
            raise lost("moves the tokens of the attention", patches)
