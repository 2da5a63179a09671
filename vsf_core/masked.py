"""The same as ``attention.py`` and ``guidance.py`` through any black-box attention that takes an additive mask: each
group of queries gets a mask of one row, or of a chunk of rows where the offset or the caller's own mask differs between
image tokens. No L x L tensor is made."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import JointCall, row_chunks
from .backends import Attention, AttentionBackend
from .guidance import Steer, steer_
from .layout import aligned, padding_mask, zero_mask

Parts = list[tuple[Tensor, Tensor | None]]
"""What ``RowMasks.flipped`` makes of values."""


@dataclass(frozen=True, eq=False)
class RowMasks:
    """Queries and keys of a sequence in which N's keys are at ``n``. ``given``: the caller's own mask; ``coarse``:
    ``AttentionBackend.coarse``."""

    attend: Attention
    q: Tensor
    k: Tensor
    n: slice
    given: Tensor
    coarse: bool = False

    def rows(self, group: slice) -> Tensor:
        """The caller's mask for a group of queries, [B or 1, 1, 1 or more, keys]."""
        return self.given[:, :, group] if self.given.shape[2] > 1 else self.given

    def seen(self, group: slice, values: Tensor) -> Tensor:
        """A copy of that with ``values`` added to N's columns, broadcast over batch and rows."""
        rows = self.rows(group)
        total = rows[..., self.n] + values
        out = zero_mask(total.shape[0], 1, total.shape[2], rows.shape[3], like=rows).copy_(rows)
        out[..., self.n] = total
        return out

    def attend_flipped_(
        self,
        out: Tensor,
        image: slice,
        v: Tensor,
        alpha: Tensor,
        beta: Tensor,
        visible: Tensor | float,
        mass: Tensor | None,
    ) -> Tensor:
        """In place: ``image`` of ``out`` becomes its attention to ``v`` with N's values times -alpha. ``visible``: -inf
        on N's padding."""
        parts = self.flipped(v, alpha)
        varies = beta.shape[1] > 1 or self.given.shape[2] > 1
        whole = slice(0, image.stop - image.start)
        for chunk in row_chunks(self.q[:, :, image], self.k.shape[2]) if varies else [whole]:
            group = slice(image.start + chunk.start, image.start + chunk.stop)
            part = beta[:, chunk] if beta.shape[1] > 1 else beta
            seen = self.seen(group, visible - part[:, None].to(self.q.dtype))
            out[:, :, group] = self.attended(self.q[:, :, group], parts, seen)
            if mass is not None:  # attention to values that are 1 where N is and 0 elsewhere
                ones = torch.zeros_like(self.k)
                ones[:, :, self.n] = 1.0
                mass[:, chunk] += self.attend(self.q[:, :, group], self.k, ones, seen)[..., 0].float().mean(dim=1)
        return out

    def attended(self, q: Tensor, parts: Parts, seen: Tensor) -> Tensor:
        """The attention of ``q`` to the values that ``flipped`` gave."""
        made = [(self.attend(q, self.k, values, seen), factor) for values, factor in parts]
        total, *rest = (z if factor is None else z * factor for z, factor in made)
        return total if not rest else (total + rest[0]).to(q.dtype)

    def flipped(self, v: Tensor, alpha: Tensor) -> Parts:
        """``v`` with N's values times -alpha, as tensors, and what the attention to each is to be multiplied by.

        In fp16, where the product may overflow, that is a power of two, by which ``v`` was divided without a rounding.
        Where values are rounded on one scale a channel, those of N have a tensor of their own: two attentions."""
        if self.coarse:
            largest = alpha.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)[:, None]
            rest, own = v.clone(), torch.zeros_like(v)
            rest[:, :, self.n] = 0.0
            own[:, :, self.n] = v[:, :, self.n] * (alpha[:, None] / largest).to(v.dtype)
            return [(rest, None), (own, -largest)]
        if v.dtype == torch.float16:
            factor = torch.exp2(torch.ceil(torch.log2(alpha.abs().amax().clamp_min(1.0))))
            v = v / factor
        else:
            v, factor = v.clone(), None
        v[:, :, self.n] *= -alpha[:, None]
        return [(v, factor)]


def joint_attention_masked(call: JointCall, steer: Steer | None = None) -> Tensor:
    """``joint_attention``; with ``steer``, ``joint_attention_guided``: it attends from image to image a second time."""
    q, k, v, layout, negative, attend = call.q, call.k, call.v, call.layout, call.negative, call.backend.black_box
    i, n = layout.span("I"), layout.span("N")
    given = q.new_zeros(1, 1, 1, layout.keys) if call.mask is None else call.mask.to(q.dtype)
    visible = q.new_zeros(1, 1) if negative.padding is None else padding_mask(negative.padding, q.dtype)
    visible, masks = visible[:, None, None], RowMasks(attend, q, k, n, given, call.backend.coarse)
    positive, out = (layout.take("PI", k), layout.take("PI", v)), torch.empty_like(q)

    def over_positive(group: slice) -> Tensor:
        seen = None if call.mask is None else aligned(layout.take("PI", masks.rows(group), dim=3))
        return attend(q[:, :, group], *positive, seen)

    def over_negative(group: slice) -> Tensor:
        seen = masks.seen(group, visible)
        for p in layout.spans("P"):
            seen[..., p] = -torch.inf
        return attend(q[:, :, group], k, v, seen)

    if negative.beta is None or steer is not None:
        out[:, :, i] = over_positive(i)
    else:
        masks.attend_flipped_(out, i, v, negative.alpha, negative.beta, visible, call.attention_mass)
    for p in layout.spans("P"):
        out[:, :, p] = over_positive(p)
    if layout.negative:
        out[:, :, n] = over_negative(n)
    if steer is not None:
        steer_(out[:, :, i], over_negative(i), steer, negative)
    return out


def cross_attention_masked(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    attention_mass: Tensor | None,
) -> Tensor:
    """VSF for cross-attention: one attention over [N, P]. beta: padding included; mask: over P."""
    n, image = slice(0, k_neg.shape[2]), slice(0, q.shape[2])
    keys, values = torch.cat((k_neg, k), dim=2), torch.cat((v_neg, v), dim=2)
    given = q.new_zeros(1, 1, 1, keys.shape[2]) if mask is None else F.pad(mask.to(q.dtype), (n.stop, 0))
    masks = RowMasks(backend.black_box, q, keys, n, given, backend.coarse)
    if beta.shape[1] == 1 and attention_mass is None:  # one row for all: the result is the attention's own
        seen = masks.seen(image, -beta[:, None].to(q.dtype))
        return masks.attended(q, masks.flipped(values, alpha), seen)
    return masks.attend_flipped_(torch.empty_like(q), image, values, alpha, beta, 0.0, attention_mass)
