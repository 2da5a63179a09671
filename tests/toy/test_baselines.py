"""The other methods are what their formulas say, and sit where they should in the model."""

import baselines
import comfy.sample
import comfy.sd
import pytest
import tiny
import torch
import torch.nn.functional as F

from vsf_core import TokenLayout, cross_attention_reference, joint_attention_reference


@pytest.fixture
def joint():
    """Three negative tokens, five positive ones, eleven of the image."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 19, 8, generator=g, dtype=torch.float64) for _ in range(3))
    return baselines.Call(q, k, v, 3, 5)


def stock(joint, *, negative=False):
    """The image's attention beside P, or beside N in its place."""
    text = slice(0, 3) if negative else slice(3, 8)
    k, v = (torch.cat([t[:, :, text], t[:, :, 8:]], 2) for t in (joint.k, joint.v))
    return F.scaled_dot_product_attention(joint.q[:, :, 8:], k, v)


def test_nasa(joint):
    expected = stock(joint) - 0.3 * stock(joint, negative=True)
    assert torch.allclose(baselines.nasa(0.3)(joint)[:, :, 8:], expected)


@pytest.mark.parametrize(("per_head", "over"), [(False, (1, 3)), (True, 3)])
def test_ong_takes_away_only_what_is_orthogonal(joint, per_head, over):
    positive, negative = stock(joint), stock(joint, negative=True)
    taken = positive - baselines.ong(2.0, per_head)(joint)[:, :, 8:]
    assert (taken * positive).sum(over).abs().max() < 1e-12
    along = 2.0 * negative - taken  # the rest of Z- is along Z+
    factor = (along * positive).sum(over, keepdim=True) / positive.square().sum(over, keepdim=True)
    assert torch.allclose(along, factor * positive)
    assert torch.allclose(baselines.ong(0.0, per_head)(joint)[:, :, 8:], positive)


def test_nag_is_bounded_and_blended(joint):
    positive, negative = stock(joint), stock(joint, negative=True)
    gentle = baselines.nag(4, 0.25, 1e9)(joint)[:, :, 8:]
    assert torch.allclose(gentle, 0.25 * (5 * positive - 4 * negative) + 0.75 * positive)
    bounded = baselines.nag(40, 1.0, 1.5)(joint)[:, :, 8:]
    ratio = bounded.abs().sum((1, 3)) / positive.abs().sum((1, 3))
    assert torch.allclose(ratio, torch.full_like(ratio, 1.5))
    assert torch.allclose(baselines.nag(0, 1.0, 2.5)(joint)[:, :, 8:], positive)


def test_the_dense_way_is_the_definition(joint):
    q, k, v = joint.q, joint.k, joint.v
    setting = torch.full((1, 1, 1), 3.3).double(), torch.full((1, 1, 1), 0.2).double()
    rule = baselines.vsf_dense(3.3, 0.2)
    assert torch.allclose(rule(joint), joint_attention_reference(q, k, v, TokenLayout(11, 5, 3), *setting))
    cross = baselines.Call(q[:, :, 8:], k[:, :, :8], v[:, :, :8], 3, 5, cross=True)
    parts = cross.q, cross.k[:, :, 3:], cross.v[:, :, 3:], cross.k[:, :, :3], cross.v[:, :, :3]
    assert torch.allclose(rule(cross), cross_attention_reference(*parts, *setting))


def test_ablations(joint):
    plain = F.scaled_dot_product_attention(joint.q, joint.k, joint.v)
    assert torch.allclose(baselines.vsf_without_duplication(-1.0)(joint), plain)
    assert torch.allclose(baselines.vsf_without_mask(2.0, 60.0)(joint), plain)
    assert not torch.allclose(baselines.vsf_without_mask(2.0, 0.2)(joint), plain)


def test_text_streams_are_those_of_two_passes(joint):
    for rule in (baselines.nasa(0.5), baselines.nag(4, 0.5, 2.5), baselines.ong(1.0)):
        z = rule(joint)
        assert torch.allclose(z[:, :, :3], joint.attend(joint.n, joint.n, joint.i))
        assert torch.allclose(z[:, :, 3:8], joint.attend(joint.p, joint.p, joint.i))


def test_cross_attention_has_no_text_queries(joint):
    call = baselines.Call(joint.q[:, :, 8:], joint.k[:, :, :8], joint.v[:, :, :8], 3, 5, cross=True)
    z_pos, z_neg = (
        F.scaled_dot_product_attention(call.q, call.k[:, :, s], call.v[:, :, s]) for s in (slice(3, 8), slice(3))
    )
    assert torch.allclose(baselines.nasa(0.3)(call), z_pos - 0.3 * z_neg)


MODELS = {
    "sd3": (tiny.sd3, (16, 8, 12), 64, 2048),
    "flux": (tiny.flux, (16, 8, 12), 64, 768),
    "wan": (tiny.wan, (16, 3, 8, 12), 4096, 1),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_rule_that_keeps_the_positive_is_stock_to_the_model(family):
    make, latent, width, pooled = MODELS[family]
    model = comfy.sd.load_diffusion_model_state_dict(make())
    g = torch.Generator().manual_seed(1)
    noise, text, n = (torch.randn(s, generator=g) for s in ((2, *latent), (1, 13, width), (1, 4, width)))
    positive = [[text, {"pooled_output": torch.zeros(1, pooled)}]]

    def run(model):
        args = (2, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise))
        return comfy.sample.sample(model, noise, *args, disable_pbar=True, seed=0)

    expected = run(model)
    kept = run(baselines.patched(model, baselines.guided(lambda z_pos, z_neg: z_pos), n))
    assert (kept - expected).abs().max() <= 1e-5 * expected.abs().max()
    changed = run(baselines.patched(model, baselines.nasa(0.3), n))
    assert (changed - expected).abs().max() > 1e-3 * expected.abs().max()
