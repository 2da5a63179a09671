"""A negative prompt in a CONDITIONING: what VSF Negative Conditioning puts there, and how it is found again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEY = "vsf_negatives"
"""Key of our own in a CONDITIONING entry's dict; unpatched models never notice it. During a run of a patched model the
same key in the entry's ``model_conds`` says whose negatives they are: ComfyUI copies a positive entry with an area into
the uncond branch, dict and all, but leaves ``model_conds`` behind."""


@dataclass(frozen=True, eq=False)
class Negative:
    """One negative prompt: what ``VSFNegativeConditioning`` puts into every entry of the positive.

    tokens: [b, n, C] embeddings without padding; strength: multiplies alpha for these tokens; mask: [b, H, W] in 0..1,
    where in the picture it acts, None = everywhere (in a video, b are frames); frames: from and to which part of a
    video (0..1) it acts; encoder: name of the text encoder that made it, None = unknown;
    pooled: [b, C'], the pooled embedding, which only the released pipeline of some families uses; extra: what else the
    encoder said of the text, by ComfyUI's names for it; padded: [b, m, C], the same text encoded as a prompt is, with
    its padding and template, for methods that take it so, None = as tokens.
    """

    tokens: Tensor
    strength: float = 1.0
    mask: Tensor | None = None
    frames: tuple[float, float] = (0.0, 1.0)
    encoder: str | None = None
    pooled: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    padded: Tensor | None = None


def negatives_of(entry: dict) -> tuple[Negative, ...]:
    """The negatives that a CONDITIONING entry's dict carries."""
    return entry.get(KEY, ())


def spans(negatives: Sequence[Negative]) -> Iterator[tuple[Negative, slice]]:
    """Each negative with the place of its tokens, one after the other."""
    start = 0
    for n in negatives:
        yield n, slice(start, start + n.tokens.shape[1])
        start += n.tokens.shape[1]


def same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two negatives act in the same places; every node makes a mask of its own out of the one it was given."""
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a)))


def count_tokens(negatives: Sequence[Negative]) -> int:
    return sum(n.tokens.shape[1] for n in negatives)
