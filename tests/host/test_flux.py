"""Flux.1: references, attention masks, the released pipeline, and neighbours that use its hooks."""

import inspect

import comfy.model_base
import pytest
import torch
from cases import CASES, latents, model_of
from cases import both as both_of
from helpers import assert_close, relative, spy_override, text, with_override
from oracle import Expect, oracle_model

CASE = CASES["flux"]
prompt, sample = CASE.prompt, CASE.run


@pytest.fixture(scope="module", params=["flux", "flux dev"])
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return model_of(name)


@pytest.fixture
def schnell():
    return model_of("flux")


def attention_mask(text_length, size, seed=3, batch=1):
    """What StyleModelApply's attn_bias leaves in a conditioning: additive, [B, text + image, text + image]."""
    length = text_length + size[0] * size[1]
    g = torch.Generator().manual_seed(seed)
    mask = torch.randn(batch, length, length, generator=g) * 2
    mask[..., text_length:, text_length:] = 0
    return {"attention_mask": mask, "attention_mask_img_shape": size}


def both(pack, model, n=5, positive=None, released=False, patch=(), expect=(), **kw):
    pooled = text(1, 77, 768)[:, 0]
    patch = {"layout": "released" if released else "paper", **dict(patch)}
    negative, expect = [[text(n, 5), {"pooled_output": pooled}]], {"pooled": pooled, **dict(expect)}
    return both_of(pack, CASE, model, n, positive, negative, patch=patch, expect=expect, **kw)


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [[(16, 24)], [(10, 12), (7, 9)]], ids=["one", "two odd"])
@pytest.mark.parametrize(("batch", "cfg"), [(1, 1.0), (2, 2.5)])
def test_reference_latents(pack, model, sizes, batch, cfg):
    """Kontext: reference tokens count as image."""
    positive = prompt(reference_latents=[latents(*s) for s in sizes])
    assert_close(*both(pack, model, positive=positive, batch=batch, cfg=cfg))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("affect", [False, True])
def test_references_may_be_left_alone(pack, schnell, affect, masked):
    """affect_references False: reference tokens never see N. A negative's mask is about the picture only."""
    positive = prompt(reference_latents=[latents(10, 12)])
    inside = torch.ones(8, 12)
    node = {}
    if masked:
        inside[:4] = 0
        node["mask"] = inside.repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
    keep = torch.cat([inside.reshape(-1), torch.full((5 * 6,), float(affect))])[:, None].expand(-1, 5)
    result, expected = both(
        pack, schnell, positive=positive, node=node, patch={"affect_references": affect}, expect={"keep": keep}
    )
    assert_close(result, expected)


@pytest.mark.parametrize(("batch", "cfg"), [(1, 1.0), (2, 2.5)])
def test_attention_mask(pack, schnell, batch, cfg):
    """A conditioning's own attention mask (Redux with attn_bias) acts together with N."""
    positive = prompt(**attention_mask(13, (8, 12)))
    result, expected = both(pack, schnell, positive=positive, batch=batch, cfg=cfg)
    assert_close(result, expected)
    without, _ = both(pack, schnell, batch=batch, cfg=cfg)
    assert relative(result, without) > 1e-3


@pytest.mark.parametrize("form", ["bool", "additive", "matrix"])
@pytest.mark.parametrize(("batch", "cfg"), [(1, 1.0), (2, 2.5)])
def test_mask_over_the_text(pack, schnell, form, batch, cfg):
    """A T5 mask that hides the text's last four tokens, as a pack may hand it to Flux: as if they were not there."""
    from comfy.patcher_extension import WrappersMP

    def hide(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kw):  # noqa: B006
        length = 13 + x.shape[-2] * x.shape[-1] // 4
        mask = torch.ones(x.shape[0], 1, 1, length, dtype=torch.bool)
        mask[..., 9:13] = False
        if form != "bool":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        if form == "matrix":
            mask = mask[0, 0].expand(length, length)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, attention_mask=mask, **kw)

    masked = schnell.clone()
    masked.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stand-in", hide)
    positive, short, negative = prompt(), [[prompt()[0][0][:, :9], prompt()[0][1]]], text(5, 5)
    uncond = prompt(seed=99)
    short_uncond = [[uncond[0][0][:, :9], uncond[0][1]]]
    attached = pack.negative(positive, negative=[[negative, {}]])
    oracle, _ = oracle_model(schnell, [Expect(short[0][0], negative, 3.3, 0.2)])
    result = sample(pack.patch(masked), attached, uncond, cfg=cfg, batch=batch)
    assert_close(result, sample(oracle, short, short_uncond, cfg=cfg, batch=batch))


@pytest.mark.parametrize(("n", "batch", "cfg"), [(1, 2, 2.5), (7, 1, 1.0)])
def test_released_layout(pack, model, n, batch, cfg):
    """VSF in double blocks; N0 ordinary text in single ones; pooled neg + 1.1 (pos - neg)."""
    result, expected = both(pack, model, n=n, released=True, batch=batch, cfg=cfg)
    assert_close(result, expected)
    paper, _ = both(pack, model, n=n, batch=batch, cfg=cfg)
    assert relative(paper, result) > 1e-3


@pytest.mark.parametrize(("alpha", "beta"), [(6.0, 0.0), (0.5, 0.2), (-2.0, -0.6), (20.0, -20.0), (3.5, 60.0)])
def test_released_layout_over_scale_and_offset(pack, schnell, alpha, beta):
    """The image sees plain N0, too: at scales below e^beta it is drawn to the negative, and at offset 60 shown it."""
    result, expected = both(pack, schnell, released=True, alpha=alpha, beta=beta, steps=1)
    assert_close(result, expected)


@pytest.mark.parametrize("way", ["one mask", "soft mask", "blocks", "references"])
def test_released_layout_where_the_negative_acts(pack, schnell, way):
    """What a mask, unselected double blocks and references do not see, they do not see as plain text either. In single
    blocks N is ordinary text for all."""
    inside = torch.ones(8, 12)
    if way.endswith("mask"):
        inside[:4] = 0.0 if way == "one mask" else 0.25
    kw = {
        "blocks": {"patch": {"blocks": "double:1,single:0"}, "expect": {"blocks": frozenset({1, 2})}},
        "references": {
            "positive": prompt(reference_latents=[latents(10, 12)]),
            "patch": {"affect_references": False},
            "expect": {"keep": torch.cat([torch.ones(96, 5), torch.zeros(30, 5)])},
        },
    }.get(way) or {
        "node": {"mask": inside.repeat_interleave(16, 0).repeat_interleave(16, 1)[None]},
        "expect": {"keep": inside.reshape(-1, 1).expand(-1, 5)},
    }
    assert_close(*both(pack, schnell, released=True, **kw))


def test_released_layout_multiplies_scale_by_strength(pack, schnell):
    _, expected = both(pack, schnell, released=True, alpha=3.3)
    attached = pack.negative(prompt(), negative=with_pooled(), strength=0.5)
    assert_close(sample(pack.patch(schnell, layout="released", scale=6.6), attached), expected)


def test_released_layout_in_a_window_of_steps(pack, schnell):
    """Outside the window the negative is nowhere, as plain text neither."""
    attached = pack.negative(prompt(), negative=with_pooled())
    patched = pack.patch(schnell, layout="released", end_percent=0.01)
    expects = [Expect(prompt()[0][0], text(5, 5), 3.3, 0.2, pooled=text(1, 77, 768)[:, 0])]
    oracle, _ = oracle_model(schnell, expects, released=True)
    stock, steps = sample(schnell, prompt(), steps=3), []

    def first_step_alone(apply_model, params):
        steps.append(1)
        run = oracle.model_options["model_function_wrapper"] if len(steps) == 1 else None
        return run(apply_model, params) if run else apply_model(params["input"], params["timestep"], **params["c"])

    mixed = schnell.clone()
    mixed.set_model_unet_function_wrapper(first_step_alone)
    result = sample(patched, attached, steps=3)
    assert_close(result, sample(mixed, prompt(), steps=3))
    assert relative(result, stock) > 1e-3


def test_released_layout_is_near_the_authors_mask_to_the_letter(pack, schnell):
    """Their mask lets texts see the flipped N and hides some image tokens: at 256 image tokens that is little."""
    positive, negative, pooled = prompt(), with_pooled(), text(1, 77, 768)[:, 0]
    expects = [Expect(positive[0][0], text(5, 5), 3.5, 0.0, pooled=pooled)]
    oracle, _ = oracle_model(schnell, expects, released="to the letter")
    attached, run = pack.negative(positive, negative=negative), {"size": (32, 32), "steps": 4}
    result = sample(pack.patch(schnell, layout="released", scale=3.5, offset=0.0), attached, **run)
    theirs, paper = sample(oracle, positive, **run), sample(pack.patch(schnell, scale=3.5, offset=0.0), attached, **run)
    assert 1e-4 < relative(result, theirs) < 0.01 < relative(paper, theirs)


def test_released_layout_needs_one_negative_with_a_pooled_output(pack, schnell):
    bare = pack.negative(prompt(), negative=[[text(5, 5), {}]])
    with pytest.raises(ValueError, match="pooled embedding of one negative"):
        sample(pack.patch(schnell, layout="released"), bare)
    two = pack.negative(pack.negative(prompt(), negative=with_pooled()), negative=with_pooled())
    with pytest.raises(ValueError, match="pooled embedding of one negative"):
        sample(pack.patch(schnell, layout="released"), two)


def with_pooled():
    return [[text(5, 5), {"pooled_output": text(1, 77, 768)[:, 0]}]]


def test_released_layout_needs_a_positive_with_a_pooled_output(pack, schnell):
    attached = pack.negative([[text(13, 1), {}]], negative=with_pooled())
    with pytest.raises(ValueError, match="positive has no pooled output"):
        sample(pack.patch(schnell, layout="released"), attached, prompt(seed=9))


def test_released_layout_beside_an_entry_without_a_pooled_output(pack, schnell):
    """Such an entry, which has no negative, is as ever."""
    if "kwargs.get" not in inspect.getsource(comfy.model_base.Flux.encode_adm):
        pytest.skip("this ComfyUI's Flux needs a pooled output")
    patched, attached = pack.patch(schnell, layout="released"), pack.negative(prompt(), negative=with_pooled())
    other = prompt(seed=9)
    combined, alone = sample(patched, attached + [[text(13, 1), {}]], other), sample(patched, attached, other)
    assert torch.isfinite(combined).all() and relative(combined, alone) > 1e-3


def test_combined_entries_of_different_lengths(pack, schnell):
    one, two, a, b = prompt(seed=1), prompt(seed=2), text(3, 5), text(8, 6)
    pooled = text(1, 77, 768)[:, 0]
    made = [[a, {"pooled_output": pooled}]], [[b, {"pooled_output": pooled}]]
    combined = pack.negative(one, negative=made[0]) + pack.negative(two, negative=made[1])
    expects = [Expect(one[0][0], a, 3.3, 0.2, pooled=pooled), Expect(two[0][0], b, 3.3, 0.2, pooled=pooled)]
    for released in (False, True):
        oracle, record = oracle_model(schnell, expects, released=released)
        patched = pack.patch(schnell, layout="released" if released else "paper")
        assert_close(sample(patched, combined, cfg=2.5), sample(oracle, one + two, cfg=2.5))
        assert max(record.forwards) == 3


# -- neighbours: stand-ins that use the same hooks as the packs they are named after


def test_redux_lengthens_the_positive(pack, schnell):
    """StyleModelApply appends image tokens to the text before sampling."""
    positive = [[torch.cat([p, text(9, 21)], 1), o] for p, o in prompt()]
    assert_close(*both(pack, schnell, positive=positive))


def test_post_input_patch_lengthens_the_text(pack, schnell):
    """A patch that adds text tokens behind the model's own text embedding (IP-Adapter-like)."""
    extra = text(6, 31, 256)

    def post_input(args):
        txt = torch.cat([args["txt"], extra.expand(args["txt"].shape[0], -1, -1)], dim=1)
        return {**args, "txt": txt, "txt_ids": torch.nn.functional.pad(args["txt_ids"], (0, 0, 0, 6))}

    def apply(m):
        m = m.clone()
        m.set_model_patch(post_input, "post_input")
        return m

    # offset 60 must equal stock with the same patch: the added tokens stay ordinary text
    positive = prompt()
    attached = pack.negative(positive, negative=[[text(5, 5), {}]])
    neutral = sample(apply(pack.patch(schnell, offset=60.0)), attached)
    assert_close(neutral, sample(apply(schnell), positive), 1e-6)
    assert relative(sample(apply(pack.patch(schnell)), attached), neutral) > 1e-3


@pytest.mark.parametrize("order", ["theirs first", "vsf first"])
def test_teacache_like_block_patches(pack, schnell, order):
    """A block patch that caches a block's residual and skips it on every other step."""

    def apply(m):
        m, cache = m.clone(), {}

        def cached(args, extra):
            cache["calls"] = cache.get("calls", 0) + 1
            if cache["calls"] % 2 == 0:
                return {**args, "img": args["img"] + cache["residual"]}
            out = extra["original_block"](args)
            cache["residual"] = out["img"] - args["img"]
            return out

        m.set_model_patch_replace(cached, "dit", "double_block", 1)
        return m

    patched = pack.patch(apply(schnell)) if order == "theirs first" else apply(pack.patch(schnell))
    positive, negative = prompt(), text(5, 5)
    oracle, record = oracle_model(apply(schnell), [Expect(positive[0][0], negative, 3.3, 0.2)])
    attached = pack.negative(positive, negative=[[negative, {}]])
    result, expected = sample(patched, attached, steps=4), sample(oracle, positive, steps=4)
    assert_close(result, expected)
    assert record.joint == 4 * 4 - 2


def test_sage_like_override(pack, schnell):
    from comfy.ldm.modules.attention import attention_pytorch

    seen = []
    override = spy_override(seen, lambda q, k, v, heads, **kw: attention_pytorch(q, k, v, heads, **kw))
    positive, negative = prompt(), text(5, 5)
    oracle, _ = oracle_model(schnell, [Expect(positive[0][0], negative, 3.3, 0.2)])
    attached = pack.negative(positive, negative=[[negative, {}]])
    result = sample(with_override(pack.patch(schnell), override), attached)
    assert_close(result, sample(oracle, positive))
    assert seen


def test_controlnet(pack, schnell):
    """A ControlNet's residuals land on the image tokens, in double and single blocks."""
    import comfy.controlnet

    class Residuals(comfy.controlnet.ControlBase):
        def get_control(self, x, t, cond, batched_number, transformer_options):
            assert cond["c_crossattn"].shape[1] == 13
            g = torch.Generator().manual_seed(8)
            made = [torch.randn(1, 8 * 12, 256, generator=g).expand(x.shape[0], -1, -1) for _ in range(4)]
            return {"input": made[:2], "output": made[2:]}

        def get_models(self):
            return []

        def pre_run(self, model, percent_to_timestep_function):
            pass

        def inference_memory_requirements(self, dtype):
            return 0

    positive = prompt(control=Residuals(), control_apply_to_uncond=True)
    result, expected = both(pack, schnell, positive=positive, cfg=2.5)
    assert_close(result, expected)
    plain, _ = both(pack, schnell, cfg=2.5)
    assert relative(result, plain) > 1e-3
