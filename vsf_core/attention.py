"""VSF as exact log-sum-exp merge: one ordinary attention plus a sliver of I x N, no mask, no second pass.

``joint_attention`` and ``cross_attention`` need an attention that returns its log-sum-exp (``backends.py``);
``joint_attention_masked`` and ``cross_attention_masked`` compute the same through any black-box attention that takes
an additive mask. The equations are those of VSF, arXiv 2508.10931.

Shapes: q, k, v [B, H, L, D]; lse [B, H, L], natural log, fp32; alpha (the scale of the flipped values)
[B or 1, N or 1, 1]; beta (the offset) [B or 1, I or 1, N or 1] in fp32, +inf meaning "never attend"; padding: bool
[B or 1, N], True where a negative token is only padding. ``softmax_scale``: what q k^T is multiplied by, None: D^-0.5.

``attention_mass``, everywhere: None, or [B, I] in fp32 to which 1 - W is added, the part of each image token's
attention that falls on the negative, averaged over heads. It changes no result. Where the log-sum-exp is not to be had
it costs a second call of the black box and is as exact as that one's dtype.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Attention, LSEAttention
from .layout import TokenLayout, padding_mask

SLIVER_BYTES = {"cpu": 2 * 2**20}
OTHER_SLIVER_BYTES = 32 * 2**20
"""Most memory that one temporary of the image-times-negative sliver may take, by type of device; a few are alive at a
time. On a GPU each further chunk is a few more kernels to launch."""


def merge_negative_(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor | float,
    beta: Tensor,
    attend: LSEAttention,
    softmax_scale: float | None = None,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """In place: ``z <- W z - alpha (1 - W) softmax(S) V-``, ``S = q K-^T softmax_scale - beta``, ``W = sigmoid(lse -
    lse-)``, ``lse- = logsumexp(S)``.

    ``z``, ``lse``: attention of ``q`` over the positive keys, which the negative ones now join. This is the softmax
    over [K+, K-] with values [V+, -alpha V-], to the last rounding (VSF's Eq. 7 and 8, and its Appendix B).
    """
    if isinstance(alpha, Tensor):
        alpha = alpha[:, None].to(v_neg.dtype)
    flipped = v_neg * -alpha
    beta = beta[:, None]
    # A beta that is the same for all negative keys moves out of their softmax: lse- = lse(q K-^T) - beta.
    merge_rows = _merge_uniform_ if beta.shape[-1] == 1 else _merge_per_token_
    for rows in row_chunks(z, k_neg.shape[2]):
        part = beta[:, :, rows] if beta.shape[2] > 1 else beta
        onto = z[:, :, rows], lse[:, :, rows, None], q[:, :, rows]
        weight = merge_rows(*onto, k_neg, flipped, part, attend, softmax_scale)
        if attention_mass is not None:
            attention_mass[:, rows] += weight.sum(dim=-1).mean(dim=1)
    return z


def join_(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    attend: LSEAttention,
    softmax_scale: float | None = None,
) -> Tensor:
    """In place: ``z``, ``lse``, attention of ``q`` over other keys, becomes that over those and ``k``: alpha = -1."""
    beta = lse.new_zeros(1, 1, 1) if beta is None else beta
    return merge_negative_(z, lse, q, k, v, -1.0, beta, attend, softmax_scale)


def padding_beta(padding: Tensor | None) -> Tensor | None:
    """[B or 1, 1, N]: a beta that hides ``padding``, and nothing else."""
    return None if padding is None else -padding_mask(padding, torch.float32)[:, None]


def _merge_uniform_(
    z: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, attend: LSEAttention, factor: float | None
) -> Tensor:
    """Returns the weight on the negative, [B, H, rows, 1]."""
    z_neg, lse_neg = attend(q, k, v, factor)
    margin = lse - lse_neg[..., None] + beta
    negative = torch.sigmoid(-margin)
    z.mul_(torch.sigmoid(margin)).addcmul_(z_neg, negative)  # weights stay fp32, one rounding each
    return negative


def _merge_per_token_(
    z: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, attend: LSEAttention, factor: float | None
) -> Tensor:
    """Returns the weight on each negative token, [B, H, rows, N]."""
    scaled = q.float() * (q.shape[-1] ** -0.5 if factor is None else factor)
    # fp32 logits: at +-50 a bf16 logit is off by 0.2
    logits = torch.matmul(scaled, k.float().transpose(-1, -2)) - beta
    total = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1, keepdim=True))
    negative = torch.exp(logits - total)
    z.mul_(torch.exp(lse - total)).add_(torch.matmul(negative, v.float()))
    return negative


def row_chunks(z: Tensor, negative: int) -> Iterator[slice]:
    batch, heads, rows, dim = z.shape
    per_row = batch * heads * max(dim, negative) * 4
    step = max(1, SLIVER_BYTES.get(z.device.type, OTHER_SLIVER_BYTES) // per_row)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    alpha: Tensor,
    beta: Tensor | None,
    attend: LSEAttention,
    padding: Tensor | None = None,
    softmax_scale: float | None = None,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """VSF for joint attention: equals ``joint_attention_reference`` without its mask.

    ``beta`` None: the image does not see the negative here (beta = +inf); N0 still updates in isolation.
    """
    i, n = layout.span("I"), layout.span("N")
    # N0's queries ride along and are overwritten below: cheaper than putting the result together from pieces.
    z, lse = attend(q, layout.without_negative(k), layout.without_negative(v), softmax_scale)
    if layout.negative == 0:
        return z
    hidden = padding_beta(padding)
    if beta is not None:
        negative = k[:, :, n], v[:, :, n], alpha, beta if hidden is None else beta + hidden
        merge_negative_(z[:, :, i], lse[:, :, i], q[:, :, i], *negative, attend, softmax_scale, attention_mass)
    z_n, lse_n = attend(q[:, :, n], k[:, :, layout.image_keys], v[:, :, layout.image_keys], softmax_scale)
    z[:, :, n] = join_(z_n, lse_n, q[:, :, n], k[:, :, n], v[:, :, n], hidden, attend, softmax_scale)
    return z


def joint_attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    alpha: Tensor,
    beta: Tensor | None,
    attend: Attention,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """``joint_attention`` through a black box: each group of queries gets a mask of one row (or a chunk of rows).

    ``mask``: an additive mask of the caller's own over the sequence, [B or 1, 1, 1 or L, L], which VSF's is added to.
    No L x L tensor is made here: a beta that differs between image tokens is applied to a chunk of rows at a time.
    """
    i, n = layout.span("I"), layout.span("N")
    given = q.new_zeros(1, 1, 1, layout.keys) if mask is None else mask.to(q.dtype)
    visible = q.new_zeros(1, 1) if padding is None else padding_mask(padding, q.dtype)
    visible = visible[:, None, None]
    keys, values = layout.without_negative(k), layout.without_negative(v)
    out = torch.empty_like(q)

    def rows(group: slice) -> Tensor:
        return given[:, :, group] if given.shape[2] > 1 else given

    def plain(group: slice) -> Tensor:
        seen = None if mask is None else layout.take("PI", rows(group), dim=3)
        return attend(q[:, :, group], keys, values, seen)

    if beta is None:
        out[:, :, i] = plain(i)
    else:
        flipped = v.clone()
        flipped[:, :, n] *= -alpha[:, None].to(v.dtype)
        varies = beta.shape[1] > 1 or given.shape[2] > 1
        for chunk in row_chunks(q[:, :, i], layout.keys) if varies else [slice(0, layout.image)]:
            image = slice(i.start + chunk.start, i.start + chunk.stop)
            part = beta[:, chunk] if beta.shape[1] > 1 else beta
            seen = add_columns(rows(image), n, visible - part[:, None].to(q.dtype))
            out[:, :, image] = attend(q[:, :, image], k, flipped, seen)
            if attention_mass is not None:
                attention_mass[:, chunk] += _weight_on(n, q[:, :, image], k, seen, attend)
    for p in layout.spans("P"):
        out[:, :, p] = plain(p)
    if layout.negative:
        isolated = add_columns(rows(n), n, visible)
        for p in layout.spans("P"):
            isolated[..., p] = -torch.inf
        out[:, :, n] = attend(q[:, :, n], k, v, isolated)
    return out


def _weight_on(columns: slice, q: Tensor, k: Tensor, mask: Tensor, attend: Attention) -> Tensor:
    """[B, Lq]: how much of the attention falls on ``columns``: attention to values that are 1 there and 0 elsewhere."""
    ones = torch.zeros_like(k)
    ones[:, :, columns] = 1.0
    return attend(q, k, ones, mask)[..., 0].float().mean(dim=1)


def add_columns(rows: Tensor, columns: slice, values: Tensor) -> Tensor:
    """A copy of ``rows`` [b, 1, r, L] with ``values`` added to ``columns``, broadcast over batch and rows."""
    total = rows[..., columns] + values
    out = rows.expand(total.shape[0], 1, total.shape[2], -1).clone()
    out[..., columns] = total
    return out


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    beta: Tensor,
    attend: LSEAttention,
    softmax_scale: float | None = None,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """VSF for cross-attention (Eq. 9): equals ``cross_attention_reference`` without its mask."""
    z, lse = attend(q, k, v, softmax_scale)
    return merge_negative_(z, lse, q, k_neg, v_neg, alpha, beta, attend, softmax_scale, attention_mass)


def cross_attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    beta: Tensor,
    attend: Attention,
    mask: Tensor | None = None,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """``cross_attention`` through a black box, with a mask of one row, or of a chunk of rows where beta varies.

    ``mask``: an additive mask of the caller's own over the positive keys, [B or 1, 1, 1, P].
    """
    keys = torch.cat((k_neg, k), dim=2)
    values = torch.cat((-alpha[:, None].to(v.dtype) * v_neg, v), dim=2)
    negative, rows = slice(0, k_neg.shape[2]), q.new_zeros(1, 1, 1, keys.shape[2])
    if mask is not None:
        rows = F.pad(mask.to(q.dtype), (k_neg.shape[2], 0))
    if beta.shape[1] == 1 and attention_mass is None:
        return attend(q, keys, values, add_columns(rows, negative, -beta[:, None].to(q.dtype)))
    out = torch.empty_like(q)
    for chunk in row_chunks(q, keys.shape[2]) if beta.shape[1] > 1 else [slice(0, q.shape[2])]:
        part = beta[:, chunk] if beta.shape[1] > 1 else beta
        seen = add_columns(rows, negative, -part[:, None].to(q.dtype))
        out[:, :, chunk] = attend(q[:, :, chunk], keys, values, seen)
        if attention_mass is not None:
            attention_mass[:, chunk] += _weight_on(negative, q[:, :, chunk], keys, seen, attend)
    return out
