"""VSF as exact log-sum-exp merge: one ordinary attention plus a sliver of I x N, no mask, no second pass.

It needs an attention that returns its log-sum-exp (``backends.py``); ``masked.py`` computes the same without. The
equations are those of VSF, arXiv 2508.10931. Shapes: q, k, v [B, H, L, D]; lse [B, H, L], natural log, fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import AttentionBackend
from .layout import TokenLayout, padding_mask

SLIVER_BYTES = {"cpu": 2 * 2**20}
OTHER_SLIVER_BYTES = 32 * 2**20
"""Most memory that one temporary of the image-times-negative sliver may take, by type of device; a few are alive at a
time. On a GPU each further chunk is a few more kernels to launch."""


@dataclass(frozen=True, eq=False)
class NegativeTerms:
    """How the image sees the negative.

    alpha [B or 1, N or 1, 1]: VSF's scale of the flipped values; the phi of NAG and NASA, which take the first token's.
    beta [B or 1, I or 1, N or 1], fp32: the offset, taken off the logits; +inf where an image token does not see a
    token of the negative, None where none does. An image token takes exp(-beta) of NAG's and NASA's steering, for its
    lowest beta. padding: bool [B or 1, N], True where a token is only padding.
    """

    alpha: Tensor
    beta: Tensor | None
    padding: Tensor | None = None


@dataclass(frozen=True, eq=False)
class JointCall:
    """What one joint attention is made of; see ``methods.py``."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    negative: NegativeTerms
    backend: AttentionBackend
    mask: Tensor | None
    attention_mass: Tensor | None


def merge_negative_(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | float,
    beta: Tensor | None,
    backend: AttentionBackend,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """In place: ``z <- W z - alpha (1 - W) softmax(S) V-``, ``S = q K-^T softmax_scale - beta``, ``W = sigmoid(lse -
    lse-)``, ``lse- = logsumexp(S)``. ``beta`` None: 0.

    ``z``, ``lse``: attention of ``q`` over the positive keys, which the negative ones ``k`` now join. This is the
    softmax over [K+, K-] with values [V+, -alpha V-], to the last rounding (VSF's Eq. 7 and 8, and its Appendix B);
    with alpha = -1 attention over both as any other.
    """
    if isinstance(alpha, Tensor):
        alpha = alpha[:, None].to(v.dtype)
    flipped = v * -alpha
    beta = lse.new_zeros(1, 1, 1, 1) if beta is None else beta[:, None]
    for rows in row_chunks(z, k.shape[2]):
        part = beta[:, :, rows] if beta.shape[2] > 1 else beta
        weight = _merge_rows_(z[:, :, rows], lse[:, :, rows, None], q[:, :, rows], k, flipped, part, backend)
        if attention_mass is not None:
            attention_mass[:, rows] += weight.sum(dim=-1).mean(dim=1)
    return z


def _merge_rows_(
    z: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: AttentionBackend
) -> Tensor:
    """Returns the weight on the negative, [B, H, rows, 1], or on each of its tokens, [B, H, rows, N]."""
    if beta.shape[-1] == 1:  # it moves out of the negative keys' softmax: lse- = lse(q K-^T) - beta
        z_neg, lse_neg = backend.with_lse(q, k, v)
        margin = lse - lse_neg[..., None] + beta
        negative = torch.sigmoid(-margin)
        z.mul_(torch.sigmoid(margin)).addcmul_(z_neg, negative)  # weights stay fp32, one rounding each
        return negative
    scaled = q.float() * (q.shape[-1] ** -0.5 if backend.softmax_scale is None else backend.softmax_scale)
    # fp32 logits: at +-50 a bf16 logit is off by 0.2
    logits = torch.matmul(scaled, k.float().transpose(-1, -2)) - beta
    total = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1, keepdim=True))
    negative = torch.exp(logits - total)
    z.mul_(torch.exp(lse - total)).add_(torch.matmul(negative, v.float()))
    return negative


def padding_beta(padding: Tensor | None) -> Tensor | None:
    """[B or 1, 1, N]: a beta that hides ``padding``, and nothing else."""
    return None if padding is None else -padding_mask(padding, torch.float32)[:, None]


def row_chunks(z: Tensor, negative: int) -> Iterator[slice]:
    batch, heads, rows, dim = z.shape
    per_row = batch * heads * max(dim, negative) * 4
    step = max(1, SLIVER_BYTES.get(z.device.type, OTHER_SLIVER_BYTES) // per_row)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def joint_attention(call: JointCall) -> Tensor:
    """VSF for joint attention: equals ``joint_attention_reference`` without its mask."""
    q, k, v, layout, backend, negative = call.q, call.k, call.v, call.layout, call.backend, call.negative
    i, n = layout.span("I"), layout.span("N")
    # N0's queries ride along and are overwritten below: cheaper than putting the result together from pieces.
    z, lse = backend.with_lse(q, layout.take("PI", k), layout.take("PI", v))
    if layout.negative == 0:
        return z
    text, hidden = (k[:, :, n], v[:, :, n]), padding_beta(negative.padding)
    if negative.beta is not None:
        terms = negative.alpha, negative.beta if hidden is None else negative.beta + hidden
        merge_negative_(z[:, :, i], lse[:, :, i], q[:, :, i], *text, *terms, backend, call.attention_mass)
    z_n, lse_n = backend.with_lse(q[:, :, n], layout.take("I", k), layout.take("I", v))
    z[:, :, n] = merge_negative_(z_n, lse_n, q[:, :, n], *text, -1.0, hidden, backend)
    return z
