"""The door: whatever a backend allows, a method gives the same; and it says in words which way it went."""

from dataclasses import replace

import pytest
import torch
from samples import BEFORE, backend_of, black_box, make, placed, relative, rows_of

from vsf_core import (
    NAG,
    NASA,
    ONG,
    VSF,
    AttentionBackend,
    Guidance,
    NegativeTerms,
    attend_cross,
    attend_joint,
    cross_attention_reference,
    joint_attention_reference,
    lse_attention,
    way_of,
)

METHODS = pytest.mark.parametrize(
    "method", [VSF(), NAG(0.25, 2.5), NASA(), ONG()], ids=lambda method: type(method).__name__
)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


def spied(with_lse):
    """A backend of both attentions, or of the black box alone; and the ways that were used, by their names."""
    used = set()

    def box(q, k, v, mask):
        used.add("row mask")
        return black_box(q, k, v, mask)

    def lse(q, k, v, softmax_scale):
        used.add("log-sum-exp merge")
        return lse_attention(q.device, q.dtype, q.shape[-1])(q, k, v, softmax_scale)

    return AttentionBackend(box, lse if with_lse else None), used


def terms(columns=7, image=1):
    g = torch.Generator().manual_seed(5)
    beta = torch.rand(2, image, columns, generator=g)
    return NegativeTerms(torch.rand(2, 1, 1, generator=g).expand(2, 7, 1) + 1, beta, PADDING)


@METHODS
@BEFORE
@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_joint(method, before, columns, with_mask, with_lse):
    """A mask of zeros takes the other way, to the same result."""
    layout, (backend, used) = placed(50, 11, 7, before), spied(with_lse)
    q, k, v = make(layout, batch=2, spread=6.0)
    negative = terms(columns, image=50)
    mask = torch.zeros(1, 1, 1, layout.length) if with_mask else None
    mass = torch.zeros(2, 50) if method.records else None
    result = attend_joint(method, backend, q, k, v, layout, negative, mask, mass)
    assert used == {"log-sum-exp merge" if with_lse and not with_mask else "row mask"}
    assert way_of(method, backend, mask).startswith(used.pop())
    assert relative(result, attend_joint(method, AttentionBackend(black_box), q, k, v, layout, negative)) < 1e-5
    if method.records:
        expected = joint_attention_reference(q, k, v, layout, negative.alpha, negative.beta, PADDING)
        assert relative(result, expected) < 1e-5
        assert (mass > 0).all() and (mass < 1).all()


@METHODS
@BEFORE
@pytest.mark.parametrize("with_lse", [False, True])
def test_where_the_image_does_not_see_the_negative(method, before, with_lse):
    layout, negative = placed(50, 11, 7, before), terms()
    q, k, v = make(layout, batch=2, spread=6.0)
    unseen = NegativeTerms(negative.alpha, None, PADDING)
    infinite = NegativeTerms(negative.alpha, torch.full((1, 1, 1), torch.inf), PADDING)
    result = attend_joint(method, spied(with_lse)[0], q, k, v, layout, unseen)
    assert relative(result, attend_joint(method, spied(with_lse)[0], q, k, v, layout, infinite)) < 1e-6
    main = rows_of(layout, "PI")
    assert relative(result[:, :, main], black_box(q[:, :, main], k[:, :, main], v[:, :, main], None)) < 1e-6


@METHODS
@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_cross(method, columns, with_mask, with_lse):
    layout, (backend, used), negative = placed(50, 11, 7, 0), spied(with_lse), terms(columns, image=50)
    q, k, v = make(layout, batch=2, spread=6.0)
    given = q[:, :, 18:], k[:, :, 7:18], v[:, :, 7:18], k[:, :, :7], v[:, :, :7]
    mask = torch.zeros(1, 1, 1, 11) if with_mask else None
    result = attend_cross(method, backend, *given, negative, mask)
    way = way_of(method, backend, mask, cross=True)
    assert relative(result, attend_cross(method, AttentionBackend(black_box), *given, negative)) < 1e-5
    if method.records:
        assert way.startswith(used.pop()) and not used
        beta = negative.beta.masked_fill(PADDING[:, None], torch.inf)
        assert relative(result, cross_attention_reference(*given, negative.alpha, beta)) < 1e-5
    else:
        assert way == "two cross-attentions" and used == {"row mask"}
    plain = attend_cross(method, backend, *given, NegativeTerms(negative.alpha, None, PADDING), mask)
    assert relative(plain, black_box(*given[:3], None)) < 1e-6


@pytest.mark.parametrize("with_lse", [False, True])
def test_guidance_takes_the_lowest_beta_and_the_first_alpha(with_lse):
    """exp(-beta) of the steering; tokens of the negative that are padding have +inf."""
    layout, method = placed(50, 11, 7, 0), NAG(0.25, 2.5)
    q, k, v = make(layout, batch=2, spread=6.0)
    image, mixed = rows_of(layout, "I"), torch.linspace(0, 2, 50).view(1, 50, 1).repeat(1, 1, 7)
    mixed[..., 2:] = torch.inf
    mixed[..., 0] += 1.0

    def made(alpha, beta):
        negative = NegativeTerms(torch.tensor(alpha).view(1, -1, 1), beta, None)
        return attend_joint(method, spied(with_lse)[0], q, k, v, layout, negative)[:, :, image]

    full, none = made([3.0], torch.zeros(1, 1, 1)), made([3.0], None)
    expected = none + torch.exp(-torch.linspace(0, 2, 50))[:, None] * (full - none)
    assert relative(made([3.0, *[9.0] * 6], mixed), expected) < 1e-5


def test_ways_by_name():
    lse = lse_attention(torch.device("cpu"), torch.float32, 64)
    assert way_of(VSF(), AttentionBackend(black_box, lse)) == f"log-sum-exp merge ({lse.__name__})"
    assert way_of(NASA(), AttentionBackend(black_box, name="split")) == "row mask (split)"
    for way, words in (("fused", "fused kernel"), ("reference", "reference"), ("mask", "row mask (black box)")):
        assert way_of(VSF(), backend_of(way, torch.zeros(1, 1, 1, 64))) == words


def test_the_first_way_that_can_be_had():
    lse, kernel = (backend_of(way, torch.zeros(1, 1, 1, 64)) for way in ("merge", "fused"))
    row, square = torch.zeros(2, 1, 1, 9), torch.zeros(2, 1, 9, 9)
    every = AttentionBackend(black_box, lse.lse, fused=kernel.fused)
    assert [every.way(mask) for mask in (None, row, square)] == ["fused", "fused", "mask"]
    assert [replace(every, fused=None).way(mask) for mask in (None, row, square)] == ["merge", "mask", "mask"]
    assert [replace(every, forced="reference").way(mask) for mask in (None, square)] == ["reference", "reference"]
    for way, mask in (("fused", square), ("merge", row)):
        with pytest.raises(ValueError, match=f"the way '{way}', which was asked for, takes no mask"):
            replace(every, forced=way).way(mask)
    with pytest.raises(ValueError, match="the way 'fused', which was asked for, is not to be had here"):
        AttentionBackend(black_box, forced="fused").way(None)


@pytest.mark.parametrize("method", [NAG(0.25, 2.5), NASA(), ONG()])
def test_guidance_has_no_attention_mass(method):
    layout = placed(50, 11, 7, 0)
    q, k, v = make(layout, batch=2)
    with pytest.raises(ValueError, match=f"^{type(method).__name__} has no one softmax"):
        attend_joint(method, AttentionBackend(black_box), q, k, v, layout, terms(), None, torch.zeros(2, 50))


@METHODS
def test_a_method_takes_its_numbers_to_a_device(method):
    z_pos, step = torch.randn(2, 1, 2, 5, 8).unbind()
    moved = method.on(torch.device("cpu"))
    assert type(moved) is type(method)
    assert all(isinstance(number, torch.Tensor) for number in vars(moved).values())
    if isinstance(method, Guidance):
        phi, presence = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5)
        for now, before in zip(moved(z_pos, step, phi, presence), method(z_pos, step, phi, presence), strict=True):
            torch.testing.assert_close(now, before)
