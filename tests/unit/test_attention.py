"""Every fast path against the dense oracle: odd shapes, dtypes, batches, extremes."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BEFORE, DTYPES, TOLERANCE, backend_of, make, on_device, placed, relative, rows_of

from vsf_core import (
    VSF,
    NegativeTerms,
    TokenLayout,
    attend_cross,
    attend_joint,
    beside_plain,
    cross_attention_reference,
    joint_attention_reference,
    joint_mask,
)


@on_device
def run_joint(path, q, k, v, layout, alpha, beta, padding=None, mask=None, mass=None):
    return attend_joint(VSF(), backend_of(path, q), q, k, v, layout, NegativeTerms(alpha, beta, padding), mask, mass)


@on_device
def run_cross(path, q, k, v, k_neg, v_neg, alpha, beta, mask=None, mass=None):
    return attend_cross(VSF(), backend_of(path, q), q, k, v, k_neg, v_neg, NegativeTerms(alpha, beta), mask, mass)


def oracle(q, k, v, layout, alpha, beta, padding=None):
    beta = torch.full((1, 1, 1), math.inf) if beta is None else beta
    return joint_attention_reference(*(t.double() for t in (q, k, v)), layout, alpha.double(), beta.double(), padding)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("before", [1, 5, 11])
def test_the_definition_does_not_depend_on_the_order(before, padded):
    layout, first = TokenLayout(50, 11, 7, before), TokenLayout(50, 11, 7)
    q, k, v = make(layout, batch=2, dtype=torch.float64, spread=6.0)
    alpha, beta = torch.linspace(-1, 4, 7).double().view(1, 7, 1), torch.linspace(-1, 4, 350).double().view(1, 50, 7)
    padding = torch.tensor([[False] * 5 + [True] * 2]) if padded else None
    order = [*rows_of(layout, "N"), *rows_of(layout, "PI")]
    expected = joint_attention_reference(*(t[:, :, order] for t in (q, k, v)), first, alpha, beta, padding)
    result = joint_attention_reference(q, k, v, layout, alpha, beta, padding)
    assert relative(result[:, :, order], expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [-20.0, 0.0, 0.3, 3.5, 20.0])
@pytest.mark.parametrize("beta", [-20.0, -0.6, 0.2, 60.0, 100.0])
def test_beside_plain_is_one_softmax_over_the_negative_as_it_is_and_flipped(alpha, beta, dtype):
    """Written out, with every key there: [P, N0, N1]. One of four tokens is hidden, and stays so."""
    g = torch.Generator().manual_seed(0)
    q, p, n = (torch.randn(count, 16, generator=g, dtype=torch.float64) * 3 for count in (9, 5, 4))
    vp, vn = (torch.randn(count, 16, generator=g, dtype=torch.float64) for count in (5, 4))
    alphas = torch.tensor([alpha, alpha / 2, 0.0, alpha], dtype=torch.float64)
    betas = torch.tensor([beta, beta, beta, math.inf], dtype=torch.float64)
    hidden = torch.where(torch.isinf(betas), betas, 0.0)
    weights = torch.cat([q @ p.T / 4, q @ n.T / 4 - hidden, q @ n.T / 4 - betas], dim=1).softmax(dim=1)
    expected = weights @ torch.cat([vp, vn, -alphas[:, None] * vn])

    new_alpha, new_beta = beside_plain(alphas.to(dtype)[None, :, None], betas.to(dtype)[None, None])
    assert new_alpha.shape == (1, 4, 1) and new_beta.shape == (1, 1, 4) and new_beta[0, 0, 3] == math.inf
    one = [t[None, None] for t in (q, p, vp, n, vn)]
    result = cross_attention_reference(*one, new_alpha.double(), new_beta.double())
    assert relative(result[0, 0], expected) < (1e-12 if dtype == torch.float64 else 3e-6)


def test_beside_plain_takes_one_beta_for_all_tokens():
    alpha, beta = torch.tensor([[[3.5], [6.0]]]), torch.zeros(1, 1, 1)
    new_alpha, new_beta = beside_plain(alpha, beta)
    assert new_alpha.flatten().tolist() == [1.25, 2.5]
    torch.testing.assert_close(new_beta, torch.full((1, 1, 1), -math.log(2)))


PATHS = pytest.mark.parametrize("path", ["merge", "mask", "fused", "reference"])


@pytest.mark.parametrize("path", ["merge", "mask", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@BEFORE
@pytest.mark.parametrize(
    ("image", "positive", "negative", "batch", "heads", "dim"),
    [
        (63, 17, 1, 1, 2, 64),
        (49, 0, 5, 2, 3, 80),
        (130, 77, 77, 1, 1, 128),
        (1, 1, 1, 4, 2, 64),
        (257, 3, 40, 3, 2, 128),
    ],
)
def test_shapes(path, dtype, before, image, positive, negative, batch, heads, dim):
    layout = placed(image, positive, negative, before)
    q, k, v = make(layout, batch=batch, heads=heads, dim=dim, dtype=DTYPES[dtype], spread=4.0)
    alpha, beta = torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)
    expected = oracle(q, k, v, layout, alpha, beta)
    assert relative(run_joint(path, q, k, v, layout, alpha, beta), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("image", "positive", "negative", "before", "batch", "dim"),
    [
        (63, 17, 1, 0.0, 2, 64),
        (49, 0, 5, 0.0, 2, 80),
        (33, 130, 77, 0.5, 1, 128),
        (1, 1, 1, 1.0, 2, 40),
        (20, 3, 40, 0.0, 1, 256),
        (9, 9, 300, 0.5, 1, 16),
        (65, 1, 64, 1.0, 1, 100),
    ],
)
def test_shapes_in_one_launch(dtype, image, positive, negative, before, batch, dim):
    """The same, as small as Triton's interpreter likes it: 1 to 300 tokens, head dimensions from 16 to 256."""
    layout = placed(image, positive, negative, before)
    q, k, v = make(layout, batch=batch, heads=3 - batch, dim=dim, dtype=DTYPES[dtype], spread=4.0)
    alpha, beta = torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)
    expected = oracle(q, k, v, layout, alpha, beta)
    result = run_joint("fused", q, k, v, layout, alpha, beta)
    assert relative(result, expected) < TOLERANCE[dtype]
    assert result.transpose(1, 2).is_contiguous() and result.dtype == q.dtype


def test_one_launch_reads_inputs_as_they_lie():
    """Parts of one tensor, heads after tokens or before, of stride 0 over the batch; the last dimension not in one
    piece, too."""
    layout = TokenLayout(50, 11, 7, 4)
    alpha, beta = torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)
    qkv = torch.randn(2, layout.length, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    views = [t.transpose(1, 2) for t in qkv.unbind(2)]
    expanded, turned = [t[:1].expand(2, -1, -1, -1) for t in views], [t.mT.contiguous().mT for t in views]
    for q, k, v in (views, expanded, turned, [t.contiguous() for t in views]):
        expected = oracle(q, k, v, layout, alpha, beta)
        assert relative(run_joint("fused", q, k, v, layout, alpha, beta), expected) < 1e-5


@pytest.mark.parametrize("path", ["merge", "mask", "fused", "reference", "definition"])
@BEFORE
@pytest.mark.parametrize("padded", [False, True])
def test_cached_keys(path, before, padded):
    """Keys of the image without queries (cached references): all that has a query is as if they had some, too."""
    layout, cached = placed(50, 11, 7, before), 20
    whole, part = replace(layout, image=70), replace(layout, cached=cached)
    q, k, v = make(whole, batch=2, spread=6.0)
    alpha, beta = torch.linspace(-1, 4, 7).view(1, 7, 1), torch.linspace(-1, 4, 490).view(1, 70, 7)
    padding = torch.tensor([[False] * 5 + [True] * 2]) if padded else None
    run = joint_attention_reference if path == "definition" else partial(run_joint, path)
    expected = run(q, k, v, whole, alpha, beta, padding)[:, :, :-cached]
    result = run(q[:, :, :-cached], k, v, part, alpha, beta[:, :-cached], padding)
    assert relative(result, expected) < 1e-6
    blind = run(*(t[:, :, :-cached] for t in (q, k, v)), layout, alpha, beta[:, :-cached], padding)
    assert relative(result, blind) > 1e-3


@pytest.mark.parametrize(
    ("path", "alpha"),
    [(way, alpha) for way in ("merge", "mask", "reference") for alpha in (-10.0, -1.0, 0.0, 1.5, 10.0)]
    + [("fused", -10.0), ("fused", 1.5)],
)
@pytest.mark.parametrize("beta", [-0.6, 0.0, 0.2, 10.0, 60.0, math.inf])
@pytest.mark.parametrize("spread", [0.0, 5.0, 50.0])
def test_extremes(path, alpha, beta, spread):
    layout = TokenLayout(61, 13, 9)
    q, k, v = make(layout, heads=1 if path == "fused" else 2, spread=spread)
    alpha, beta = torch.full((1, 1, 1), alpha), torch.full((1, 1, 1), beta)
    result = run_joint(path, q, k, v, layout, alpha, beta)
    assert torch.isfinite(result).all()
    assert relative(result, oracle(q, k, v, layout, alpha, beta)) < 1e-5


@PATHS
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_alpha_times_a_value_beyond_fp16(path, cross, tokens):
    """The product is not in the result: with a share of 1 - W it fits."""
    layout = TokenLayout(61, 13, 9)
    q, k, v = make(layout, dtype=torch.float16, spread=4.0)
    v, i, n, p = v * 1000, layout.span("I"), layout.span("N"), layout.span("P")
    alpha, beta = torch.linspace(-20, 20, tokens).view(1, tokens, 1), torch.full((1, 1, 1), 3.0)
    alpha[:, :1] = 20.0
    assert (20 * v.double()).abs().max() > 65504
    if cross:
        given = q[:, :, i], k[:, :, p], v[:, :, p], k[:, :, n], v[:, :, n]
        expected = cross_attention_reference(*(t.double() for t in (*given, alpha, beta)))
        result = run_cross(path, *given, alpha, beta)
    else:
        expected, result = oracle(q, k, v, layout, alpha, beta), run_joint(path, q, k, v, layout, alpha, beta)
    assert relative(result, expected) < TOLERANCE["fp16"]


@PATHS
@pytest.mark.parametrize("beta", [-0.6, 60.0])
def test_logits_whose_exponential_overflows(path, beta):
    """A beta per token, at logits whose exp fp32 cannot hold."""
    layout = TokenLayout(61, 13, 9)
    q, k, v = make(layout, batch=2, spread=150.0)
    alphas, beta = torch.full((1, 1, 1), 3.3), torch.full((1, 1, 9), beta)
    assert relative(run_joint(path, q, k, v, layout, alphas, beta), oracle(q, k, v, layout, alphas, beta)) < 1e-4


@PATHS
@BEFORE
@pytest.mark.parametrize("where", ["token", "image", "both", "batch"])
def test_beta_and_alpha_per_token(path, before, where):
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, batch=3, spread=6.0)
    g = torch.Generator().manual_seed(1)
    shape = {"token": (1, 1, 7), "image": (1, 50, 1), "both": (3, 50, 7), "batch": (3, 1, 1)}[where]
    beta = torch.randn(shape, generator=g)
    beta.view(-1)[0] = math.inf
    alpha = torch.rand(3, 7, 1, generator=g) * 4
    expected = oracle(q, k, v, layout, alpha, beta)
    assert relative(run_joint(path, q, k, v, layout, alpha, beta), expected) < 1e-5


@PATHS
@BEFORE
def test_batch_in_which_some_entries_have_no_negative(path, before):
    """Padding is +inf for the image and masked from N0; an entry that is all padding equals plain attention."""
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, batch=3, spread=6.0)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [True] * 7])
    beta = torch.full((3, 1, 1), 0.2)
    alpha = torch.full((3, 7, 1), 3.3)
    result = run_joint(path, q, k, v, layout, alpha, beta, padding)
    assert torch.isfinite(result).all()
    assert relative(result, oracle(q, k, v, layout, alpha, beta, padding)) < 1e-5
    # entry 1 alone, its padding removed, gives the same image and the same four negative tokens
    alone = TokenLayout(50, 11, 4, layout.before)
    keep = [at for at in range(layout.length) if at not in rows_of(layout, "N")[4:]]
    qs, ks, vs = (t[1:2, :, keep] for t in (q, k, v))
    single = run_joint(path, qs, ks, vs, alone, alpha[1:2, :4], beta[1:2])
    assert relative(result[1:2, :, keep], single) < 1e-5
    # entry 2 is the model's own attention
    main = rows_of(layout, "PI")
    plain = F.scaled_dot_product_attention(q[2:, :, main], k[2:, :, main], v[2:, :, main])
    assert relative(result[2:, :, main], plain) < 1e-6


@PATHS
@BEFORE
def test_block_that_is_not_selected(path, before):
    """beta None: the image's rows are plain attention whatever N is, while N0 goes on attending to [I, N0]."""
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, spread=6.0)
    result = run_joint(path, q, k, v, layout, torch.ones(1, 1, 1), None)
    assert relative(result, oracle(q, k, v, layout, torch.ones(1, 1, 1), None)) < 1e-5
    k2, v2 = k.clone(), v.clone()
    k2[:, :, layout.span("N")] += 1
    v2[:, :, layout.span("N")] -= 1
    other = run_joint(path, q, k2, v2, layout, torch.ones(1, 1, 1), None)
    assert torch.equal(other[:, :, layout.span("I")], result[:, :, layout.span("I")])
    assert not torch.equal(other[:, :, layout.span("N")], result[:, :, layout.span("N")])


@PATHS
@BEFORE
@pytest.mark.parametrize("group", ["P", "N"])
def test_isolation(path, before, group):
    """P never depends on N; N0 never depends on P (Listing 1's mask)."""
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, spread=6.0)
    own, other = rows_of(layout, group), rows_of(layout, {"P": "N", "N": "P"}[group])
    first = run_joint(path, q, k, v, layout, torch.full((1, 1, 1), 3.3), torch.zeros(1, 1, 1))
    for t in (q, k, v):
        t[:, :, other] += 1.0
    then = run_joint(path, q, k, v, layout, torch.full((1, 1, 1), 3.3), torch.zeros(1, 1, 1))
    assert relative(then[:, :, own], first[:, :, own]) < 1e-6
    assert relative(then[:, :, layout.span("I")], first[:, :, layout.span("I")]) > 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("spread", [1.0, 10.0, 50.0])
@pytest.mark.parametrize("alpha", [-5.0, 3.3, 10.0])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per-token"])
def test_half_precision_is_no_further_from_fp64_than_twice_the_dense_path(dtype, spread, alpha, uniform):
    layout = TokenLayout(200, 40, 16)
    dense_worst = merge_worst = 0.0
    for seed in range(4):
        q, k, v = make(layout, dtype=DTYPES[dtype], spread=spread, seed=seed)
        alphas = torch.full((1, 1, 1), alpha)
        beta = torch.full((1, 1, 1 if uniform else 16), 0.2)
        expected = oracle(q, k, v, layout, alphas, beta)
        dense_worst = max(dense_worst, relative(joint_attention_reference(q, k, v, layout, alphas, beta), expected))
        merge_worst = max(merge_worst, relative(run_joint("merge", q, k, v, layout, alphas, beta), expected))
    assert merge_worst <= 2 * dense_worst


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("image", "positive", "negative", "batch"), [(1, 1, 1, 1), (133, 64, 9, 2), (40, 300, 77, 1)])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("path", ["merge", "mask", "fused", "reference"])
def test_cross_attention(path, dtype, image, positive, negative, batch, per_token):
    g = torch.Generator().manual_seed(0)
    q, k, v, kn, vn = (
        torch.randn(batch, 2, length, 64, generator=g).to(DTYPES[dtype])
        for length in (image, positive, positive, negative, negative)
    )
    alpha = torch.rand(batch, negative, 1, generator=g) * 4
    beta = torch.rand(batch, 1, negative if per_token else 1, generator=g)
    double = (t.double() for t in (q, k, v, kn, vn, alpha, beta))
    result = run_cross(path, q, k, v, kn, vn, alpha, beta)
    assert relative(result, cross_attention_reference(*double)) < TOLERANCE[dtype]


@pytest.mark.parametrize("path", ["mask", "fused", "reference"])
def test_cross_attention_with_padding_of_the_positive(path):
    """A mask over the positive keys: as if those it hides were not there."""
    g = torch.Generator().manual_seed(0)
    q, k, v, kn, vn = (torch.randn(2, 2, n, 64, generator=g) for n in (30, 12, 12, 5, 5))
    alpha = torch.rand(2, 5, 1, generator=g) * 4
    mask = torch.zeros(2, 1, 1, 12)
    mask[0, ..., 7:], mask[1, ..., 9:] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min

    for rows, columns in ((1, 1), (1, 5), (30, 5)):
        beta = torch.rand(2, rows, columns, generator=g)
        for mass in (None, torch.zeros(2, 30)):
            result = run_cross(path, q, k, v, kn, vn, alpha, beta, mask, mass)
            for i, kept in enumerate((7, 9)):
                one = slice(i, i + 1)
                left = (k[one, :, :kept], v[one, :, :kept], kn[one], vn[one], alpha[one], beta[one])
                assert relative(result[one], cross_attention_reference(q[one], *left)) < 1e-5


def test_appendix_b_identity():
    """W Z+ - alpha (1 - W) Z- with the paper's W is Eq. 9's single softmax."""
    g = torch.Generator().manual_seed(0)
    q, k, v, kn, vn = (torch.randn(1, 2, n, 64, generator=g, dtype=torch.float64) for n in (30, 12, 12, 5, 5))
    a_pos, a_neg = (torch.exp(q @ t.transpose(-1, -2) / 8.0) for t in (k, kn))
    w = a_pos.sum(-1, keepdim=True) / (a_pos.sum(-1, keepdim=True) + a_neg.sum(-1, keepdim=True))
    z_pos = a_pos / a_pos.sum(-1, keepdim=True) @ v
    z_neg = a_neg / a_neg.sum(-1, keepdim=True) @ vn
    by_hand = w * z_pos - 3.3 * (1 - w) * z_neg
    alpha, beta = torch.full((1, 1, 1), 3.3, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    assert relative(cross_attention_reference(q, k, v, kn, vn, alpha, beta), by_hand) < 1e-12


@BEFORE
def test_rows_are_chunked(monkeypatch, before):
    """Many small chunks give the result of one, for a beta per image token too."""
    layout = placed(101, 11, 7, before)
    q, k, v = make(layout, batch=2, spread=6.0)
    beta = torch.rand(1, 101, 7)
    for path in ("merge", "mask"):
        whole = run_joint(path, q, k, v, layout, torch.ones(1, 1, 1), beta)
        with monkeypatch.context() as m:
            m.setattr("vsf_core.attention.SLIVER_BYTES", {"cpu": 2 * 2 * 64 * 4 * 10})
            assert relative(run_joint(path, q, k, v, layout, torch.ones(1, 1, 1), beta), whole) < 1e-6


@BEFORE
@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize(
    ("path", "rows"), [("mask", 1), ("mask", 68), ("fused", 1), ("reference", 1), ("reference", 68)]
)
def test_a_mask_of_the_callers_own(path, before, columns, rows):
    """The caller's own mask, [B, 1, 1, L] or [B, 1, L, L], adds to VSF's and to that of padding."""
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, batch=2, spread=6.0)
    g = torch.Generator().manual_seed(3)
    mask, n = torch.randn(2, 1, rows, layout.length, generator=g), layout.span("N")
    alpha, beta = torch.full((1, 1, 1), 3.3), torch.rand(2, 1, columns, generator=g)
    padding = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
    mass, plain_mass = torch.zeros(2, 50), torch.zeros(2, 50)
    result = run_joint(path, q, k, v, layout, alpha, beta, padding, mask, mass)
    dense = joint_mask(layout, beta, padding) + torch.cat((mask, mask[..., n]), -1)
    keys, values = torch.cat((k, k[:, :, n]), 2), torch.cat((v, -3.3 * v[:, :, n]), 2)
    assert relative(result, F.scaled_dot_product_attention(q, keys, values, attn_mask=dense)) < 1e-5
    weights = (q @ keys.mT / 8 + dense).softmax(-1)
    assert relative(mass, weights[:, :, layout.span("I"), layout.length :].sum(-1).mean(1)) < 1e-5
    run_joint(path, q, k, v, layout, alpha, beta, padding, None, plain_mass)
    assert relative(plain_mass, mass) > 1e-2


@pytest.mark.parametrize("path", ["mask", "fused", "reference"])
@BEFORE
def test_a_key_mask(path, before):
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, spread=6.0)
    gone = [rows_of(layout, "P")[at] for at in (0, -1)]
    keep = [j for j in range(layout.length) if j not in gone]
    key_mask = torch.zeros(1, 1, 1, layout.length)
    key_mask[..., gone] = -math.inf
    alpha, beta = torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)
    masked = run_joint(path, q, k, v, layout, alpha, beta, mask=key_mask)
    short = TokenLayout(50, 9, 7, sum(at not in gone for at in range(layout.before)))
    expected = joint_attention_reference(q[:, :, keep], k[:, :, keep], v[:, :, keep], short, alpha, beta)
    assert relative(masked[:, :, keep], expected) < 1e-5
    hidden = run_joint(path, q, k, v, layout, alpha, None, mask=key_mask)
    plain = oracle(q[:, :, keep], k[:, :, keep], v[:, :, keep], short, alpha, None)
    assert relative(hidden[:, :, keep], plain) < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    image=st.integers(1, 40),
    positive=st.integers(0, 20),
    negative=st.integers(1, 12),
    batch=st.integers(1, 3),
    before=st.floats(0, 1),
    dim=st.sampled_from([8, 24, 64, 100]),
)
def test_random_layouts(data, image, positive, negative, batch, before, dim):
    layout = placed(image, positive, negative, before)
    q, k, v = make(layout, batch=batch, dim=dim, spread=data.draw(st.floats(0, 50)), seed=data.draw(st.integers(0, 99)))
    one = st.booleans()
    shape = (batch, image if data.draw(one) else 1, negative if data.draw(one) else 1)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    beta = torch.randn(shape, generator=g) * 5
    beta[torch.rand(shape, generator=g) < 0.2] = math.inf
    alpha = torch.randn(batch, negative, 1, generator=g) * 5
    padding = torch.rand(batch, negative, generator=g) < 0.3 if data.draw(one) else None
    expected = oracle(q, k, v, layout, alpha, beta, padding)
    for path in ("merge", "mask", *(["fused"] if data.draw(st.integers(0, 15)) == 0 else [])):
        result = run_joint(path, q, k, v, layout, alpha, beta, padding)
        if padding is not None:  # rows of padding are nobody's business
            n = layout.span("N")
            result[:, :, n] = result[:, :, n].masked_fill(padding[:, None, :, None], 0)
            expected[:, :, n] = expected[:, :, n].masked_fill(padding[:, None, :, None], 0)
        assert relative(result, expected) < 1e-5


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -1, 1), (1, 1, -1), (1, 1, 1, -1), (1, 3, 1, 4)])
def test_layout_refuses_nonsense(sizes):
    with pytest.raises(ValueError, match="at least one image token, no negative lengths and before <= positive"):
        TokenLayout(*sizes)


@settings(deadline=None)
@given(image=st.integers(1, 5), positive=st.integers(0, 5), negative=st.integers(0, 5), before=st.floats(0, 1))
def test_layout(image, positive, negative, before):
    """By the letter: what is taken are the tokens of the groups, in order, of views where that is one piece."""
    layout = placed(image, positive, negative, before)
    x = torch.arange(layout.length)[None, None, :, None]
    for groups in ("I", "P", "N", "PI", "NI", "PNI"):
        taken, rows = layout.take(groups, x), rows_of(layout, groups)
        assert taken.flatten().tolist() == rows
        spans = layout.spans(groups)
        assert [at for s in spans for at in range(s.start, s.stop)] == rows and all(s.stop > s.start for s in spans)
        one_piece = not rows or rows[-1] - rows[0] == len(rows) - 1
        assert len(spans) <= 1 if one_piece else len(spans) == 2
        assert not one_piece or taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(layout.take(groups, x.mT, dim=3), taken.mT)
    assert [*range(layout.length)][layout.span("N")] == rows_of(layout, "N")
    if len(layout.spans("P")) == 2:
        with pytest.raises(ValueError, match="on both sides of the negative"):
            layout.span("P")


def test_probe_refuses_a_wrong_log_sum_exp(monkeypatch):
    from vsf_core import backends

    def base_two(q, k, v, softmax_scale):
        z, lse = backends.cpu_flash(q, k, v, softmax_scale)
        return z, lse / math.log(2)

    monkeypatch.setitem(backends.CANDIDATES, "cpu", (base_two,))
    backends.lse_attention.cache_clear()
    try:
        assert backends.lse_attention(torch.device("cpu"), torch.float32, 64) is None
    finally:
        backends.lse_attention.cache_clear()


@pytest.mark.parametrize("path", ["merge", "fused"])
def test_out_of_memory_is_not_remembered(monkeypatch, path):
    """The attempt that decides what a machine can do may meet a full one: it is made again, not given up for good."""
    from vsf_core import backends, fused

    kind, failing = (torch.device("cpu"), torch.float32, 64), [True]

    def fail_once(inner):
        def attend(*arguments):
            if failing.pop() if failing else False:
                raise torch.cuda.OutOfMemoryError("no memory")
            return inner(*arguments)

        return attend

    monkeypatch.setitem(backends.CANDIDATES, "cpu", (fail_once(backends.cpu_flash),))
    monkeypatch.setattr(fused, "_launch", fail_once(fused._launch))
    find = backends.lse_attention if path == "merge" else partial(backends.fused_attention, forced=True)
    backends.lse_attention.cache_clear()
    backends.fused_attention.cache_clear()
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            find(*kind)
        assert find(*kind) is not None
    finally:
        backends.lse_attention.cache_clear()
        backends.fused_attention.cache_clear()
