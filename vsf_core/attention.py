"""VSF as exact log-sum-exp merge: one ordinary attention plus a sliver of I x N, no mask, no second pass.

``joint_attention`` and ``cross_attention`` need an attention that returns its log-sum-exp (``backends.py``);
``joint_attention_masked`` computes the same through any black-box attention that takes an additive mask.

Shapes: q, k, v [B, H, L, D]; lse [B, H, L], natural log, fp32; alpha [B or 1, N or 1, 1];
bias (beta) [B or 1, I or 1, N or 1] in fp32, +inf meaning "never attend".

``share``, everywhere: None, or [B, I] in fp32 to which 1 - W is added, the part of each image token's attention that
falls on the negative, averaged over heads. It changes no result. Where the log-sum-exp is not to be had it costs a
second call of the black box and is as exact as that one's dtype.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import LSEAttention
from .layout import TokenLayout

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""A black box: (q, k, v, additive mask or None) -> Z [B, H, Lq, D]."""

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
    bias: Tensor,
    attend: LSEAttention,
    scale: float | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """In place: ``z <- W z - alpha (1 - W) softmax(S) V-``, ``S = q K-^T scale - beta``, ``W = sigmoid(lse - lse-)``.

    ``z``, ``lse``: attention of ``q`` over the positive keys, which the negative ones now join. This is the softmax
    over [K+, K-] with values [V+, -alpha V-], to the last rounding (the paper's Appendix B). alpha = -1 is a plain
    softmax over both.
    """
    if isinstance(alpha, Tensor):
        alpha = alpha[:, None].to(v_neg.dtype)
    flipped = v_neg * -alpha
    bias = bias[:, None]
    # A bias that is the same for all negative keys moves out of their softmax: lse- = lse(q K-^T) - beta.
    merge_rows = _merge_uniform_ if bias.shape[-1] == 1 else _merge_per_token_
    for rows in row_chunks(z, k_neg.shape[2]):
        beta = bias[:, :, rows] if bias.shape[2] > 1 else bias
        weight = merge_rows(z[:, :, rows], lse[:, :, rows, None], q[:, :, rows], k_neg, flipped, beta, attend, scale)
        if share is not None:
            share[:, rows] += weight.sum(dim=-1).mean(dim=1)
    return z


def _merge_uniform_(
    z: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, attend: LSEAttention, scale: float | None
) -> Tensor:
    """Returns the weight on the negative, [B, H, rows, 1]."""
    z_neg, lse_neg = attend(q, k, v, scale)
    margin = lse - lse_neg[..., None] + bias
    negative = torch.sigmoid(-margin)
    z.mul_(torch.sigmoid(margin)).addcmul_(z_neg, negative)  # weights stay fp32, one rounding each
    return negative


def _merge_per_token_(
    z: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, attend: LSEAttention, scale: float | None
) -> Tensor:
    """Returns the weight on each negative token, [B, H, rows, N]."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    # fp32 logits: at +-50 a bf16 logit is off by 0.2
    logits = torch.matmul(q.float() * factor, k.float().transpose(-1, -2)) - bias
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
    bias: Tensor | None,
    attend: LSEAttention,
    padding: Tensor | None = None,
    scale: float | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """VSF for joint attention: equals ``joint_attention_reference`` without its mask.

    ``bias`` None: the image does not see the negative here (beta = +inf); N0 still updates in isolation.
    ``padding``: bool [B or 1, N], True where a negative token is only padding.
    """
    i, n = layout.span("I"), layout.span("N")
    # N0's queries ride along and are overwritten below: cheaper than putting the result together from pieces.
    z, lse = attend(q, layout.without_negative(k), layout.without_negative(v), scale)
    if layout.negative == 0:
        return z
    if bias is not None:
        hidden = bias if padding is None else bias.masked_fill(padding[:, None], torch.inf)
        negative = k[:, :, n], v[:, :, n]
        merge_negative_(z[:, :, i], lse[:, :, i], q[:, :, i], *negative, alpha, hidden, attend, scale, share)
    z_n, lse_n = attend(q[:, :, n], k[:, :, i], v[:, :, i], scale)
    visible = padding_bias(padding, q)
    z[:, :, n] = merge_negative_(z_n, lse_n, q[:, :, n], k[:, :, n], v[:, :, n], -1.0, visible, attend, scale)
    return z


def joint_attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    alpha: Tensor,
    bias: Tensor | None,
    attend: Attention,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """``joint_attention`` through a black box: each group of queries gets a mask of one row (or a chunk of rows).

    ``mask``: an additive mask of the caller's own over the sequence, [B or 1, 1, 1 or L, L], which VSF's is added to.
    No L x L tensor is made here: a bias that differs between image tokens is applied to a chunk of rows at a time.
    """
    i, p, n = layout.span("I"), layout.span("P"), layout.span("N")
    given = q.new_zeros(1, 1, 1, layout.length) if mask is None else mask.to(q.dtype)
    visible = -padding_bias(padding, q).to(q.dtype)[:, None]
    keys, values = layout.without_negative(k), layout.without_negative(v)
    out = torch.empty_like(q)

    def rows(group: slice) -> Tensor:
        return given[:, :, group] if given.shape[2] > 1 else given

    def plain(group: slice) -> Tensor:
        seen = None if mask is None else layout.without_negative(rows(group).mT).mT
        return attend(q[:, :, group], keys, values, seen)

    if bias is None:
        out[:, :, i] = plain(i)
    else:
        flipped = v.clone()
        flipped[:, :, n] *= -alpha[:, None].to(v.dtype)
        varies = bias.shape[1] > 1 or given.shape[2] > 1
        for chunk in row_chunks(q[:, :, i], layout.length) if varies else [slice(0, layout.image)]:
            image = slice(i.start + chunk.start, i.start + chunk.stop)
            beta = bias[:, chunk] if bias.shape[1] > 1 else bias
            seen = add_columns(rows(image), n, visible - beta[:, None].to(q.dtype))
            out[:, :, image] = attend(q[:, :, image], k, flipped, seen)
            if share is not None:
                share[:, chunk] += _weight_on(n, q[:, :, image], k, seen, attend)
    if layout.positive:
        out[:, :, p] = plain(p)
    if layout.negative:
        isolated = add_columns(rows(n), n, visible)
        isolated[..., p] = -torch.inf
        out[:, :, n] = attend(q[:, :, n], k, v, isolated)
    return out


def _weight_on(columns: slice, q: Tensor, k: Tensor, mask: Tensor, attend: Attention) -> Tensor:
    """[B, Lq]: how much of the attention falls on ``columns``: attention to values that are 1 there and 0 elsewhere."""
    ones = torch.zeros_like(k)
    ones[:, :, columns] = 1.0
    return attend(q, k, ones, mask)[..., 0].float().mean(dim=1)


def padding_bias(padding: Tensor | None, like: Tensor) -> Tensor:
    """[B or 1, 1, N or 1]: 0 on real negative tokens, +inf on padding."""
    if padding is None:
        return like.new_zeros(1, 1, 1, dtype=torch.float32)
    return torch.zeros_like(padding, dtype=torch.float32).masked_fill(padding, torch.inf)[:, None]


def unless_all(padding: Tensor) -> Tensor:
    """``padding`` [B, N], but nothing where all of a row is: what nobody sees must be finite all the same."""
    return padding & ~padding.all(dim=-1, keepdim=True)


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
    bias: Tensor,
    attend: LSEAttention,
    scale: float | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """VSF for cross-attention (Eq. 9): equals ``cross_attention_reference`` without its mask."""
    z, lse = attend(q, k, v, scale)
    return merge_negative_(z, lse, q, k_neg, v_neg, alpha, bias, attend, scale, share)


def cross_attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    bias: Tensor,
    attend: Attention,
    share: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``cross_attention`` through a black box, with a mask of one row, or of a chunk of rows where beta varies.

    ``mask``: an additive mask of the caller's own over the positive keys, [B or 1, 1, 1, P].
    """
    keys = torch.cat((k_neg, k), dim=2)
    values = torch.cat((-alpha[:, None].to(v.dtype) * v_neg, v), dim=2)
    negative, rows = slice(0, k_neg.shape[2]), q.new_zeros(1, 1, 1, keys.shape[2])
    if mask is not None:
        rows = F.pad(mask.to(q.dtype), (k_neg.shape[2], 0))
    if bias.shape[1] == 1 and share is None:
        return attend(q, keys, values, add_columns(rows, negative, -bias[:, None].to(q.dtype)))
    out = torch.empty_like(q)
    for chunk in row_chunks(q, keys.shape[2]) if bias.shape[1] > 1 else [slice(0, q.shape[2])]:
        beta = bias[:, chunk] if bias.shape[1] > 1 else bias
        mask = add_columns(rows, negative, -beta[:, None].to(q.dtype))
        out[:, :, chunk] = attend(q[:, :, chunk], keys, values, mask)
        if share is not None:
            share[:, chunk] += _weight_on(negative, q[:, :, chunk], keys, mask, attend)
    return out
