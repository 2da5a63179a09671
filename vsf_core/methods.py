"""The door: ``attend_joint`` and ``attend_cross`` do with a negative what a method does (VSF, NAG, NASA), in the best
way that a backend allows. Nobody else has to know which ways there are:

========= ============================================== ==========================================================
method    with a log-sum-exp                             black box alone, or with a mask of the caller's own
========= ============================================== ==========================================================
VSF       one attention over [P, I], a sliver merged in  one attention over all, with masks of one row
NAG, NASA joint: one attention over I, and slivers       joint: over [P, I], and over all with masks of one row
          cross: as on the right                         cross: two attentions, over P and over N
========= ============================================== ==========================================================

Shapes: q, k, v [B, H, L, D]; ``mask``: additive, [B or 1, 1, 1 or L, L] (cross-attention: over P, [B or 1, 1, 1, P]);
``attention_mass``: None, or [B, I] in fp32, to which 1 - W is added (``attention.py``).
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .attention import cross_attention, cross_attention_masked, joint_attention, joint_attention_masked, padding_beta
from .backends import AttentionBackend
from .guidance import cross_attention_guided, joint_attention_guided, joint_attention_guided_masked
from .layout import TokenLayout

M = TypeVar("M", bound="Method")


class Method:
    """What is done with a negative."""

    records = False
    """Whether there is an ``attention_mass``: whether positive and negative share one softmax."""

    def on(self: M, device: torch.device) -> M:
        """The same with its numbers as tensors there, which one compiled graph takes as they come."""
        return self


@dataclass(frozen=True)
class VSF(Method):
    """Value Sign Flip, arXiv 2508.10931, Eq. 7 to 9: see ``reference.py``."""

    records = True


class Guidance(Method):
    """A method that steers the image's attention from Z-, what it would be with N in P's place, to Z+."""

    def __call__(self, z_pos: Tensor, z_neg: Tensor, phi: Tensor) -> Tensor:
        """Z: fp32 [B, H, I, D]; phi [B or 1, 1, 1, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class NAG(Guidance):
    """Normalized Attention Guidance, arXiv 2505.21179, per image token, before the output projection::

        Z~ = Z+ + phi (Z+ - Z-)    R = |Z~| / |Z+|    Z^ = Z~ min(R, tau) / R    Z = alpha Z^ + (1 - alpha) Z+

    with L1 norms over all heads' channels. alpha: how much of the steered Z the result has; tau: how much longer than
    Z+ that may be; phi, the scale, is the ``alpha`` of ``NegativeTerms``.
    """

    alpha: float | Tensor
    tau: float | Tensor

    def __call__(self, z_pos: Tensor, z_neg: Tensor, phi: Tensor) -> Tensor:
        z = z_pos + phi * (z_pos - z_neg)
        ratio = _length(z) / _length(z_pos)
        return torch.lerp(z_pos, z * (self.tau / ratio).clamp_max(1.0), self.alpha)

    def on(self, device: torch.device) -> "NAG":
        return NAG(*(torch.as_tensor(number, dtype=torch.float32, device=device) for number in (self.alpha, self.tau)))


@dataclass(frozen=True)
class NASA(Guidance):
    """Negative-Aware Self-Attention, arXiv 2412.02687: ``Z = Z+ - phi Z-``."""

    def __call__(self, z_pos: Tensor, z_neg: Tensor, phi: Tensor) -> Tensor:
        return z_pos - phi * z_neg


def _length(z: Tensor) -> Tensor:
    """L1 norm over heads and channels, [B, 1, I, 1]."""
    return z.abs().sum(dim=(1, 3), keepdim=True).clamp_min(1e-6)


@dataclass(frozen=True, eq=False)
class NegativeTerms:
    """How the image sees the negative.

    alpha [B or 1, N or 1, 1]: VSF's scale of the flipped values; the phi of NAG and NASA, which take the first token's.
    beta [B or 1, I or 1, N or 1], fp32: the offset, taken off the logits; +inf where an image token does not see a
    token of the negative, None where none does. An image token takes exp(-beta) of NAG's and NASA's steering, for its
    lowest beta. padding: bool [B or 1, N], True where a token is only padding.
    """

    alpha: Tensor
    beta: Tensor | None
    padding: Tensor | None = None


def attend_joint(
    method: Method,
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    negative: NegativeTerms,
    mask: Tensor | None = None,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """Joint attention with a negative, [B, H, L, D]. P's and N's own rows are those of two passes: each text sees the
    image and itself. ``ValueError`` for an ``attention_mass`` that the method has not."""
    _check_mass(method, attention_mass)
    alpha, beta, padding = negative.alpha, negative.beta, negative.padding
    lse = backend.lse_under(mask)
    if beta is None or not isinstance(method, Guidance):
        shared = q, k, v, layout, alpha, beta
        if lse is not None:
            return joint_attention(*shared, lse, padding, backend.softmax_scale, attention_mass)
        return joint_attention_masked(*shared, backend.black_box, padding, mask, attention_mass)
    guided = q, k, v, layout, method, alpha[:, :1], _presence(beta)
    if lse is not None:
        return joint_attention_guided(*guided, lse, padding, backend.softmax_scale)
    return joint_attention_guided_masked(*guided, backend.black_box, padding, mask)


def attend_cross(
    method: Method,
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    negative: NegativeTerms,
    mask: Tensor | None = None,
    attention_mass: Tensor | None = None,
) -> Tensor:
    """Cross-attention with a negative, [B, H, I, D]. ``ValueError`` as above."""
    _check_mass(method, attention_mass)
    alpha, beta, padding = negative.alpha, negative.beta, negative.padding
    if beta is None:
        return backend.black_box(q, k, v, mask)
    shared, lse = (q, k, v, k_neg, v_neg), backend.lse_under(mask)
    if isinstance(method, Guidance):
        steering = method, alpha[:, :1], _presence(beta)
        return cross_attention_guided(*shared, *steering, backend.black_box, padding, mask)
    hidden = padding_beta(padding)
    beta = beta if hidden is None else beta + hidden
    if lse is not None:
        return cross_attention(*shared, alpha, beta, lse, backend.softmax_scale, attention_mass)
    return cross_attention_masked(*shared, alpha, beta, backend.black_box, mask, attention_mass)


def way_of(method: Method, backend: AttentionBackend, mask: Tensor | None = None, cross: bool = False) -> str:
    """In words, for a log: how the two above compute a call with these."""
    if cross and isinstance(method, Guidance):
        return "two cross-attentions"
    lse = backend.lse_under(mask)
    return f"row mask ({backend.name})" if lse is None else f"log-sum-exp merge ({lse.__name__})"


def _presence(beta: Tensor) -> Tensor:
    """[B or 1, I or 1, 1]: how much of NAG's or NASA's steering an image token takes."""
    return torch.exp(-beta.amin(dim=-1, keepdim=True))


def _check_mass(method: Method, attention_mass: Tensor | None) -> None:
    if attention_mass is not None and not method.records:
        raise ValueError(f"{type(method).__name__} has no one softmax of which the negative takes a part to record")
