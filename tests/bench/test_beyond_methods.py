"""The candidates: VSF among them is VSF, each turns into it (or into no negative) where its numbers say so."""

import math

import pytest
import torch
import torch.nn.functional as F
from beyond_methods import CANDIDATES, parts_of, vsf

from vsf_core import TokenLayout, joint_attention_reference

OWN = {
    "norm_limit": {"tau": 1.0},
    "blend": {"share": 0.5},
    "cap": {"most": 0.05},
    "saturate": {"most": 0.1},
    "power": {"exponent": 0.5},
    "gate": {"least": 0.3},
    "louder_positive": {"factor": 1.5},
}
"""Numbers at which a candidate is itself."""
IS_VSF = {
    "norm_limit": {"tau": 1e6},
    "cap": {"most": 1.0},
    "saturate": {"most": 1e6},
    "power": {"exponent": 0.0},
    "gate": {"least": 0.0},
    "louder_positive": {"factor": 1.0},
}
LAYOUT = TokenLayout(40, 9, 5)


def attend(q, k, v):
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.fixture
def qkv():
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, LAYOUT.length, 16, generator=g, dtype=torch.float64) for _ in range(3))


@pytest.fixture
def parts(qkv):
    q, k, v = qkv
    q = q[:, :, LAYOUT.span("I")]

    def over(columns):
        return attend(q, k[:, :, columns], v[:, :, columns])

    z_neg, lse_neg = over(LAYOUT.span("N"))
    return parts_of(*over(slice(5, None)), z_neg, lse_neg - 0.2, *over(LAYOUT.span("P")))


def test_vsf_is_the_papers(qkv, parts):
    setting = torch.full((1, 1, 1), 3.3).double(), torch.full((1, 1, 1), 0.2).double()
    expected = joint_attention_reference(*qkv, LAYOUT, *setting)[:, :, LAYOUT.span("I")]
    assert torch.allclose(vsf(parts, 3.3), expected)


def test_parts_are_what_they_say(qkv, parts):
    q, k, v = qkv
    alone = F.scaled_dot_product_attention(q[:, :, 14:], k[:, :, 14:], v[:, :, 14:])
    assert torch.allclose((1 - parts.text) * alone + parts.text * parts.z_text, parts.z_pos)


@pytest.mark.parametrize("name", IS_VSF)
def test_each_is_vsf_at_the_end_of_its_range(parts, name):
    assert torch.allclose(CANDIDATES[name](parts, 3.3, **IS_VSF[name]), vsf(parts, 3.3), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "vsf"])
def test_each_is_something_else_and_grows_with_alpha(parts, name):
    def made(alpha):
        return CANDIDATES[name](parts, alpha, **OWN.get(name, {}))

    assert torch.isfinite(made(8.0)).all()
    assert not torch.allclose(made(8.0), vsf(parts, 8.0), atol=1e-3)
    gentle, hard = ((made(alpha) - made(0.0)).norm() for alpha in (0.5, 8.0))
    assert 0 < gentle < hard


def test_norms(parts):
    length = parts.z_pos.norm(dim=-1)
    assert torch.allclose(CANDIDATES["norm_kept"](parts, 8.0).norm(dim=-1), length)
    limited = CANDIDATES["norm_limit"](parts, 8.0, tau=1.2, order=2).norm(dim=-1)
    assert (limited <= 1.2 * length * (1 + 1e-9)).all()
    assert math.isclose((limited / length).max(), 1.2)
    whole = CANDIDATES["norm_limit"](parts, 8.0, tau=1.2, order=1, whole=True).abs().sum((1, 3))
    assert math.isclose((whole / parts.z_pos.abs().sum((1, 3))).max(), 1.2)


def test_balance_keeps_what_both_share(parts):
    """Where Z- is Z+ nothing is pushed away."""
    z, lse = parts.z_pos, torch.zeros_like(parts.weight[..., 0])
    same = parts_of(z, lse, z, lse, z, lse)
    assert torch.allclose(CANDIDATES["balance"](same, 5.0), z)
    across = CANDIDATES["orthogonal"](parts, 5.0) - (1 - parts.weight) * parts.z_pos
    assert (across * parts.z_pos).sum(-1).abs().max() < 1e-9


def test_projection_never_turns_round(parts):
    left = CANDIDATES["project"](parts, 1e6)
    along = (left * parts.z_neg).sum(-1)
    before = (parts.z_pos * parts.z_neg).sum(-1)
    assert along[before > 0].abs().max() < 1e-9
    assert torch.allclose(along[before <= 0], before[before <= 0])
