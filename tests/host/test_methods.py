"""NAG and NASA as methods of VSF Model Patch: every family's whole tiny models against their formulas, dense and in two
attentions, on the oracle's seams."""

import inspect
import logging
from functools import lru_cache

import cross
import pytest
import torch
from helpers import conditioning, load_flux, load_sd3, load_wan, relative, sample, spy_override, text, with_override
from oracle import Expect, oracle_model
from test_families import CASES, attached

NAG = {"method": "nag", "nag_scale": 3.0, "nag_alpha": 0.5, "nag_tau": 1.2}
NASA = {"method": "nasa", "nasa_scale": 0.3}
METHODS = {"nag": NAG, "nasa": NASA}


def nag(z_pos, z_neg, s=3.0, alpha=0.5, tau=1.2):
    z = s * z_pos - (s - 1) * z_neg
    ratio = z.abs().sum(-1, keepdim=True) / z_pos.abs().sum(-1, keepdim=True)
    return alpha * z * ratio.clamp(max=tau) / ratio + (1 - alpha) * z_pos


def nasa(z_pos, z_neg):
    return z_pos - 0.3 * z_neg


GUIDES = {"nag": nag, "nasa": nasa}
RUNS = pytest.mark.parametrize(("method", "batch", "cfg", "size"), [("nag", 2, 2.5, 1), ("nasa", 1, 1.0, 0)])


@lru_cache(maxsize=1)
def model_of(name):
    return CASES[name].load()


@pytest.fixture
def model():
    return load_sd3()


@RUNS
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.cross])
def test_parity_in_joint_attention(pack, name, method, batch, cfg, size):
    case, model = CASES[name], model_of(name)
    positive, run = case.prompt(), {"size": case.sizes[size], "batch": batch, "cfg": cfg}
    oracle, record = oracle_model(model, case.expect(positive, guide=GUIDES[method]))
    patched = pack.patch(model, **METHODS[method])
    expected = case.run(oracle, positive, **run)
    assert record.joint > 0
    row_mask = [with_override(patched, spy_override([]))] if method == "nag" else []
    for path in (patched, *row_mask):  # by log-sum-exp, and by a mask of one row
        assert relative(case.run(path, attached(pack, case), **run), expected) <= 1e-5
    if method == "nasa":
        assert relative(case.run(model, positive, **run), expected) > 1e-3  # and it matters


@pytest.mark.parametrize("name", cross.FAMILIES)
def test_parity_in_cross_attention(pack, name):
    """NASA differs by the formula alone: one family, Wan, has it below."""
    family, model = cross.FAMILIES[name], cross.loaded(name)
    run = {"batch": 2, "cfg": 2.5, "size": family.sizes[1]}
    result, expected = cross.both(pack, family, model, patch=NAG, expect={"guide": nag}, **run)
    assert relative(result, expected) <= 1e-5
    assert relative(cross.run(family, model, family.prompt(), **run), expected) > 1e-4


@pytest.mark.smoke
@RUNS
def test_parity_on_wan(pack, method, batch, cfg, size):
    case, model = CASES["wan"], load_wan()
    positive, run = case.prompt(), {"size": case.sizes[size], "batch": batch, "cfg": cfg}
    expected = case.run(oracle_model(model, case.expect(positive, guide=GUIDES[method]))[0], positive, **run)
    result = case.run(pack.patch(model, **METHODS[method]), attached(pack, case), **run)
    assert relative(result, expected) <= 1e-5


def both(pack, model, patch, node=(), **expect):
    positive, negative = conditioning(), text(5, 5)
    given = pack.negative(positive, negative=[[negative, {}]], **dict(node))
    reference, _ = oracle_model(model, [Expect(positive[0][0], negative, 0.0, 0.0, **expect)])
    return sample(pack.patch(model, **patch), given), sample(reference, positive)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_masks(pack, model, method):
    """A soft mask is the share of the steering that a token takes."""
    mask = torch.rand(1, 16, 24, generator=torch.Generator().manual_seed(2))
    keep = torch.nn.functional.avg_pool2d(mask, 2).flatten()[:, None].expand(-1, 5)
    patch, guide = {**METHODS[method], "blocks": "double:1-"}, GUIDES[method]
    result, expected = both(pack, model, patch, {"mask": mask}, guide=guide, keep=keep, blocks=frozenset({1, 2}))
    assert relative(result, expected) <= 1e-5


def test_strength_multiplies_phi(pack, model):
    result, expected = both(pack, model, NASA, {"strength": 2.0}, guide=lambda z_pos, z_neg: z_pos - 0.6 * z_neg)
    assert relative(result, expected) <= 1e-5
    result, expected = both(pack, model, NAG, {"strength": 0.5}, guide=lambda a, b: nag(a, b, s=2.0))
    assert relative(result, expected) <= 1e-5


def test_entries_with_and_without_a_negative_share_a_batch(pack, model):
    """At cfg above 1 the uncond entry has none: it is stock's, and both are one forward pass."""
    positive, negative = conditioning(), text(5, 5)
    given = pack.negative(positive, negative=[[negative, {}]])
    reference, record = oracle_model(model, [Expect(positive[0][0], negative, 0.0, 0.0, guide=nasa)])
    result = sample(pack.patch(model, **NASA), given, negative=conditioning(seed=9), cfg=3.0)
    assert relative(result, sample(reference, positive, negative=conditioning(seed=9), cfg=3.0)) <= 1e-5
    assert set(record.forwards) == {2}


@pytest.mark.parametrize("method", METHODS)
def test_black_everywhere_is_stock(pack, model, method):
    given = pack.negative(conditioning(), negative=[[text(5, 5), {}]], mask=torch.zeros(1, 16, 24))
    result = sample(pack.patch(model, **METHODS[method]), given)
    assert relative(result, sample(model, conditioning())) <= 1e-6


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
def test_outside_the_window_is_stock_to_the_bit(pack, model, method):
    patched = pack.patch(model, **METHODS[method], start_percent=0.999, end_percent=1.0)
    given = pack.negative(conditioning(), negative=[[text(5, 5), {}]])
    assert torch.equal(sample(patched, given), sample(model, conditioning()))
    assert torch.equal(sample(model, given), sample(model, conditioning()))


def test_vsf_is_the_default_and_pays_no_heed_to_the_others_inputs(pack, model):
    given = pack.negative(conditioning(), negative=[[text(5, 5), {}]])
    plain = sample(pack.patch(model), given)
    assert torch.equal(sample(pack.patch(model, method="vsf", nag_scale=50.0, nasa_scale=3.0), given), plain)
    other = sample(pack.patch(model, **NAG), given)
    assert torch.equal(sample(pack.patch(model, **NAG, scale=9.0, offset=5.0, nasa_scale=3.0), given), other)
    assert relative(other, plain) > 1e-3


def test_a_scale_sweep_sweeps_the_methods_own_scale(pack, model):
    sweep, given = pack.mapping["VSFScaleSweep"], pack.negative(conditioning(), negative=[[text(5, 5), {}]])
    patched, latent, _ = sweep.execute(
        model=pack.patch(model, **NAG), latent={"samples": torch.zeros(1, 16, 16, 24)}, scales="1, 3"
    ).result
    noise = torch.randn(1, 16, 16, 24, generator=torch.Generator().manual_seed(7)).expand(2, -1, -1, -1)
    import comfy.sample

    args = (3, 1.0, "euler", "simple", given, conditioning(), latent["samples"])
    first, second = comfy.sample.sample(patched, noise, *args, disable_pbar=True, seed=7)
    assert relative(first, sample(model, conditioning())[0]) <= 1e-5
    assert relative(second, sample(pack.patch(model, **NAG), given)[0]) <= 1e-5


def test_the_log_says_which(pack, model, caplog):
    with caplog.at_level(logging.INFO):
        sample(pack.patch(model, **NAG), pack.negative(conditioning(), negative=[[text(5, 5), {}]]))
    assert "5 negative tokens, scale 3, offset 0" in caplog.text
    assert "method NAG(alpha=0.5, tau=1.2), attention: log-sum-exp merge" in caplog.text


def test_what_cannot_work_is_refused(pack, model):
    with pytest.raises(ValueError, match="layout released works only with method vsf, and method is nag"):
        pack.patch(model, **NAG, layout="released")
    with pytest.raises(ValueError, match='method must be one of vsf, nag, nasa, got "sag"'):
        pack.patch(model, method="sag")
    with pytest.raises(ValueError, match="nag_tau"):
        pack.patch(model, method="nag", nag_tau=float("nan"))
    one = pack.negative(conditioning(), negative=[[text(5, 5), {}]])
    two = pack.negative(one, negative=[[text(4, 6), {}]], strength=0.5)
    with pytest.raises(ValueError, match="method nasa takes several negatives as one, but 2 here differ in strength"):
        sample(pack.patch(model, **NASA), two)
    recorded = pack.mapping["VSFRecord"].execute(model=pack.patch(model, **NASA)).result[0]
    with pytest.raises(ValueError, match="Remove VSF Record, or set method to vsf"):
        sample(recorded, one)


def test_chained_negatives_are_one(pack, model):
    one = pack.negative(conditioning(), negative=[[text(5, 5), {}]])
    two = pack.negative(one, negative=[[text(4, 6), {}]])
    joined = pack.negative(conditioning(), negative=[[torch.cat([text(5, 5), text(4, 6)], 1), {}]])
    patched = pack.patch(model, **NAG)
    assert relative(sample(patched, two), sample(patched, joined)) <= 1e-6


def test_one_mask_wired_into_two_nodes_is_one(pack, model):
    mask = torch.rand(1, 16, 24, generator=torch.Generator().manual_seed(2))
    given = conditioning()
    for tokens in (text(5, 5), text(4, 6)):
        given = pack.negative(given, negative=[[tokens, {}]], mask=mask)
    joined = [[torch.cat([text(5, 5), text(4, 6)], 1), {}]]
    patched, alone = pack.patch(model, **NAG), pack.negative(conditioning(), negative=joined, mask=mask)
    assert relative(sample(patched, given), sample(patched, alone)) <= 1e-6
    other = pack.negative(given, negative=[[text(4, 7), {}]], mask=1 - mask)
    with pytest.raises(ValueError, match="3 here differ in strength, mask or frames"):
        sample(patched, other)


def test_flux_takes_a_users_mask(pack):
    """ComfyUI's own attention_mask, which has the row-mask path at work."""
    model = load_flux()
    positive = conditioning(pooled_width=768, attention_mask=torch.rand(1, 109, 109), attention_mask_img_shape=(8, 12))
    given = pack.negative(positive, negative=[[text(5, 5), {}]])
    assert torch.isfinite(sample(pack.patch(model, **NAG), given)).all()


def test_the_nodes_own_numbers_are_the_schemas(pack):
    """What the API may leave out is what the widgets show."""
    node = pack.mapping["VSFModelPatch"]
    schema = {i.id: i for i in node.define_schema().inputs}
    given = inspect.signature(node.execute).parameters
    for name in ("method", "nag_scale", "nag_alpha", "nag_tau", "nasa_scale"):
        assert schema[name].default == given[name].default
        assert schema[name].optional and schema[name].advanced
