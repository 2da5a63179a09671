"""One attention call of ComfyUI's, as ``optimized_attention_override`` is asked about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import environ
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention as comfy_attention
import torch
import torch.nn.functional as F
from comfy.model_management import OOM_EXCEPTION, InterruptProcessingException
from torch import Tensor

from ..vsf_core import WAYS, Attention, AttentionBackend, LSEAttention, fused_attention, lse_attention, zero_mask

if TYPE_CHECKING:
    from ..vsf_core.fused import FusedAttention

OVERRIDE = "optimized_attention_override"
LIBRARIES = {
    "attention_pytorch": "torch",
    "attention_sage": "sageattention",
    "attention_flash": "flash_attn",
    "attention_xformers": "xformers",
}
"""ComfyUI's attention functions whose library can return the log-sum-exp (``vsf_core.lse_attention``)."""

TRIALS = (64, 130, 1153)
"""Numbers of tokens for which an attention must apply a mask, besides as many as the model has: some ignore it only
beyond a length."""
FORCE = "VSF_ATTENTION"
"""The environment variable that forces one of ``vsf_core.WAYS``, for bug reports."""


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
        self.queries, self.keys = (t.shape[2 if skip_reshape else 1] for t in (q, k))
        self.width = q.shape[-1] * (heads if skip_reshape else 1)
        """Channels of all heads."""
        self.options: dict = kwargs["transformer_options"]
        self.scale: float | None = kwargs.get("scale")
        self.name: str = getattr(previous or func, "__name__", "override")
        self.library = LIBRARIES.get(func.__name__) if previous is None else None
        # what runs inside sees the slot as it was before us
        options = {key: value for key, value in self.options.items() if key != OVERRIDE}
        options = options if previous is None else {**options, OVERRIDE: previous}
        self.kwargs = {**kwargs, "attn_precision": attn_precision, "transformer_options": options}
        self.run = func if previous is None else partial(previous, func)

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


@dataclass(frozen=True, eq=False)
class Backend:
    """How the attention over text is computed instead of ComfyUI's call, while that is the one it was made for."""

    library: str | None
    """Whose calls ``attend`` stands for (``LIBRARIES``); None: those of any other attention."""
    attend: LSEAttention | None
    """None: the call itself, with a mask of one row."""
    ignores_mask: str | None = None
    """The name of an attention that ignores masks, so that PyTorch's runs in its place where there is one."""
    replaced: bool = False
    """Whether PyTorch's runs in its place everywhere."""
    fused: "FusedAttention | None" = None
    forced: str | None = None
    """What ``FORCE`` says."""

    def of(self, host: HostAttention) -> AttentionBackend:
        """What this call may be made of."""
        meant = host.library == self.library
        name = host.name if self.ignores_mask is None else "PyTorch"
        attend, fused = (self.attend, self.fused) if meant else (None, None)
        return AttentionBackend(self.masked(host), attend, host.scale, name, fused, self.forced)

    def masked(self, host: HostAttention) -> Attention:
        """An attention that takes an additive mask."""
        return host.black_box if self.ignores_mask is None else partial(_sdpa, scale=host.scale)


def choose_backend(
    options: Mapping[str, Any], device: torch.device, dtype: torch.dtype, head_dim: int, keys: int
) -> Backend:
    """The backend for a forward pass with these ``transformer_options``, of attentions over up to so many ``keys``.
    Raises ``RuntimeError`` if there is none, or not the one that is forced, and ``ValueError`` if that has no such
    name."""
    forced = environ.get(FORCE) or None
    if forced not in (None, *WAYS):
        raise ValueError(f"VSF: {FORCE} is {forced!r}, and may be {', '.join(WAYS)}, or not set at all.")
    host = _trial(options, TRIALS[0], device, dtype, head_dim)
    deaf = None
    if host.library != "torch":
        trials = (_trial(options, tokens, device, dtype, head_dim) for tokens in (*TRIALS, keys))
        deaf = None if all(map(_applies_masks, trials)) else host.name
    if forced is not None:
        return _forced_backend(forced, host, deaf, device, dtype, head_dim)
    fused = fused_attention(device, dtype, head_dim) if host.library == "torch" else None
    attend = lse_attention(device, dtype, head_dim, host.library) if host.library else None
    if attend or deaf is None:
        return Backend(host.library, attend, deaf, fused=fused)
    attend = lse_attention(device, dtype, head_dim)
    if attend is None:
        raise RuntimeError(
            f"VSF: the attention in use ({host.name}) ignores or refuses masks, and PyTorch's own returns no "
            f"log-sum-exp on {device.type} in {dtype}. Use another attention: remove the node that sets this one, or "
            "start ComfyUI with --use-pytorch-cross-attention."
        )
    return Backend(host.library, attend, deaf, replaced=True)


def _forced_backend(
    forced: str, host: HostAttention, deaf: str | None, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Backend:
    """As asked for, whatever the attention in use. Raises ``RuntimeError`` if it can't be."""
    fused = fused_attention(device, dtype, head_dim, forced=True) if forced == "fused" else None
    attend = lse_attention(device, dtype, head_dim) if forced == "merge" else None
    if (forced == "fused" and fused is None) or (forced == "merge" and attend is None):
        why = "needs Triton and a CUDA device" if forced == "fused" else "needs an attention with a log-sum-exp"
        raise RuntimeError(
            f"VSF: {FORCE}={forced} {why}, which {device.type} in {dtype} with heads of {head_dim} has not. Set it to "
            f"another of {', '.join(WAYS)}, or not at all."
        )
    return Backend(host.library, attend, deaf, fused=fused, forced=forced)


def _trial(
    options: Mapping[str, Any], tokens: int, device: torch.device, dtype: torch.dtype, head_dim: int
) -> HostAttention:
    """A small call of the attention in use, of random q, k and v: two heads, and no more queries than ``TRIALS``."""
    g = torch.Generator().manual_seed(0)
    lengths = min(tokens, TRIALS[-1]), tokens, tokens
    q, k, v = (torch.randn(1, 2, length, head_dim, generator=g).to(device, dtype) for length in lengths)
    func = comfy_attention.optimized_attention
    func = getattr(func, "__wrapped__", func)
    options = {"block_index": 0, **options}
    return HostAttention(options.get(OVERRIDE), func, q, k, v, 2, skip_reshape=True, transformer_options=options)


def _applies_masks(host: HostAttention) -> bool:
    """Whether the host's attention applies an additive mask of one row; SageAttention's kernels, for one, do not, and
    some refuse it.

    True where it fails without a mask, too: then the real call will fail, and say why.
    """
    q, k, v = host.given
    mask = zero_mask(1, 1, 1, k.shape[2], like=q)
    mask[..., k.shape[2] // 2 :] = -torch.inf
    out = _attempt(host, mask)
    if out is None:
        return _attempt(host, None) is None
    masked, unmasked = (_sdpa(q, k, v, m, host.scale) for m in (mask, None))
    return bool((out - masked).abs().max() < (out - unmasked).abs().max())


def _attempt(host: HostAttention, mask: Tensor | None) -> Tensor | None:
    """What the host's attention gives, or None where it fails."""
    try:
        return host.black_box(*host.given, mask)
    except (InterruptProcessingException, OOM_EXCEPTION):
        raise
    except Exception:
        return None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
