"""The definition of VSF, dense and obvious: the oracle that every faster path is compared with.

Sequence groups: I (image), P (positive), N0 (negative, unflipped). N1 is a second set of keys: N0's keys with N0's
values times -alpha. N1 is never a query (Fig. 3 and Listing 1 of VSF, arXiv 2508.10931):

    query | may attend to
    I     | I, P, N1 (logit - beta)
    P     | I, P
    N0    | I, N0
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import JointCall, without_positive
from .guidance import Steer, steer_
from .layout import TokenLayout, padding_mask


def joint_mask(layout: TokenLayout, beta: Tensor, padding: Tensor | None = None) -> Tensor:
    """The additive mask of Listing 1, [B, 1, L, keys + N]; the last N columns are N1.

    ``beta``: the offset, [B or 1, I or 1, N or 1], +inf where the image must not see a negative token.
    ``padding``: bool [B or 1, N], True where a negative token is only padding: nobody attends to it.
    """
    n = layout.negative
    i, n0, n1 = layout.span("I"), layout.span("N"), slice(layout.keys, layout.keys + n)
    batch = max(beta.shape[0], 1 if padding is None else padding.shape[0])
    mask = beta.new_zeros(batch, layout.length, layout.keys + n)
    for p in layout.spans("P"):
        mask[:, p, n0] = mask[:, p, n1] = mask[:, n0, p] = -torch.inf
    mask[:, n0, n1] = mask[:, i, n0] = -torch.inf
    mask[:, i, n1] -= beta
    if padding is not None:
        hidden = padding_mask(padding, mask.dtype)[:, None]
        mask[:, :, n0] += hidden
        mask[:, :, n1] += hidden
    return mask[:, None]


def joint_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    alpha: Tensor,
    beta: Tensor,
    padding: Tensor | None = None,
    given: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """VSF for joint (MMDiT) attention with one dense mask.

    q, k, v: [B, H, L, D]. ``alpha``: [B or 1, N or 1, 1]. ``given``: a mask of the caller's own, additive, [B or 1, 1,
    1 or L, keys]. Result: [B, H, L, D]; the N rows are N0's.
    """
    n = layout.span("N")
    keys = torch.cat((k, k[:, :, n]), dim=2)
    values = torch.cat((v, -alpha[:, None].to(v.dtype) * v[:, :, n]), dim=2)
    mask = joint_mask(layout, beta, padding).to(q.dtype)
    if given is not None:
        mask = mask + torch.cat((given, given[..., n]), dim=-1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=softmax_scale)


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    beta: Tensor,
    given: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """VSF for cross-attention, Eq. 9 of arXiv 2508.10931: one softmax over [K+, K-], values [V+, -alpha V-].

    q: [B, H, I, D]; k, v: [B, H, P, D]; k_neg, v_neg: [B, H, N, D]; ``alpha``: [B or 1, N or 1, 1];
    ``beta``: [B or 1, I or 1, N or 1]. ``given``: a mask over P, additive, [B or 1, 1, 1, P]. Result: [B, H, I, D].
    """
    keys = torch.cat((k, k_neg), dim=2)
    values = torch.cat((v, -alpha[:, None].to(v.dtype) * v_neg), dim=2)
    to_negative = -beta[:, None].expand(-1, -1, -1, k_neg.shape[2])
    mask = F.pad(to_negative, (k.shape[2], 0)).to(q.dtype)
    if given is not None:
        mask = mask + F.pad(given, (0, k_neg.shape[2]))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=softmax_scale)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax_scale: float | None = None) -> Tensor:
    """PyTorch's attention in fp32, whatever the dtype."""
    mask = None if mask is None else mask.float()
    z = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=softmax_scale)
    return z.to(q.dtype)


def joint_attention_exact(call: JointCall, steer: Steer | None = None) -> Tensor:
    """``call`` by definition and in fp32, with all its memory: what a bug report is compared with."""
    q, k, v = (t.float() for t in (call.q, call.k, call.v))
    layout, negative, given = call.layout, call.negative, None if call.mask is None else call.mask.float()
    i, n, scale = layout.span("I"), layout.span("N"), call.backend.softmax_scale
    unseen = torch.full((1, 1, 1), torch.inf, device=q.device)
    beta = unseen if negative.beta is None or steer is not None else negative.beta
    z = joint_attention_reference(q, k, v, layout, negative.alpha, beta, negative.padding, given, scale)
    if call.attention_mass is not None:  # attention to values that are 1 where N is and 0 elsewhere
        ones = torch.zeros_like(v)
        ones[:, :, n] = 1.0
        flips = -torch.ones_like(negative.alpha)
        share = joint_attention_reference(q, k, ones, layout, flips, beta, negative.padding, given, scale)
        call.attention_mass.add_(share[:, :, i, 0].mean(dim=1))
    if steer is not None:
        hidden = without_positive(layout, negative.padding, q)
        if given is not None:
            hidden = hidden + (given[:, :, i] if given.shape[2] > 1 else given)
        steer_(z[:, :, i], exact(q[:, :, i], k, v, hidden, scale), steer, negative)
    return z.to(call.q.dtype)


def cross_attention_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    beta: Tensor,
    given: Tensor | None,
    softmax_scale: float | None,
    attention_mass: Tensor | None,
) -> Tensor:
    """The same for cross-attention."""
    dtype, given = q.dtype, None if given is None else given.float()
    q, k, v, k_neg, v_neg = (t.float() for t in (q, k, v, k_neg, v_neg))
    if attention_mass is not None:
        zeros, ones, flips = torch.zeros_like(v), torch.ones_like(v_neg), -torch.ones_like(alpha)
        share = cross_attention_reference(q, k, zeros, k_neg, ones, flips, beta, given, softmax_scale)
        attention_mass.add_(share[..., 0].mean(dim=1))
    return cross_attention_reference(q, k, v, k_neg, v_neg, alpha, beta, given, softmax_scale).to(dtype)
