"""Wan 2.1 and 2.2: every attention but that to the text is untouched; frames, references, context windows, pairs."""

import inspect

import comfy.model_base
import comfy.sample
import pytest
import torch
from cases import CASES, clip_vision, latents, model_of
from cases import both as both_of
from helpers import assert_close, load_wan, relative, spy_override, text, windowed, with_override
from oracle import Expect, oracle_model

NAMES = {"t2v": "wan", "vace": "wan vace", "control": "wan control"}
WIDTH = 4096
prompt, sample = CASES["wan"].prompt, CASES["wan"].run


@pytest.fixture
def t2v():
    return model_of("wan")


def both(pack, model, kind="t2v", n=5, positive=None, **kw):
    return both_of(pack, CASES[NAMES[kind]], model, n, positive, **kw)


@pytest.mark.parametrize("size", [(9, 4, 6), (4, 7, 9)], ids=["nine frames", "odd"])
def test_parity_at_other_sizes(pack, t2v, size):
    assert_close(*both(pack, t2v, size=size, batch=2, cfg=2.5))


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.8, 6.0])
@pytest.mark.parametrize("beta", [-0.6, 0.0, 2.0])
def test_parity_over_scale_and_offset(pack, t2v, alpha, beta):
    assert_close(*both(pack, t2v, alpha=alpha, beta=beta))


@pytest.mark.parametrize(("kind", "batch", "cfg"), [("t2v", 1, 1.0), ("vace", 2, 2.5)])
def test_video_tokens_as_many_as_text_tokens(pack, kind, batch, cfg):
    """3 x 4 x 5 video tokens, 55 + 5 text tokens: self-attention must pass through untouched."""
    assert_close(*both(pack, model_of(NAMES[kind]), kind, positive=prompt(55), n=5, batch=batch, cfg=cfg))


@pytest.mark.parametrize("tokens", [257, 514])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_clip_vision_tokens_as_many_as_text_tokens(pack, tokens, extra):
    """First-last-frame models have 514 CLIP tokens: 512 text tokens and a negative of two words count the same."""
    model = load_wan("i2v", frames_tokens=514 if tokens == 514 else None)
    positive = prompt(tokens - 2 + extra, clip_vision_output=clip_vision(tokens))
    assert_close(*both(pack, model, n=2, positive=positive))


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
    assert_close(*both(pack, t2v, node=node, expect={"keep": keep}, size=size, cfg=cfg))


REFERENCES = {
    "before": ("control", {}),
    "after, in time": ("t2v", {"time_dim_concat": latents(1, 8, 10)}),
    "after, in context": ("t2v", {"context_latents": [latents(1, 8, 10), latents(2, 6, 8, seed=12)]}),
    "given to a model that has no place for it": ("t2v", {"reference_latents": [latents(1, 8, 10)]}),
}


@pytest.mark.parametrize("affected", [True, False])
@pytest.mark.parametrize("case", REFERENCES)
def test_mask_and_reference_tokens(pack, case, affected):
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
        model_of(NAMES[kind]),
        kind,
        positive=CASES[NAMES[kind]].prompt(**options),
        patch={"affect_references": affected},
        node={"mask": pixels},
        expect={"keep": keep},
    )
    assert_close(result, expected)


def test_mask_that_moves(pack, t2v):
    """A MASK batch of as many frames as the latent is a mask for each."""
    per_frame = torch.zeros(3, 4, 5)
    per_frame[0, :2], per_frame[1, 2:], per_frame[2] = 1.0, 1.0, 1.0
    pixels = per_frame.repeat_interleave(16, 1).repeat_interleave(16, 2)
    keep = per_frame.reshape(-1, 1).expand(-1, 5)
    assert_close(*both(pack, t2v, node={"mask": pixels}, expect={"keep": keep}))


def test_mask_of_pixel_frames(pack, t2v):
    """Nine frames are three of the latent: the first alone, then four each, as causal VAEs have it."""
    per_latent = torch.zeros(3, 4, 5)
    per_latent[0, :2], per_latent[1, 2:], per_latent[2] = 1.0, 1.0, 1.0
    pixels = per_latent[[0, 1, 1, 1, 1, 2, 2, 2, 2]].repeat_interleave(16, 1).repeat_interleave(16, 2)
    keep = per_latent.reshape(-1, 1).expand(-1, 5)
    assert_close(*both(pack, t2v, node={"mask": pixels}, expect={"keep": keep}))


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
        assert_close(result, sample(windowed(oracle), positive, size=size, steps=2))
        return
    # windows 0-3, 2-5, 4-7: the first shows no active frame, so after one step its own frames are stock's
    first = sample(both, attached, size=size, steps=1)
    stock = sample(windowed(t2v), positive, size=size, steps=1)
    assert_close(first[:, :, :2], stock[:, :, :2], 1e-6)
    assert relative(first[:, :, 6:], stock[:, :, 6:]) > 1e-4


def test_high_and_low_noise_pair(pack, t2v):
    """Both models of a 14B pair patched, one conditioning: as each alone would do."""
    high, low = pack.patch(t2v), pack.patch(load_wan("t2v", seed=3))
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
    expected = run(oracle_model(t2v, expects)[0], oracle_model(load_wan("t2v", seed=3), expects)[0], positive)
    assert_close(run(high, low, attached), expected)


def test_row_mask_path(pack, t2v):
    seen = []
    positive, negative = prompt(), text(5, 5, WIDTH)
    oracle, _ = oracle_model(t2v, [Expect(positive[0][0], negative, 3.3, 0.2)])
    attached = pack.negative(positive, negative=[[negative, {}]])
    for cfg in (1.0, 2.5):
        run = {"size": (3, 8, 10), "cfg": cfg, "batch": 2}
        result = sample(with_override(pack.patch(t2v), spy_override(seen)), attached, **run)
        assert_close(result, sample(oracle, positive, **run))
    masked = pack.negative(positive, negative=[[negative, {}]], from_frame=0.4)
    one = sample(with_override(pack.patch(t2v), spy_override(seen)), masked, size=(3, 8, 10))
    assert_close(one, sample(pack.patch(t2v), masked, size=(3, 8, 10)))


def test_subclasses_are_refused(pack):
    model = load_wan("t2v")
    model.model.__class__ = type("WAN21_SCAIL", (type(model.model),), {"__module__": "comfy.model_base"})
    with pytest.raises(ValueError, match="WAN21_SCAIL are not supported"):
        pack.patch(model)
