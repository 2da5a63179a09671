"""Wan 2.1 and 2.2, whole models through the real sampler: cross-attention by Eq. 9, every other attention untouched."""

import inspect
from functools import partial
from types import SimpleNamespace

import comfy.model_base
import pytest
import torch
from helpers import conditioning, load_wan, only_rounded, relative, sample, spy_override, text, windowed, with_override
from oracle import Expect, oracle_model

KINDS = ("t2v", "i2v", "vace", "5b", "control", "camera", "camera_2.2")
EVEN_ALONE = ("vace", "control")
"""Stock ComfyUI itself takes even latent sizes alone."""
BLOCKS = 3
WIDTH = 4096


@pytest.fixture(scope="module")
def models():
    return {kind: load_wan(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def t2v(models):
    return models["t2v"]


def clip_vision(tokens=257, seed=9):
    g = torch.Generator().manual_seed(seed)
    return SimpleNamespace(penultimate_hidden_states=torch.randn(1, tokens, 1280, generator=g))


def latents(frames, height, width, seed=11):
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(seed))


def prompt(kind="t2v", seed=1, length=13, size=(3, 8, 10), **options):
    if kind in ("i2v", "control", "camera"):
        options = {"clip_vision_output": clip_vision(), **options}
    if kind == "control":
        options = {"reference_latents": [latents(1, *size[1:])], **options}
    if kind.startswith("camera"):
        pixels = [16 * -(-side // 2) for side in size[1:]]
        rays = torch.randn(1, 24, size[0], *pixels, generator=torch.Generator().manual_seed(8))
        options = {"camera_conditions": rays, **options}
    return conditioning(length, seed, WIDTH, **options)


def both(pack, model, kind="t2v", n=5, positive=None, alpha=1.9, beta=0.2, patch=(), node=(), expect=(), **run):
    positive, negative = positive or prompt(kind), text(n, 5, WIDTH)
    attached = pack.negative(positive, negative=[[negative, {}]], **dict(node))
    patched = pack.patch(model, scale=alpha, offset=beta, **dict(patch))
    oracle, record = oracle_model(model, [Expect(positive[0][0], negative, alpha, beta, **dict(expect))])
    run = {"size": (3, 8, 10), "channels": 48 if kind == "5b" else 16, "steps": 2, **run}
    result, expected = sample(patched, attached, **run), sample(oracle, positive, **run)
    assert record.joint > 0
    return result, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "batch", "cfg"), [(1, 1, 1.0), (40, 2, 1.0), (5, 2, 2.5)])
@pytest.mark.parametrize("size", [(1, 8, 10), (3, 7, 9), (9, 4, 6)], ids=["image", "odd", "nine"])
def test_parity(pack, models, kind, n, batch, cfg, size):
    if kind in EVEN_ALONE:
        size = (size[0], 6, 10)
    positive = prompt(kind, size=size)
    result, expected = both(pack, models[kind], kind, n=n, positive=positive, batch=batch, cfg=cfg, size=size)
    assert relative(result, expected) <= 1e-5
    channels = 48 if kind == "5b" else 16
    stock = sample(models[kind], positive, batch=batch, cfg=cfg, size=size, steps=2, channels=channels)
    assert relative(stock, expected) > 1e-4


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.8, 6.0])
@pytest.mark.parametrize("beta", [-0.6, 0.0, 2.0])
def test_parity_over_scale_and_offset(pack, t2v, alpha, beta):
    result, expected = both(pack, t2v, alpha=alpha, beta=beta)
    assert relative(result, expected) <= 1e-5


@pytest.mark.parametrize("kind", ["t2v", "vace"])
@pytest.mark.parametrize(("batch", "cfg"), [(1, 1.0), (2, 2.5)])
def test_video_tokens_as_many_as_text_tokens(pack, models, kind, batch, cfg):
    """3 x 4 x 5 video tokens, 55 + 5 text tokens: self-attention must pass through untouched."""
    result, expected = both(
        pack, models[kind], kind, positive=prompt(kind, length=55), n=5, size=(3, 8, 10), batch=batch, cfg=cfg
    )
    assert relative(result, expected) <= 1e-5


@pytest.mark.parametrize("tokens", [257, 514])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_clip_vision_tokens_as_many_as_text_tokens(pack, tokens, extra):
    """First-last-frame models have 514 CLIP tokens: 512 text tokens and a negative of two words count the same."""
    model = load_wan("i2v", frames_tokens=514 if tokens == 514 else None)
    positive = prompt("i2v", length=tokens - 2 + extra, clip_vision_output=clip_vision(tokens))
    result, expected = both(pack, model, "i2v", n=2, positive=positive)
    assert relative(result, expected) <= 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("blocks", ["double:1", "double:0-1", ""])
@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_blocks(pack, models, kind, blocks):
    """VACE blocks follow their host block."""
    selected = {"double:1": {1}, "double:0-1": {0, 1}, "": {0, 1, 2}}[blocks]
    result, expected = both(pack, models[kind], kind, patch={"blocks": blocks}, expect={"blocks": selected})
    assert relative(result, expected) <= 1e-5


@pytest.mark.parametrize("size", [(3, 8, 10), (4, 7, 9)])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_mask_and_frame_window(pack, t2v, size, cfg):
    t, h, w = size[0], (size[1] + 1) // 2, (size[2] + 1) // 2
    inside = torch.zeros(h, w)
    inside[1:3, 1:4] = 1.0
    pixels = inside.repeat_interleave(16, 0).repeat_interleave(16, 1)[None, : size[1] * 8, : size[2] * 8]
    frames = torch.tensor([0.25 <= (f + 0.5) / t < 0.8 for f in range(t)])
    assert frames.any() and not frames.all()
    keep = (inside[None] * frames[:, None, None]).reshape(-1, 1).expand(-1, 5)
    node = {"mask": pixels, "from_frame": 0.25, "to_frame": 0.8}
    result, expected = both(pack, t2v, node=node, expect={"keep": keep}, size=size, cfg=cfg)
    assert relative(result, expected) <= 1e-5


REFERENCES = {
    "before": ("control", {}),
    "after, in time": ("t2v", {"time_dim_concat": latents(1, 8, 10)}),
    "after, in context": ("t2v", {"context_latents": [latents(1, 8, 10), latents(2, 6, 8, seed=12)]}),
    "given to a model that has no place for it": ("t2v", {"reference_latents": [latents(1, 8, 10)]}),
}


@pytest.mark.parametrize("affected", [True, False])
@pytest.mark.parametrize("case", REFERENCES)
def test_mask_and_reference_tokens(pack, models, case, affected):
    """A mask means the video alone; whether reference tokens see the negative is ``affect_references``."""
    kind, options = REFERENCES[case]
    if "context_latents" in options and "context_latents" not in inspect.getsource(comfy.model_base.WAN21):
        pytest.skip("this ComfyUI's Wan takes no context_latents")
    inside = torch.zeros(3, 4, 5)
    inside[:, 1:3, 1:4] = 1.0
    counts = {"before": (20, 0), "after, in time": (0, 20), "after, in context": (0, 20 + 2 * 12)}.get(case, (0, 0))
    before, after = (torch.full((count,), float(affected)) for count in counts)
    keep = torch.cat([before, inside.flatten(), after])[:, None].expand(-1, 5)
    pixels = inside[:1].repeat_interleave(16, 1).repeat_interleave(16, 2)
    result, expected = both(
        pack,
        models[kind],
        kind,
        positive=prompt(kind, **options),
        patch={"affect_references": affected},
        node={"mask": pixels},
        expect={"keep": keep},
    )
    assert relative(result, expected) <= 1e-5


def test_mask_that_moves(pack, t2v):
    """A MASK batch of as many frames as the latent is a mask for each."""
    per_frame = torch.zeros(3, 4, 5)
    per_frame[0, :2], per_frame[1, 2:], per_frame[2] = 1.0, 1.0, 1.0
    pixels = per_frame.repeat_interleave(16, 1).repeat_interleave(16, 2)
    keep = per_frame.reshape(-1, 1).expand(-1, 5)
    result, expected = both(pack, t2v, node={"mask": pixels}, expect={"keep": keep})
    assert relative(result, expected) <= 1e-5


def test_mask_of_pixel_frames(pack, t2v):
    """Nine frames are three of the latent: the first alone, then four each, as causal VAEs have it."""
    per_latent = torch.zeros(3, 4, 5)
    per_latent[0, :2], per_latent[1, 2:], per_latent[2] = 1.0, 1.0, 1.0
    pixels = per_latent[[0, 1, 1, 1, 1, 2, 2, 2, 2]].repeat_interleave(16, 1).repeat_interleave(16, 2)
    keep = per_latent.reshape(-1, 1).expand(-1, 5)
    result, expected = both(pack, t2v, node={"mask": pixels}, expect={"keep": keep})
    assert relative(result, expected) <= 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_neutrality_at_a_large_finite_offset(pack, models, kind, cfg):
    model, positive = models[kind], prompt(kind)
    run = {"size": (3, 8, 10), "channels": 48 if kind == "5b" else 16, "cfg": cfg}
    plain = partial(sample, positive=positive, **run)
    attached = pack.negative(positive, negative=[[text(40, 5, WIDTH) * 3, {}]])
    stock, patched, seen = plain(model), pack.patch(model, offset=60.0), []
    assert only_rounded(sample(with_override(patched, spy_override(seen)), attached, **run), stock, model, plain)
    assert only_rounded(sample(patched, attached, **run), stock, model, plain)
    per_forward = BLOCKS * (2 if kind == "vace" else 1)
    # an uncond without camera rays or CLIP vision runs apart; without CLIP vision its text also meets the image branch
    apart = 0 if cfg == 1 else 2 if "clip_vision_output" in positive[0][1] else "camera_conditions" in positive[0][1]
    forwards = 3 * (1 + apart)
    assert seen.count(13 + 40) == per_forward * forwards


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_off(pack, models, kind, cfg):
    model, run = models[kind], {"size": (3, 8, 10), "channels": 48 if kind == "5b" else 16, "cfg": cfg}
    stock = sample(model, prompt(kind), **run)
    attached = pack.negative(prompt(kind), negative=[[text(5, 5, WIDTH), {}]])
    patched = pack.patch(model)
    assert torch.equal(sample(model, attached, **run), stock)
    assert torch.equal(sample(patched, prompt(kind), **run), stock)
    assert torch.equal(sample(pack.patch(model, start_percent=0.999), attached, **run), stock)

    def fail(func, q, k, v, heads, **kw):
        raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        sample(with_override(patched, fail), attached, **run)
    assert not torch.equal(sample(patched, attached, **run), stock)
    assert torch.equal(sample(model, prompt(kind), **run), stock)


@pytest.mark.smoke
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["windows first", "vsf first"])
def test_context_windows(pack, t2v, masked, order):
    """ComfyUI's own context windows; a frame window means the whole video, not the window at hand."""
    positive, negative, size = prompt(), text(5, 5, WIDTH), (8, 8, 10)
    node = {"from_frame": 0.5} if masked else {}
    attached = pack.negative(positive, negative=[[negative, {}]], **node)
    both = pack.patch(windowed(t2v)) if order == "windows first" else windowed(pack.patch(t2v))
    result = sample(both, attached, size=size, steps=2)
    if not masked:
        oracle, _ = oracle_model(t2v, [Expect(positive[0][0], negative, 3.3, 0.2)])
        assert relative(result, sample(windowed(oracle), positive, size=size, steps=2)) <= 1e-5
        return
    # windows 0-3, 2-5, 4-7: the first shows no active frame, so after one step its own frames are stock's
    first = sample(both, attached, size=size, steps=1)
    stock = sample(windowed(t2v), positive, size=size, steps=1)
    assert relative(first[:, :, :2], stock[:, :, :2]) <= 1e-6
    assert relative(first[:, :, 6:], stock[:, :, 6:]) > 1e-4


def test_high_and_low_noise_pair(pack, models):
    """Both models of a 14B pair patched, one conditioning: as each alone would do."""
    import comfy.sample
    from comfy.samplers import KSampler

    assert KSampler and comfy.sample
    high, low = pack.patch(models["t2v"]), pack.patch(load_wan("t2v", seed=3))
    attached = pack.negative(prompt(), negative=[[text(5, 5, WIDTH), {}]])
    uncond = prompt(seed=99)
    noise = torch.randn(1, 16, 3, 8, 10, generator=torch.Generator().manual_seed(7))

    def run(first, second, positive):
        def part(m, latent, start, last, zero):
            return comfy.sample.sample(
                m,
                torch.zeros_like(noise) if zero else noise,
                4,
                1.0,
                "euler",
                "simple",
                positive,
                uncond,
                latent,
                start_step=start,
                last_step=last,
                force_full_denoise=zero,
                disable_noise=zero,
            )

        return part(second, part(first, torch.zeros_like(noise), 0, 2, False), 2, 4, True)

    positive = prompt()
    expects = [Expect(positive[0][0], text(5, 5, WIDTH), 3.3, 0.2)]
    expected = run(oracle_model(models["t2v"], expects)[0], oracle_model(load_wan("t2v", seed=3), expects)[0], positive)
    assert relative(run(high, low, attached), expected) <= 1e-5


def test_row_mask_path(pack, t2v):
    seen = []
    positive, negative = prompt(), text(5, 5, WIDTH)
    oracle, _ = oracle_model(t2v, [Expect(positive[0][0], negative, 3.3, 0.2)])
    attached = pack.negative(positive, negative=[[negative, {}]])
    for cfg in (1.0, 2.5):
        run = {"size": (3, 8, 10), "cfg": cfg, "batch": 2}
        result = sample(with_override(pack.patch(t2v), spy_override(seen)), attached, **run)
        assert relative(result, sample(oracle, positive, **run)) <= 1e-5
    masked = pack.negative(positive, negative=[[negative, {}]], from_frame=0.4)
    one = sample(with_override(pack.patch(t2v), spy_override(seen)), masked, size=(3, 8, 10))
    assert relative(one, sample(pack.patch(t2v), masked, size=(3, 8, 10))) <= 1e-5


def test_subclasses_are_refused(pack):
    model = load_wan("t2v")
    model.model.__class__ = type("WAN21_SCAIL", (type(model.model),), {"__module__": "comfy.model_base"})
    with pytest.raises(ValueError, match="WAN21_SCAIL are not supported"):
        pack.patch(model)
