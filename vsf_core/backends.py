"""Attentions that return their log-sum-exp, and the probe that decides whether one can be trusted here.

The libraries' ones (sageattention, flash_attn, xformers) are imported when they are asked for and at no other time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .fused import FusedAttention

log = logging.getLogger(__name__)

LSEAttention = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
"""(q, k, v, softmax_scale) -> (Z [B, H, Lq, D], fresh memory; lse [B, H, Lq], natural log, fp32). No empty q or k."""

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""A black box: (q, k, v, additive mask or None) -> Z [B, H, Lq, D]."""


WAYS = ("fused", "merge", "mask", "reference")
"""To compute a call, the first that can be had: in one kernel; by log-sum-exps; through a black box that takes masks;
and by definition, which is never chosen. See ``methods.py``."""


@dataclass(frozen=True, eq=False)
class AttentionBackend:
    """Which attentions a call may be made of."""

    black_box: Attention
    lse: LSEAttention | None = None
    softmax_scale: float | None = None
    """What q k^T is multiplied by; None: D^-0.5. ``black_box`` has a scale of its own."""
    name: str = "black box"
    """That of ``black_box``, for logs."""
    fused: FusedAttention | None = None
    forced: str | None = None
    """One of ``WAYS``, whatever would be chosen; for bug reports."""
    coarse: bool = False
    """Whether ``black_box`` rounds values on one scale a channel: those of N, times -alpha, would make all coarse."""

    def way(self, mask: Tensor | None) -> str:
        """Which of ``WAYS`` a call with the caller's own ``mask`` takes. ``ValueError`` for a forced one that can't."""
        can = {
            "fused": self.fused is not None and (mask is None or mask.shape[2] == 1),
            "merge": self.lse is not None and mask is None,
        }
        way = self.forced or next(way for way in WAYS if can.get(way, True))
        if not can.get(way, True):
            lacks = "takes no mask" if mask is not None else "is not to be had here"
            raise ValueError(f"the way {way!r}, which was asked for, {lacks}: ask for another, or for none")
        return way

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``lse`` at this scale. Raises ``ValueError`` where it is not given."""
        if self.lse is None:
            raise ValueError("this backend has no attention that returns its log-sum-exp")
        return self.lse(q, k, v, self.softmax_scale)


aten = torch.ops.aten


def unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The kernels read the last dimension as if its stride were 1."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def cpu_flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention for CPUs."""
    q, k, v = unit_stride(q, k, v)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=softmax_scale)


def cuda_flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """FlashAttention as PyTorch ships it (CUDA, ROCm): half precision, head dimension padded to a multiple of 8."""
    dim = q.shape[-1]
    softmax_scale = dim**-0.5 if softmax_scale is None else softmax_scale
    if dim % 8:
        q, k, v = (F.pad(t, (0, 8 - dim % 8)) for t in (q, k, v))
    z, lse = aten._scaled_dot_product_flash_attention(*unit_stride(q, k, v), scale=softmax_scale)[:2]
    return z[..., :dim], lse[..., : q.shape[2]]


def cuda_efficient(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel (CUDA, ROCm), fp32 too; its log-sum-exp is padded to 32 rows."""
    z, lse = aten._scaled_dot_product_efficient_attention(*unit_stride(q, k, v), None, True, scale=softmax_scale)[:2]
    return z, lse[..., : q.shape[2]]


def cuda_cudnn(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """cuDNN's kernel (CUDA); its log-sum-exp has a dimension more."""
    z, lse = aten._scaled_dot_product_cudnn_attention(*unit_stride(q, k, v), None, True, scale=softmax_scale)[:2]
    return z, lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]]


def sageattention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """SageAttention 2 (CUDA): 8-bit keys and queries."""
    from sageattention import sageattn

    options = {"tensor_layout": "HND", "is_causal": False, "sm_scale": softmax_scale, "return_lse": True}
    return sageattn(*unit_stride(q, k, v), **options)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The flash-attn package (CUDA, ROCm); [B, L, H, D] there."""
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    z, lse, _ = flash_attn_func(q, k, v, softmax_scale=softmax_scale, return_attn_probs=True)
    return z.transpose(1, 2), lse[..., : q.shape[1]]


def xformers(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """xFormers' memory-efficient attention (CUDA, ROCm); [B, L, H, D] there, the log-sum-exp padded by some kernels."""
    from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    z, lse = memory_efficient_attention_forward_requires_grad(q, k, v, scale=softmax_scale)
    return z.transpose(1, 2), lse[..., : q.shape[1]]


CANDIDATES: dict[str, tuple[LSEAttention, ...]] = {
    "cpu": (cpu_flash,),
    "cuda": (cuda_flash, cuda_cudnn, cuda_efficient),
}
"""PyTorch's own, by type of device, the fastest first; ``cuda`` is ROCm too."""
LIBRARIES: dict[str, LSEAttention] = {f.__name__: f for f in (sageattention, flash_attn, xformers)}
SMALL = 256
"""With this many queries or keys at most, PyTorch's own attention runs although a library was asked for: the negative's
part is small, and exact instead of in 8 bits."""


def candidates(device: torch.device) -> list[LSEAttention]:
    """``CANDIDATES`` of a device, cuDNN's first on Hopper and Blackwell."""
    found, newest = CANDIDATES.get(device.type, ()), False
    if device.type == "cuda" and torch.version.hip is None:
        newest = torch.cuda.get_device_capability(device) >= (9, 0)
    return sorted(found, key=lambda attend: newest and attend is not cuda_cudnn)


@lru_cache(maxsize=64)
def lse_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, library: str = "torch"
) -> LSEAttention | None:
    """An attention of ``library`` that returns a right log-sum-exp on this device for this dtype and head dimension.

    ``library``: "torch" (the first of the device's kernels that does) or one of ``LIBRARIES``. None if there is none:
    each is tried once per device, dtype and head dimension, on inputs of a few kilobytes. Out of memory is no answer:
    it is raised, and another call tries again.
    """
    own = next((f for f in candidates(device) if _trustworthy(f, device, dtype, head_dim)), None)
    if library == "torch" or own is None:
        return own if library == "torch" else None
    return _large_only(LIBRARIES[library], own) if _trustworthy(LIBRARIES[library], device, dtype, head_dim) else None


def _large_only(large: LSEAttention, small: LSEAttention) -> LSEAttention:
    def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
        return (small if min(q.shape[2], k.shape[2]) <= SMALL else large)(q, k, v, softmax_scale)

    attend.__name__ = large.__name__
    return attend


def _trustworthy(attend: LSEAttention, device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    # 8 bits are coarse; a log-sum-exp to base 2, or of shifted keys, is further off than this
    tolerance = 0.1 if attend is sageattention else 0.03
    try:
        zeros = torch.zeros(1, 2, 8, dim, device=device, dtype=dtype)
        if not ((attend(zeros, zeros, zeros, None)[1] - math.log(8.0)).abs() < 1e-3).all():
            return False
        # rows != keys != heads, rows no multiple of 32, and the strided views that models hand over
        g = torch.Generator().manual_seed(0)
        lengths = (37, 21, 21)
        q, k, v = (torch.randn(2, n, 3, dim, generator=g).to(device, dtype).transpose(1, 2) for n in lengths)
        z, lse = attend(q, k, v, None)
        logits = torch.matmul(q.double(), k.double().transpose(-1, -2)) * dim**-0.5
        expected = torch.matmul(logits.softmax(-1), v.double())
        lse_error = (lse.double() - logits.logsumexp(-1)).abs().max()
        return bool(lse_error < tolerance and (z.double() - expected).abs().max() < tolerance)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # a kernel that is not there or does not take these inputs says so in many ways
        return False


@lru_cache(maxsize=64)
def fused_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, forced: bool = False
) -> FusedAttention | None:
    """The fused kernel, where it is the best way (``fused.TABLE``) and gives the right result; ``forced``: wherever it
    runs. Tried once, as ``lse_attention`` is."""
    if device.type != "cuda" and not forced:
        return None
    try:
        from .fused import FusedAttention

        return FusedAttention.find(device, dtype, head_dim, forced)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler for its launcher, a chip that it does not know ...
        log.info(f"VSF: no fused kernel for {dtype} here, other ways are used: {type(error).__name__}: {error}")
        return None
