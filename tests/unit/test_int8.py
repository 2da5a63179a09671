"""An attention that rounds values on one scale a channel, and what times -alpha does to it."""

import pytest
import torch
from hosting.int8 import int8_attention
from samples import backend_of, make

from vsf_core import (
    NAG,
    VSF,
    AttentionBackend,
    NegativeTerms,
    TokenLayout,
    attend_cross,
    attend_joint,
    cross_attention_reference,
    joint_attention_reference,
)

ALPHAS = (1.0, 3.3, 8.0)


def error(result, expected):
    """Root mean square, relative."""
    return ((result.double() - expected).norm() / expected.norm()).item()


def joint(coarse, alpha, per_token=False, masked=False):
    """The error of the image's tokens, and that of the plain attention of all tokens."""
    layout = TokenLayout(512, 77, 16)
    q, k, v = make(layout, heads=4, spread=8.0)
    image, n = layout.span("I"), layout.span("N")
    v[:, :, layout.length - layout.image - 93 : layout.length - layout.image] *= 3.0  # text values are longer
    beta = torch.full((1, 1, 1), 0.2)
    if masked:
        beta = torch.linspace(0, 2, layout.image).view(1, -1, 1) + torch.zeros(1, 1, layout.negative)
    alphas = torch.full((1, layout.negative if per_token else 1, 1), alpha)
    if per_token:
        alphas[:, ::2] *= -0.5
    terms = NegativeTerms(alphas, beta)
    mass = torch.zeros(1, layout.image)
    result = attend_joint(VSF(), AttentionBackend(int8_attention, coarse=coarse), q, k, v, layout, terms, None, mass)
    doubles = (t.double() for t in (q, k, v))
    expected = joint_attention_reference(*doubles, layout, terms.alpha.double(), terms.beta.double())
    assert n == slice(0, 16)
    plain = error(int8_attention(q, k, v), backend_of("reference", q).black_box(*(t.double() for t in (q, k, v)), None))
    return error(result[:, :, image], expected[:, :, image]), plain


@pytest.mark.parametrize("masked", [False, True], ids=["one offset", "a mask"])
@pytest.mark.parametrize("per_token", [False, True], ids=["one alpha", "several"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_negative_in_a_call_of_its_own(alpha, per_token, masked):
    """No coarser than the attention is by itself; in one call with the others it is, from alpha 3.3 on."""
    apart, plain = joint(True, alpha, per_token, masked)
    assert apart < 1.1 * plain
    if alpha > 3 and not (per_token or masked):
        assert joint(False, alpha)[0] > 1.2 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("varies", [False, True])
def test_cross_attention(dtype, varies):
    g = torch.Generator().manual_seed(0)
    q, k, v, k_neg, v_neg = (torch.randn(2, 3, n, 64, generator=g).to(dtype) for n in (70, 40, 40, 9, 9))
    alpha, beta = torch.full((1, 9, 1), 8.0), torch.full((1, 70 if varies else 1, 1), 0.2)
    alpha[:, 3:] = -2.0
    exact = [t.double() for t in (q, k, v, k_neg, v_neg)]
    expected = cross_attention_reference(*exact, alpha.double(), beta.double())
    terms = NegativeTerms(alpha, beta)
    backend = AttentionBackend(backend_of("mask", q).black_box, coarse=True)  # that rounds nothing: the same sums
    result = attend_cross(VSF(), backend, q, k, v, k_neg, v_neg, terms)
    assert result.dtype == dtype and error(result, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    backend = AttentionBackend(int8_attention, coarse=True)
    assert error(attend_cross(VSF(), backend, q, k, v, k_neg, v_neg, terms), expected) < 0.05


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("way", ["fused", "merge", "mask", "reference"])
@pytest.mark.parametrize("method", [VSF(), NAG(0.5, 2.5)], ids=["vsf", "nag"])
def test_fewer_heads_of_keys_are_refused(way, cross, method):
    """Grouped-query attention: kernels of PyTorch's take such keys for others, without a word."""
    layout = TokenLayout(20, 6, 3)
    q, k, v = make(layout, heads=4)
    terms = NegativeTerms(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 0.2))
    backend = AttentionBackend(None, fused=object(), forced=way) if way == "fused" else backend_of(way, q)
    with pytest.raises(ValueError, match="queries of 4 heads and keys or values of 2: repeat the latter"):
        if cross:
            attend_cross(method, backend, q, k[:, :2], v[:, :2], k[:, :2, :3], v[:, :2, :3], terms)
        else:
            attend_joint(method, backend, q, k[:, :2], v[:, :2], layout, terms)
