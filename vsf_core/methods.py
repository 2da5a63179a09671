"""The door: ``attend_joint`` and ``attend_cross`` do with a negative what a method does (VSF, NAG, NASA, ONG), in the
best way that a backend allows. Nobody else has to know which ways there are:

========= =================== ======================================= ==========================================
method    fused kernel        with a log-sum-exp                      black box, maybe under a mask of the caller's
========= =================== ======================================= ==========================================
VSF       one launch          one attention over [P, I], a sliver     one attention over all, with masks of one
                              merged in                               row
NAG,      one launch for Z+   joint: one attention over I, and        joint: over [P, I], and over all with masks
NASA, ONG and Z-, a few more  slivers                                 of one row
          for the formula     cross: as on the right                  cross: two attentions, over P and over N
========= =================== ======================================= ==========================================

Shapes: q, k, v [B, H, L, D]; ``mask``: the caller's own, additive, [B or 1, 1, 1 or L, L] (cross-attention: over P,
[B or 1, 1, 1, P]). ``attention_mass``: None, or [B, I] in fp32 to which 1 - W is added, the part of each image token's
attention that falls on the negative, averaged over heads. It changes no result. Where the log-sum-exp is not to be had
it costs a second call of the black box and is as exact as that one's dtype.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import JointCall, NegativeTerms, joint_attention, merge_negative_, padding_beta
from .backends import AttentionBackend
from .guidance import joint_attention_guided, steer_
from .layout import TokenLayout, padding_mask, unless_all
from .masked import cross_attention_masked, joint_attention_masked
from .reference import cross_attention_exact, exact, joint_attention_exact


class Method:
    """What is done with a negative."""

    records = False
    """Whether there is an ``attention_mass``: whether positive and negative share one softmax."""

    def on(self, device: torch.device) -> "Method":
        """The same with its numbers as tensors there, which one compiled graph takes as they come."""
        return self


@dataclass(frozen=True)
class VSF(Method):
    """Value Sign Flip, arXiv 2508.10931, Eq. 7 to 9: see ``reference.py``."""

    records = True


class Guidance(Method):
    """A method that steers the image's attention from Z-, what it would be with N in P's place, to Z+."""

    def __call__(self, z_pos: Tensor, step: Tensor, phi: Tensor, presence: Tensor) -> tuple[Tensor, Tensor]:
        """``guidance.Steer``: what the image's Z+ and its ``step`` Z+ - Z- are multiplied by."""
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

    def __call__(self, z_pos: Tensor, step: Tensor, phi: Tensor, presence: Tensor) -> tuple[Tensor, Tensor]:
        steered = torch.addcmul(z_pos, step, phi)  # fp32: phi may be large
        longest = self.tau * _length(z_pos).clamp_min(1e-6)
        kept = (longest / _length(steered).clamp_min(1e-6)).clamp_max(1.0) * self.alpha
        return 1 + presence * (kept - self.alpha), presence * kept * phi

    def on(self, device: torch.device) -> "NAG":
        return NAG(*(torch.as_tensor(number, dtype=torch.float32, device=device) for number in (self.alpha, self.tau)))


@dataclass(frozen=True)
class NASA(Guidance):
    """Negative-Aware Self-Attention, arXiv 2412.02687: ``Z = Z+ - phi Z-``."""

    def __call__(self, z_pos: Tensor, step: Tensor, phi: Tensor, presence: Tensor) -> tuple[Tensor, Tensor]:
        moved = presence * phi
        return 1 - moved, moved


@dataclass(frozen=True)
class ONG(Guidance):
    """Orthogonal Negative Guidance, arXiv 2605.29390: only the part of Z- that is orthogonal to Z+ is taken away::

        Z = Z+ - phi (Z- - c Z+)    c = <Z-, Z+> / <Z+, Z+>

    This is a reading of the paper's abstract ("orthogonalizes negative-prompt attention features with respect to
    positive-prompt features and subtracts only the orthogonal component"); more of it was not to be had. What the
    abstract leaves open is done as NAG does it: a vector is an image token's over all heads, which is what attention
    puts out, before the output projection; Z- has N in P's place. Of a Z+ of 0 any Z- is orthogonal to it.
    """

    def __call__(self, z_pos: Tensor, step: Tensor, phi: Tensor, presence: Tensor) -> tuple[Tensor, Tensor]:
        moved = presence * phi
        return 1 - moved * _along(step, z_pos), moved  # <Z+ - Z-, Z+> / <Z+, Z+> is 1 - c


def _length(z: Tensor, order: float = 1) -> Tensor:
    """A norm over heads and channels, L1 unless said, in fp32 at least, [B, 1, I, 1]."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(z, order, dim=(1, 3), keepdim=True, dtype=dtype)


def _along(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / <b, b> over heads and channels, in fp32 at least, [B, 1, I, 1]; 0 where b is 0."""
    largest = _length(b, torch.inf).clamp_min(1e-30)
    unit = b / largest  # its squares neither overflow nor vanish
    return (a * unit).sum((1, 3), keepdim=True) / (_length(unit, 2).square().clamp_min(1.0) * largest)


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
    image and itself. ``ValueError`` for an ``attention_mass`` that the method has not, or keys of fewer heads."""
    _check_mass(method, attention_mass)
    _check_heads(q, k, v)
    call = JointCall(q, k, v, layout, negative, backend, mask, attention_mass)
    steer = method if isinstance(method, Guidance) and negative.beta is not None else None
    way = backend.way(mask)
    if way == "fused" and backend.fused is not None:
        made = backend.fused.joint(call, steer is not None)
        return _completed(made, layout.span("I"), steer, negative, attention_mass)
    if way == "merge":
        return joint_attention(call) if steer is None else joint_attention_guided(call, steer)
    return joint_attention_masked(call, steer) if way == "mask" else joint_attention_exact(call, steer)


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
    _check_heads(q, k, v, k_neg, v_neg)
    beta = negative.beta
    if beta is None:
        return backend.black_box(q, k, v, mask)
    steer, way, text = method if isinstance(method, Guidance) else None, backend.way(mask), (k_neg, v_neg)
    if steer is not None and negative.padding is not None:
        negative = replace(negative, padding=unless_all(negative.padding))
    if way == "fused" and backend.fused is not None:
        two, share = steer is not None, attention_mass is not None
        made = backend.fused.cross((q, k, v, *text), negative, mask, backend.softmax_scale, two, share)
        return _completed(made, slice(None), steer, negative, attention_mass)
    if steer is not None:
        attend = exact if way == "reference" else backend.black_box
        hidden = None if negative.padding is None else padding_mask(negative.padding[:, None, None], q.dtype)
        return steer_(attend(q, k, v, mask), attend(q, *text, hidden), steer, negative)
    hidden, alpha = padding_beta(negative.padding), negative.alpha
    beta = beta if hidden is None else beta + hidden
    if way == "merge":
        return merge_negative_(*backend.with_lse(q, k, v), q, *text, alpha, beta, backend, attention_mass)
    if way == "reference":
        return cross_attention_exact(q, k, v, *text, alpha, beta, mask, backend.softmax_scale, attention_mass)
    return cross_attention_masked(backend, q, k, v, *text, alpha, beta, mask, attention_mass)


def _completed(
    made: list[Tensor], image: slice, steer: Guidance | None, negative: NegativeTerms, attention_mass: Tensor | None
) -> Tensor:
    """Z of what the fused kernel ``made``: its rows ``image`` steered, and its shares noted."""
    z, *others = made
    if attention_mass is not None:
        attention_mass += others[0].mean(dim=1)
    if steer is not None:
        steer_(z[:, :, image], others[0], steer, negative)
    return z


def way_of(method: Method, backend: AttentionBackend, mask: Tensor | None = None, cross: bool = False) -> str:
    """In words, for a log: how the two above compute a call with these."""
    way = backend.way(mask)
    words = {
        "fused": "fused kernel",
        "merge": f"log-sum-exp merge ({getattr(backend.lse, '__name__', '')})",
        "mask": f"row mask ({backend.name})",
        "reference": "reference",
    }
    return "two cross-attentions" if cross and isinstance(method, Guidance) and way in ("merge", "mask") else words[way]


def _check_heads(q: Tensor, *others: Tensor) -> None:
    """Some kernels take fewer heads of keys than of queries for the same number, and read beyond them."""
    for t in others:
        if t.shape[1] != q.shape[1]:
            raise ValueError(
                f"queries of {q.shape[1]} heads and keys or values of {t.shape[1]}: repeat the latter first "
                "(grouped-query attention)"
            )


def _check_mass(method: Method, attention_mass: Tensor | None) -> None:
    if attention_mass is not None and not method.records:
        raise ValueError(f"{type(method).__name__} has no one softmax of which the negative takes a part to record")
