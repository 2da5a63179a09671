"""The attention mass 1 - W against a dense fp64 softmax, on every path, and the record that keeps it."""

import pytest
import torch
from samples import BEFORE, backend_of, placed

from vsf_core import LAYERS, VSF, AttentionRecord, NegativeTerms, attend_cross, attend_joint, joint_mask

ALPHA = torch.full((1, 1, 1), 3.3)
BETAS = {
    "one": torch.full((1, 1, 1), 0.2),
    "per row": torch.linspace(-1, 2, 90).view(1, 90, 1),
    "per token": torch.linspace(-1, 2, 90 * 7).view(1, 90, 7),
}
DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2)}


def tensors(length, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, length, 64, generator=g).to(dtype) for _ in range(3))


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("merge", "fp32"),
        ("merge", "bf16"),
        ("mask", "fp32"),
        ("mask", "bf16"),
        ("fused", "fp32"),
        ("reference", "bf16"),
    ],
)
@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("padded", [False, True])
@BEFORE
def test_joint(monkeypatch, path, dtype, name, padded, before):
    """Rows come in chunks; what was in the mass before stays; the result is the same to the bit without it."""
    monkeypatch.setattr("vsf_core.attention.SLIVER_BYTES", {"cpu": 2 * 3 * 107 * 4 * 20})
    (kind, tolerance), beta = DTYPES[dtype], BETAS[name]
    layout = placed(90, 10, 7, before)
    q, k, v = (t[:, :1] if path == "fused" else t for t in tensors(layout.length, kind))
    padding = torch.tensor([[False] * 5 + [True] * 2]) if padded else None
    n = layout.span("N")
    mask = joint_mask(layout, beta.double(), padding)
    logits = q.double() @ torch.cat((k, k[:, :, n]), 2).double().mT / 8 + mask
    expected = logits.softmax(-1)[:, :, layout.span("I"), layout.length :].sum(-1).mean(1)
    mass = torch.ones(2, 90)
    given = VSF(), backend_of(path, q), q, k, v, layout, NegativeTerms(ALPHA, beta, padding), None
    results = [attend_joint(*given, m) for m in (mass, None)]
    torch.testing.assert_close(mass.double(), 1 + expected, rtol=0, atol=tolerance)
    assert torch.equal(*results) and expected.max() > 0.05


@pytest.mark.parametrize("path", ["merge", "mask", "fused", "reference"])
@pytest.mark.parametrize("name", BETAS)
def test_cross(monkeypatch, path, name):
    monkeypatch.setattr("vsf_core.attention.SLIVER_BYTES", {"cpu": 2 * 3 * 64 * 4 * 20})
    beta = BETAS[name]
    (q, _, _), (k, v, _), (k_neg, v_neg, _) = (tensors(n, torch.float32, n) for n in (90, 10, 7))
    logits = torch.cat((q.double() @ k.double().mT / 8, q.double() @ k_neg.double().mT / 8 - beta[:, None]), -1)
    expected = logits.softmax(-1)[..., 10:].sum(-1).mean(1)
    given = VSF(), backend_of(path, q), q, k, v, k_neg, v_neg, NegativeTerms(ALPHA, beta), None
    mass = torch.zeros(2, 90)
    results = [attend_cross(*given, m) for m in (mass, None)]
    torch.testing.assert_close(mass.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(*results)


def test_record_means():
    """Over blocks, evaluations of a step, steps and layer groups, frame by frame."""
    record = AttentionRecord()
    record.begin((1, 2, 2, 2), steps=3, patch=2)
    one = torch.ones(3, 1, 2, 1, 1) * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1, 1)
    record.add(0, one, (1, 1, 2))
    record.add(torch.tensor(0), one * 3, (1, 1, 2))
    record.add(torch.tensor(2), one[:, :, :1] * 10, (1, 1, 2), at=([0], [1], [0, 1], [0, 1]))
    assert record.acted == [0, 2]
    assert [record.mean(layer, 0)[0, 0].item() for layer in LAYERS] == [2.0, 4.0, 4.0]
    assert record.mean("all", 0)[0, 0].item() == 7 * 4 / 8
    assert not record.mean("all", 1).any()
    assert record.mean("early", 2).flatten().tolist() == [0.0, 10.0]
    assert record.mean("early").flatten().tolist() == [2.0, pytest.approx((1 + 3 + 10) / 3)]
    with pytest.raises(ValueError, match=r"attention mass of shape \(3, 1, 2, 1, 1\), got \(3, 2, 2, 1, 1\)"):
        record.add(1, torch.ones(3, 2, 2, 1, 1), torch.ones(3))


def test_windows_of_a_record():
    """What is shown twice is a mean of both; what begins inside a token of the whole cannot be placed."""
    record = AttentionRecord()
    record.begin((2, 1, 4, 6), steps=1, patch=2)
    for columns, value in (([0, 1, 2, 3], 1.0), ([2, 3, 4, 5], 3.0)):
        record.add(0, torch.full((3, 1, 1, 2, 2), value), (1, 1, 1), at=([1], [0], range(4), columns))
    assert record.mean()[1, 0].tolist() == [[1.0, 2.0, 3.0]] * 2
    assert not record.mean()[0].any()
    record.add(0, torch.full((3, 2, 1, 2, 3), 4.0), (1, 1, 1), at=([1, 1], [0], range(4), range(6)))
    assert record.mean()[1, 0, 0].tolist() == pytest.approx([(1 + 8) / 3, (1 + 3 + 8) / 4, (3 + 8) / 3])
    with pytest.raises(ValueError, match="begins at latent pixel 1, inside a token"):
        record.add(0, torch.ones(3, 1, 1, 2, 2), (1, 1, 1), at=([0], [0], range(4), [1, 2, 3, 4]))
