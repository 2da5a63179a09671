"""What the tests of attention share: inputs, tolerances, the error measure, the ways to compute a call."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hosting.interpreter import triton_interpreted

from vsf_core import AttentionBackend, TokenLayout, fused_attention, lse_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
with triton_interpreted():
    from vsf_core import fused  # noqa: F401 (made here)

BEFORE = pytest.mark.parametrize("before", [0.0, 0.5, 1.0], ids=["N, P", "P, N, P", "P, N"])
"""Which part of P stands in front of N."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}


def placed(image, positive, negative, before):
    """With ``before``, 0..1, of P in front of N."""
    return TokenLayout(image, positive, negative, round(before * positive))


def rows_of(layout, groups):
    """The positions of ``groups`` in the sequence, from the definition [P's first, N, P's rest, I]."""
    first, rest = "P" * layout.before, "P" * (layout.positive - layout.before)
    return [at for at, group in enumerate(first + "N" * layout.negative + rest + "I" * layout.image) if group in groups]


def black_box(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def on_device(run):
    """``run`` with its tensors on ``DEVICE``, and its result on the CPU; what is added to a mass comes back."""

    @functools.wraps(run)
    def there(*given, **named):
        if DEVICE.type == "cpu":
            return run(*given, **named)
        pairs = [(t, t.to(DEVICE)) for t in (*given, *named.values()) if isinstance(t, torch.Tensor)]
        moved = {id(before): after for before, after in pairs}
        result = run(*(moved.get(id(x), x) for x in given), **{k: moved.get(id(x), x) for k, x in named.items()})
        for before, after in pairs:
            if before.ndim == 2 and before.is_floating_point():  # a mass
                before.copy_(after)
        return result.cpu()

    return there


def backend_of(way, q):
    """What makes a call go one of ``vsf_core.WAYS``."""
    kind = q.device, q.dtype, q.shape[-1]
    lse = lse_attention(*kind) if way == "merge" else None
    kernel = fused_attention(*kind, forced=True) if way == "fused" else None
    assert way not in ("merge", "fused") or lse or kernel, "this machine's own must pass the probe"
    return AttentionBackend(black_box, lse, fused=kernel, forced=way)


def relative(a, b):
    """max|a - b| / max|b|, the project's error measure."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def make(layout, *, batch=1, heads=2, dim=64, dtype=torch.float32, spread=1.0, seed=0):
    """Random q, k, v [B, H, L, D] as strided views, with logits spread over about +-``spread``."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, layout.length, heads, dim, generator=g).transpose(1, 2) for _ in range(3))
    logits = (q @ k.transpose(-1, -2)).abs().max() * dim**-0.5
    return (q * (spread / logits)).to(dtype), k.to(dtype), v.to(dtype)
