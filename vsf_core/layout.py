"""Where image, positive and negative tokens sit in a joint attention's sequence, and which of them are padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Lengths of the three groups of a joint sequence [P's first ``before`` tokens, N, the rest of P, I].

    I is the image; N the negative; P everything else, usually the positive text: ``positive`` tokens, on both sides of
    N taken together. With ``before`` 0, P and I lie in one piece, and the model's own attention runs on a view of them;
    otherwise it needs a copy of keys and values. ``cached`` keys of I without a query of their own follow all others (a
    cache of reference images).

    Raises ``ValueError`` for a negative length, for ``before`` > ``positive``, and without image tokens.
    """

    image: int
    positive: int
    negative: int
    before: int = 0
    cached: int = 0

    def __post_init__(self) -> None:
        if self.image < 1 or self.negative < 0 or self.cached < 0 or not 0 <= self.before <= self.positive:
            raise ValueError(
                f"need at least one image token, no negative lengths and before <= positive, got image={self.image}, "
                f"positive={self.positive}, negative={self.negative}, before={self.before}"
            )

    @property
    def length(self) -> int:
        """Number of tokens in the sequence."""
        return self.image + self.positive + self.negative

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.length + self.cached

    def spans(self, groups: str, keys: bool = False) -> list[slice]:
        """The slices of ``groups`` (a text of "I", "P" and "N"), in the sequence's order, or in that of its ``keys``:
        what touches is one slice, and none is empty."""
        n, p, i = self.before, self.before + self.negative, self.positive + self.negative
        end = self.keys if keys else self.length
        merged: list[slice] = []
        for group, start, stop in (("P", 0, n), ("N", n, p), ("P", p, i), ("I", i, end)):
            if group in groups and start < stop:
                start = merged.pop().start if merged and merged[-1].stop == start else start
                merged.append(slice(start, stop))
        return merged

    def span(self, group: str) -> slice:
        """The slice of ``group``, maybe an empty one. ``ValueError`` for a P on both sides of N."""
        spans = self.spans(group) or [slice(self.before, self.before)]
        if len(spans) > 1:
            raise ValueError(f"{group} is in {len(spans)} pieces, on both sides of the negative: ask for its spans")
        return spans[0]

    def take(self, groups: str, x: Tensor, dim: int = 2) -> Tensor:
        """The keys of ``groups`` along ``dim`` of ``x``: a view where they lie in one piece, else a copy."""
        parts = [x.narrow(dim, s.start, s.stop - s.start) for s in self.spans(groups, keys=True) or [slice(0, 0)]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


MASK_ROW = 16
"""How many elements, or a multiple of that, lie between the rows of a mask, and before its first: attention kernels of
GPUs read several at a time, and one that begins between two reads is the end of the process."""


def zero_mask(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A mask of zeros as an attention of a GPU takes it without a copy; device and, by default, dtype of ``like``. What
    lies between its rows is 0 too: a kernel may read it."""
    return like.new_zeros((*shape[:-1], shape[-1] + -shape[-1] % MASK_ROW), dtype=dtype)[..., : shape[-1]]


def aligned(mask: Tensor) -> Tensor:
    """``mask``, or a copy of it, so that an attention of a GPU can take it."""
    if not torch.compiler.is_compiling():  # a graph knows of no addresses
        starts = mask.storage_offset(), *mask.stride()[:-1]
        if mask.stride(-1) == 1 and not any(start % MASK_ROW for start in starts):
            return mask
    return zero_mask(*mask.shape, like=mask).copy_(mask)


def padding_mask(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """``padding`` (bool, of any shape) as an additive mask: 0 on real tokens, -inf on padding. As a beta: negated."""
    return zero_mask(*padding.shape, like=padding, dtype=dtype).masked_fill_(padding, -torch.inf)


def unless_all(padding: Tensor) -> Tensor:
    """``padding`` [B, N], but nothing where all of a row is: what nobody sees must be finite all the same."""
    return padding & ~padding.all(dim=-1, keepdim=True)
