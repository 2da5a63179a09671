"""LTX-2, where video and sound are made together: what is not as in the other cross-attention families."""

import logging
from pathlib import Path

import comfy.utils
import comfy_extras.nodes_lt
import pytest
import torch
from cases import CASES, attached_of, both, clip_of, model_of
from comfy.ldm.lightricks.embeddings_connector import Embeddings1DConnector
from comfy.nested_tensor import NestedTensor
from comfy.patcher_extension import WrappersMP
from encoders import make_ltxav_clip
from helpers import assert_close, relative
from oracle import oracle_model

import nodes

KINDS = ("ltx2", "ltx2.3")


@pytest.fixture(scope="module", params=KINDS)
def name(request):
    return request.param


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_as_many_tokens_of_sound_as_of_text(pack, case, model, cfg):
    """Sound's attention to itself, and the video's to it, must pass through untouched."""
    assert_close(*both(pack, case, model, n=5, cfg=cfg, sound=case.length + 5))


def test_as_many_tokens_of_sound_as_of_the_picture(pack, case, model):
    assert_close(*both(pack, case, model, n=5, size=(3, 4, 5), sound=60))


def test_no_sound(pack, case, model):
    """A latent of video alone."""
    assert_close(*both(pack, case, model, n=5, sound=0))


@pytest.mark.parametrize("voice", [4, 1020], ids=["short", "as long as the text"])
def test_reference_voice(pack, case, model, voice):
    """Tokens of a voice go before those of sound (LTXVReferenceAudio)."""
    if not hasattr(comfy_extras.nodes_lt, "LTXVReferenceAudio"):
        pytest.skip("this ComfyUI knows no reference voice")
    ((cond, options),) = case.prompt()
    reference = {"tokens": torch.randn(1, voice, 128, generator=torch.Generator().manual_seed(3))}
    positive = [[cond, {**options, "ref_audio": reference}]]
    assert_close(*both(pack, case, model, n=5, positive=positive))
    assert relative(case.run(model, case.prompt()), case.run(model, positive)) > 1e-4


def test_guides(pack, case, model):
    """Where guides leave a frame of the video out, so that as many tokens are left as the text has: 1,024 and N's 5."""
    size, sound = (8, 7, 21), 9
    denoise = torch.ones(1, 128, *size)
    denoise[:, :, -1] = -1.0
    packed, _ = comfy.utils.pack_latents([denoise, torch.ones(1, 8, sound, 16)])
    ((cond, options),) = case.prompt()
    guided = {"keyframe_idxs": torch.zeros(1, 3, 7 * 21, 2), "concat_mask": packed}
    assert_close(*both(pack, case, model, n=5, positive=[[cond, {**options, **guided}]], size=size))


def test_a_node_that_hands_the_run_on_by_place(pack, case, model):
    """What ComfyUI hands over by name, as the shapes of video and sound, is found by its place too."""
    kw, patched = {"sound": 5, "steps": 1}, pack.patch(model)
    names = ("denoise_mask", "callback", "disable_pbar", "seed", "latent_shapes")

    def by_place(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return executor(noise, latent_image, sampler, sigmas, *(given[name] for name in names))

    other = model.clone()
    other.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "other", by_place)
    attached = pack.negative(case.prompt(), negative=case.negative(5))
    assert torch.equal(case.run(pack.patch(other), attached, **kw), case.run(patched, attached, **kw))


def test_sampled_in_context_windows(pack, case, model):
    """Each frame sees the negative of its own part of the video."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    if not hasattr(model.model, "map_context_window_to_modalities"):
        pytest.skip("this ComfyUI takes a packed latent for a video in context windows")
    given = (4, 2, "standard_static", 1, False, "pyramid", 2, False)
    windowed = ContextWindowsManualNode.execute(model, *given, causal_window_fix=False).result[0]
    kw = {"size": (8, 3, 3), "sound": 16, "steps": 1}
    early = pack.negative(case.prompt(), negative=case.negative(5), to_frame=0.25)
    results = [case.run(m, early, **kw) for m in (windowed, pack.patch(windowed))]
    video = [comfy.utils.unpack_latents(r, [(1, 128, 8, 3, 3), (1, 8, 16, 16)])[0] for r in results]
    moved = (video[0] - video[1]).abs().amax(dim=(0, 1, 3, 4))
    assert (moved[:2] > 1e-2).all() and (moved[4:] == 0).all()  # the first window, and those after it


def test_scale_sweep(pack, case, model):
    """A copy of both, video and sound, for each scale."""
    positive = pack.negative(case.prompt(), negative=case.negative(5))
    empty = {"samples": NestedTensor((torch.zeros(1, 128, 2, 3, 4), torch.zeros(1, 8, 9, 16)))}
    swept, latent, _ = (
        pack.mapping["VSFScaleSweep"].execute(model=pack.patch(model), latent=empty, scales="0, 2").result
    )
    shown = nodes.common_ksampler(swept, 7, 2, 1.0, "euler", "simple", positive, case.prompt(9), latent)[0]["samples"]
    for i, scale in enumerate((0.0, 2.0)):
        one = pack.patch(model, scale=scale)
        alone = nodes.common_ksampler(one, 7, 2, 1.0, "euler", "simple", positive, case.prompt(9), empty)[0]["samples"]
        for part, whole in zip(alone.unbind(), shown.unbind(), strict=True):
            assert_close(whole[i : i + 1], part)


def test_as_wide_sound_is_refused(pack, case, model, monkeypatch):
    monkeypatch.setattr(model.model.diffusion_model, "audio_inner_dim", model.model.diffusion_model.inner_dim)
    with pytest.raises(ValueError, match="attention of sound and of video are as wide"):
        pack.patch(model)


# -- from text


WORDS = {"a red roof": ["a", "red", "roof"], "roof": ["roof"]}


@pytest.mark.parametrize("words", WORDS)
def test_its_own_tokens(pack, case, model, name, words, caplog):
    """The words as the connectors see them behind the start token; the node's text is what a prompt would be."""
    clip = clip_of(name)
    made = attached_of(pack, clip, words)
    cond, options = clip.encode_from_tokens_scheduled(clip.tokenize(words))[0]
    n = len(clip.tokenizer.gemma3_12b.tokenizer(words)["input_ids"]) - 1
    assert torch.equal(made.tokens, cond) and made.encoder == "ltxav" and cond.shape[1] == n + 1
    positive = case.prompt()
    as_text = pack.negative(positive, clip=clip, text=words)
    as_prompt = pack.negative(positive, negative=[[cond, options]])
    with caplog.at_level(logging.INFO):
        results = [case.run(pack.patch(model), attached) for attached in (as_text, as_prompt)]
    assert torch.equal(*results)
    assert any(f"LTX-2: {n} negative tokens" in record.getMessage() for record in caplog.records)
    oracle, _ = oracle_model(model, [case.expect(model, positive, [[made.tokens, made.extra]])])
    assert_close(results[0], case.run(oracle, positive))
    shown = pack.mapping["VSFNegativeConditioning"].execute(positive=positive, clip=clip, text=words)
    count, said = shown.ui.as_dict()["text"][0].splitlines()
    assert count == f"pushes away {n} tokens" and said.replace(" · ", "") == "Gemma: " + words.replace(" ", "")


def test_extrapolation_and_a_negative_without_words_are_refused(pack, case, model, name):
    with pytest.raises(ValueError, match=r"not that of LTX-2 .* Set extrapolation to 0"):
        attached_of(pack, clip_of(name), "roof", extrapolation=8.0)
    attached = pack.negative(case.prompt(), negative=case.negative(0))
    with pytest.raises(ValueError, match="the negative has no words"):
        case.run(pack.patch(model), attached)


def test_connectors_in_the_encoder(pack, tmp_path):
    """LTX-2 19B's checkpoint as LTXAVTextEncoderLoader reads it: the encoder has the connectors, too."""
    case, model, clip = CASES["ltx2"], model_of("ltx2"), make_ltxav_clip(Path(tmp_path), "2")
    encoder, dit = clip.cond_stage_model, model.model.diffusion_model
    raw = attached_of(pack, clip, "a red roof")
    encoder.compat_mode = True
    for part in ("video_embeddings_connector", "audio_embeddings_connector"):
        assert isinstance(getattr(dit, part), Embeddings1DConnector)
        setattr(encoder, part, getattr(dit, part))
    ready = attached_of(pack, clip, "a red roof")
    assert ready.tokens.shape == (1, raw.tokens.shape[1] - 1, 2 * raw.tokens.shape[2])
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a house"))
    results = []
    for negative in ("a red roof", "roof"):
        attached = pack.negative(positive, clip=clip, text=negative)
        results.append(case.run(pack.patch(model), attached, positive))
    assert relative(*results) > 1e-4
    oracle, _ = oracle_model(model, [case.expect(model, case.prompt(), [[raw.tokens, raw.extra]])])
    attached = pack.negative(case.prompt(), clip=clip, text="a red roof")
    assert_close(case.run(pack.patch(model), attached), case.run(oracle, case.prompt()))
