"""Other people's guidance, caches and attention patches, in the same graph before and after VSF, on each family."""

import comfy.ldm.flux.math as flux_math
import comfy.patcher_extension
import pytest
import torch
from cases import CASES, compare
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from helpers import assert_close, load_flux, relative
from oracle import Expect, Record, listing_1, replaced

ORDER = pytest.mark.parametrize("order", ["theirs first", "vsf first"])
FAMILY = pytest.mark.parametrize("family", ["sd3", "flux", "wan"])


@ORDER
@FAMILY
def test_model_sampling(pack, family, order):
    def apply(m):
        if family == "flux":
            return ModelSamplingFlux().patch(m, max_shift=2.0, base_shift=0.2, width=192, height=128)[0]
        return ModelSamplingSD3().patch(m, shift=9.0)[0]

    result, expected, without = compare(pack, family, apply, order)
    assert_close(result, expected)
    assert relative(without, expected) > 1e-2


@ORDER
@FAMILY
def test_block_output_filtered_like_freeu(pack, family, order):
    """FreeU's idea on a DiT: the low frequencies of a block's image tokens are scaled."""

    def filtered(args, extra):
        out = extra["original_block"](args)
        spectrum = torch.fft.rfft(out["img"], dim=1)
        spectrum[:, :4] *= 1.5
        return {**out, "img": torch.fft.irfft(spectrum, n=out["img"].shape[1], dim=1)}

    def apply(m):
        m = m.clone()
        m.set_model_patch_replace(filtered, "dit", "double_block", 1)
        return m

    result, expected, without = compare(pack, family, apply, order)
    assert_close(result, expected)
    assert relative(without, expected) > 1e-3


def every_second_step(m):
    """TeaCache's idea as a wrapper around the model: every second step repeats the last prediction."""
    m, cache = m.clone(), {"calls": 0}

    def cached(executor, *args, **kwargs):
        cache["calls"] += 1
        if cache["calls"] % 2:
            cache["last"] = executor(*args, **kwargs)
        return cache["last"]

    m.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "cache", cached)
    return m


CACHES = {
    "wrapper": every_second_step,
    "EasyCache": lambda m: EasyCacheNode.execute(m, 3.0, 0.0, 1.0, False).result[0],
    "LazyCache": lambda m: LazyCacheNode.execute(m, 3.0, 0.0, 1.0, False).result[0],
}


@ORDER
@FAMILY
@pytest.mark.parametrize("cache", CACHES)
def test_caches(pack, family, order, cache):
    """Steps that a cache skips stay skipped. (EasyCache itself does nothing on SD3, which lacks its wrapper.)"""
    result, expected, without = compare(pack, family, CACHES[cache], order, steps=6)
    assert_close(result, expected)
    assert (family, cache) == ("sd3", "EasyCache") or relative(without, expected) > 1e-4


@ORDER
@FAMILY
def test_the_first_step_of_the_window_may_be_one_that_a_cache_skips(pack, family, order):
    """No forward pass in it is no sign of a broken hook then; none in the whole run is."""
    model, attached = CASES[family].load(), pack.negative(CASES[family].prompt(), negative=CASES[family].negative())

    def both(**window):
        patch = lambda m: pack.patch(m, **window)  # noqa: E731
        return patch(every_second_step(model)) if order == "theirs first" else every_second_step(patch(model))

    late = CASES[family].run(both(start_percent=0.02), attached, steps=4)  # from the second step on
    stock = CASES[family].run(every_second_step(model), attached, steps=4)
    assert relative(late, stock) > 1e-3
    assert relative(CASES[family].run(both(), attached, steps=4), late) > 1e-4
    with pytest.raises(RuntimeError, match="past the wrappers of APPLY_MODEL|no block of this model ran"):
        CASES[family].run(both(start_percent=0.02), attached, steps=2)


@ORDER
@FAMILY
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_skip_layer_guidance(pack, family, order, cfg):
    """Core's SLG makes a pass of its own without a block: with VSF in it, as in the others."""

    def apply(m):
        return SkipLayerGuidanceDiT.execute(m, 2.0, 0.0, 1.0, "1", "1", 0.0).result[0]

    result, expected, without = compare(pack, family, apply, order, cfg=cfg)
    assert_close(result, expected)
    assert relative(without, expected) > 1e-3


@ORDER
@FAMILY
def test_perturbed_attention_guidance(pack, family, order):
    """Core's PAG knows UNets alone; its second pass must have VSF in it, else it would push with the difference."""

    def apply(m):
        return PerturbedAttentionGuidance.execute(m, 3.0).result[0]

    result, expected, without = compare(pack, family, apply, order)
    assert_close(result, expected)
    assert_close(result, without)


def image_prompt(m, family):
    """An IP-Adapter's idea: image tokens also attend to an image prompt's, and the result is added."""
    g = torch.Generator().manual_seed(21)
    keys, values = (torch.randn(1, 4, 256, generator=g) for _ in range(2))
    m = m.clone()

    def attended(q):
        kv = (t.expand(q.shape[0], -1, -1) for t in (keys[..., : q.shape[2]], values[..., : q.shape[2]]))
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(q, *kv)

    def after_attention(out, extra_options):
        image = out[:, extra_options["img_slice"][0] :]
        return torch.cat([out[:, : extra_options["img_slice"][0]], image + attended(image)], dim=1)

    def after_block(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + attended(out["img"])}

    if family == "flux":
        m.set_model_attn1_output_patch(after_attention)
    elif family == "wan":
        m.set_model_patch(lambda args: args["x"] + attended(args["x"]), "attn2_patch")
    else:
        m.set_model_patch_replace(after_block, "dit", "double_block", 0)
    return m


@ORDER
@FAMILY
def test_image_prompts(pack, family, order):
    result, expected, without = compare(pack, family, lambda m: image_prompt(m, family), order)
    assert_close(result, expected)
    assert relative(without, expected) > 1e-3


def test_an_image_prompt_among_the_keys_is_refused(pack):
    """A patch that repeats keys of the text would make some of the negative's wished for."""

    def more_keys(q, k, v, pe=None, attn_mask=None, extra_options=None):
        k, v = (torch.cat([t, t[:, :, :3]], dim=2) for t in (k, v))
        return {"q": q, "k": k, "v": v, "pe": None}

    model = load_flux()
    model.set_model_attn1_patch(more_keys)
    stock = CASES["flux"].run(load_flux(), CASES["flux"].prompt())
    if torch.equal(CASES["flux"].run(model, CASES["flux"].prompt()), stock):
        pytest.skip("this ComfyUI's Flux has no attn1_patch")
    attached = pack.negative(CASES["flux"].prompt(), negative=CASES["flux"].negative())
    with pytest.raises(RuntimeError, match=r"more_keys\) adds keys of the negative"):
        CASES["flux"].run(pack.patch(model), attached)


# -- core's NAGuidance: another negative guidance, by a second pass over the sampler's negative -----------------------


def nag(m):
    return NAGuidance.execute(m, 5.0, 0.5, 1.5).result[0]


def nag_oracle(model, expect):
    """Flux whose positive entry has VSF by hand, in one batch with the uncond: what core's NAG then mixes."""
    record, n = Record(), expect.negative.shape[1]

    def make(original, image, positive, n, expect, record, released, user_mask):
        def attention(q, k, v, heads, skip_reshape=False, mask=None, **kwargs):
            record.joint += 1
            q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
            unseen = Expect(expect.positive, expect.negative, 0.0, 0.0, keep=torch.zeros(image, n))
            expects = [expect if kind == 0 else unseen for kind in record.forwards[-1]]
            rows = (q.split(1), k.split(1), v.split(1), expects)
            return torch.cat(
                [listing_1(a, b, c, heads, image, positive, n, e, 0) for a, b, c, e in zip(*rows, strict=True)]
            )

        return attention

    def apply_model(apply, params):
        c, x = dict(params["c"]), params["input"]
        record.forwards.append(params["cond_or_uncond"])
        assert sorted(params["cond_or_uncond"]) == [0, 1] and x.shape[0] == 2
        positive = c["c_crossattn"].shape[1]
        c["c_crossattn"] = torch.cat([c["c_crossattn"], expect.negative.expand(2, -1, -1)], dim=1)
        image = -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)
        kw = {"image": image, "positive": positive, "n": n, "expect": expect, "record": record}
        with replaced(flux_math, "optimized_attention", make, released=False, user_mask=None, **kw):
            return apply(x, params["timestep"], **c)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(apply_model)
    return clone, record


@ORDER
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_nag_on_flux_pushes_from_the_samplers_negative_what_vsf_made(pack, order, cfg):
    """NAG mixes each block's attention of the positive, VSF's result, with that of the sampler's negative."""
    model, positive, negative = load_flux(), CASES["flux"].prompt(), CASES["flux"].negative()[0][0]
    attached = pack.negative(positive, negative=[[negative, {}]])
    patched = pack.patch(nag(model)) if order == "theirs first" else nag(pack.patch(model))
    reference, record = nag_oracle(nag(model), Expect(positive[0][0], negative, 3.3, 0.2))
    result = CASES["flux"].run(patched, attached, cfg=cfg)
    assert_close(result, CASES["flux"].run(reference, positive, cfg=cfg))
    assert record.joint == 4 * 2
    # each of the two takes part, and NAG's own negative is the sampler's
    for other in (
        CASES["flux"].run(nag(model), positive, cfg=cfg),
        CASES["flux"].run(pack.patch(model), attached, cfg=cfg),
        CASES["flux"].run(patched, attached, CASES["flux"].prompt(seed=50), cfg=cfg),
        CASES["flux"].run(patched, pack.negative(positive, negative=CASES["flux"].negative(seed=6)), cfg=cfg),
    ):
        assert relative(result, other) > 1e-3
    assert torch.equal(CASES["flux"].run(patched, positive, cfg=cfg), CASES["flux"].run(nag(model), positive, cfg=cfg))


@ORDER
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_nag_does_nothing_where_it_did_nothing_before(pack, family, order):
    """Core's NAG knows neither SD3 nor Wan: with VSF the picture is VSF's."""
    result, expected, without = compare(pack, family, nag, order)
    assert_close(result, expected)
    assert_close(result, without)
