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
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, alpha: Tensor, beta: Tensor, padding: Tensor | None = None
) -> Tensor:
    """VSF for joint (MMDiT) attention with one dense mask.

    q, k, v: [B, H, L, D]. ``alpha``: [B or 1, N or 1, 1]. Result: [B, H, L, D]; the N rows are N0's.
    """
    n = layout.span("N")
    keys = torch.cat((k, k[:, :, n]), dim=2)
    values = torch.cat((v, -alpha[:, None].to(v.dtype) * v[:, :, n]), dim=2)
    mask = joint_mask(layout, beta, padding).to(q.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_neg: Tensor, v_neg: Tensor, alpha: Tensor, beta: Tensor
) -> Tensor:
    """VSF for cross-attention, Eq. 9 of arXiv 2508.10931: one softmax over [K+, K-], values [V+, -alpha V-].

    q: [B, H, I, D]; k, v: [B, H, P, D]; k_neg, v_neg: [B, H, N, D]; ``alpha``: [B or 1, N or 1, 1];
    ``beta``: [B or 1, I or 1, N or 1]. Result: [B, H, I, D].
    """
    keys = torch.cat((k, k_neg), dim=2)
    values = torch.cat((v, -alpha[:, None].to(v.dtype) * v_neg), dim=2)
    to_negative = -beta[:, None].expand(-1, -1, -1, k_neg.shape[2])
    mask = F.pad(to_negative, (k.shape[2], 0)).to(q.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
