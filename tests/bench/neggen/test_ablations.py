"""The ablations on a real ComfyUI, as a template draws them, against a dense softmax that is written out here.

The oracle is in this process: ComfyUI's own loaders, encoder, sampler and model files, and of the model's attention
nothing but the function that the model file calls. It imports nothing of the pack or of ``baselines``, and puts N
behind P.
"""

import os
from pathlib import Path

import pytest
import sampling
import torch
from hosting.client import ComfyClient

from neggen import templates

SCALE, OFFSET, SEED, SIDE = 1.7, 0.3, 5, 64
PROMPT, UNWANTED = "a photo of a house and a sun", "a roof"
END = 49407
METHODS = ("none", "no_mask", "no_duplication", "padded", "flipped_embedding")


def drawn(server, method):
    """The latent that the server samples with a method of the shipped template, in two steps."""
    template = templates.load("toy_sd3")
    own = templates.slots_of(template.methods[method])
    settings = {"steps": 2, "width": SIDE, "height": SIDE, "scale": SCALE, "offset": OFFSET}
    run = template.check(templates.Run(method, method, {k: v for k, v in settings.items() if k in own}))
    graph = {k: v for k, v in template.fill(run, PROMPT, UNWANTED, SEED).items() if k not in ("decode", "vae")}
    graph["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": method}}
    (ref,) = ComfyClient(server.address).run(graph)["save"]["latents"]
    from safetensors.torch import load_file

    return load_file(Path(server.base, "output", ref["subfolder"], ref["filename"]))["latent_tensor"].float()


@pytest.fixture(scope="module")
def toy():
    """The same files, through ComfyUI's own loaders in this process."""
    sampling.open_comfyui()
    import comfy.sd

    models = Path(os.environ["VSF_MODELS"])
    clip = str(models / "text_encoders" / "vsf_tiny_clip_l.safetensors")
    model = comfy.sd.load_diffusion_model(str(models / "diffusion_models" / "vsf_tiny_sd3.safetensors"))
    return model, comfy.sd.load_clip([clip], clip_type=comfy.sd.CLIPType.SD3)


def encoded(clip, text):
    (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return entry


def words_only(clip, text):
    """The text's tokens up to CLIP's end, without what fills them up."""
    ids = [token for token, _ in clip.tokenize(text)["l"][0]]
    return encoded(clip, text)[0][:, : ids.index(END) + 1]


def dense(q, k, v, heads, bias):
    """softmax(q k^T / sqrt(d) + bias) v in fp64; [B, L, H*D]."""
    q64, k, v = (t.double().unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q64 @ k.transpose(-1, -2) / q64.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2).to(q.dtype)


def attention(method, positive, n, calls):
    """What the method makes of a call over [P, N, I]; n: N's tokens that the method steers."""
    n0, image = slice(positive, positive + n), positive + n

    def attend(q, k, v, heads, **kwargs):
        calls.append(q.shape[1])
        length, v = q.shape[1], v.flatten(2)
        bias = torch.zeros(length, length, dtype=torch.float64)
        if method == "no_duplication":
            v = torch.cat([v[:, :positive], -SCALE * v[:, n0], v[:, image:]], 1)
        elif method in ("no_mask", "padded"):
            k, v = torch.cat([k, k[:, n0]], 1), torch.cat([v, -SCALE * v[:, n0]], 1)
            bias = torch.nn.functional.pad(bias, (0, n), value=-OFFSET)
            if method == "padded":  # Listing 1's mask
                bias[:image, length:] = -torch.inf
                bias[:positive, n0] = bias[image:, n0] = bias[n0, :positive] = -torch.inf
        return dense(q, k, v, heads, bias)

    return attend


def oracle(toy, method, monkeypatch):
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
    import comfy.sample

    model, clip = toy
    text, entry = encoded(clip, PROMPT)
    unwanted = encoded(clip, UNWANTED)[0]
    behind = {
        "none": unwanted[:, :0],
        "padded": unwanted,
        "flipped_embedding": -SCALE * unwanted,
    }.get(method, words_only(clip, UNWANTED))
    calls = []
    plain = method in ("none", "flipped_embedding")
    n = 0 if plain else behind.shape[1]
    both = torch.cat([text, behind], 1)
    monkeypatch.setattr(mmdit, "optimized_attention", attention(method, both.shape[1] - n, n, calls))
    start = torch.zeros(1, 16, SIDE // 8, SIDE // 8)
    noise, positive = comfy.sample.prepare_noise(start, SEED), [[both, entry]]
    latent = comfy.sample.sample(
        *(model, noise, 2, 1.0, "euler", "simple", positive, positive, start), disable_pbar=True, seed=SEED
    )
    assert len(calls) == 2 * len(model.model.diffusion_model.joint_blocks), "the oracle was not in force"
    assert set(calls) == {both.shape[1] + (SIDE // 16) ** 2}
    return latent


def test_each_ablation_acts_and_is_what_it_says(server, toy, monkeypatch):
    """Largest differences are of the latent's largest value."""
    seen = {method: drawn(server, method) for method in METHODS}
    for method, latent in seen.items():
        expected = oracle(toy, method, monkeypatch)
        off = float((latent - expected).abs().max() / expected.abs().max())
        print(f"{method}: {off:.1e}")
        assert off < 1e-4, method
    for one, latent in seen.items():
        for other in METHODS:
            apart = float((latent - seen[other]).abs().max() / latent.abs().max())
            assert (apart > 1e-2) == (one != other), f"{one} and {other} are {apart:.1e} apart"


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("wan", "VSFBenchNoMask", "for SD3, Flux, not for WAN21"),
        ("qwen_image", "VSFBenchNASA", "WAN21, not for QwenImage"),
    ],
)
def test_models_that_a_rule_does_not_know(server, family, kind, words):
    """A loud error, and not a picture that nothing acted on."""
    from hosting.errors import PromptFailed
    from hosting.toy_graphs import stock, with_vsf

    graph = with_vsf(stock("wan" if family == "wan" else "sd3"))
    numbers = {"scale": 1.0, "offset": 0.0} if kind == "VSFBenchNoMask" else {"phi": 0.4}
    if family != "wan":
        graph["model"] = {"class_type": "VSFTinyModel", "inputs": {"family": family}}
    graph["patch"] = {"class_type": kind, "inputs": {"model": ["model", 0], "positive": ["negative", 0], **numbers}}
    graph["sample"]["inputs"]["positive"] = ["patch", 1]
    with pytest.raises(PromptFailed, match=words):
        ComfyClient(server.address).run(graph)


def test_a_rule_is_for_cfg_1(server):
    from hosting.errors import PromptFailed

    template = templates.load("toy_sd3")
    (run,) = templates.parse_run("no_duplication:scale=1:cfg=2:steps=1:width=64:height=64")
    with pytest.raises(PromptFailed, match="this method is for cfg 1"):
        ComfyClient(server.address).run(template.fill(template.check(run), PROMPT, UNWANTED, 1))
