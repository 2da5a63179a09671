"""One attention call of ComfyUI's, as ``optimized_attention_override`` is asked about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from os import environ
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention as comfy_attention
import torch
import torch.nn.functional as F
from comfy.model_management import OOM_EXCEPTION, InterruptProcessingException
from torch import Tensor

from ..vsf_core import WAYS, Attention, AttentionBackend, LSEAttention, fused_attention, lse_attention, zero_mask
from .known_overrides import SPARSE_NAME, container_function, dense, is_sparse
from .recordings import is_recording

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

COARSE = frozenset({"attention_comfy_kitchen_int8"})
"""Those of ComfyUI's attention functions that round values on one scale a channel (``AttentionBackend.coarse``)."""

TRIALS = (65, 130, 1153)
"""Numbers of tokens for which an attention must apply a mask, besides as many as the model has: some ignore it, or give
garbage, only beyond a length. On some AMD cards INT8 attention does, with masks over more than 64 keys."""
CLOSE = 0.25
"""How far an attention with a mask may be from the right result, in parts of how far apart those with the mask and
without are: 8 bits are at 0.02, garbage beyond 1."""
FORCE = "VSF_ATTENTION"
"""The environment variable that forces one of ``vsf_core.WAYS``, for bug reports."""


class HostAttention:
    """The call that ComfyUI was about to make: its arguments, and ways to make it.

    ``previous``: the override that was in the slot before ours, if any; ``func``: the host's attention function. q, k
    and v may come in the containers of newer ComfyUIs, out of which an attention takes them once.
    """

    def __init__(
        self,
        previous: Callable | None,
        func: Callable,
        q: Any,
        k: Any,
        v: Any,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> None:
        self.given: Any = (q, k, v)
        self.heads, self.mask = heads, mask
        self.has_heads, self.keeps_heads = skip_reshape, skip_output_reshape
        query, key = (t if isinstance(t, Tensor) else t.peek() for t in (q, k))
        self.device = query.device
        self.queries, self.keys = (t.shape[2 if skip_reshape else 1] for t in (query, key))
        self.width = query.shape[-1] * (heads if skip_reshape else 1)
        """Channels of all heads."""
        self.options: dict = kwargs["transformer_options"]
        self.scale: float | None = kwargs.get("scale")
        self.whole = previous, func
        previous, func = dense(*self.whole)
        self.name: str = getattr(previous or func, "__name__", "override")
        self.library = LIBRARIES.get(func.__name__) if previous is None else None
        self.coarse = previous is None and func.__name__ in COARSE
        self.kwargs = {**kwargs, "attn_precision": attn_precision}
        self.run = func if previous is None else partial(previous, func)
        self.inner = {"transformer_options": self._options(previous)}

    def _options(self, previous: Callable | None) -> dict:
        """What runs inside sees the slot as it was before us."""
        options = {key: value for key, value in self.options.items() if key != OVERRIDE}
        return options if previous is None else {**options, OVERRIDE: previous}

    def unchanged(self) -> Tensor:
        """The call as it was going to be."""
        shape = {"skip_reshape": self.has_heads, "skip_output_reshape": self.keeps_heads}
        previous, func = self.whole
        run, given = func if previous is None else partial(previous, func), self.given
        if not isinstance(given[0], Tensor):
            contained = container_function(previous, func)
            run, given = (contained, given) if contained is not None else (run, tuple(t.take() for t in given))
        named = {**self.kwargs, "transformer_options": self._options(previous)}
        return run(*given, self.heads, mask=self.mask, **shape, **named)

    def split(self) -> tuple[Tensor, ...]:
        """q, k, v [B, H, L, D], views but where k and v have fewer heads, each of which serves several of q's; some
        models hand over a v that is 4-D already. Raises ``RuntimeError`` where heads do not fit."""
        q, k, v = self.given = tuple(t if isinstance(t, Tensor) else t.take() for t in self.given)
        if not self.has_heads:
            size = self.width // self.heads
            q, k, v = (t.reshape(*t.shape[:2], -1, size).transpose(1, 2) for t in (q, k, v))
        return q, *(self._for_each_query(t, q.shape[1]) for t in (k, v))

    def _for_each_query(self, t: Tensor, heads: int) -> Tensor:
        """Keys or values with as many ``heads`` as the queries."""
        times, rest = divmod(heads, t.shape[1])
        if rest or (times > 1 and not self.kwargs.get("enable_gqa")):
            raise RuntimeError(
                f"VSF: an attention over text has {heads} heads of queries and {t.shape[1]} of keys or values, and "
                "nothing says that these are shared (enable_gqa). Please report which model this is."
            )
        return t if times == 1 else t.repeat_interleave(times, dim=1)

    def black_box(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The host's attention on [B, H, L, D], with an additive mask or none."""
        named = {**self.kwargs, **self.inner, "skip_reshape": True, "skip_output_reshape": True}
        named.pop("enable_gqa", None)  # ``split`` has seen to it
        return self.run(q, k, v, self.heads, mask=mask, **named)

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
    set_aside: str | None = None
    """The name of an attention that is not right with masks, so that PyTorch's runs in its place where there is one."""
    replaced: str | None = None
    """Why PyTorch's runs in its place everywhere, for the log."""
    fused: "FusedAttention | None" = None
    forced: str | None = None
    """What ``FORCE`` says."""
    hurried: str | None = None
    """The name of an attention that attends in a quicker way without masks than with them."""

    def of(self, host: HostAttention) -> AttentionBackend:
        """What this call may be made of."""
        meant = host.library == self.library
        name = host.name if self.set_aside is None else "PyTorch"
        attend, fused = (self.attend, self.fused) if meant else (None, None)
        if fused is not None and self.forced is None and is_recording(host.device):
            fused = None  # some kernels of Triton's end such a recording in an error
        coarse = host.coarse and self.set_aside is None
        return AttentionBackend(self.masked(host), attend, host.scale, name, fused, self.forced, coarse)

    def warning(self, joint: bool) -> str | None:
        """What people should know of it, on a model with ``joint`` attention or another; None if nothing."""
        if self.replaced:
            return (
                f"VSF: the attention in use ({self.set_aside}) {self.replaced} and returns no log-sum-exp, so VSF "
                "would not be exact on it. Where the image attends to text, PyTorch's runs instead."
            )
        if self.hurried and joint:
            return (
                f"VSF: the attention in use ({self.hurried}) is quicker without a mask than with one. Where the image "
                "attends to text, it runs with a mask, or PyTorch's runs in its place, while there is a negative: this "
                "run is slower than one without."
            )
        return None

    def masked(self, host: HostAttention) -> Attention:
        """An attention that takes an additive mask."""
        return host.black_box if self.set_aside is None else partial(_sdpa, scale=host.scale)


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
    sparse = SPARSE_NAME if is_sparse(options.get(OVERRIDE)) else None
    chosen = _backend(host, deaf, device, dtype, head_dim)
    if sparse is None and host.library is None and chosen.attend is None:
        sparse = host.name if _hurries(_trial(options, TRIALS[-1], device, dtype, head_dim)) else None
    return replace(chosen, hurried=sparse)


def _backend(host: HostAttention, deaf: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The best for calls like ``host``'s; ``deaf``: their attention's name where it is not right with masks."""
    kind = device, dtype, head_dim
    if host.library is not None:
        attend, fused = lse_attention(*kind, host.library), fused_attention(*kind) if host.library == "torch" else None
        if attend or deaf is None:
            return Backend(host.library, attend, deaf, fused=fused)
    attend = lse_attention(*kind) if deaf or host.coarse else None
    if attend is not None:
        why = "ignores or refuses masks" if deaf else "rounds the negative's values and all others on one scale"
        return Backend(host.library, attend, host.name, replaced=why, fused=fused_attention(*kind))
    if deaf is None:
        return Backend(host.library, None)
    raise RuntimeError(
        f"VSF: the attention in use ({host.name}) ignores or refuses masks, and PyTorch's own returns no "
        f"log-sum-exp on {device.type} in {dtype}. Use another attention: remove the node that sets this one, or "
        "start ComfyUI with --use-pytorch-cross-attention."
    )


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
    return bool((out - masked).abs().max() < CLOSE * (unmasked - masked).abs().max())


def _hurries(host: HostAttention) -> bool:
    """Whether the attention is only about right without a mask, as sparse ones and those of 8 bits are, and much closer
    with one: then it leaves calls with a mask to another, slower one."""
    q, k, v = host.given
    exact = _sdpa(q, k, v, None, host.scale)
    errors = []
    for mask in (None, zero_mask(1, 1, 1, k.shape[2], like=q)):
        out = _attempt(host, mask)
        errors.append(torch.inf if out is None else (out - exact).abs().max().item())
    return 4 * errors[1] + 1e-3 * exact.abs().max().item() < errors[0]


def _attempt(host: HostAttention, mask: Tensor | None) -> Tensor | None:
    """What the host's attention gives, or None where it fails."""
    q, k, v = host.given
    try:
        return host.black_box(q, k, v, mask)
    except (InterruptProcessingException, OOM_EXCEPTION):
        raise
    except Exception:
        return None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
