"""VSF as exact log-sum-exp merge: one ordinary attention plus a sliver of I x N, no mask, no second pass.

It needs an attention that returns its log-sum-exp (``backends.py``); ``masked.py`` computes the same without. The
equations are those of VSF, arXiv 2508.10931. Shapes: q, k, v [B, H, L, D]; lse [B, H, L], natural log, fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import AttentionBackend
from .layout import TokenLayout, padding_mask, zero_mask

SLIVER_BYTES = {"cpu": 2 * 2**20}
OTHER_SLIVER_BYTES = 256 * 2**20
"""Most memory that one temporary of the image-times-negative sliver may take, by type of device. A CPU is quickest in
its cache; on a GPU each further chunk is a few more kernels to launch."""


@dataclass(frozen=True, eq=False)
class NegativeTerms:
    """How the image sees the negative.

    alpha [B or 1, N or 1, 1]: VSF's scale of the flipped values; the phi of NAG, NASA and ONG, which take the first
    token's.
    beta [B or 1, I or 1, N or 1], fp32: the offset, taken off the logits; +inf where an image token does not see a
    token of the negative, None where none does. An image token takes exp(-beta) of such a steering, for its lowest
    beta. padding: bool [B or 1, N], True where a token is only padding.
    """

    alpha: Tensor
    beta: Tensor | None
    padding: Tensor | None = None


def beside_plain(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The alpha and beta by which the image sees N1 alone as, with those given, it would see N1 and N0 side by side.

    N0's keys are N1's, so both have one logit s: e^s falls on the value V, and e^(s - beta) on -alpha V. Together:
    ``beta' = -ln(1 + e^-beta)``, ``alpha' = (alpha e^-beta - 1) / (1 + e^-beta)``; what beta +inf hides stays hidden.
    alpha: [B or 1, N, 1]; beta: [B or 1, 1, N or 1].
    """
    hidden = torch.isposinf(beta)
    flipped = torch.sigmoid(-beta).transpose(1, 2)  # the part of the weight that falls on N1
    return (alpha + 1) * flipped - 1, torch.where(hidden, beta, F.logsigmoid(beta))


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
    alpha: Tensor | None,
    beta: Tensor | None,
    backend: AttentionBackend,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """In place: ``z <- W z - alpha (1 - W) softmax(S) V-``, ``S = q K-^T softmax_scale - beta``, ``W = sigmoid(lse -
    lse-)``, ``lse- = logsumexp(S)``. ``beta`` None: 0. ``alpha`` None: -1, attention over both as any other.

    ``z``, ``lse``: attention of ``q`` over the positive keys, which the negative ones ``k`` now join. This is the
    softmax over [K+, K-] with values [V+, -alpha V-], to the last rounding (VSF's Eq. 7 and 8, and its Appendix B).
    """
    per_token = beta is not None and beta.shape[-1] > 1
    if not per_token and alpha is not None and alpha.shape[1] > 1:
        # 1 at most goes into the values, which would overflow in fp16, and the rest into the weights, which are fp32
        largest = alpha.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
        v, alpha = v * (alpha / largest)[:, None].to(v.dtype), largest
    alpha, beta = (None if terms is None else terms[:, None] for terms in (alpha, beta))
    for rows in row_chunks(z, k.shape[2]):
        part = beta if beta is None or beta.shape[2] == 1 else beta[:, :, rows]
        chunk = z[:, :, rows], lse[:, :, rows, None], q[:, :, rows], k, v, alpha
        if part is not None and per_token:
            weight = _merge_per_token_(*chunk, part, backend.softmax_scale)
        else:
            weight = _merge_rows_(*chunk, part, backend)
        if attention_mass is not None:
            attention_mass[:, rows] += weight.sum(dim=-1).mean(dim=1)
    return z


def _merge_rows_(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    backend: AttentionBackend,
) -> Tensor:
    """One beta for all of N moves out of its softmax: lse- = lse(q K-^T) - beta. Returns 1 - W, [B, H, rows, 1]."""
    z_neg, lse_neg = backend.with_lse(q, k, v)
    share = lse_neg[..., None] - lse
    share = (share if beta is None else share.sub_(beta)).sigmoid_()
    z.mul_(1 - share)  # weights stay fp32, one rounding each
    if alpha is None:
        z.addcmul_(z_neg, share)
    else:
        z.addcmul_(z_neg, share * alpha, value=-1)
    return share


def _merge_per_token_(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    beta: Tensor,
    softmax_scale: float | None,
) -> Tensor:
    """Returns the weight on each token of N, [B, H, rows, N]."""
    scaled = q.float() * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    # fp32 logits: at +-50 a bf16 logit is off by 0.2
    logits = torch.matmul(scaled, k.float().transpose(-1, -2)) - beta
    total = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1, keepdim=True))
    negative = torch.exp(logits - total)
    values = v.float() if alpha is None else v.float() * -alpha
    z.mul_(torch.exp(lse - total)).add_(torch.matmul(negative, values))
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


def without_positive(layout: TokenLayout, padding: Tensor | None, like: Tensor) -> Tensor:
    """The mask of a pass with N in P's place, [B or 1, 1, 1, keys]: it hides P, and N's ``padding``."""
    hidden = zero_mask(1 if padding is None else padding.shape[0], 1, 1, layout.keys, like=like)
    for p in layout.spans("P"):
        hidden[..., p] = -torch.inf
    if padding is not None:
        hidden[:, 0, 0, layout.span("N")] = padding_mask(padding, like.dtype)
    return hidden


def attend_from_negative(call: JointCall) -> Tensor:
    """N's own rows, [B, H, N, D]: attention to the image and to N, as in a pass of its own. One small call."""
    layout, padding = call.layout, call.negative.padding
    hides = layout.positive or padding is not None
    hidden = without_positive(layout, padding, call.q) if hides else None
    q = call.q[:, :, layout.span("N")]
    return F.scaled_dot_product_attention(q, call.k, call.v, attn_mask=hidden, scale=call.backend.softmax_scale)


def joint_attention(call: JointCall) -> Tensor:
    """VSF for joint attention: equals ``joint_attention_reference`` without its mask."""
    q, k, v, layout, backend, negative = call.q, call.k, call.v, call.layout, call.backend, call.negative
    i, n = layout.span("I"), layout.span("N")
    # N0's queries ride along and are overwritten below: cheaper than putting the result together from pieces.
    z, lse = backend.with_lse(q, layout.take("PI", k), layout.take("PI", v))
    if layout.negative == 0:
        return z
    if negative.beta is not None:
        hidden = padding_beta(negative.padding)
        beta = negative.beta if hidden is None else negative.beta + hidden
        text = k[:, :, n], v[:, :, n], negative.alpha, beta
        merge_negative_(z[:, :, i], lse[:, :, i], q[:, :, i], *text, backend, call.attention_mass)
    z[:, :, n] = attend_from_negative(call)
    return z
