"""SD3 and SD3.5 Medium, whole models through the real sampler: parity with the oracle, neutrality, off."""

import pytest
import torch
from helpers import conditioning, load_sd3, relative, sample, spy_override, text, with_override
from oracle import Expect, oracle_model

MODELS = {"large": {}, "medium": {"self_attn_layers": (0, 1)}}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return load_sd3(**MODELS[request.param])


def both(pack, model, n=5, alpha=3.3, beta=0.2, positive_length=13, patch=(), node=(), expect=(), **run):
    """(patched latent, oracle latent, the oracle's record) of the same run."""
    positive, negative = conditioning(positive_length), text(n, 5)
    attached = pack.negative(positive, negative=[[negative, {}]], **dict(node))
    patched = pack.patch(model, scale=alpha, offset=beta, **dict(patch))
    reference, record = oracle_model(model, [Expect(positive[0][0], negative, alpha, beta, **dict(expect))])
    result, expected = sample(patched, attached, **run), sample(reference, positive, **run)
    assert record.joint > 0
    return result, expected, record


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("size", [(16, 24), (15, 21)], ids=["even", "odd"])
def test_parity(pack, model, n, batch, cfg, size):
    result, expected, record = both(pack, model, n=n, batch=batch, cfg=cfg, size=size)
    assert relative(result, expected) <= 1e-5
    assert relative(sample(model, conditioning(), cfg=cfg, batch=batch, size=size), expected) > 1e-3  # and it matters


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5, 3.8])
@pytest.mark.parametrize("beta", [-0.6, 0.0, 2.0])
def test_parity_over_scale_and_offset(pack, model, alpha, beta):
    result, expected, _ = both(pack, model, alpha=alpha, beta=beta, batch=3)
    assert relative(result, expected) <= 1e-5


def test_medium_calls_its_second_attention(model, pack):
    _, _, record = both(pack, model)
    assert record.passed == len(record.forwards) * len(model.model.diffusion_model.x_block_self_attn_layers)


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("seed", [5, 6])
def test_neutrality_at_a_large_finite_offset(pack, model, n, cfg, seed):
    """Offset 60 equals stock to 1e-6 whatever N is, while N went through every block."""
    positive = conditioning()
    stock = sample(model, positive, cfg=cfg)
    attached = pack.negative(positive, negative=[[text(n, seed) * 3, {}]])
    patched = pack.patch(model, offset=60.0)
    seen = []
    neutral = sample(with_override(patched, spy_override(seen)), attached, cfg=cfg)
    assert relative(neutral, stock) <= 1e-6
    image = 8 * 12
    blocks = len(model.model.diffusion_model.joint_blocks)
    # the row-mask path: in each block and forward, image and N0 see all keys once each, P sees what is not N
    assert seen.count(13 + n + image) == 2 * blocks * 3
    assert relative(sample(patched, attached, cfg=cfg), stock) <= 1e-6


def test_cond_and_uncond_stay_in_one_forward(pack, model):
    """At cfg 2.5 VSF makes as many forward calls, with as many entries each, as stock makes."""
    forwards = {}
    for name, m in {"stock": model, "vsf": pack.patch(model)}.items():
        clone, calls = m.clone(), []

        def count(apply_model, params, calls=calls):
            calls.append(list(params["cond_or_uncond"]))
            return apply_model(params["input"], params["timestep"], **params["c"])

        clone.set_model_unet_function_wrapper(count)
        sample(clone, pack.negative(conditioning(), negative=[[text(5, 5), {}]]), cfg=2.5)
        forwards[name] = calls
    assert forwards["vsf"] == forwards["stock"]
    assert any(len(call) == 2 for call in forwards["vsf"])


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_released_layout(pack, model, n, cfg):
    """The authors' [P, N, N0]: a plain copy of N stays visible as text."""
    positive, negative = conditioning(), text(n, 5)
    attached = pack.negative(positive, negative=[[negative, {}]])
    reference, record = oracle_model(model, [Expect(positive[0][0], negative, 3.3, 0.2)], released=True)
    result = sample(pack.patch(model, layout="released"), attached, cfg=cfg, batch=2)
    assert relative(result, sample(reference, positive, cfg=cfg, batch=2)) <= 1e-5
    assert relative(sample(pack.patch(model), attached, cfg=cfg, batch=2), result) > 1e-3
    assert record.joint > 0


def test_released_layout_is_the_paper_layout_with_other_numbers(pack, model):
    """design.md: for one attention, beta' = -ln(1 + e^-beta), alpha' = (alpha e^-beta - 1)/(1 + e^-beta)."""
    from vsf_core import TokenLayout, joint_attention_reference

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 16, generator=g, dtype=torch.float64) for _ in range(3))
    layout = TokenLayout(image=40, positive=6, negative=4)
    n = layout.span("N")
    b = torch.exp(torch.tensor(-0.2, dtype=torch.float64))
    with_copy = TokenLayout(image=40, positive=10, negative=4)

    def grow(t):  # [N, P, I] -> [N, (copy of N, P), I]
        return torch.cat((t[:, :, n], t[:, :, n], t[:, :, n.stop :]), dim=2)

    one = torch.ones(1, 1, 1, dtype=torch.float64)
    released = joint_attention_reference(grow(q), grow(k), grow(v), with_copy, 3.3 * one, 0.2 * one)
    mapped = joint_attention_reference(q, k, v, layout, (3.3 * b - 1) / (1 + b) * one, -torch.log1p(b) * one)
    assert relative(mapped[:, :, layout.span("I")], released[:, :, with_copy.span("I")]) < 1e-12


@pytest.mark.smoke
@pytest.mark.parametrize("blocks", ["double:1", "double:0-1", "double:2-", "double"])
def test_blocks(pack, model, blocks):
    """In a block that is not selected the image does not see N; N0 goes on in isolation."""
    selected = {"double:1": {1}, "double:0-1": {0, 1}, "double:2-": {2}, "double": {0, 1, 2}}[blocks]
    result, expected, _ = both(pack, model, patch={"blocks": blocks}, expect={"blocks": selected})
    assert relative(result, expected) <= 1e-5


@pytest.mark.parametrize("attention", ["attention_sub_quad", "attention_split", "attention_basic"])
def test_parity_on_attentions_without_a_log_sum_exp(pack, model, attention):
    import comfy.ldm.modules.attention as host

    other = getattr(host, attention)
    seen = []
    override = spy_override(seen, lambda *a, **kw: other(*a, **kw))
    positive, negative = conditioning(), text(5, 5)
    attached = pack.negative(positive, negative=[[negative, {}]])
    reference, _ = oracle_model(model, [Expect(positive[0][0], negative, 3.3, 0.2)])
    for cfg in (1.0, 2.5):
        result = sample(with_override(pack.patch(model), override), attached, cfg=cfg, batch=2)
        assert relative(result, sample(reference, positive, cfg=cfg, batch=2)) <= 1e-5
    assert seen
