"""SD3 and SD3.5 Medium: what is not as in the other families."""

import pytest
import torch
from cases import both
from helpers import assert_close, relative, spy_override, text, with_override
from oracle import Expect, oracle_model


@pytest.fixture(scope="module", params=["sd3", "sd3.5 medium"])
def name(request):
    return request.param


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize(("batch", "cfg"), [(1, 2.5), (2, 1.0), (4, 2.5)])
@pytest.mark.parametrize("size", [(16, 24), (15, 21)], ids=["even", "odd"])
def test_parity(pack, case, model, n, batch, cfg, size):
    """The one model on which batches, cfg, sizes and lengths are crossed."""
    assert_close(*both(pack, case, model, n, batch=batch, cfg=cfg, size=size))


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5, 3.8])
@pytest.mark.parametrize("beta", [-0.6, 0.0, 2.0])
def test_parity_over_scale_and_offset(pack, case, model, alpha, beta):
    assert_close(*both(pack, case, model, alpha=alpha, beta=beta, batch=3))


def test_medium_calls_its_second_attention(pack, case, model):
    positive, negative = case.prompt(), case.negative()
    oracle, record = oracle_model(model, [case.expect(model, positive, negative)])
    result = case.run(pack.patch(model), pack.negative(positive, negative=negative))
    assert_close(result, case.run(oracle, positive))
    assert record.passed == len(record.forwards) * len(model.model.diffusion_model.x_block_self_attn_layers)


def test_cond_and_uncond_stay_in_one_forward(pack, case, model):
    """At cfg 2.5 VSF makes as many forward calls, with as many entries each, as stock makes."""
    forwards = {}
    for name, m in {"stock": model, "vsf": pack.patch(model)}.items():
        clone, calls = m.clone(), []

        def count(apply_model, params, calls=calls):
            calls.append(list(params["cond_or_uncond"]))
            return apply_model(params["input"], params["timestep"], **params["c"])

        clone.set_model_unet_function_wrapper(count)
        case.run(clone, pack.negative(case.prompt(), negative=case.negative()), cfg=2.5)
        forwards[name] = calls
    assert forwards["vsf"] == forwards["stock"]
    assert any(len(call) == 2 for call in forwards["vsf"])


@pytest.mark.smoke
@pytest.mark.parametrize(("n", "cfg"), [(1, 2.5), (7, 1.0)])
def test_released_layout(pack, case, model, n, cfg):
    """The authors' [P, N, N0]: a plain copy of N stays visible as text."""
    run = {"cfg": cfg, "batch": 2}
    result, expected = both(pack, case, model, n, patch={"layout": "released"}, **run)
    assert_close(result, expected)
    paper = case.run(pack.patch(model), pack.negative(case.prompt(), negative=case.negative(n)), **run)
    assert relative(paper, result) > 1e-3


def test_released_layout_is_the_paper_layout_with_other_numbers():
    """For one attention: beta' = -ln(1 + e^-beta), alpha' = (alpha e^-beta - 1) / (1 + e^-beta)."""
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
    assert_close(mapped[:, :, layout.span("I")], released[:, :, with_copy.span("I")], 1e-12)


@pytest.mark.parametrize("attention", ["attention_sub_quad", "attention_split", "attention_basic"])
def test_parity_on_attentions_without_a_log_sum_exp(pack, case, model, attention):
    import comfy.ldm.modules.attention as host

    other, seen = getattr(host, attention), []
    override = spy_override(seen, lambda *a, **kw: other(*a, **kw))
    positive, negative = case.prompt(), text(5, 5)
    attached = pack.negative(positive, negative=[[negative, {}]])
    reference, _ = oracle_model(model, [Expect(positive[0][0], negative, 3.3, 0.2)])
    result = case.run(with_override(pack.patch(model), override), attached, cfg=2.5, batch=2)
    assert_close(result, case.run(reference, positive, cfg=2.5, batch=2))
    assert seen
