"""One attention call of ComfyUI's, as ``optimized_attention_override`` is asked about it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

OVERRIDE = "optimized_attention_override"


class HostAttention:
    """The call that ComfyUI was about to make: its arguments, and ways to make it.

    ``previous``: the override that was in the slot before ours, if any; ``func``: the host's attention function.
    """

    def __init__(
        self,
        previous: Callable | None,
        func: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> None:
        self.given = q, k, v
        self.heads, self.mask = heads, mask
        self.has_heads, self.keeps_heads = skip_reshape, skip_output_reshape
        self.options: dict = kwargs["transformer_options"]
        self.scale: float | None = kwargs.get("scale")
        self.name: str = getattr(previous or func, "__name__", "override")
        self.is_sdpa = previous is None and func.__name__ == "attention_pytorch"
        # what runs inside sees the slot as it was before us
        options = {key: value for key, value in self.options.items() if key != OVERRIDE}
        options = options if previous is None else {**options, OVERRIDE: previous}
        self.kwargs = {**kwargs, "attn_precision": attn_precision, "transformer_options": options}
        self.run = func if previous is None else partial(previous, func)

    @property
    def queries(self) -> int:
        return self.given[0].shape[2 if self.has_heads else 1]

    @property
    def keys(self) -> int:
        return self.given[1].shape[2 if self.has_heads else 1]

    def unchanged(self) -> Tensor:
        """The call as it was going to be."""
        shape = {"skip_reshape": self.has_heads, "skip_output_reshape": self.keeps_heads}
        return self.run(*self.given, self.heads, mask=self.mask, **shape, **self.kwargs)

    def split(self) -> tuple[Tensor, ...]:
        """q, k, v as views [B, H, L, D]; some models hand over a v that is 4-D already."""
        if self.has_heads:
            return self.given
        return tuple(t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in self.given)

    def black_box(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The host's attention on [B, H, L, D], with an additive mask or none."""
        return self.run(q, k, v, self.heads, mask=mask, skip_reshape=True, skip_output_reshape=True, **self.kwargs)

    def join(self, out: Tensor) -> Tensor:
        """[B, H, L, D] in the shape that the caller expects."""
        return out if self.keeps_heads else out.transpose(1, 2).flatten(2)
