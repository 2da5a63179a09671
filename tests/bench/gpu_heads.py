"""The attention alone on a GPU, in the sizes of whole models, by every way against the definition in fp64: tiny models
have tiny heads, for which the fused kernel is cut up otherwise."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_report import DTYPES, PATHS, TIMES, NotRun
from helpers import relative
from torch import Tensor

NAME = "attention alone"
SHAPES = {"SD3.5": (24, 64, 1024, 154), "Flux": (24, 128, 1024, 256), "Flux, large": (8, 128, 4096, 512)}
"""Heads, their dimension, image and text tokens."""
AT_LEAST = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 2e-3}


class Heads:
    """All that is asked of one dtype."""

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.exact: dict[tuple[str, str], Tensor] = {}

    def all(self) -> dict[str, Callable[[], dict]]:
        """The way that is chosen here first, then each."""
        return {
            f"{shape}, {method}, {way or 'chosen'}": partial(self.check, shape, method, way)
            for shape in SHAPES
            for method in ("vsf", "nag", "cross")
            for way in (None, *PATHS)
        }

    def check(self, shape: str, method: str, way: str | None) -> dict:
        """How far from fp64 a way is, beside PyTorch's own attention; an error if that is too far."""
        from vsf_core import (
            NAG,
            VSF,
            AttentionBackend,
            NegativeTerms,
            TokenLayout,
            attend_cross,
            attend_joint,
            fused_attention,
            lse_attention,
            way_of,
        )

        heads, dim, image, text = SHAPES[shape]
        kind = self.device, DTYPES[self.dtype], dim
        layout, generator = TokenLayout(image, text, 16), torch.Generator().manual_seed(0)
        sizes = (1, layout.length, heads, dim)
        q, k, v = (torch.randn(sizes, generator=generator).to(*kind[:2]).transpose(1, 2) for _ in range(3))
        alpha, beta = (torch.full((1, 1, 1), number, device=self.device) for number in (3.3, 0.2))
        lse = lse_attention(*kind) if way in (None, "merge") else None
        fused = fused_attention(*kind, forced=way == "fused") if way in (None, "fused") else None
        if (way == "merge" and lse is None) or (way == "fused" and fused is None):
            raise NotRun(f"{way} is not to be had here")
        backend = AttentionBackend(_sdpa, lse, fused=fused, forced=way)
        arithmetic = NAG(0.5, 2.5) if method == "nag" else VSF()

        def run(backend: AttentionBackend, *tensors: Tensor) -> Tensor:
            q, k, v = tensors
            if method == "cross":
                n = layout.span("N")
                parts = q[:, :, layout.span("I")], k[:, :, n.stop :], v[:, :, n.stop :], k[:, :, n], v[:, :, n]
                return attend_cross(arithmetic, backend, *parts, NegativeTerms(alpha, beta))
            return attend_joint(arithmetic, backend, q, k, v, layout, NegativeTerms(alpha, beta))

        if self.device.type == "mps":
            raise NotRun("Apple's GPUs have no fp64 to compare with")
        if (shape, method) not in self.exact:  # in fp64, masks are the definition
            self.exact[shape, method] = run(AttentionBackend(_sdpa), q.double(), k.double(), v.double())
        exact = self.exact[shape, method]
        plain = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        own = relative(F.scaled_dot_product_attention(q, k, v), plain)
        first, second = run(backend, q, k, v), run(backend, q, k, v)
        error, allowed = relative(first, exact), max(TIMES * own, AT_LEAST[self.dtype])
        path = way_of(arithmetic, backend, cross=method == "cross")
        if not torch.equal(first, second):
            raise AssertionError(f"two calls differ; attention: {path}")
        if not error <= allowed or math.isnan(error):
            raise AssertionError(f"{error:.1e} from fp64 where {allowed:.1e} is allowed; attention: {path}")
        return {"error": error, "stock": own, "path": path}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
