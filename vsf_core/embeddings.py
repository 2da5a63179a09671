"""Text embeddings of a negative prompt (VSF, arXiv 2508.10931): padding (Appendix C), extrapolation (Appendix G)."""

from collections.abc import Sequence

from torch import Tensor


def content_length(tokens: Sequence, pad: int, end: int) -> int:
    """How many leading entries of ``tokens`` are not padding; the end token counts as content.

    Entries may be token ids or embeddings (tensors), which are always content. Where the end token is also the padding
    token (CLIP-L), one of the trailing ones is kept as the end.
    """
    last = len(tokens)
    while last and isinstance(tokens[last - 1], int) and tokens[last - 1] == pad:
        last -= 1
    return min(last + 1, len(tokens)) if pad == end else last


def null_embedding(empty: Tensor, content: int) -> Tensor:
    """The null condition of Eq. 10: the mean over the padded positions of the empty prompt's padded encoding.

    ``empty``: [1, L, C] with ``content`` leading positions that are no padding. Result: [1, 1, C].
    """
    if content >= empty.shape[1]:
        raise ValueError(
            f"the empty prompt's encoding has no padding: {content} of {empty.shape[1]} positions are content"
        )
    return empty[:, content:].mean(dim=1, keepdim=True)


def extrapolate(negative: Tensor, null: Tensor, strength: float) -> Tensor:
    """Eq. 10: ``p- <- p- + lambda (p- - p0)``. Shapes [B, n, C] and [1, 1, C]; strength 0 is the identity."""
    return negative + strength * (negative - null)
