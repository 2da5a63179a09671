"""A negative prompt in a CONDITIONING: what VSF Negative Conditioning puts there, and how it is found again.

What travels is plain data: dicts, tensors, numbers and text. So it survives pickle, ``torch.save`` and a process that
lacks this pack. ``attached`` and ``negatives_of`` are the only two that know its form.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

KEY = "vsf_negatives"
"""Key of our own in a CONDITIONING entry's dict; unpatched models never notice it. During a run of a patched model the
same key in the entry's ``model_conds`` says whose negatives they are: ComfyUI copies a positive entry with an area into
the uncond branch, dict and all, but leaves ``model_conds`` behind."""

FORMAT = 1
"""Of the plain data; another number for whatever an older version of this pack would read wrongly."""


@dataclass(frozen=True, eq=False)
class Negative:
    """One negative prompt: what ``VSFNegativeConditioning`` puts into every entry of the positive.

    tokens: [b, n, C] embeddings without padding; strength: multiplies alpha for these tokens; mask: [b, H, W] in 0..1,
    where in the picture it acts, None = everywhere (in a video, b are frames); frames: from and to which part of a
    video (0..1) it acts; encoder: name of the text encoder that made it, None = unknown;
    pooled: [b, C'], the pooled embedding, which only the released pipeline of some families uses; extra: what else the
    encoder said of the text, by ComfyUI's names for it; padded: [b, m, C], the same text encoded as a prompt is, with
    its padding and template, for methods that take it so, None = as tokens.

    Two that were read from the same data are equal.
    """

    tokens: Tensor
    strength: float = 1.0
    mask: Tensor | None = None
    frames: tuple[float, float] = (0.0, 1.0)
    encoder: str | None = None
    pooled: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    padded: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Negative) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        own = (getattr(self, field.name) for field in fields(self))
        return tuple(id(value) if isinstance(value, (Tensor, Mapping)) else value for value in own)


def attached(options: Mapping[str, Any], negative: Negative) -> dict[str, Any]:
    """The dict of a CONDITIONING entry, ``options``, with one negative more."""
    plain = {field.name: getattr(negative, field.name) for field in fields(negative)}
    return {**options, KEY: [*options.get(KEY, ()), {"format": FORMAT, **plain}]}


def negatives_of(entry: Mapping[str, Any]) -> tuple[Negative, ...]:
    """The negatives that a CONDITIONING entry's dict carries. Raises ``ValueError`` for another version's data."""
    return tuple(map(_read, entry.get(KEY, ())))


def _read(plain: Any) -> Negative:
    made = plain.get("format") if isinstance(plain, Mapping) else None
    names = {field.name for field in fields(Negative)}
    if made != FORMAT or set(plain) != {"format", *names}:
        what = (
            f"in format {made!r}" if made != FORMAT else f"in which {sorted(names ^ (set(plain) - {'format'}))} differ"
        )
        raise ValueError(
            f"VSF: a conditioning carries a negative {what}, and this version of ComfyUI-VSF reads format {FORMAT}. "
            "Another version of ComfyUI-VSF made it, perhaps on another machine or in a file: use the same version in "
            "both places, and run VSF Negative Conditioning again."
        )
    return Negative(**{name: plain[name] for name in names})


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
