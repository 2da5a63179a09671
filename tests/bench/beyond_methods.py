"""What might be better than VSF's merge, each in one function: candidates that ``bench beyond`` judges.

A candidate gets what one attention call yields of an image token and a head (``Parts``) and alpha, and returns the
token's new value. With w = 1 - W, VSF itself is::

    Z = (1 - w) Z+  -  alpha w Z-

Shapes: z [B, H, I, D]; weights and log-sum-exps [B, H, I, 1]. docs/beyond.md has what came of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """z_pos: attention over image and positive; z_neg: over the negative alone; z_text: over the positive alone.

    weight: w = 1 - W, the part of the attention that falls on the negative; text: the part of Z+ that falls on the
    positive text (in cross-attention all of it, and z_text is z_pos).
    """

    z_pos: Tensor
    z_neg: Tensor
    z_text: Tensor
    weight: Tensor
    text: Tensor


Candidate = Callable[..., Tensor]
"""(parts, alpha, **own numbers) -> Z."""


def parts_of(z_pos: Tensor, lse_pos: Tensor, z_neg: Tensor, lse_neg: Tensor, z_text: Tensor, lse_text: Tensor) -> Parts:
    """From three attentions and their log-sum-exps [B, H, I]; ``lse_neg`` less beta."""
    weight, text = torch.sigmoid(lse_neg - lse_pos), torch.exp(lse_text - lse_pos)
    return Parts(z_pos, z_neg, z_text, weight[..., None], text[..., None])


def vsf(p: Parts, alpha: float) -> Tensor:
    """The paper's Eq. 7."""
    return (1 - p.weight) * p.z_pos - alpha * p.weight * p.z_neg


def norm_limit(p: Parts, alpha: float, tau: float, order: int = 1, whole: bool = False) -> Tensor:
    """VSF, at most tau times as long as Z+: NAG's limit; in the L1 or L2 norm, of each head or of all (``whole``)."""
    z = vsf(p, alpha)
    return z * (tau * _norm(p.z_pos, order, whole) / _norm(z, order, whole)).clamp_max(1.0)


def norm_kept(p: Parts, alpha: float) -> Tensor:
    """VSF's direction in each head, Z+'s length."""
    z = vsf(p, alpha)
    return z * _norm(p.z_pos, 2, False) / _norm(z, 2, False)


def blend(p: Parts, alpha: float, share: float) -> Tensor:
    """NAG's blending: ``share`` of VSF with its norm limited to 1.5 of Z+'s, the rest Z+."""
    return share * norm_limit(p, alpha, 1.5, whole=True) + (1 - share) * p.z_pos


def cap(p: Parts, alpha: float, most: float) -> Tensor:
    """At most ``most`` of the attention falls on the negative."""
    w = p.weight.clamp_max(most)
    return (1 - w) * p.z_pos - alpha * w * p.z_neg


def saturate(p: Parts, alpha: float, most: float) -> Tensor:
    """The push alpha w approaches ``most`` and never passes it."""
    return (1 - p.weight) * p.z_pos - most * torch.tanh(alpha * p.weight / most) * p.z_neg


def power(p: Parts, alpha: float, exponent: float) -> Tensor:
    """Alpha follows how strongly the token attends to the negative: alpha w^exponent (0: VSF)."""
    return (1 - p.weight) * p.z_pos - alpha * p.weight ** (1 + exponent) * p.z_neg


def relative(p: Parts, alpha: float) -> Tensor:
    """Alpha follows the negative's part in the attention to all text, w / (w + text's part): 1 where no other text is
    attended to."""
    return (1 - p.weight) * p.z_pos - 2 * alpha * p.weight * _of_text(p) * p.z_neg


def instead(p: Parts, alpha: float) -> Tensor:
    """The push is the negative's part in the attention to all text, however little the token attends to text."""
    return (1 - p.weight) * p.z_pos - 0.1 * alpha * _of_text(p) * p.z_neg


def gate(p: Parts, alpha: float, least: float) -> Tensor:
    """Tokens that attend to the negative with less than ``least`` of their attention to text are left alone."""
    w = torch.where(_of_text(p) >= least, p.weight, 0.0)
    return (1 - w) * p.z_pos - alpha * w * p.z_neg


def louder_positive(p: Parts, alpha: float, factor: float) -> Tensor:
    """The positive text's values times ``factor``."""
    z_pos = p.z_pos + (factor - 1) * p.text * p.z_text
    return (1 - p.weight) * z_pos - alpha * p.weight * p.z_neg


def undiminished(p: Parts, alpha: float) -> Tensor:
    """Decoupled: the positive keeps its whole weight."""
    return p.z_pos - alpha * p.weight * p.z_neg


def balance(p: Parts, alpha: float) -> Tensor:
    """What is taken of Z- is given back of Z+, so that the weights add up to 1, as in guidance."""
    return p.z_pos + alpha * p.weight * (p.z_pos - p.z_neg)


def difference(p: Parts, alpha: float) -> Tensor:
    """Only what Z- has and the positive text has not is pushed away: values less those of the text attended to."""
    return (1 - p.weight) * p.z_pos - alpha * p.weight * (p.z_neg - p.z_text)


def orthogonal(p: Parts, alpha: float) -> Tensor:
    """Only the part of Z- that is orthogonal to Z+ is pushed away: Z+ loses nothing of its own."""
    along = _dot(p.z_neg, p.z_pos) / _dot(p.z_pos, p.z_pos).clamp_min(1e-12)
    return (1 - p.weight) * p.z_pos - alpha * p.weight * (p.z_neg - along * p.z_pos)


def project(p: Parts, alpha: float) -> Tensor:
    """Takes out of Z+ its component along Z-, up to all of it, and nothing else."""
    along = _dot(p.z_pos, p.z_neg) / _dot(p.z_neg, p.z_neg).clamp_min(1e-12)
    return p.z_pos - (alpha * p.weight).clamp_max(1.0) * along.clamp_min(0.0) * p.z_neg


CANDIDATES: dict[str, Candidate] = {
    f.__name__: f
    for f in (
        *(vsf, norm_limit, norm_kept, blend, cap, saturate, power, relative, instead, gate, louder_positive),
        *(undiminished, balance, difference, orthogonal, project),
    )
}


def _norm(z: Tensor, order: int, whole: bool) -> Tensor:
    """Over channels, and over heads too if ``whole``."""
    return torch.linalg.vector_norm(z, order, dim=(1, 3) if whole else 3, keepdim=True).clamp_min(1e-6)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _of_text(p: Parts) -> Tensor:
    """The negative's part in a token's attention to all text."""
    return p.weight / (p.weight + (1 - p.weight) * p.text).clamp_min(1e-12)
