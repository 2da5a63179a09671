"""Short names for what the host tests do over and over."""

import json
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch as patched

import comfy.ldm.anima.model
import comfy.model_detection
import comfy.sample
import comfy.sd
import comfy.utils
import tiny
import torch
from comfy.nested_tensor import NestedTensor


def load_sd3(**kw):
    """A tiny random SD3 through ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model_state_dict(tiny.sd3(**kw))


def load_flux(**kw):
    """A tiny random Flux.1 through ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model_state_dict(tiny.flux(**kw))


def load_wan(kind="t2v", **kw):
    """A tiny random Wan through ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model_state_dict(tiny.wan(kind, **kw))


def load_unet(kind="sdxl", **kw):
    """A tiny random UNet (sd1, sd2, sdxl); the loader knows them by 320 channels."""
    original = comfy.model_detection.detect_unet_config

    def detect(*args, **kw):
        return {**original(*args, **kw), "model_channels": 320}

    with patched.object(comfy.model_detection, "detect_unet_config", detect):
        return load_sized(tiny.unet(kind, **kw), {**tiny.UNETS[kind], "model_channels": tiny.UNET_CHANNELS})


def load_cosmos(kind="cosmos", **kw):
    """A tiny random Cosmos Predict2, or Anima; Anima's adapter has one block, as the class itself has no sizes."""
    with patched.object(comfy.ldm.anima.model, "LLMAdapter", partial(comfy.ldm.anima.model.LLMAdapter, num_layers=1)):
        return load_sized(tiny.cosmos(kind, **kw), tiny.COSMOS)


def load_ltxv(**kw):
    """A tiny random LTX-Video through ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model_state_dict(tiny.ltxv(**kw))


def load_ltxav(kind):
    """A tiny random LTX-2, or 2.3, through ComfyUI's own loader, which reads the sizes in the file's metadata."""
    metadata = {"config": json.dumps({"transformer": tiny.LTXAV[kind]})}
    return comfy.sd.load_diffusion_model_state_dict(tiny.ltxav(kind), metadata=metadata)


def load_sized(state, sizes):
    """A model through ComfyUI's own loader, but for the ``sizes`` that it takes for granted instead of reading them."""
    original = comfy.model_detection.model_config_from_unet

    def detect(*args, **kw):
        config = original(*args, **kw)
        config.unet_config.update(sizes)
        return config

    with patched.object(comfy.model_detection, "model_config_from_unet", detect):
        return comfy.sd.load_diffusion_model_state_dict(state)


def load_flux2(**kw):
    """A tiny random Flux.2."""
    return load_sized(tiny.flux2(**kw), tiny.FLUX2)


def load_chroma(**kw):
    """A tiny random Chroma, or Chroma Radiance."""
    return load_sized(tiny.chroma(**kw), tiny.CHROMA | (tiny.NERF if kw.get("radiance") else {}))


def load_qwen_image(**kw):
    """A tiny random Qwen-Image."""
    return load_sized(tiny.qwen_image(**kw), tiny.QWEN_IMAGE)


def load_z_image(**kw):
    """A tiny random Z-Image."""
    return load_sized(tiny.z_image(**kw), tiny.Z_IMAGE)


def load_hunyuan_video(kind="t2v", **kw):
    """A tiny random HunyuanVideo, or 1.5, through ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model_state_dict(tiny.hunyuan_video(kind, **kw))


def carried(positive):
    """The negatives that the first entry of a CONDITIONING carries."""
    return [SimpleNamespace(**negative) for negative in positive[0][1].get("vsf_negatives", ())]


def text(length, seed, width=64, batch=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=g)


def conditioning(length=13, seed=1, width=64, pooled_width=2048, **options):
    """A CONDITIONING of one entry."""
    pooled = text(1, seed + 1000, pooled_width)[:, 0] * 0.5
    return [[text(length, seed, width), {"pooled_output": pooled, **options}]]


def sample(
    model,
    positive,
    negative=None,
    *,
    cfg=1.0,
    size=(16, 24),
    batch=1,
    steps=3,
    channels=16,
    sampler="euler",
    seed=7,
    sound=0,
    start_from=None,
    noise_mask=None,
    **kw,
):
    """The final latent of a run through ComfyUI's sampler; ``sound``: how many tokens of it LTX-2 makes besides, all
    in one then."""
    if negative is None:
        tokens, options = positive[0]
        negative = conditioning(seed=99, width=tokens.shape[2], pooled_width=options["pooled_output"].shape[1])
    latent = torch.zeros(batch, channels, *size) if start_from is None else start_from
    own = torch.Generator().manual_seed(seed)  # prepare_noise seeds torch's, which threads share
    noise = torch.randn(latent.shape, generator=own)
    if sound:
        heard = torch.zeros(batch, 8, sound, 16)
        latent = NestedTensor((latent, heard))
        if noise_mask is not None:
            kw["noise_mask"] = NestedTensor((noise_mask, torch.ones(batch, 1, sound, 1)))
        noise = NestedTensor((noise, torch.randn(heard.shape, generator=own)))
        made = comfy.sample.sample(model, noise, steps, cfg, sampler, "simple", positive, negative, latent, **kw)
        return comfy.utils.pack_latents(made.unbind())[0]
    if noise_mask is not None:
        kw["noise_mask"] = noise_mask
    return comfy.sample.sample(model, noise, steps, cfg, sampler, "simple", positive, negative, latent, seed=seed, **kw)


def relative(a, b):
    """max|a - b| / max|b| on the final latent."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def assert_close(actual, expected, bound=1e-5):
    """Fails if max|actual - expected| is more than ``bound`` of max|expected|, and says where it is most and by how
    much."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    apart, largest = (actual - expected).abs().nan_to_num(torch.inf, torch.inf), expected.abs().max().item()
    if apart.max().item() > bound * largest or largest != largest:
        at = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
        share = (apart > bound * largest).double().mean().item()
        raise AssertionError(
            f"{apart.max().item() / largest:.2e} of the largest value {largest:.4g}, and {bound:g} is allowed: "
            f"at {at} {actual[at].item():.9g} instead of {expected[at].item():.9g}; {share:.0%} of {apart.numel()} off"
        )


def is_trial(k, kw):
    """Whether an override is only being asked, at the start of a run, whether it heeds masks."""
    is_ours = "vsf_run" in kw["transformer_options"] and "vsf_forward" not in kw["transformer_options"]
    return is_ours and kw.get("skip_reshape", False) and k.shape[:2] == (1, 2)


def spy_override(seen, inner=None):
    """An ``optimized_attention_override`` like those of other packs: notes each call's key length, then runs ``inner``
    (default: the host's attention)."""

    def override(func, q, k, v, heads, **kw):
        if not is_trial(k, kw):
            seen.append(k.shape[2 if kw.get("skip_reshape") else 1])
        return (inner or func)(q, k, v, heads, **kw)

    return override


def with_override(model, override):
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def reversed_keys(func, q, k, v, heads, mask=None, **kw):
    """The same attention, its sums over keys taken from the other end."""
    axis = 2 if kw.get("skip_reshape") else 1
    return func(q, k.flip(axis), v.flip(axis), heads, mask=None if mask is None else mask.flip(-1), **kw)


def only_rounded(result, stock, model, run):
    """Whether a result is ``stock``, that of ``run(model)``, but for rounding: to 1e-6, or to twice what stock itself
    moves when its attention sums in another order, which differs from CPU to CPU."""
    error = relative(result, stock)
    return error <= 1e-6 or error <= 2 * relative(run(with_override(model, reversed_keys)), stock)


def windowed(model):
    """A clone that samples a video in ComfyUI's own context windows, of 4 latent frames with 2 shared."""
    from comfy.context_windows import (
        ContextFuseMethods,
        ContextSchedules,
        IndexListContextHandler,
        create_prepare_sampling_wrapper,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    m = model.clone()
    m.model_options["context_handler"] = IndexListContextHandler(
        context_schedule=get_matching_context_schedule(ContextSchedules.STATIC_STANDARD),
        fuse_method=get_matching_fuse_method(ContextFuseMethods.PYRAMID),
        context_length=4,
        context_overlap=2,
        dim=2,
    )
    create_prepare_sampling_wrapper(m)
    return m
