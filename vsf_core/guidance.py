"""NAG and NASA in one pass: the image steered away from what its attention would be with the negative in the
positive's place.

Normalized Attention Guidance, and Negative-Aware Self-Attention, per image token, before the output projection::

    NAG   Z~ = Z+ + phi (Z+ - Z-)    R = |Z~| / |Z+|    Z^ = Z~ min(R, tau) / R    Z = a Z^ + (1 - a) Z+
    NASA  Z  = Z+ - phi Z-

with L1 norms over all heads' channels. In joint attention, Z+ is over [I, P] and Z- over [I, N]: both grow by
log-sum-exp out of one attention over I, so that nothing but two slivers is added. P's and N's own rows are those of two
passes: each text sees the image and itself.

Shapes: q, k, v [B, H, L, D]; phi [B or 1, 1, 1]; presence [B or 1, I or 1, 1] in 0..1, the share of the steering that
an image token takes (0: it is as without a negative); padding: bool [B or 1, N], True where a token is only padding.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .attention import (
    Attention,
    add_columns,
    joint_attention_masked,
    merge_negative_,
    padding_bias,
    row_chunks,
    unless_all,
)
from .backends import LSEAttention
from .layout import TokenLayout


class Guidance(Protocol):
    """How Z+ and Z- make Z: fp32 [B, H, I, D], phi [B or 1, 1, 1, 1]."""

    def __call__(self, z_pos: Tensor, z_neg: Tensor, phi: Tensor) -> Tensor: ...

    def on(self, device: torch.device) -> "Guidance":
        """The same with its numbers as tensors there, which one compiled graph takes as they come."""
        ...


@dataclass(frozen=True)
class NAG:
    """alpha: how much of the steered Z the result has (a); tau: how much longer than Z+ that may be."""

    alpha: float | Tensor
    tau: float | Tensor

    def __call__(self, z_pos: Tensor, z_neg: Tensor, phi: Tensor) -> Tensor:
        z = z_pos + phi * (z_pos - z_neg)
        ratio = _length(z) / _length(z_pos)
        return torch.lerp(z_pos, z * (self.tau / ratio).clamp_max(1.0), self.alpha)

    def on(self, device: torch.device) -> "NAG":
        return NAG(*(torch.as_tensor(number, dtype=torch.float32, device=device) for number in (self.alpha, self.tau)))


@dataclass(frozen=True)
class NASA:
    """The formula has no numbers but phi."""

    def __call__(self, z_pos: Tensor, z_neg: Tensor, phi: Tensor) -> Tensor:
        return z_pos - phi * z_neg

    def on(self, device: torch.device) -> "NASA":
        return self


def _length(z: Tensor) -> Tensor:
    """L1 norm over heads and channels, [B, 1, I, 1]."""
    return z.abs().sum(dim=(1, 3), keepdim=True).clamp_min(1e-6)


def joint_attention_guided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    guide: Guidance,
    phi: Tensor,
    presence: Tensor,
    attend: LSEAttention,
    padding: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Joint attention whose image rows ``guide`` steers: one attention over the image, and slivers over both texts."""
    i, p, n = (layout.span(group) for group in "IPN")
    z, lse = attend(q, k[:, :, i], v[:, :, i], scale)
    visible = padding_bias(padding, q)

    def join(rows: slice, keys: slice, into: Tensor, bias: Tensor) -> None:
        """``into``, the rows' attention over the image, becomes that over the image and ``keys``."""
        if rows.stop > rows.start and keys.stop > keys.start:
            merge_negative_(
                into, lse[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], -1.0, bias, attend, scale
            )

    z_neg = z[:, :, i].clone()
    join(i, n, z_neg, visible)
    join(n, n, z[:, :, n], visible)
    for rows in (i, p):
        join(rows, p, z[:, :, rows], visible.new_zeros(1, 1, 1))
    _steer_(z[:, :, i], z_neg, guide, phi, presence)
    return z


def joint_attention_guided_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    guide: Guidance,
    phi: Tensor,
    presence: Tensor,
    attend: Attention,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``joint_attention_guided`` through a black box, which attends from image to image a second time.

    ``mask``: an additive mask of the caller's own over the sequence, [B or 1, 1, 1 or L, L].
    """
    i, p, n = (layout.span(group) for group in "IPN")
    out = joint_attention_masked(q, k, v, layout, phi, None, attend, padding, mask)
    given = q.new_zeros(1, 1, 1, layout.length) if mask is None else mask.to(q.dtype)
    rows = given[:, :, i] if given.shape[2] > 1 else given
    seen = add_columns(rows, n, -padding_bias(padding, q).to(q.dtype)[:, None])
    seen[..., p] = -torch.inf
    _steer_(out[:, :, i], attend(q[:, :, i], k, v, seen), guide, phi, presence)
    return out


def cross_attention_guided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    guide: Guidance,
    phi: Tensor,
    presence: Tensor,
    attend: Attention,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-attention steered by ``guide``: Z+ over P, Z- over N. ``mask``: additive, over P, [B or 1, 1, 1, P]."""
    hidden = None if padding is None else -padding_bias(unless_all(padding), q).to(q.dtype)[:, None]
    z = attend(q, k, v, mask)
    _steer_(z, attend(q, k_neg, v_neg, hidden), guide, phi, presence)
    return z


def _steer_(z: Tensor, z_neg: Tensor, guide: Guidance, phi: Tensor, presence: Tensor) -> None:
    """In place: ``z <- z + presence (guide(z, z_neg) - z)``, in fp32 and a chunk of rows at a time."""
    presence = presence[:, None]
    for rows in row_chunks(z, z.shape[3]):
        part = presence[:, :, rows] if presence.shape[2] > 1 else presence
        z_pos = z[:, :, rows].float()
        z[:, :, rows] = z_pos + part * (guide(z_pos, z_neg[:, :, rows].float(), phi[:, None]) - z_pos)
