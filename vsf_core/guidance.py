"""Guidance in one pass: the image steered away from what its attention would be with the negative in the positive's
place. ``steer`` says how: NAG's formula or NASA's (``methods.py``).

In joint attention, Z+ is over [I, P] and Z- over [I, N]: both grow by log-sum-exp out of one attention over I, so that
nothing but two slivers is added.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import JointCall, NegativeTerms, merge_negative_, padding_beta, row_chunks

Steer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(Z+, Z-, alpha) -> Z: fp32 [B, H, I, D], alpha (the papers' phi) [B or 1, 1, 1, 1]."""


def joint_attention_guided(call: JointCall, steer: Steer) -> Tensor:
    """Joint attention whose image rows ``steer`` moves: one attention over the image, and slivers over both texts."""
    q, k, v, layout, backend = call.q, call.k, call.v, call.layout, call.backend
    i, n = layout.span("I"), layout.span("N")
    negative = k[:, :, n], v[:, :, n], -1.0, padding_beta(call.negative.padding)
    positive = layout.take("P", k), layout.take("P", v), -1.0, None
    z, lse = backend.with_lse(q, layout.take("I", k), layout.take("I", v))

    def join(rows: slice, text: tuple[Tensor, Tensor, float, Tensor | None], into: Tensor) -> None:
        """``into``, the rows' attention over the image, becomes that over the image and ``text``."""
        if rows.stop > rows.start and text[0].shape[2]:
            merge_negative_(into, lse[:, :, rows], q[:, :, rows], *text, backend)

    z_neg = z[:, :, i].clone()
    join(i, negative, z_neg)
    join(n, negative, z[:, :, n])
    for rows in (i, *layout.spans("P")):
        join(rows, positive, z[:, :, rows])
    steer_(z[:, :, i], z_neg, steer, call.negative)
    return z


def steer_(z: Tensor, z_neg: Tensor, steer: Steer, negative: NegativeTerms) -> Tensor:
    """In place: ``z <- z + exp(-beta) (steer(z, z_neg, alpha) - z)``, in fp32 and a chunk of rows at a time."""
    if negative.beta is None:
        return z
    alpha, presence = negative.alpha[:, :1, None], torch.exp(-negative.beta.amin(dim=-1, keepdim=True))[:, None]
    for rows in row_chunks(z, z.shape[3]):
        part = presence[:, :, rows] if presence.shape[2] > 1 else presence
        z_pos = z[:, :, rows].float()
        z[:, :, rows] = z_pos + part * (steer(z_pos, z_neg[:, :, rows].float(), alpha) - z_pos)
    return z
