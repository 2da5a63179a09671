"""Half precision at its limits: whole models that compute in fp16 and bf16, logits near fp16's largest number, strong
settings. The result is finite and as close to fp64 attention as half precision lets it be, or the run ends in an error
that says so."""

import pytest
import torch
from cases import CASES
from helpers import conditioning, load_flux, load_sd3, load_wan, relative, sample, text, with_override
from oracle import Expect, oracle_model

SHAPES = {"sd3": ((4, 6), 64, 2048), "flux": ((4, 6), 64, 768), "wan": ((2, 4, 6), 4096, 8)}
SMALLEST = {"sd3": {"depth": 2}, "flux": {"double": 1, "single": 1}, "wan": {"layers": 2}}
LOAD = {"sd3": load_sd3, "flux": load_flux, "wan": load_wan}
LOGITS = {"usual": 10.0, "large": 6e3, "near overflow": 6e4}  # fp16 ends at 65504
NORMS = ("query_norm", "key_norm", "norm_q", "norm_k", "ln_q", "ln_k")
VALUES = {"sd3": "context_block.attn.qkv.weight", "wan": "cross_attn.v.weight"}


def load(name, logits):
    """A model whose largest logit on the way to the first result is about ``logits``, and how large it really is."""
    model, width, pooled = LOAD[name](**SMALLEST[name]), *SHAPES[name][1:]
    positive = conditioning(5, 1, width, pooled)
    factor = (logits / largest_logit(model, positive, name)) ** 0.5
    for key, parameter in model.model.diffusion_model.named_parameters():
        if key.split(".")[-2] in NORMS:
            parameter.data.mul_(factor)
    return model, largest_logit(model, positive, name)


def run(model, positive, name):
    size, width, pooled = SHAPES[name]
    return sample(model, positive, conditioning(7, 99, width, pooled), steps=1, size=size)


def largest_logit(model, positive, name):
    """The largest |q k| / sqrt(d) in any attention of a run."""
    found = []

    def override(func, q, k, v, heads, **kw):
        a, b = (t if kw.get("skip_reshape") else t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))
        found.append(((a @ b.transpose(-1, -2)).abs().max() * a.shape[-1] ** -0.5).item())
        return func(q, k, v, heads, **kw)

    run(with_override(model, override), positive, name)
    return max(found)


def computing_in(model, dtype):
    clone = model.clone()
    clone.set_model_compute_dtype(dtype)
    return clone


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", SHAPES)
def test_half_precision_with_any_logits_and_settings(pack, name, logits, tally):
    width, pooled = SHAPES[name][1:]
    full, largest = load(name, LOGITS[logits])
    assert LOGITS[logits] / 4 < largest < LOGITS[logits] * 4
    positive, negative = conditioning(5, 1, width, pooled), text(3, 5, width)
    attached = pack.negative(positive, negative=[[negative, {}]])
    for dtype in (torch.float16, torch.bfloat16):
        half = computing_in(full, dtype)
        for scale, offset in ((3.3, 0.2), (20.0, -0.6), (20.0, 8.0), (-10.0, 0.2), (20.0, 90.0)):
            expects = [Expect(positive[0][0], negative, scale, offset)]
            exact = run(oracle_model(full, expects)[0], positive, name)
            rounding = relative(run(oracle_model(half, expects)[0], positive, name), exact)
            assert rounding > 1e-6, "the model does not compute in half precision"
            ours = run(pack.patch(half, scale=scale, offset=offset), attached, name)
            assert torch.isfinite(ours).all()
            assert relative(ours, exact) <= 3 * rounding, (dtype, scale, offset, rounding)
            tally["half precision runs"] += 1


@pytest.mark.parametrize("name", VALUES)
def test_values_that_overflow_end_in_an_error_not_in_a_black_picture(pack, name):
    """A negative's values times alpha may go beyond fp16's largest number. (ComfyUI's Flux clips such values.)"""
    width, pooled = SHAPES[name][1:]
    model = LOAD[name](**SMALLEST[name])
    for key, parameter in model.model.diffusion_model.named_parameters():
        if key.endswith(VALUES[name]):
            parameter.data[-parameter.shape[0] // 3 :].mul_(4000)
    half, positive = computing_in(model, torch.float16), conditioning(5, 1, width, pooled)
    assert torch.isfinite(run(half, positive, name)).all()
    attached = pack.negative(positive, negative=[[text(3, 5, width), {}]], strength=10.0)
    with pytest.raises(RuntimeError, match="VSF: the sampled latent, or .* at scale 20 in torch.float16"):
        run(pack.patch(half, scale=20.0), attached, name)


TEXT_VALUES = {
    "sd3": "context_block.attn.qkv.weight",
    "flux": "txt_attn.qkv.weight",
    "flux.2 klein": "txt_attn.qkv.weight",
    "chroma": "txt_attn.qkv.weight",
    "z-image": "attention.qkv.weight",
    "hunyuan": "txt_attn.qkv.weight",
    "wan": "cross_attn.v.weight",
}


def with_values_to(case, model, name, most):
    """``model``, in which the largest value that an attention reads is about ``most``, and what it makes of it as
    before."""
    found = []

    def override(func, q, k, v, *args, **kw):
        found.append(v.abs().max().item())
        return func(q, k, v, *args, **kw)

    case.run(with_override(model, override), case.prompt(), steps=1)
    for key, parameter in model.model.diffusion_model.named_parameters():
        if key.endswith(TEXT_VALUES[name]):
            rows = parameter.shape[0] if name == "wan" else parameter.shape[0] // 3
            parameter.data[-rows:].mul_(most / max(found))
    return model


@pytest.mark.parametrize("way", ["merge", "mask", "reference"])
@pytest.mark.parametrize("name", TEXT_VALUES)
def test_large_values_in_fp16(pack, monkeypatch, name, way):
    """Scale times a value is beyond fp16, what becomes of it is not; models that cut off what is infinite would hide
    it. What is really beyond fp16 is an error."""
    case = CASES[name]
    model = with_values_to(case, case.load(), name, 8000.0)
    positive, negative = case.prompt(), case.negative()
    half, offset = computing_in(model, torch.float16), 4.0
    monkeypatch.setenv("VSF_ATTENTION", way)
    expects = [case.expect(model, positive, negative, 20.0, offset)]
    exact, rounded = (case.run(oracle_model(m, expects)[0], positive, steps=1) for m in (model, half))
    rounding = relative(rounded, exact)
    assert rounding > 1e-6, "the model does not compute in half precision"
    ours = case.run(pack.patch(half, scale=20.0, offset=offset), pack.negative(positive, negative=negative), steps=1)
    assert relative(ours, exact) <= 3 * rounding, rounding
    loud = pack.negative(positive, negative=negative, strength=10.0)
    with pytest.raises(
        RuntimeError, match="VSF: the sampled latent, or an attention on the way to it, has values .* NaN"
    ):
        case.run(pack.patch(half, scale=20.0, offset=-4.0), loud, steps=1)
