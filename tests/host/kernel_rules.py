"""What CUDA's attention kernels take for granted, asked on the CPU, where nothing breaks, of every call that VSF makes.

On a GPU a mask of half precision that begins off 16 bytes is no error but the end: "misaligned address", and the server
must be restarted. PyTorch copies a mask of which a stride is no multiple of 8 first, which is safe but slow; one whose
strides are right it hands on as it is, wherever that begins.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F

BYTES = 16
"""What a kernel reads at once."""
STRIDE = 8
"""Of a mask, in elements: torch's ``preprocess_mask``."""


class KernelRule(BaseException):
    """A call that a GPU would not survive, or not as fast. No ``Exception``: ComfyUI and VSF catch those where they try
    an attention out."""


def broken_rules(q: Any, k: Any, v: Any, mask: Any = None) -> list[str]:
    """What is wrong with q, k, v [B, H, L, D] and an additive or bool mask [B or 1, H or 1, Lq or 1, Lk], in words."""
    found = []
    for name, t in {"q": q, "k": k, "v": v}.items():
        if t.numel() == 0:
            found.append(f"{name} is empty: {tuple(t.shape)}")
        if (t.dtype, t.device) != (q.dtype, q.device):
            found.append(f"{name} is {t.dtype} on {t.device}, q {q.dtype} on {q.device}")
        if t.stride(-1) != 1:
            found.append(f"{name}'s last stride is {t.stride(-1)}")
        # torch pads heads of other sizes to a copy, which starts anew; no real model has any
        if t.shape[-1] * t.element_size() % BYTES == 0:
            found += _begins(name, t) + _rows_begin(name, t, BYTES // t.element_size())
    if mask is None:
        return found
    if mask.device != q.device or mask.dtype not in (q.dtype, torch.bool):
        found.append(f"the mask is {mask.dtype} on {mask.device}, q {q.dtype} on {q.device}")
    if mask.dtype == torch.bool:  # torch makes an additive one of it, in memory of its own
        return found
    if mask.stride(-1) != 1:
        found.append(f"the mask's last stride is {mask.stride(-1)}")
    return found + _begins("the mask", mask) + _rows_begin("the mask", mask, STRIDE)


def _begins(name: str, t: Any) -> list[str]:
    off = t.data_ptr() % BYTES
    return [f"{name} begins {off} bytes off"] if off else []


def _rows_begin(name: str, t: Any, multiple: int) -> list[str]:
    """Of a dimension of one element no stride is asked: where torch does, it copies a mask of one row."""
    off = any(stride % multiple for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1)
    return [f"{name}'s strides {t.stride()} are no multiples of {multiple}"] if off else []


def kills(mask: Any) -> bool:
    """Whether torch hands this additive mask to a kernel as it is, and the kernel reads across its words."""
    as_it_is = mask.stride(-1) == 1 and not any(stride % STRIDE for stride in mask.stride()[:-1])
    return mask.is_floating_point() and as_it_is and bool(_begins("the mask", mask))


def is_expanded(out: Any) -> bool:
    """Whether several elements of ``out`` share memory: a kernel that writes there would write them over."""
    return any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True))


def ruled(attend: Callable, first: int = 0) -> Callable:
    """``attend`` with its arguments from ``first`` on, (q, k, v, mask or scale), held to the rules."""

    @wraps(attend)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # addresses are not known yet
            return attend(*args, **kwargs)
        mask = args[first + 3] if len(args) > first + 3 else None
        found = broken_rules(*args[first : first + 3], mask if isinstance(mask, torch.Tensor) else None)
        made = attend(*args, **kwargs)
        outs = made if isinstance(made, tuple) else (made,)
        found += ["what it returns is expanded, and VSF writes into that"] if any(map(is_expanded, outs)) else []
        if found:
            raise KernelRule(f"{attend.__qualname__}: {'; '.join(found)}")
        return made

    return checked


def survived(attend: Callable) -> Callable:
    """PyTorch's own attention, whoever calls it: with no mask that kills."""

    @wraps(attend)
    def checked(q: Any, k: Any, v: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if attn_mask is not None and not torch.compiler.is_compiling() and kills(attn_mask):
            raise KernelRule(f"{attend.__name__}: {_begins('the mask', attn_mask)[0]}, and is handed on as it is")
        return attend(q, k, v, attn_mask, *args, **kwargs)

    return checked


def watch(pack: str) -> None:
    """Hold to the rules whatever VSF, loaded as ``pack``, attends with: ComfyUI's attention, PyTorch's with a mask, and
    those that return their log-sum-exp. Of calls that ComfyUI makes itself, only that no mask kills."""
    host, backends = (sys.modules[f"{pack}.{name}"] for name in ("nodes.host_attention", "vsf_core.backends"))
    F.scaled_dot_product_attention = survived(F.scaled_dot_product_attention)
    host.HostAttention.black_box = ruled(host.HostAttention.black_box, first=1)
    host._sdpa = ruled(host._sdpa)
    with_lse = {f: ruled(f) for some in (*backends.CANDIDATES.values(), backends.LIBRARIES.values()) for f in some}
    for f, checked in with_lse.items():
        setattr(backends, f.__name__, checked)  # by which the probe knows it, too
    for table in (backends.CANDIDATES, backends.LIBRARIES):
        for key, value in table.items():
            table[key] = tuple(map(with_lse.get, value)) if isinstance(value, tuple) else with_lse[value]
