"""Guidance in one pass: the image steered away from what its attention would be with the negative in the positive's
place. ``Steer`` says how: NAG's formula, NASA's or ONG's (``methods.py``).

In joint attention, Z+ is over [I, P] and Z- over [I, N]: both grow by log-sum-exp out of one attention over I, so that
nothing but two slivers is added.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import JointCall, NegativeTerms, attend_from_negative, merge_negative_, padding_beta, row_chunks

Steer = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(Z+, Z+ - Z-, phi, presence) -> a, b with Z = a Z+ + b (Z+ - Z-): Z [B, H, I, D], the others fp32 and broadcast to
[B, 1, I, 1]; an image token takes ``presence``, 0..1, of the steering."""


def joint_attention_guided(call: JointCall, steer: Steer) -> Tensor:
    """Joint attention whose image rows ``steer`` moves: one attention over the image, and slivers over both texts."""
    q, k, v, layout, backend = call.q, call.k, call.v, call.layout, call.backend
    i, n = layout.span("I"), layout.span("N")
    z, lse = backend.with_lse(q, layout.take("I", k), layout.take("I", v))
    z_neg = z[:, :, i].clone()
    negative = k[:, :, n], v[:, :, n], None, padding_beta(call.negative.padding)
    merge_negative_(z_neg, lse[:, :, i], q[:, :, i], *negative, backend)
    if layout.positive:
        positive = layout.take("P", k), layout.take("P", v), None, None
        for rows in layout.spans("PI"):
            merge_negative_(z[:, :, rows], lse[:, :, rows], q[:, :, rows], *positive, backend)
    z[:, :, n] = attend_from_negative(call)
    steer_(z[:, :, i], z_neg, steer, call.negative)
    return z


def steer_(z: Tensor, z_neg: Tensor, steer: Steer, negative: NegativeTerms) -> Tensor:
    """In place: ``z``, Z+, becomes Z, a chunk of rows at a time."""
    if negative.beta is None:
        return z
    phi, presence = negative.alpha[:, :1, None], torch.exp(-negative.beta.amin(dim=-1, keepdim=True))[:, None]
    for rows in row_chunks(z, z.shape[3]):
        z_pos, part = z[:, :, rows], presence[:, :, rows] if presence.shape[2] > 1 else presence
        step = z_pos - z_neg[:, :, rows]
        a, b = steer(z_pos, step, phi, part)
        z_pos.copy_((z_pos * a).addcmul_(step, b))  # in fp32: what is added up may be larger than the sum
    return z
