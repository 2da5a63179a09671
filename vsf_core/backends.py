"""Attentions that return their log-sum-exp, and the probe that decides whether one can be trusted here."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LSEAttention = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
"""(q, k, v, scale) -> (Z [B, H, Lq, D], lse [B, H, Lq] natural log, fp32); Z is fresh memory. No empty q or k."""

aten = torch.ops.aten


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The ops below read the last dimension as if its stride were 1."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention for CPUs."""
    q, k, v = _unit_stride(q, k, v)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def cuda_flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """FlashAttention as PyTorch ships it (CUDA, ROCm): half precision, head dimension padded to a multiple of 8."""
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    if dim % 8:
        q, k, v = (F.pad(t, (0, 8 - dim % 8)) for t in (q, k, v))
    z, lse = aten._scaled_dot_product_flash_attention(*_unit_stride(q, k, v), scale=scale)[:2]
    return z[..., :dim], lse[..., : q.shape[2]]


def cuda_efficient(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel (CUDA, ROCm), fp32 too; its log-sum-exp is padded to 32 rows."""
    z, lse = aten._scaled_dot_product_efficient_attention(*_unit_stride(q, k, v), None, True, scale=scale)[:2]
    return z, lse[..., : q.shape[2]]


CANDIDATES: dict[str, tuple[LSEAttention, ...]] = {"cpu": (cpu_flash,), "cuda": (cuda_flash, cuda_efficient)}


@lru_cache(maxsize=64)
def lse_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> LSEAttention | None:
    """The first attention of this device that returns a right log-sum-exp for this dtype and head dimension, or None.

    Tried once per device, dtype and head dimension, on inputs of a few kilobytes.
    """
    return next((f for f in CANDIDATES.get(device.type, ()) if _trustworthy(f, device, dtype, head_dim)), None)


def _trustworthy(attend: LSEAttention, device: torch.device, dtype: torch.dtype, dim: int) -> bool:
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
        return bool(
            (lse.double() - logits.logsumexp(-1)).abs().max() < 2e-2 and (z.double() - expected).abs().max() < 4e-2
        )
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
