"""A forward pass that another node cuts: into parts of the batch, one after the other, in threads or in processes, or
on copies of the network. A part learns what of the pass it is from what the network was really called with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from .forward_context import ForwardContext
from .recordings import unrecorded
from .text_stream import TextStream


@contextmanager
def parts_told(forward: ForwardContext, diffusion_model: Any) -> Iterator[None]:
    """While open, what the whole network is called with is kept; and where ComfyUI has no wrapper around the network
    (``Family.inputs``), each start of it begins a part."""
    given: list[Tensor] = []

    def keep(_: Any, args: tuple, named: dict) -> None:
        forward.whole = *_first(args[:1]), *_first([named.get("context")])

    def latent(_: Any, args: tuple) -> None:
        given[:] = args[:1]

    def text(_: Any, args: tuple) -> None:
        begin_part(forward, diffusion_model, *given, *args[:1])

    handles = [diffusion_model.register_forward_pre_hook(keep, with_kwargs=True)]
    for name, hook in zip(forward.family.inputs, (latent, text), strict=False):
        handles.append(getattr(diffusion_model, name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        forward.collect()


def begin_part(forward: ForwardContext, network: Any, x: Tensor | Sequence[Tensor], text: Tensor) -> ForwardContext:
    """The ``network`` starts in this thread, on ``x`` and ``text``: what its attention gets to know from now on. Raises
    ``RuntimeError`` where VSF cannot tell what part of the pass that is."""
    if forward.network is not None and network is not forward.network:
        _check_copy(forward)
    rows, count = _rows_of(forward), text.shape[0]
    here = slice(None) if rows in (1, count) else _place(forward, _first([x]) + (text,), rows)
    if forward.attention_mass is not None and count != forward.attention_mass.shape[1]:
        raise _cut(forward.attention_mass.shape[1], count, "VSF Record, which sees whole steps, cannot follow that")
    with unrecorded():
        stream = TextStream(forward.text.negative, forward.text.given, forward.text.known, forward.text.moved.device)
        reached = torch.zeros_like(forward.reached)
    stream.strangers, stream.copies = forward.text.strangers, forward.text.copies
    alpha, beta, nowhere = (_cut_rows(t, here) for t in (forward.alpha, forward.beta, forward.nowhere))
    part = replace(
        forward,
        text=stream,
        alpha=alpha,
        beta=beta,
        nowhere=beta if forward.nowhere is forward.beta else nowhere,
        padding=_cut_rows(forward.padding, here),
        padding_as_text=_cut_rows(forward.padding_as_text, here),
        reached=reached,
        batch=count,
        calls=0,
        cached_keys=0,
        keys_before=None,
        made={},
        placed={},
    )
    with forward.lock:
        forward.parts.append(part)
        forward.by_thread[get_ident()] = part
    return part


def _numbers(forward: ForwardContext) -> list[Tensor]:
    """What may have a row for each of the batch."""
    own = (forward.alpha, forward.beta, forward.padding, forward.padding_as_text)
    return [t for t in own if t is not None]


def _rows_of(forward: ForwardContext) -> int:
    """How many rows of a batch have numbers of their own; 1 where all share them."""
    return max(t.shape[0] for t in _numbers(forward))


def _first(given: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tensors among ``given``; of several latents in one the first."""
    firsts = (one[0] if isinstance(one, (list, tuple)) else one for one in given)
    return tuple(one for one in firsts if isinstance(one, Tensor))


def _place(forward: ForwardContext, given: tuple[Tensor, ...], rows: int) -> slice:
    """Which of the pass's ``rows`` have the latent and the text that were ``given``, to the bit."""
    count, whole = given[-1].shape[0], forward.whole[-len(given) :]
    found = [
        slice(start, start + count)
        for start in range(rows - count + 1)
        if len(whole) == len(given) and all(map(_same, (w[start : start + count] for w in whole), given))
    ]
    if not found:
        raise _cut(rows, count, "and their latent and text are none of this step's, to the bit")
    if len(found) > 1 and not all(_alike(forward, found[0], other) for other in found[1:]):
        raise _cut(rows, count, "and these look alike, but their negatives are not")
    return found[0]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.to(theirs), theirs)


def _alike(forward: ForwardContext, a: slice, b: slice) -> bool:
    return all(t.shape[0] == 1 or torch.equal(t[a], t[b]) for t in _numbers(forward))


def _cut_rows(t: Any, rows: slice) -> Any:
    return t if t is None or t.shape[0] == 1 else t[rows]


def _check_copy(forward: ForwardContext) -> None:
    """A copy of the network has none of the hooks by which N keeps its own positions and its own way to the blocks."""
    family = forward.family
    if family.rope_module(forward.network) or family.token_refiner():
        raise RuntimeError(
            "VSF: another node runs a copy of this model's network, perhaps on another GPU (as ParallelAnything does), "
            f"and on {family.title} the negative's place is kept on the network itself. Remove that node, or VSF Model "
            "Patch."
        )


def _cut(rows: int, count: int, why: str) -> RuntimeError:
    return RuntimeError(
        f"VSF: this step has {rows} rows in its batch, but another node calls the model with {count} of them, {why}. "
        "A node splits the batch, perhaps over several GPUs. Remove it, or use cfg 1 and one picture at a time."
    )
