"""NAG, NASA and ONG as methods of VSF Model Patch: each family's whole tiny models against their formulas, dense and in
two attentions, on the oracle's seams."""

import inspect
import logging

import pytest
import torch
from cases import CASES, both, model_of
from encoders import make_clip, make_flux_clip, make_wan_clip
from helpers import assert_close, conditioning, relative, sample, spy_override, text, with_override
from oracle import oracle_model

import nodes

NAG = {"method": "nag", "nag_scale": 3.0, "nag_alpha": 0.5, "nag_tau": 1.2}
NASA = {"method": "nasa", "nasa_scale": 0.3}
ONG = {"method": "ong", "ong_scale": 3.0}
METHODS = {"nag": NAG, "nasa": NASA, "ong": ONG}


def nag(z_pos, z_neg, s=3.0, alpha=0.5, tau=1.2):
    z = s * z_pos - (s - 1) * z_neg
    ratio = z.abs().sum(-1, keepdim=True) / z_pos.abs().sum(-1, keepdim=True)
    return alpha * z * ratio.clamp(max=tau) / ratio + (1 - alpha) * z_pos


def nasa(z_pos, z_neg):
    return z_pos - 0.3 * z_neg


def ong(z_pos, z_neg, w=3.0):
    unit = torch.nn.functional.normalize(z_pos, dim=-1)  # over all heads
    return z_pos - w * (z_neg - (z_neg * unit).sum(-1, keepdim=True) * unit)


GUIDES = {"nag": nag, "nasa": nasa, "ong": ong}


@pytest.fixture
def case():
    return CASES["sd3"]


@pytest.fixture
def model():
    return model_of("sd3")


@pytest.mark.parametrize("name", CASES)
def test_parity(pack, name):
    """NAG by log-sum-exp and, in joint attention, by a mask of one row; NASA differs by the formula alone."""
    case, model = CASES[name], model_of(name)
    positive, run = case.prompt(size=case.sizes[1]), {"size": case.sizes[1], "cfg": 2.5}
    oracle, record = oracle_model(model, [case.expect(model, positive, guide=nag)])
    patched, expected = pack.patch(model, **NAG), case.run(oracle, positive, **run)
    assert record.joint > 0
    attached = pack.negative(positive, negative=case.negative())
    assert_close(case.run(patched, attached, **run), expected)
    if not case.cross:
        assert_close(case.run(with_override(patched, spy_override([])), attached, **run), expected)
    assert relative(case.run(model, positive, **run), expected) > 1e-4  # and it matters


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_padding_follows_the_method(pack, name, tmp_path):
    """NAG and NASA as published, and ONG: N is a prompt like any other, with its padding. VSF takes words alone."""
    clip = {
        "sd3": lambda: make_clip(clip_l=False, clip_g=False),
        "flux": lambda: make_flux_clip(pooled=64),
        "wan": lambda: make_wan_clip(tmp_path),
    }[name]()
    case, model = CASES[name], model_of(name)
    padded = nodes.CLIPTextEncode().encode(clip, "a roof")[0]
    words = [[pack.negative(padded, clip=clip, text="a roof")[0][1]["vsf_negatives"][0]["tokens"], {}]]
    positive = case.prompt()
    for settings, given, other in (*((method, padded, words) for method in METHODS.values()), ({}, words, padded)):
        patched = pack.patch(model, **settings)
        run = [
            case.run(patched, pack.negative(positive, **kw))
            for kw in ({"clip": clip, "text": "a roof"}, {"negative": given}, {"negative": other})
        ]
        assert torch.equal(run[0], run[1])
        assert relative(run[2], run[1]) > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_parity_of_ong(pack, name):
    """It looks at all heads of a token at once, however a family has them."""
    case, model = CASES[name], model_of(name)
    assert_close(*both(pack, case, model, patch=ONG, expect={"guide": ong}, steps=1))


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_parity_of_two_pictures(pack, name, method):
    case, model = CASES[name], model_of(name)
    expect, patch = {"guide": GUIDES[method]}, METHODS[method]
    assert_close(*both(pack, case, model, patch=patch, expect=expect, batch=2, cfg=2.5))


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_masks(pack, case, model, method):
    """A soft mask is the share of the steering that a token takes."""
    mask = torch.rand(1, 16, 24, generator=torch.Generator().manual_seed(2))
    keep = torch.nn.functional.avg_pool2d(mask, 2).flatten()[:, None].expand(-1, 5)
    patch, guide = {**METHODS[method], "blocks": "double:1-"}, GUIDES[method]
    expect = {"guide": guide, "keep": keep, "blocks": frozenset({1, 2})}
    assert_close(*both(pack, case, model, patch=patch, node={"mask": mask}, expect=expect))


@pytest.mark.parametrize(
    ("method", "strength", "guide"),
    [
        ("nasa", 2.0, lambda a, b: a - 0.6 * b),
        ("nag", 0.5, lambda a, b: nag(a, b, s=2.0)),
        ("ong", 0.5, lambda a, b: ong(a, b, w=1.5)),
    ],
)
def test_strength_multiplies_phi(pack, case, model, method, strength, guide):
    expect = {"guide": guide}
    assert_close(*both(pack, case, model, patch=METHODS[method], node={"strength": strength}, expect=expect))


def test_entries_with_and_without_a_negative_share_a_batch(pack, case, model):
    """At cfg above 1 the uncond entry has none: it is stock's, and both are one forward pass."""
    positive = conditioning()
    given = pack.negative(positive, negative=case.negative())
    reference, record = oracle_model(model, [case.expect(model, positive, guide=nasa)])
    result = sample(pack.patch(model, **NASA), given, negative=conditioning(seed=9), cfg=3.0)
    assert_close(result, sample(reference, positive, negative=conditioning(seed=9), cfg=3.0))
    assert set(record.forwards) == {2}


@pytest.mark.parametrize("method", METHODS)
def test_black_everywhere_is_stock(pack, model, method):
    given = pack.negative(conditioning(), negative=[[text(5, 5), {}]], mask=torch.zeros(1, 16, 24))
    result = sample(pack.patch(model, **METHODS[method]), given)
    assert_close(result, sample(model, conditioning()), 1e-6)


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
    assert torch.equal(
        sample(pack.patch(model, method="vsf", nag_scale=50.0, nasa_scale=3.0, ong_scale=3.0), given), plain
    )
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
    assert_close(first, sample(model, conditioning())[0])
    assert_close(second, sample(pack.patch(model, **NAG), given)[0])


def test_the_log_says_which(pack, model, caplog):
    with caplog.at_level(logging.INFO):
        sample(pack.patch(model, **NAG), pack.negative(conditioning(), negative=[[text(5, 5), {}]]))
    assert "5 negative tokens, scale 3, offset 0" in caplog.text
    assert "method nag (alpha 0.5, tau 1.2), attention: log-sum-exp merge" in caplog.text


def test_what_cannot_work_is_refused(pack, model):
    with pytest.raises(ValueError, match="layout released works only with method vsf, and method is nag"):
        pack.patch(model, **NAG, layout="released")
    with pytest.raises(ValueError, match='method must be one of vsf, nag, nasa, ong, got "sag"'):
        pack.patch(model, method="sag")
    with pytest.raises(ValueError, match="nag_tau"):
        pack.patch(model, method="nag", nag_tau=float("nan"))
    with pytest.raises(ValueError, match="ong_scale"):
        pack.patch(model, method="ong", ong_scale=float("inf"))
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
    assert_close(sample(patched, two), sample(patched, joined), 1e-6)


def test_one_mask_wired_into_two_nodes_is_one(pack, model):
    mask = torch.rand(1, 16, 24, generator=torch.Generator().manual_seed(2))
    given = conditioning()
    for tokens in (text(5, 5), text(4, 6)):
        given = pack.negative(given, negative=[[tokens, {}]], mask=mask)
    joined = [[torch.cat([text(5, 5), text(4, 6)], 1), {}]]
    patched, alone = pack.patch(model, **NAG), pack.negative(conditioning(), negative=joined, mask=mask)
    assert_close(sample(patched, given), sample(patched, alone), 1e-6)
    other = pack.negative(given, negative=[[text(4, 7), {}]], mask=1 - mask)
    with pytest.raises(ValueError, match="3 here differ in strength, mask or frames"):
        sample(patched, other)


def test_flux_takes_a_users_mask(pack):
    """ComfyUI's own attention_mask, which has the row-mask path at work."""
    model = model_of("flux")
    positive = conditioning(pooled_width=768, attention_mask=torch.rand(1, 109, 109), attention_mask_img_shape=(8, 12))
    given = pack.negative(positive, negative=[[text(5, 5), {}]])
    assert torch.isfinite(sample(pack.patch(model, **NAG), given)).all()


def test_the_nodes_own_numbers_are_the_schemas(pack):
    """What the API may leave out is what the widgets show."""
    node = pack.mapping["VSFModelPatch"]
    schema = {i.id: i for i in node.define_schema().inputs}
    given = inspect.signature(node.execute).parameters
    for name in ("method", "nag_scale", "nag_alpha", "nag_tau", "nasa_scale", "ong_scale"):
        assert schema[name].default == given[name].default
        assert schema[name].optional and schema[name].advanced
