"""NAG, NASA and ONG in one pass against their formulas, dense and in two."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from samples import BEFORE, DTYPES, TOLERANCE, backend_of, black_box, make, on_device, placed, relative, rows_of

from vsf_core import (
    NAG,
    NASA,
    ONG,
    AttentionBackend,
    NegativeTerms,
    TokenLayout,
    attend_cross,
    attend_joint,
    lse_attention,
)

GUIDES = {
    **{"nag": NAG(0.25, 2.5), "nag strong": NAG(0.5, 5.0), "nag tight": NAG(1.0, 1.0)},
    **{"nasa": NASA(), "ong": ONG()},
}
WAYS = ["merge", "mask", "fused", "reference"]
GUIDED = pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
PATHS = pytest.mark.parametrize(
    ("path", "guide"),
    # the kernel makes Z+ and Z-, whatever becomes of them
    [
        pytest.param(way, GUIDES[guide], id=f"{way}-{guide}")
        for way in WAYS
        for guide in (GUIDES if way != "fused" else ["nag"])
    ],
)


def formula(guide, z_pos, z_neg, phi):
    """As the papers write it; [B, H, I, D]."""
    if isinstance(guide, NASA):
        return z_pos - phi * z_neg
    if isinstance(guide, ONG):
        along = torch.einsum("bhid,bhid->bi", z_neg, z_pos) / torch.einsum("bhid,bhid->bi", z_pos, z_pos)
        along = torch.nan_to_num(along)[:, None, :, None]  # any Z- is orthogonal to a Z+ of nothing
        return z_pos - phi * (z_neg - along * z_pos)
    s = 1 + phi
    z = s * z_pos - (s - 1) * z_neg
    ratio = z.abs().sum((1, 3), keepdim=True) / z_pos.abs().sum((1, 3), keepdim=True)
    z = z * ratio.clamp(max=guide.tau) / ratio
    return guide.alpha * z + (1 - guide.alpha) * z_pos


def dense(q, k, v, hidden=None):
    """fp64; hidden: bool [B, keys]."""
    q, k, v = (t.double() for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v


def oracle(q, k, v, layout, guide, phi, presence=1.0, padding=None):
    i, p, n = (rows_of(layout, group) for group in "IPN")
    padding = torch.zeros(q.shape[0], layout.negative, dtype=torch.bool) if padding is None else padding

    def over(rows, text, hidden=None):
        keys, values = (torch.cat([t[:, :, text], t[:, :, i]], 2) for t in (k, v))
        hidden = None if hidden is None else F.pad(hidden, (0, layout.image))
        return dense(q[:, :, rows], keys, values, hidden)

    out = torch.zeros_like(q, dtype=torch.float64)
    out[:, :, p], out[:, :, n] = over(p, p), over(n, n, padding)
    z_pos = over(i, p)
    steered = formula(guide, z_pos, over(i, n, padding), torch.as_tensor(phi).double())
    out[:, :, i] = z_pos + presence * (steered - z_pos)
    return out


def terms(phi, presence=None, padding=None):
    """``presence``: which share of the steering an image token takes, 1 unless said."""
    return NegativeTerms(phi, -torch.log(torch.ones_like(phi[:1]) if presence is None else presence), padding)


@on_device
def run(path, q, k, v, layout, guide, phi, presence=None, padding=None, mask=None):
    return attend_joint(guide, backend_of(path, q), q, k, v, layout, terms(phi, presence, padding), mask)


@PATHS
@pytest.mark.parametrize(
    ("dtype", "before"), [("fp32", 0.0), ("fp32", 0.5), ("fp32", 1.0), ("bf16", 0.5), ("fp16", 0.0)]
)
@pytest.mark.parametrize(
    ("image", "positive", "negative", "batch", "heads", "dim"),
    [(63, 17, 1, 1, 2, 64), (49, 0, 5, 2, 1, 80), (1, 1, 1, 4, 1, 64), (67, 3, 40, 2, 1, 128)],
)
def test_shapes(path, guide, dtype, before, image, positive, negative, batch, heads, dim):
    layout = placed(image, positive, negative, before)
    q, k, v = make(layout, batch=batch, heads=heads, dim=dim, dtype=DTYPES[dtype], spread=4.0)
    expected = oracle(q, k, v, layout, guide, 0.7)
    assert relative(run(path, q, k, v, layout, guide, torch.full((1, 1, 1), 0.7)), expected) < TOLERANCE[dtype]


@PATHS
@BEFORE
def test_cached_keys(path, guide, before):
    """Keys of the image without queries: see the test of that name in test_attention.py."""
    layout, cached = placed(50, 11, 7, before), 20
    q, k, v = make(replace(layout, image=70), batch=2, spread=6.0)
    phi = torch.full((1, 1, 1), 0.7)
    expected = run(path, q, k, v, replace(layout, image=70), guide, phi)[:, :, :-cached]
    assert relative(run(path, q[:, :, :-cached], k, v, replace(layout, cached=cached), guide, phi), expected) < 1e-6


@PATHS
@pytest.mark.parametrize("phi", [-1.0, 0.0, 11.0, 100.0])
@pytest.mark.parametrize("spread", [0.0, 50.0])
def test_extremes(path, guide, phi, spread):
    layout = TokenLayout(61, 13, 9)
    q, k, v = make(layout, batch=2, spread=spread)
    result = run(path, q, k, v, layout, guide, torch.full((1, 1, 1), phi))
    assert relative(result, oracle(q, k, v, layout, guide, phi)) < 1e-5


@PATHS
@BEFORE
def test_padding_and_entries_without_a_negative(path, guide, before):
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, batch=3, spread=6.0)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [True] * 7])
    phi, presence = torch.tensor([0.5, 0.9, 0.0]).view(3, 1, 1), torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1)
    result = run(path, q, k, v, layout, guide, phi, presence, padding)
    expected = oracle(q, k, v, layout, guide, phi[:, None], presence[:, None], padding)
    assert torch.isfinite(result).all()
    assert relative(result, expected) < 1e-5
    main = rows_of(layout, "PI")
    plain = F.scaled_dot_product_attention(q[2:, :, main], k[2:, :, main], v[2:, :, main])
    assert relative(result[2:, :, main], plain) < 1e-6


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("guide", [GUIDES["nag"], GUIDES["ong"]], ids=["nag", "ong"])
def test_presence_is_a_share_for_each_image_token(path, guide):
    layout = TokenLayout(50, 11, 7)
    q, k, v = make(layout, batch=2, spread=6.0)
    presence = torch.rand(1, 50, 1, generator=torch.Generator().manual_seed(1))
    presence[:, :10] = 0.0
    result = run(path, q, k, v, layout, guide, torch.full((1, 1, 1), 4.0), presence)
    assert relative(result, oracle(q, k, v, layout, guide, 4.0, presence[:, None])) < 1e-5
    without = run(path, q, k, v, layout, guide, torch.full((1, 1, 1), 4.0), torch.zeros(1, 1, 1))
    assert torch.equal(result[:, :, 18:28], without[:, :, 18:28])


SIZES = {"fp32": (0.0, 1e-20, 3e4), "bf16": (0.0, 1e-20, 3e4), "fp16": (0.0, 1e-3, 3e4)}


@pytest.mark.parametrize(
    ("path", "dtype", "size"),
    [
        *((path, dtype, size) for path in WAYS if path != "fused" for dtype in DTYPES for size in SIZES[dtype]),
        *(("fused", "fp16", size) for size in SIZES["fp16"]),
    ],
)
def test_ong_of_values_of_any_size(path, dtype, size):
    """``size``: of the image's and the positive's values; the negative's are about 1. Squares vanish or are beyond
    fp16, a Z+ of 0 has no direction. The second entry takes none of it."""
    layout = placed(50, 11, 7, 0.5)
    q, k, v = make(layout, batch=2, dtype=DTYPES[dtype], spread=6.0)
    v[:, :, rows_of(layout, "PI")] *= size / v.abs().max()
    presence, image = torch.tensor([1.0, 0.0]).view(2, 1, 1), rows_of(layout, "I")
    result = run(path, q, k, v, layout, ONG(), torch.full((1, 1, 1), 3.0), presence)[:, :, image].double()
    expected = oracle(q, k, v, layout, ONG(), 3.0, presence[:, None])[:, :, image]
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


@pytest.mark.parametrize("path", ["merge", "mask", "reference"])
@pytest.mark.parametrize("guide", [GUIDES["nasa"], GUIDES["ong"]], ids=["nasa", "ong"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_strong_push_from_next_to_nothing(path, guide, dtype):
    """Z- so small that Z is Z+, large and within its rounding, however hard the push: what it is made of is larger."""
    layout = TokenLayout(50, 11, 7)
    q, k, v = make(layout, dtype=DTYPES[dtype], spread=0.5)
    k[:, :, rows_of(layout, "P")] = k[:, :, rows_of(layout, "N")] = 0.0
    v[:, :, rows_of(layout, "NI")] = 0.0
    v[:, :, rows_of(layout, "P")] = 6e4
    result = run(path, q, k, v, layout, guide, torch.full((1, 1, 1), 20.0))
    assert relative(result, oracle(q, k, v, layout, guide, 20.0)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("path", "rows", "guide"),
    [
        *(("mask", 1, "nasa"), ("mask", 68, "nasa"), ("fused", 1, "nasa"), ("reference", 1, "nasa")),
        *(("mask", 68, "ong"), ("fused", 1, "ong"), ("reference", 68, "ong")),
    ],
)
@BEFORE
@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_of_the_callers_own(path, before, rows, padded, guide):
    layout = placed(50, 11, 7, before)
    q, k, v = make(layout, batch=2, spread=6.0)
    mask = torch.randn(1, 1, rows, 68, generator=torch.Generator().manual_seed(1))
    padding, guide = torch.tensor([[False] * 5 + [True] * 2]) if padded else None, GUIDES[guide]
    result = run(path, q, k, v, layout, guide, torch.full((1, 1, 1), 0.4), None, padding, mask)
    seen = [at for at in rows_of(layout, "N")][: 5 if padded else 7]
    image = rows_of(layout, "I")

    def over(group, columns):
        at = mask[:, :, group] if rows > 1 else mask
        return black_box(q[:, :, group], k[:, :, columns], v[:, :, columns], at[..., columns])

    z_pos, z_neg = over(image, rows_of(layout, "PI")), over(image, seen + image)
    assert relative(result[:, :, image], formula(guide, z_pos, z_neg, 0.4)) < 1e-5
    for text, keys in ((rows_of(layout, "P"), rows_of(layout, "PI")), (seen, seen + image)):
        assert relative(result[:, :, text], over(text, keys)) < 1e-5


def naive(q, k, v, mask):
    """An attention that makes NaN of rows whose keys are all hidden; PyTorch's makes 0."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits if mask is None else logits + mask).softmax(-1) @ v


@PATHS
@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention(path, guide, padded):
    layout = TokenLayout(50, 11, 7)
    q, k, v = make(layout, batch=3, spread=6.0)
    q, k_neg, v_neg, k, v = q[:, :, 18:], k[:, :, :7], v[:, :, :7], k[:, :, 7:18], v[:, :, 7:18]
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [True] * 7]) if padded else None
    presence = torch.tensor([1.0, 0.4, 0.0]).view(3, 1, 1)
    hidden = padding if padding is None else padding & ~padding.all(-1, keepdim=True)
    z_pos, z_neg = dense(q, k, v), dense(q, k_neg, v_neg, hidden)
    expected = z_pos + presence[:, None] * (formula(guide, z_pos, z_neg, 0.7) - z_pos)
    negative = terms(torch.full((1, 1, 1), 0.7), presence, padding)
    backends = [AttentionBackend(naive)] if path == "mask" else []
    for backend in (backend_of(path, q), *backends):
        result = attend_cross(guide, backend, q, k, v, k_neg, v_neg, negative)
        assert relative(result, expected) < 1e-5


def test_one_attention_over_the_image():
    """The price is slivers: no second attention from image to image."""
    layout, calls = TokenLayout(300, 11, 7), []
    q, k, v = make(layout)
    inner = lse_attention(q.device, q.dtype, q.shape[-1])

    def attend(q, k, v, scale=None):
        calls.append(q.shape[2] * k.shape[2])
        return inner(q, k, v, scale)

    attend_joint(NASA(), AttentionBackend(black_box, attend), q, k, v, layout, terms(torch.ones(1, 1, 1)))
    assert sum(calls) == 318 * 300 + 300 * 7 + 311 * 11
