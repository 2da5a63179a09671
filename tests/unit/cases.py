"""What the tests of attention share: inputs, tolerances, the error measure."""

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}


def black_box(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def relative(a, b):
    """max|a - b| / max|b|, the project's error measure."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def make(layout, *, batch=1, heads=2, dim=64, dtype=torch.float32, spread=1.0, seed=0):
    """Random q, k, v [B, H, L, D] as strided views, with logits spread over about +-``spread``."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, layout.length, heads, dim, generator=g).transpose(1, 2) for _ in range(3))
    logits = (q @ k.transpose(-1, -2)).abs().max() * dim**-0.5
    return (q * (spread / logits)).to(dtype), k.to(dtype), v.to(dtype)
