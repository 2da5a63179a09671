"""What a node was given, checked before anything runs: an error that names the input beats one from a kernel."""

import inspect
import logging
import re
from collections.abc import Callable
from functools import wraps
from numbers import Number
from os import environ
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

STRICT = "VSF_STRICT"
"""The environment variable that makes a negative without effect an error, for servers whose log nobody reads."""
_LARGEST = torch.finfo(torch.float32).max
LONGEST = 100_000
"""Letters of a text."""


def limited(execute: Callable) -> Callable:
    """A node's ``execute`` that gets its inputs as the schema says, or raises ``ValueError`` that names the one which
    is not so. ComfyUI holds what is set on a node to its limits, but not what comes through a link."""
    signature = inspect.signature(execute)

    @wraps(execute)
    def checked(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(cls, *args, **kwargs)
        for one in cls.define_schema().inputs:
            if one.id in given.arguments:
                given.arguments[one.id] = fitted(one, given.arguments[one.id])
        return execute(*given.args, **given.kwargs)

    return checked


def fitted(one: Any, value: Any) -> Any:
    """``value`` as the input ``one`` of a schema takes it. Numbers, switches and texts are converted as ComfyUI does
    with what is set on a node, but for NaN and text that no log can hold; None is an optional socket left open."""
    kind = one.get_io_type()
    if value is None and one.optional and kind not in _WIDGETS:
        return None
    if kind in _WIDGETS:
        return _WIDGETS[kind](one, value)
    if kind in _SOCKETS:
        return _SOCKETS[kind](one.id, value)
    return value


def _whole(one: Any, value: Any) -> int:
    number = _converted(int, value)
    if number is None or not one.min <= number <= one.max:
        raise ValueError(f"VSF: {one.id} must be a whole number from {one.min} to {one.max}, got {shown(value)}.")
    return number


def _number(one: Any, value: Any) -> float:
    number = _converted(float, value)
    if number is None or not one.min <= number <= one.max:
        raise ValueError(f"VSF: {one.id} must be a number from {one.min:g} to {one.max:g}, got {shown(value)}.")
    return number


def _converted(kind: type, value: Any) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last by tensors
        return None


def _switch(one: Any, value: Any) -> bool:
    if not isinstance(value, Number) or value != value:
        raise ValueError(f"VSF: {one.id} must be true or false, got {shown(value)}.")
    return bool(value)


def _words(one: Any, value: Any) -> str:
    value = "" if value is None and one.optional else str(value) if isinstance(value, Number) else value
    if not isinstance(value, str):
        raise ValueError(f"VSF: {one.id} must be text, got {shown(value)}.")
    if len(value) > LONGEST:
        raise ValueError(f"VSF: {one.id} must be text of {LONGEST:,} letters at most, got {len(value):,}.")
    if half := re.search("[\ud800-\udfff]", value):  # of a pair
        raise ValueError(f"VSF: character {half.start() + 1} of {one.id} is not valid Unicode. Please delete it.")
    return value


def _choice(one: Any, value: Any) -> str:
    if not isinstance(value, str) or value not in one.options:
        raise ValueError(f'VSF: {one.id} must be one of {", ".join(one.options)}, got "{shown(value)}".')
    return value


_WIDGETS = {"INT": _whole, "FLOAT": _number, "BOOLEAN": _switch, "STRING": _words, "COMBO": _choice}


def is_strict() -> bool:
    return environ.get(STRICT, "") not in ("", "0")


def no_effect(message: str) -> None:
    """A warning that a negative had, or will have, no effect. Raises ``RuntimeError`` where ``VSF_STRICT`` is set."""
    if is_strict():
        raise RuntimeError(f"{message} (An error since {STRICT} is set.)")
    log.warning(message)


def finite_number(name: str, value: Any) -> float:
    """``value`` as a float that fp32 can hold."""
    number = _converted(float, value)
    if number is None or not abs(number) <= _LARGEST:
        raise ValueError(f"VSF: {name} must be a finite number, got {shown(value)}.")
    return number


def interval(first: str, start: float, last: str, end: float) -> tuple[float, float]:
    """The values of the inputs ``first`` and ``last``, in 0..1, as a part of it that is not empty."""
    if start >= end:
        raise ValueError(
            f"VSF: {first} ({start:g}) must lie before {last} ({end:g}); otherwise the negative would never act."
        )
    return start, end


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


def _mask(name: str, given: Any) -> Tensor:
    """[b, H, W] in 0..1, from [H, W] or anything that ends in [..., H, W]."""
    if not isinstance(given, Tensor) or given.ndim < 2 or given.is_complex():
        raise ValueError(f"VSF: {name} must be a mask [batch, height, width], got {shown(given)}.")
    if given.numel() == 0:
        raise ValueError(f"VSF: {name} is empty (shape {tuple(given.shape)}). Connect a mask with pixels.")
    given = given.float()
    if torch.isnan(given).any():
        raise ValueError(f"VSF: {name} has values that are NaN. Connect one whose values lie in 0..1.")
    return given.reshape(-1, *given.shape[-2:]).clamp(0.0, 1.0)


def _picture(name: str, given: Any) -> Tensor:
    """[b, H, W, 3 or more], from grey ones too."""
    if not isinstance(given, Tensor) or given.ndim != 4 or not given.is_floating_point() or given.shape[-1] == 2:
        raise ValueError(f"VSF: {name} must be pictures [batch, height, width, 3], got {shown(given)}.")
    if given.numel() == 0:
        raise ValueError(f"VSF: {name} is empty (shape {tuple(given.shape)}). Connect pictures with pixels.")
    return given.expand(-1, -1, -1, 3) if given.shape[-1] == 1 else given


def _latent(name: str, given: Any) -> dict:
    samples = given.get("samples") if isinstance(given, dict) else None
    if samples is None or len(getattr(samples, "shape", ())) < 4:
        raise ValueError(f"VSF: {name} must be a latent, got {shown(given)}. Connect an empty latent, or a VAE Encode.")
    return given


def _conditioning(name: str, given: Any) -> list:
    """A CONDITIONING with at least one entry."""
    if not isinstance(given, (list, tuple)) or not all(_is_entry(entry) for entry in given):
        raise ValueError(f"VSF: {name} must be a conditioning, got {shown(given)}. Connect a text encode node.")
    if not given:
        raise ValueError(f"VSF: {name} is a conditioning without an entry. Connect a text encode node.")
    return list(given)


def _has(attribute: str, what: str, source: str) -> Callable[[str, Any], Any]:
    """A check that an object is what it should be: it has this ``attribute``."""

    def check(name: str, given: Any) -> Any:
        if not hasattr(given, attribute):
            raise ValueError(f"VSF: {name} must be {what}, got {shown(given)}. Connect {source}.")
        return given

    return check


_SOCKETS = {
    "MODEL": _has("get_model_object", "a model", "a model loader"),
    "CLIP": _has("tokenize", "a text encoder", "the one that encodes the positive prompt"),
    "VSF_MAP": _has("record_here", "a record", "the map of VSF Record"),
    "CONDITIONING": _conditioning,
    "MASK": _mask,
    "IMAGE": _picture,
    "LATENT": _latent,
}


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
    try:
        text = str(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a value of type {type(value).__name__}"
    text = text if len(text) <= 40 else f"{text[:40]}..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
