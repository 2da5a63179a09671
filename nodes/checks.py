"""What a node was given, checked before anything runs: an error that names the input beats one from a kernel."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max


def finite_number(name: str, value: Any) -> float:
    """``value`` as a float that fp32 can hold."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise ValueError(f"VSF: {name} must be a finite number, got {shown(value)}.")
    return number


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as a whole number: a node's limits do not bind what comes through a link."""
    number = finite_number(name, value)
    if not low <= number <= high or number != int(number):
        raise ValueError(f"VSF: {name} must be a whole number from {low} to {high}, got {shown(value)}.")
    return int(number)


def words(name: str, value: Any) -> str:
    """``value`` as text that a log can hold."""
    if not isinstance(value, str):
        raise ValueError(f"VSF: {name} must be text, got {shown(value)}.")
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def interval(first: str, start: Any, last: str, end: Any) -> tuple[float, float]:
    """The values of the inputs ``first`` and ``last`` as a part of 0..1 that is not empty."""
    start, end = finite_number(first, start), finite_number(last, end)
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(
            f"VSF: {first} ({start:g}) must lie before {last} ({end:g}), both in 0..1; otherwise the negative would "
            "never act."
        )
    return start, end


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f'VSF: {name} must be one of {", ".join(known)}, got "{shown(value)}".')


def embedding(tokens: Any) -> Tensor:
    """A prompt's embedding [b, n, C]: neither empty nor with values that would make the picture NaN."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(
            f"VSF: the negative's embedding must be numbers of shape [batch, tokens, channels], got {shown(tokens)}. "
            "Connect the output of a text encode node."
        )
    if tokens.numel() == 0:
        raise ValueError(f"VSF: the negative's embedding is empty (shape {tuple(tokens.shape)}). Give it some text.")
    if not torch.isfinite(tokens).all():
        raise ValueError(
            "VSF: the negative's embedding has values that are NaN or infinite. Look for weights like (word:1e39) in "
            "its text; otherwise its text encoder, or what was patched onto it, is broken."
        )
    return tokens


def mask(given: Any) -> Tensor | None:
    """[b, H, W] in 0..1, from [H, W] or anything that ends in [..., H, W]; None stays None."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.ndim < 2:
        raise ValueError(f"VSF: the mask must be a picture [batch, height, width], got {shown(given)}.")
    if given.numel() == 0:
        raise ValueError(f"VSF: the mask is empty (shape {tuple(given.shape)}). Connect a mask with pixels.")
    given = given.float()
    if torch.isnan(given).any():
        raise ValueError("VSF: the mask has values that are NaN. Connect one whose values lie in 0..1.")
    return given.reshape(-1, *given.shape[-2:]).clamp(0.0, 1.0)


def conditioning(name: str, given: Any) -> list:
    """A CONDITIONING with at least one entry."""
    if not isinstance(given, (list, tuple)) or not all(_is_entry(entry) for entry in given):
        raise ValueError(f"VSF: {name} must be a conditioning, got {shown(given)}. Connect a text encode node.")
    if not given:
        raise ValueError(f"VSF: {name} is a conditioning without an entry. Connect a text encode node.")
    return list(given)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)


def module_of(kind: type) -> str:
    """Where a class comes from, for people: ComfyUI names the modules of a pack by its folder's path."""
    return re.split(r"custom_nodes[./\\]", kind.__module__)[-1]


def shown(value: Any) -> str:
    """A value for a message: what it is, not all of it, and nothing that cannot be written to a log.

    ComfyUI's log takes no lone surrogates: one in an error's text ends the thread that works on its queue.
    """
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    text = str(value)
    text = text if len(text) <= 40 else f"{text[:40]}..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
