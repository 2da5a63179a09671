"""The definition of VSF, dense and obvious: the oracle that every faster path is compared with.

Sequence groups: I (image), P (positive), N0 (negative, unflipped). N1 is a second set of keys: N0's keys with N0's
values times -alpha. N1 is never a query (the paper's Fig. 3 and Listing 1):

    query | may attend to
    I     | I, P, N1 (logit - beta)
    P     | I, P
    N0    | I, N0
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import TokenLayout


def joint_mask(layout: TokenLayout, bias: Tensor, padding: Tensor | None = None) -> Tensor:
    """The additive mask of Listing 1, [B, 1, L, L + N]; the last N columns are N1.

    ``bias``: beta, [B or 1, I or 1, N or 1], +inf where the image must not see a negative token.
    ``padding``: bool [B or 1, N], True where a negative token is only padding: nobody attends to it.
    """
    n = layout.negative
    i, p, n0 = layout.span("I"), layout.span("P"), layout.span("N")
    n1 = slice(layout.length, layout.length + n)
    batch = max(bias.shape[0], 1 if padding is None else padding.shape[0])
    mask = bias.new_zeros(batch, layout.length, layout.length + n)
    mask[:, p, n1] = -torch.inf
    mask[:, n0, n1] = -torch.inf
    mask[:, i, n0] = -torch.inf
    mask[:, p, n0] = -torch.inf
    mask[:, n0, p] = -torch.inf
    mask[:, i, n1] -= bias
    if padding is not None:
        hidden = padding[:, None, :].expand(batch, layout.length, n)
        mask[:, :, n0] = mask[:, :, n0].masked_fill(hidden, -torch.inf)
        mask[:, :, n1] = mask[:, :, n1].masked_fill(hidden, -torch.inf)
    return mask[:, None]


def joint_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    alpha: Tensor,
    bias: Tensor,
    padding: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """VSF for joint (MMDiT) attention with one dense mask.

    q, k, v: [B, H, L, D]. ``alpha``: [B or 1, N or 1, 1]. Result: [B, H, L, D]; the N rows are N0's.
    """
    n = layout.span("N")
    keys = torch.cat((k, k[:, :, n]), dim=2)
    values = torch.cat((v, -alpha[:, None].to(v.dtype) * v[:, :, n]), dim=2)
    mask = joint_mask(layout, bias, padding).to(q.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    bias: Tensor,
    scale: float | None = None,
) -> Tensor:
    """VSF for cross-attention, the paper's Eq. 9: one softmax over [K+, K-], values [V+, -alpha V-].

    q: [B, H, I, D]; k, v: [B, H, P, D]; k_neg, v_neg: [B, H, N, D]; ``alpha``: [B or 1, N or 1, 1];
    ``bias``: [B or 1, I or 1, N or 1]. Result: [B, H, I, D].
    """
    keys = torch.cat((k, k_neg), dim=2)
    values = torch.cat((v, -alpha[:, None].to(v.dtype) * v_neg), dim=2)
    to_negative = -bias[:, None].expand(-1, -1, -1, k_neg.shape[2])
    mask = F.pad(to_negative, (k.shape[2], 0)).to(q.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
