"""Guidance in one pass: the image steered away from what its attention would be with the negative in the positive's
place. ``steer`` says how: NAG's formula or NASA's (``methods.py``).

In joint attention, Z+ is over [I, P] and Z- over [I, N]: both grow by log-sum-exp out of one attention over I, so that
nothing but two slivers is added. P's and N's own rows are those of two passes: each text sees the image and itself.

Shapes: q, k, v [B, H, L, D]; alpha (the papers' phi) [B or 1, 1, 1]; presence [B or 1, I or 1, 1] in 0..1, the part of
the steering that an image token takes (0: it is as without a negative); padding: bool [B or 1, N], True where a token
is only padding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import add_columns, join_, joint_attention_masked, padding_beta, row_chunks
from .backends import Attention, LSEAttention
from .layout import TokenLayout, padding_mask, unless_all

Steer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(Z+, Z-, alpha) -> Z: fp32 [B, H, I, D], alpha [B or 1, 1, 1, 1]."""


def joint_attention_guided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    steer: Steer,
    alpha: Tensor,
    presence: Tensor,
    attend: LSEAttention,
    padding: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Joint attention whose image rows ``steer`` moves: one attention over the image, and slivers over both texts."""
    i, n = layout.span("I"), layout.span("N")
    negative = k[:, :, n], v[:, :, n], padding_beta(padding)
    positive = layout.take("P", k), layout.take("P", v), None
    z, lse = attend(q, k[:, :, layout.image_keys], v[:, :, layout.image_keys], softmax_scale)

    def join(rows: slice, text: tuple[Tensor, Tensor, Tensor | None], into: Tensor) -> None:
        """``into``, the rows' attention over the image, becomes that over the image and ``text``."""
        if rows.stop > rows.start and text[0].shape[2]:
            join_(into, lse[:, :, rows], q[:, :, rows], *text, attend, softmax_scale)

    z_neg = z[:, :, i].clone()
    join(i, negative, z_neg)
    join(n, negative, z[:, :, n])
    for rows in (i, *layout.spans("P")):
        join(rows, positive, z[:, :, rows])
    _steer_(z[:, :, i], z_neg, steer, alpha, presence)
    return z


def joint_attention_guided_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    steer: Steer,
    alpha: Tensor,
    presence: Tensor,
    attend: Attention,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``joint_attention_guided`` through a black box, which attends from image to image a second time.

    ``mask``: an additive mask of the caller's own over the sequence, [B or 1, 1, 1 or L, L].
    """
    i, n = layout.span("I"), layout.span("N")
    out = joint_attention_masked(q, k, v, layout, alpha, None, attend, padding, mask)
    given = q.new_zeros(1, 1, 1, layout.keys) if mask is None else mask.to(q.dtype)
    rows = given[:, :, i] if given.shape[2] > 1 else given
    visible = q.new_zeros(1, 1) if padding is None else padding_mask(padding, q.dtype)
    seen = add_columns(rows, n, visible[:, None, None])
    for p in layout.spans("P"):
        seen[..., p] = -torch.inf
    _steer_(out[:, :, i], attend(q[:, :, i], k, v, seen), steer, alpha, presence)
    return out


def cross_attention_guided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    steer: Steer,
    alpha: Tensor,
    presence: Tensor,
    attend: Attention,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-attention moved by ``steer``: Z+ over P, Z- over N. ``mask``: additive, over P, [B or 1, 1, 1, P]."""
    hidden = None if padding is None else padding_mask(unless_all(padding), q.dtype)[:, None, None]
    z = attend(q, k, v, mask)
    _steer_(z, attend(q, k_neg, v_neg, hidden), steer, alpha, presence)
    return z


def _steer_(z: Tensor, z_neg: Tensor, steer: Steer, alpha: Tensor, presence: Tensor) -> None:
    """In place: ``z <- z + presence (steer(z, z_neg, alpha) - z)``, in fp32 and a chunk of rows at a time."""
    presence = presence[:, None]
    for rows in row_chunks(z, z.shape[3]):
        part = presence[:, :, rows] if presence.shape[2] > 1 else presence
        z_pos = z[:, :, rows].float()
        z[:, :, rows] = z_pos + part * (steer(z_pos, z_neg[:, :, rows].float(), alpha[:, None]) - z_pos)
