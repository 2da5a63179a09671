"""Where image, positive and negative tokens sit in a joint attention's sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Lengths of the three token groups of a joint sequence, and their order.

    ``order`` is a permutation of ``"IPN"``: ``"NPI"`` is a text-first model (SD3, Flux) with the negative tokens put
    before the positive ones, ``"IPN"`` an image-first one (HunyuanVideo). With the negative at either end, image and
    positive tokens stay contiguous, so that the model's own attention runs on a view of them; ``"PNI"`` works too and
    costs a copy of keys and values.

    Raises ``ValueError`` for an order that is no permutation, a negative length, or a sequence without image tokens.
    """

    image: int
    positive: int
    negative: int
    order: str = "NPI"

    def __post_init__(self) -> None:
        if sorted(self.order) != ["I", "N", "P"]:
            raise ValueError(f"order must be a permutation of 'IPN', got {self.order!r}")
        if self.image < 1 or self.positive < 0 or self.negative < 0:
            raise ValueError(
                f"need at least one image token and no negative lengths, got image={self.image}, "
                f"positive={self.positive}, negative={self.negative}"
            )

    @property
    def length(self) -> int:
        """Number of tokens in the sequence."""
        return self.image + self.positive + self.negative

    def span(self, group: str) -> slice:
        """The slice of the sequence that ``group`` ("I", "P" or "N") occupies."""
        sizes = {"I": self.image, "P": self.positive, "N": self.negative}
        start = sum(sizes[g] for g in self.order[: self.order.index(group)])
        return slice(start, start + sizes[group])

    def without_negative(self, x: Tensor) -> Tensor:
        """``x`` [B, H, L, D] without its negative tokens: a view when these sit at an end, else a copy."""
        n = self.span("N")
        if n.start == 0:
            return x[:, :, n.stop :]
        if n.stop == self.length:
            return x[:, :, : n.start]
        return torch.cat((x[:, :, : n.start], x[:, :, n.stop :]), dim=2)
