"""Where a run would wait for a GPU, seen on the CPU: whoever reads a tensor that lives there, or copies one there from
ordinary memory, stops until the GPU has done all that it was given, and then it has nothing to do.

Nothing tells which tensors would live there. So: what is made without a ``device``, or copied to "cpu", is in ordinary
memory, and what is computed of such alone; everything else is on the device.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__bool__, Tensor.__int__}
READS |= {Tensor.__float__, Tensor.__index__, Tensor.__contains__, Tensor.__format__, Tensor.equal, torch.equal}
READS |= {torch.allclose, Tensor.allclose, torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere}
READS |= {torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique, Tensor.bincount, torch.bincount}
READS |= {torch.is_nonzero, Tensor.is_nonzero, torch.repeat_interleave, Tensor.repeat_interleave}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.index_put, torch.index_put}
COPIES = {Tensor.to, torch.tensor, torch.as_tensor}
"""To the device that they are told."""
HIDDEN = str(Path(torch.__file__).parent), __file__


class Waits(TorchFunctionMode):
    """While in force, ``steps[-1]`` counts the waits by place; ``next_step`` begins another."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [Counter()]

    def next_step(self, *_: Any) -> None:
        """A sampler's callback."""
        self.steps.append(Counter())

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        ordinary, to = all(map(_is_ordinary, given)), _destination(func, args, kwargs)
        if _waits(func, args, given, ordinary, to):
            self.steps[-1][_place()] += 1
        made = func(*args, **kwargs)
        ordinary = ordinary if to is None else to == "cpu"
        if any(made is t and _is_ordinary(t) != ordinary for t in given):
            made = made.detach()  # on the other device it would be another tensor
        for t in _tensors(made):
            t._is_ordinary = ordinary
        return made


def _waits(func: Any, args: tuple, given: list[Tensor], ordinary: bool, to: str | None) -> bool:
    if func in READS or (func is torch.where and len(args) == 1):
        return not ordinary
    if func in COPIES and to is not None:
        return (_is_ordinary(args[0]) if func is Tensor.to else ordinary) != (to == "cpu")
    if func is Tensor.copy_:
        return _is_ordinary(args[0]) != _is_ordinary(args[1])
    if func not in INDEXING or _is_ordinary(args[0]):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    # how many are True, or which one it is, must be known; a list goes to the device first
    read = (torch.bool, torch.uint8)
    asks = any(
        isinstance(i, Tensor) and (i.dtype in read or (i.ndim == 0 and not i.is_floating_point())) for i in index
    )
    return asks or any(isinstance(i, list) for i in index) or any(map(_is_ordinary, given))


def _destination(func: Any, args: tuple, kwargs: dict) -> str | None:
    """The device that a call asks for: "cpu" if in so many words, else "device"; None where it asks for none."""
    to = kwargs.get("device", args[1] if func is Tensor.to and len(args) > 1 else None)
    if func is Tensor.cpu or to == "cpu" or (func is Tensor.to and isinstance(to, Tensor) and _is_ordinary(to)):
        return "cpu"
    return "device" if isinstance(to, (str, torch.device, Tensor)) else None


def _is_ordinary(t: Tensor) -> bool:
    return getattr(t, "_is_ordinary", False)


def _tensors(x: Any) -> Any:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _tensors(part)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))


def _place() -> str:
    """The line outside of torch that waits."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(HIDDEN):
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
