"""LTX-2, where video and sound are made together: what is not as in the other cross-attention families."""

import logging
from pathlib import Path

import comfy.utils
import comfy_extras.nodes_lt
import pytest
import torch
from comfy.ldm.lightricks.embeddings_connector import Embeddings1DConnector
from comfy.nested_tensor import NestedTensor
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from cross import FAMILIES, attached_of, both, cached_clip, loaded, oracle_of, run
from encoders import make_ltxav_clip
from helpers import relative

import nodes

KINDS = ("ltx2", "ltx2.3")


@pytest.fixture(scope="module", params=KINDS)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture
def model(name):
    return loaded(name)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_as_many_tokens_of_sound_as_of_text(pack, family, model, cfg):
    """Sound's attention to itself, and the video's to it, must pass through untouched."""
    result, expected = both(pack, family, model, n=5, cfg=cfg, sound=family.length + 5)
    assert relative(result, expected) <= 1e-5


def test_as_many_tokens_of_sound_as_of_the_picture(pack, family, model):
    result, expected = both(pack, family, model, n=5, size=(3, 4, 5), sound=60)
    assert relative(result, expected) <= 1e-5


def test_no_sound(pack, family, model):
    """A latent of video alone."""
    result, expected = both(pack, family, model, n=5, sound=0)
    assert relative(result, expected) <= 1e-5


@pytest.mark.parametrize("voice", [4, 1020], ids=["short", "as long as the text"])
def test_reference_voice(pack, family, model, voice):
    """Tokens of a voice go before those of sound (LTXVReferenceAudio)."""
    if not hasattr(comfy_extras.nodes_lt, "LTXVReferenceAudio"):
        pytest.skip("this ComfyUI knows no reference voice")
    ((cond, options),) = family.prompt()
    reference = {"tokens": torch.randn(1, voice, 128, generator=torch.Generator().manual_seed(3))}
    positive = [[cond, {**options, "ref_audio": reference}]]
    result, expected = both(pack, family, model, n=5, positive=positive)
    assert relative(result, expected) <= 1e-5
    assert relative(run(family, model, family.prompt()), run(family, model, positive)) > 1e-4


def test_guides(pack, family, model):
    """Where guides leave tokens of the video out, so that as many are left as the text has."""
    size, sound, left_out = (1, 33, 32), 9, 27
    denoise = torch.ones(1, 128, *size)
    denoise[..., -1, -left_out:] = -1.0
    packed, _ = comfy.utils.pack_latents([denoise, torch.ones(1, 8, sound, 16)])
    ((cond, options),) = family.prompt()
    guided = {"keyframe_idxs": torch.zeros(1, 3, 32, 2), "concat_mask": packed}
    result, expected = both(pack, family, model, n=5, positive=[[cond, {**options, **guided}]], size=size)
    assert relative(result, expected) <= 1e-5


def test_sampled_in_context_windows(pack, family, model):
    """Each frame sees the negative of its own part of the video."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    if not hasattr(model.model, "map_context_window_to_modalities"):
        pytest.skip("this ComfyUI takes a packed latent for a video in context windows")
    given = (4, 2, "standard_static", 1, False, "pyramid", 2, False)
    windowed = ContextWindowsManualNode.execute(model, *given, causal_window_fix=False).result[0]
    kw = {"size": (8, 3, 3), "sound": 16, "steps": 1}
    early = pack.negative(family.prompt(), negative=family.negative(5), to_frame=0.25)
    results = [run(family, m, early, **kw) for m in (windowed, pack.patch(windowed))]
    video = [comfy.utils.unpack_latents(r, [(1, 128, 8, 3, 3), (1, 8, 16, 16)])[0] for r in results]
    moved = (video[0] - video[1]).abs().amax(dim=(0, 1, 3, 4))
    assert (moved[:2] > 1e-2).all() and (moved[4:] == 0).all()  # the first window, and those after it


def test_scale_sweep(pack, family, model):
    """A copy of both, video and sound, for each scale."""
    positive = pack.negative(family.prompt(), negative=family.negative(5))
    empty = {"samples": NestedTensor((torch.zeros(1, 128, 2, 3, 4), torch.zeros(1, 8, 9, 16)))}
    swept, latent, _ = (
        pack.mapping["VSFScaleSweep"].execute(model=pack.patch(model), latent=empty, scales="0, 2").result
    )
    shown = nodes.common_ksampler(swept, 7, 2, 1.0, "euler", "simple", positive, family.prompt(9), latent)[0]["samples"]
    for i, scale in enumerate((0.0, 2.0)):
        one = pack.patch(model, scale=scale)
        alone = nodes.common_ksampler(one, 7, 2, 1.0, "euler", "simple", positive, family.prompt(9), empty)[0][
            "samples"
        ]
        for part, whole in zip(alone.unbind(), shown.unbind(), strict=True):
            assert relative(whole[i : i + 1], part) <= 1e-5


def test_as_wide_sound_is_refused(pack, family, model, monkeypatch):
    monkeypatch.setattr(model.model.diffusion_model, "audio_inner_dim", model.model.diffusion_model.inner_dim)
    with pytest.raises(ValueError, match="attention of sound and of video are as wide"):
        pack.patch(model)


def test_compiled_is_refused(pack, family, model):
    """ComfyUI's own code of the model breaks the graph."""
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager", {"guard_filter_fn": skip_torch_compile_dict}, keys=["diffusion_model"])
    attached = pack.negative(family.prompt(), negative=family.negative(5))
    with pytest.raises(RuntimeError, match="Remove the node that compiles the model"):
        run(family, pack.patch(compiled), attached)


# -- from text


WORDS = {"a red roof": ["a", "red", "roof"], "roof": ["roof"]}


@pytest.mark.parametrize("words", WORDS)
def test_its_own_tokens(pack, family, model, name, words, caplog):
    """The words as the connectors see them behind the start token; the node's text is what a prompt would be."""
    clip = cached_clip(name)
    made = attached_of(pack, clip, words)
    cond, options = clip.encode_from_tokens_scheduled(clip.tokenize(words))[0]
    n = len(clip.tokenizer.gemma3_12b.tokenizer(words)["input_ids"]) - 1
    assert torch.equal(made.tokens, cond) and made.encoder == "ltxav" and cond.shape[1] == n + 1
    positive = family.prompt()
    as_text = pack.negative(positive, clip=clip, text=words)
    as_prompt = pack.negative(positive, negative=[[cond, options]])
    with caplog.at_level(logging.INFO):
        results = [run(family, pack.patch(model), attached) for attached in (as_text, as_prompt)]
    assert torch.equal(*results)
    assert any(f"LTX-2: {n} negative tokens" in record.getMessage() for record in caplog.records)
    oracle, _ = oracle_of(family, model, positive, [[made.tokens, made.extra]])
    assert relative(results[0], run(family, oracle, positive)) <= 1e-5
    shown = pack.mapping["VSFNegativeConditioning"].execute(positive=positive, clip=clip, text=words)
    count, said = shown.ui.as_dict()["text"][0].splitlines()
    assert count == f"pushes away {n} tokens" and said.replace(" · ", "") == "Gemma: " + words.replace(" ", "")


def test_extrapolation_and_a_negative_without_words_are_refused(pack, family, model, name):
    with pytest.raises(ValueError, match=r"not that of LTX-2 .* Set extrapolation to 0"):
        attached_of(pack, cached_clip(name), "roof", extrapolation=8.0)
    attached = pack.negative(family.prompt(), negative=family.negative(0))
    with pytest.raises(ValueError, match="the negative has no words"):
        run(family, pack.patch(model), attached)


def test_connectors_in_the_encoder(pack, tmp_path):
    """LTX-2 19B's checkpoint as LTXAVTextEncoderLoader reads it: the encoder has the connectors, too."""
    family, model, clip = FAMILIES["ltx2"], loaded("ltx2"), make_ltxav_clip(Path(tmp_path), "2")
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
        results.append(run(family, pack.patch(model), attached, positive))
    assert relative(*results) > 1e-4
    oracle, _ = oracle_of(family, model, family.prompt(), [[raw.tokens, raw.extra]])
    attached = pack.negative(family.prompt(), clip=clip, text="a red roof")
    assert relative(run(family, pack.patch(model), attached), run(family, oracle, family.prompt())) <= 1e-5
