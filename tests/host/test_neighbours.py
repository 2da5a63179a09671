"""Other people's patches in the same graph: LoRA, ControlNet, block patches, overrides, samplers, guiders, compile."""

import logging

import comfy.cldm.mmdit
import comfy.controlnet
import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    BasicScheduler,
    CFGGuider,
    DualCFGGuider,
    KSamplerSelect,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
)
from helpers import assert_close, conditioning, load_sd3, relative, sample, spy_override, text, with_override
from oracle import Expect, oracle_model

import nodes


@pytest.fixture(scope="module")
def model():
    return load_sd3()


NEGATIVE = text(5, 5)


def attach(pack, positive):
    return pack.negative(positive, negative=[[NEGATIVE, {}]])


def oracle_of(model, positive):
    return oracle_model(model, [Expect(p[0], NEGATIVE, 3.3, 0.2) for p in positive])[0]


@pytest.mark.smoke
@pytest.mark.parametrize("order", ["lora first", "vsf first"])
def test_lora(pack, model, order):
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    g = torch.Generator().manual_seed(3)
    lora = {
        f"{key}.lora_up.weight": torch.randn(576, 4, generator=g),
        f"{key}.lora_down.weight": torch.randn(4, 192, generator=g),
    }

    def apply(m):
        return comfy.sd.load_lora_for_models(m, None, lora, 0.2, 0.0)[0]

    patched = pack.patch(apply(model)) if order == "lora first" else apply(pack.patch(model))
    positive = conditioning()
    expected = sample(oracle_of(apply(model), positive), positive)
    assert_close(sample(patched, attach(pack, positive)), expected)
    assert relative(sample(oracle_of(model, positive), positive), expected) > 1e-3


def controlnet(model):
    config = dict(model.model.model_config.unet_config)
    config.pop("dtype", None)
    net = comfy.cldm.mmdit.ControlNet(num_blocks=2, control_latent_channels=16, operations=torch.nn, **config)
    net.load_state_dict(tiny.randomize(net.state_dict(), 11))
    return comfy.controlnet.ControlNet(net, compression_ratio=1, load_device=comfy.model_management.get_torch_device())


@pytest.mark.smoke
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_controlnet(pack, model, cfg):
    """ControlNets run before the negative joins, and never see it."""
    lengths = []
    control = controlnet(model)
    control.control_model.register_forward_pre_hook(
        lambda _m, _a, kw: lengths.append(kw["context"].shape[1]), with_kwargs=True
    )
    hint = torch.randn(1, 16, 16, 24, generator=torch.Generator().manual_seed(1))

    def controlled(cond):
        c = control.copy().set_cond_hint(hint, 0.8, (0.0, 1.0))
        return [[t, {**o, "control": c, "control_apply_to_uncond": True}] for t, o in cond]

    positive = controlled(conditioning())
    expected = sample(oracle_of(model, positive), positive, cfg=cfg)
    assert_close(sample(pack.patch(model), attach(pack, positive), cfg=cfg), expected)
    assert relative(sample(pack.patch(model), attach(pack, conditioning()), cfg=cfg), expected) > 1e-3
    assert set(lengths) == {13}


@pytest.mark.parametrize("order", ["theirs first", "vsf first"])
def test_skip_layer_patch(pack, model, order):
    """A block patch that skips a block (SLG, TeaCache): the block stays skipped, and that is no error."""

    def skip(args, extra):
        return args

    def apply(m):
        m = m.clone()
        m.set_model_patch_replace(skip, "dit", "double_block", 1)
        return m

    patched = pack.patch(apply(model)) if order == "theirs first" else apply(pack.patch(model))
    positive = conditioning()
    expected = sample(oracle_of(apply(model), positive), positive)
    assert_close(sample(patched, attach(pack, positive)), expected)


def test_block_patch_that_changes_its_input(pack, model):
    """A patch around a block sees the block with VSF inside."""

    def halve(args, extra):
        return extra["original_block"]({**args, "img": args["img"] * 0.5})

    def apply(m):
        m = m.clone()
        m.set_model_patch_replace(halve, "dit", "double_block", 1)
        return m

    positive = conditioning()
    expected = sample(oracle_of(apply(model), positive), positive)
    assert_close(sample(apply(pack.patch(model)), attach(pack, positive)), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("order", ["theirs first", "vsf first"])
def test_override_of_another_pack_is_chained(pack, model, order):
    """Sage-like patches keep computing the attention; its kwargs and its place in the slot survive."""
    seen = []
    override = spy_override(seen)
    patched = (
        pack.patch(with_override(model, override))
        if order == "theirs first"
        else with_override(pack.patch(model), override)
    )
    positive = conditioning()
    expected = sample(oracle_of(model, positive), positive)
    assert_close(sample(patched, attach(pack, positive)), expected)
    assert len(seen) == 3 * 3 * 3  # image, P and N0 rows; blocks; steps
    seen.clear()
    sample(patched, positive)
    assert len(seen) == 3 * 3  # off: once a block


def test_override_that_calls_a_registered_function(pack, model):
    """An override that calls ComfyUI's own registered attention, as sage patches do, does not recurse."""
    from comfy.ldm.modules.attention import attention_pytorch

    override = spy_override([], lambda q, k, v, heads, **kw: attention_pytorch(q, k, v, heads, **kw))
    positive = conditioning()
    expected = sample(oracle_of(model, positive), positive)
    assert_close(sample(with_override(pack.patch(model), override), attach(pack, positive)), expected)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "lcm", "res_multistep"])
def test_samplers(pack, model, sampler):
    positive = conditioning()
    expected = sample(oracle_of(model, positive), positive, sampler=sampler, steps=4)
    assert relative(sample(pack.patch(model), attach(pack, positive), sampler=sampler, steps=4), expected) <= 2e-5


@pytest.mark.smoke
@pytest.mark.parametrize("guider", ["basic", "cfg", "dual"])
def test_guiders(pack, model, guider):
    def run(m, positive):
        uncond, other = conditioning(seed=99), conditioning(seed=98)
        g = {
            "basic": lambda: BasicGuider.execute(m, positive),
            "cfg": lambda: CFGGuider.execute(m, positive, uncond, 2.0),
            "dual": lambda: DualCFGGuider.execute(m, positive, other, uncond, 2.0, 1.5, "regular"),
        }[guider]().result[0]
        sigmas = BasicScheduler.execute(m, "simple", 3, 1.0).result[0]
        sampler = KSamplerSelect.execute("euler").result[0]
        latent = {"samples": torch.zeros(1, 16, 16, 24)}
        return SamplerCustomAdvanced.execute(Noise_RandomNoise(7), g, sampler, sigmas, latent).result[0]["samples"]

    positive = conditioning()
    expected = run(oracle_of(model, positive), positive)
    assert_close(run(pack.patch(model), attach(pack, positive)), expected)


def test_inpainting_noise_mask(pack, model):
    positive = conditioning()
    mask = torch.zeros(1, 16, 24)
    mask[:, :8] = 1
    expected = sample(oracle_of(model, positive), positive, noise_mask=mask)
    assert_close(sample(pack.patch(model), attach(pack, positive), noise_mask=mask), expected)


def test_zero_out_keeps_the_negative(pack, model):
    positive = nodes.ConditioningZeroOut().zero_out(attach(pack, conditioning()))[0]
    bare = nodes.ConditioningZeroOut().zero_out(conditioning())[0]
    assert_close(sample(pack.patch(model), positive), sample(oracle_of(model, bare), bare))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(pack, dtype):
    """As close to the fp64-attention oracle as half precision is to fp32 at all."""
    model = comfy.sd.load_diffusion_model_state_dict(tiny.sd3(), model_options={"dtype": dtype})
    positive = conditioning()
    full = sample(oracle_of(load_sd3(), positive), positive)
    rounding = relative(sample(oracle_of(model, positive), positive), full)
    assert relative(sample(pack.patch(model), attach(pack, positive)), full) <= 2 * rounding


def test_torch_compile_takes_new_settings_and_negatives(pack, model, caplog):
    """TorchCompileModel drops every guard on transformer_options: a changed setting must not go stale."""
    caplog.set_level(logging.WARNING)  # dynamo logs its whole trace below that
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    positive = conditioning()
    for settings in (
        {"scale": 2.0},
        {"scale": 4.0},
        {"scale": 4.0, "offset": 1.0},
        {"blocks": "double:1"},
        {"scale": -1.0},
    ):
        for seed in (5, 6):
            cond = pack.negative(positive, negative=[[text(5, seed), {}]])
            eager = sample(pack.patch(model, **settings), cond)
            assert_close(sample(pack.patch(compiled, **settings), cond), eager)
